"""The ledger: one run a row and a cell, found again by key; repetition changes nothing."""

from __future__ import annotations

import gc
import math
import statistics
from pathlib import Path

import pandas as pd
import pytest
from mlflow.store.artifact.artifact_repo import ArtifactRepository

from analysis import schema
from analysis.records import load
from study.ledger import CellOutcome, Epoch, Ledger, LedgerError
from tests.ledger_samples import (
    CLASSES,
    ROWS,
    START_MS,
    Sample,
    cell_key,
    contents,
    digest,
    new_database,
    opened,
    run_study,
    runs_of,
)


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return new_database(tmp_path)


# ------------------------------------------------------------------------------------------------ what is written


def test_a_study_becomes_row_runs_with_cell_runs_nested_in_them(uri: str, tmp_path: Path) -> None:
    ledger = Ledger(uri, tmp_path / "kept here")
    run_study(ledger, Sample(rows=ROWS, seeds=(0, 1)), tmp_path)
    runs = {run.info.run_name: run for run in runs_of(ledger)}
    assert set(runs) == {*ROWS} | {f"{row} · seed {seed}" for row in ROWS for seed in (0, 1)}
    row, cell = runs["+ EMA (full)"], runs["+ EMA (full) · seed 1"]
    assert (
        cell.data.tags["mlflow.parentRunId"] == row.info.run_id == ledger.run_id(digest("row", "chestxray14", ROWS[3]))
    )
    assert (cell.data.tags[schema.TAG_KIND], cell.data.tags[schema.TAG_SEED]) == ("cell", "1")
    assert cell.data.params == {
        "strategy.depth": "10",
        schema.metric_key("weighting.boosts.Nodule/Mass (x)"): "1.2",
    }
    assert {(i.dataset.name, i.dataset.digest) for i in cell.inputs.dataset_inputs} == {
        ("chestxray14", digest("index", "chestxray14")[:36]),
        ("chestxray14 split", digest("split", "chestxray14")[:36]),
    }
    assert (cell.info.status, cell.info.start_time, cell.info.end_time) == (
        "FINISHED",
        START_MS + 1000,
        START_MS + 100_001,
    )
    artifacts = {artifact.path for artifact in ledger._client.list_artifacts(cell.info.run_id)}
    assert artifacts == {"effective.json", "predictions.npz"}
    assert (tmp_path / "kept here" / cell.info.run_id / "artifacts" / "effective.json").is_file()


def test_the_first_row_of_the_table_leads_in_the_order_of_the_ui(uri: str) -> None:
    ledger = opened(uri, Sample(rows=ROWS))
    assert [run.info.run_name for run in runs_of(ledger)] == list(ROWS)  # MLflow's default order: youngest first


def test_names_of_runs_carry_the_data_set_where_there_are_several(uri: str) -> None:
    ledger = Ledger(uri)
    run_study(ledger, Sample(rows=ROWS[:1], seeds=(4,), datasets=("ham10000", "phantom-derm")))
    names = {run.info.run_name for run in runs_of(ledger)}
    assert {f"{ROWS[0]} · ham10000", f"{ROWS[0]} · phantom-derm · seed 4"} <= names


def test_row_runs_hold_mean_sample_deviation_and_n_over_finished_cells_only(uri: str) -> None:
    ledger, sample = Ledger(uri), Sample(seeds=(0, 1, 2), ending={(ROWS[0], 1): "FAILED"})
    run_study(ledger, sample)
    finished = [sample.outcome(cell) for cell in sample.cell_headers() if cell.row == ROWS[0] and cell.seed != 1]
    values = [outcome.metrics["test/macro_auc"] for outcome in finished]
    metrics = {run.info.run_name: run.data.metrics for run in runs_of(ledger)}[ROWS[0]]
    assert metrics["test/macro_auc/n"] == 2
    assert metrics["test/macro_auc/mean"] == statistics.mean(values)
    assert metrics["test/macro_auc/std"] == statistics.stdev(values)
    assert f"test/auc/{CLASSES[2]}/mean" not in metrics, "an undefined class has no mean"
    assert schema.metric_key("test/mAP@50/mean") in metrics


def test_a_single_seed_has_a_mean_and_no_deviation(uri: str) -> None:
    ledger = Ledger(uri)
    run_study(ledger, Sample(rows=ROWS[:1], seeds=(0,)))
    metrics = {run.info.run_name: run.data.metrics for run in runs_of(ledger)}[ROWS[0]]
    assert metrics["test/macro_auc/n"] == 1
    assert math.isnan(metrics["test/macro_auc/std"])


@pytest.mark.parametrize(
    ("ending", "row_status"),
    [
        ({}, "FINISHED"),
        ({(ROWS[0], 0): "FAILED", (ROWS[0], 1): "PRUNED"}, "FAILED"),
        ({(ROWS[0], 0): "PRUNED"}, "KILLED"),
    ],
)
def test_a_row_ends_as_its_cells_did(uri: str, ending: dict[tuple[str, int], str], row_status: str) -> None:
    ledger = Ledger(uri)
    run_study(ledger, Sample(ending=ending))
    assert {run.info.run_name: run.info.status for run in runs_of(ledger)}[ROWS[0]] == row_status


def test_pruned_failed_and_unstarted_cells_are_told_apart(uri: str) -> None:
    sample = Sample(rows=ROWS[:1], seeds=(0, 1, 2, 3), ending={(ROWS[0], 1): "PRUNED", (ROWS[0], 2): "FAILED"})
    ledger = opened(uri, sample)
    for cell in sample.cell_headers()[:3]:
        ledger.log_epochs(cell.key, sample.told_epochs(cell))
        assert ledger.status_of(cell.key) == "RUNNING"
        ledger.finish(cell.key, sample.outcome(cell))
    ledger.close(sample.header())
    keys = [cell.key for cell in sample.cell_headers()]
    assert [ledger.status_of(key) for key in keys] == ["FINISHED", "PRUNED", "FAILED", None]
    status = {run.info.run_name: run.info.status for run in runs_of(ledger)}
    assert [status.get(f"{ROWS[0]} · seed {seed}") for seed in range(4)] == ["FINISHED", "KILLED", "FAILED", None]
    assert status[ROWS[0]] == "FAILED"
    with pytest.raises(LedgerError, match="no run with key"):
        ledger.run_id(keys[3])


def test_of_a_cell_that_has_ended_no_store_of_artifacts_is_kept(uri: str, tmp_path: Path) -> None:
    def stores() -> int:
        gc.collect()
        return sum(ArtifactRepository in type(o).__mro__ for o in gc.get_objects())

    ledger, before = Ledger(uri), stores()
    run_study(ledger, Sample(seeds=(0, 1, 2)))
    assert len(list(tmp_path.glob("artifacts/*/artifacts/effective.json"))) > 3
    assert stores() == before


def test_nan_and_infinite_losses_come_back_as_they_were(uri: str) -> None:
    ledger = opened(uri)
    told = {"train/loss": math.nan, "val/loss": math.inf, "val/other": -math.inf}
    ledger.log_epochs(cell_key(), [Epoch(1, START_MS, told)])
    ledger.flush()
    history = load(uri, "ablation").history.set_index("metric")["value"]
    assert math.isnan(history["train/loss"])
    assert (history["val/loss"], history["val/other"]) == (math.inf, -math.inf)


def test_long_parameters_and_errors_are_cut_in_sight_and_kept_in_full(uri: str, tmp_path: Path) -> None:
    sample = Sample(rows=ROWS[:1], seeds=(0,), params={"long": "x" * 7000 + "end"})
    ledger = opened(uri, sample)
    ledger.log_epochs(cell_key(), [Epoch(1, START_MS, {"train/loss": 1.0})])
    ledger.finish(cell_key(), CellOutcome("FAILED", START_MS, error="first\n" + "y" * 9000 + "\nlast"))
    run = ledger._client.get_run(ledger.run_id(cell_key()))
    assert len(run.data.params["long"]) == 6000
    assert "7003 characters" in run.data.params["long"]
    error = run.data.tags[schema.TAG_ERROR]
    assert len(error) == 8000
    assert error.startswith("first") and error.endswith("last") and "error.txt" in error
    kept = tmp_path / "artifacts" / run.info.run_id / "artifacts"
    assert ("x" * 7000 + "end") in (kept / "parameters.json").read_text()
    assert (kept / "error.txt").read_text() == "first\n" + "y" * 9000 + "\nlast"
    opened(uri, sample)  # the parameters are recognised


def test_a_header_longer_than_a_tag_survives_and_leaves_no_old_pieces(uri: str) -> None:
    for length in (30_000, 12_000, 10):
        sample = Sample(notes=("ü" * length,))
        ledger = opened(uri, sample)
        assert load(uri, "ablation").header == sample.header()
        tags = ledger._client.get_experiment(ledger._experiment_id).tags
        pieces = [name for name in tags if name.startswith(schema.TAG_HEADER)]
        assert len(pieces) == {30_000: 8, 12_000: 4, 10: 1}[length]


def test_counted_units_outlive_a_launch_that_has_not_counted_yet(uri: str) -> None:
    run_study(Ledger(uri), Sample())
    opened(uri)
    assert load(uri, "ablation").header.units.executed == 58


# ------------------------------------------------------------------------------------------------ repetition


def test_running_a_finished_study_again_changes_nothing(uri: str, tmp_path: Path) -> None:
    sample = Sample(ending={(ROWS[1], 1): "PRUNED"})
    run_study(Ledger(uri), sample, tmp_path)
    before, files = contents(uri), {path: path.stat().st_mtime_ns for path in (tmp_path / "artifacts").rglob("*")}
    run_study(Ledger(uri), sample, tmp_path)
    assert contents(uri) == before
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "artifacts").rglob("*")} == files


def test_a_failed_cell_that_fails_alike_again_adds_no_run_and_no_metric(uri: str) -> None:
    sample = Sample(ending={(ROWS[0], 0): "FAILED"})
    run_study(Ledger(uri), sample)
    before = contents(uri)
    run_study(Ledger(uri), sample)
    assert contents(uri) == before


def test_a_failed_cell_runs_again_in_its_own_run(uri: str) -> None:
    run_study(Ledger(uri), Sample(ending={(ROWS[0], 0): "FAILED"}))
    ledger = opened(uri)
    run_id, sample = ledger.run_id(cell_key()), Sample()
    ledger.log_epochs(cell_key(), sample.told_epochs(sample.cell_headers()[0]))
    statuses = {run.info.run_name: run.info.status for run in runs_of(ledger)}
    assert statuses[ROWS[0]] == statuses[f"{ROWS[0]} · seed 0"] == "RUNNING"
    assert load(uri, "ablation").cells.iloc[0][["status", "error"]].tolist() == ["RUNNING", None]
    ledger.finish(cell_key(), sample.outcome(sample.cell_headers()[0]))
    ledger.close(sample.header())
    assert ledger.run_id(cell_key()) == run_id
    cell = load(uri, "ablation").cells.iloc[0]
    assert (cell["status"], cell["error"]) == ("FINISHED", None)
    assert {run.info.status for run in runs_of(ledger)} == {"FINISHED"}


@pytest.mark.parametrize(
    ("larger", "runs"),
    [(Sample(seeds=(0, 1, 2)), 2), (Sample(rows=ROWS[:3]), 3), (Sample(datasets=("chestxray14", "b")), 6)],
)
def test_adding_a_seed_a_row_or_a_data_set_adds_only_its_runs(uri: str, larger: Sample, runs: int) -> None:
    ledger = Ledger(uri)
    run_study(ledger, Sample())
    before = {run.info.run_id: run.data.metrics for run in runs_of(ledger) if run.data.tags[schema.TAG_KIND] == "cell"}
    count = len(runs_of(ledger))
    run_study(Ledger(uri), larger)
    after = {run.info.run_id: run.data.metrics for run in runs_of(ledger)}
    assert len(after) == count + runs
    assert all(pd.Series(after[run_id]).equals(pd.Series(metrics)) for run_id, metrics in before.items())


def test_the_rows_figures_follow_a_seed_that_comes_and_goes(uri: str) -> None:
    def aggregate() -> tuple[float, float]:
        metrics = {run.info.run_name: run.data.metrics for run in runs_of(ledger)}[ROWS[0]]
        return metrics["test/macro_auc/n"], metrics["test/macro_auc/mean"]

    ledger = Ledger(uri)
    run_study(ledger, Sample(seeds=(0, 1)))
    two = aggregate()
    run_study(ledger, Sample(seeds=(0, 1, 2)))
    assert aggregate()[0] == 3
    run_study(ledger, Sample(seeds=(0, 1)))
    assert aggregate() == two
    ledger.open(Sample(seeds=(7,)).header(), Sample(seeds=(7,)).row_headers(), Sample(seeds=(7,)).cell_headers())
    ledger.close(Sample(seeds=(7,)).header())
    assert aggregate()[0] == 0
    assert math.isnan(aggregate()[1])


def test_runs_outside_the_declaration_are_retired_and_come_back(uri: str) -> None:
    ledger = Ledger(uri)
    run_study(ledger, Sample(rows=ROWS[:3]))
    opened(uri, Sample(rows=ROWS[:1], seeds=(1,)))
    current = {run.info.run_name for run in runs_of(ledger) if run.data.tags[schema.TAG_CURRENT] == "true"}
    assert current == {ROWS[0], f"{ROWS[0]} · seed 1"}
    assert len(runs_of(ledger)) == 9, "nothing is deleted"
    run_study(Ledger(uri), Sample(rows=ROWS[:3]))
    assert {run.data.tags[schema.TAG_CURRENT] for run in runs_of(ledger)} == {"true"}
    assert len(runs_of(ledger)) == 9


def test_a_row_that_moves_in_the_table_keeps_its_run(uri: str) -> None:
    run_study(Ledger(uri), Sample())
    ledger = opened(uri, Sample(rows=ROWS[1::-1]))
    assert len(runs_of(ledger)) == 6
    assert [row.name for row in load(uri, "ablation").rows] == [ROWS[1], ROWS[0]]
    assert load(uri, "ablation").cells["status"].eq("FINISHED").all()


def test_epochs_told_twice_are_kept_once(uri: str) -> None:
    sample = Sample()
    for _ in range(2):
        ledger = opened(uri, sample)
        ledger.log_epochs(cell_key(), sample.told_epochs(sample.cell_headers()[0]))
        ledger.log_epochs(cell_key(), sample.told_epochs(sample.cell_headers()[0])[1:])
        ledger.flush()
    history = ledger._client.get_metric_history(ledger.run_id(cell_key()), "val/macro_auc")
    assert [metric.step for metric in history] == [1, 2, 3]


def test_more_epochs_than_a_batch_takes_arrive_in_order_and_complete(uri: str) -> None:
    sample = Sample(epochs=300)
    ledger = opened(uri, sample)
    ledger.log_epochs(cell_key(), sample.told_epochs(sample.cell_headers()[0]))
    history = load(uri, "ablation").history
    assert history.groupby("metric").size().eq(300).all()
    assert history.loc[history["metric"] == "train/loss", "epoch"].tolist() == list(range(1, 301))


def test_two_runs_with_one_key_are_reduced_to_the_older(uri: str, caplog: pytest.LogCaptureFixture) -> None:
    ledger = Ledger(uri)
    run_study(ledger, Sample())
    twin = ledger._client.get_run(ledger.run_id(cell_key()))
    ledger._client.create_run(ledger._experiment_id, START_MS * 2, dict(twin.data.tags), twin.info.run_name)
    with pytest.raises(LedgerError, match="two current runs"):
        load(uri, "ablation")
    again = opened(uri)
    assert again.run_id(cell_key()) == twin.info.run_id
    assert "same key" in caplog.text
    assert load(uri, "ablation").cells["status"].eq("FINISHED").all()
