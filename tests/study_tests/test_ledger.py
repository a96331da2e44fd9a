"""The ledger: one run a row and a cell, found again by key, unharmed by repetition, kills, locks and absent servers."""

from __future__ import annotations

import http.server
import json
import logging
import math
import os
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from analysis import schema
from analysis.records import find_runs, load
from analysis.tracking import _move_unless_taken
from study.ledger import CellOutcome, Epoch, Ledger, LedgerError
from tests.ledger_samples import CLASSES, ROWS, START_MS, Sample, contents, digest, new_database, run_study


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return new_database(tmp_path)


def runs_of(ledger: Ledger) -> list[Any]:
    return find_runs(ledger._client, ledger._experiment_id)


def cell_key(row: str = ROWS[0], seed: int = 0, dataset: str = "chestxray14") -> str:
    return digest("cell", dataset, row, str(seed))


def opened(uri: str, sample: Sample = Sample()) -> Ledger:  # noqa: B008
    ledger = Ledger(uri)
    ledger.open(sample.header(), sample.row_headers(), sample.cell_headers())
    return ledger


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
    assert [(i.dataset.name, len(i.dataset.digest)) for i in cell.inputs.dataset_inputs] == [("chestxray14", 36)]
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


# ------------------------------------------------------------------------------------------------ kills


def in_child(work: Callable[[], None]) -> int:
    """Exit status of a forked process that does the work; 0 where it was done."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
    return os.waitpid(child, 0)[1]


def killed_at(commit: int, counter: Path | None = None) -> None:
    """Kill this process with SIGKILL just before its n-th database commit; count the commits where n is 0."""
    import sqlalchemy

    count = 0

    def hook(connection: Any) -> None:
        nonlocal count
        count += 1
        if counter is not None:
            counter.write_text(str(count))
        if count == commit:
            os.kill(os.getpid(), signal.SIGKILL)

    sqlalchemy.event.listen(sqlalchemy.engine.Engine, "commit", hook)


def states_after_kills(folder: Path, sample: Sample, stride: int) -> list[Any]:
    """What a second driver leaves, for kills of the first at every `stride`-th commit."""
    counter = folder / "commits"

    def driver(uri: str, commit: int, count: Path | None = None) -> None:
        killed_at(commit, count)
        run_study(Ledger(uri), sample, folder)

    (folder / "whole").mkdir()
    whole = new_database(folder / "whole")
    assert in_child(lambda: driver(whole, 0, counter)) == 0
    states = [state(whole)]
    for commit in range(1, int(counter.read_text()) + 1, stride):
        (folder / str(commit)).mkdir()
        uri = new_database(folder / str(commit))
        assert in_child(lambda uri=uri, commit=commit: driver(uri, commit)) == signal.SIGKILL
        run_study(Ledger(uri), sample, folder)
        states.append(state(uri))
    return states


def state(uri: str) -> dict[str, Any]:
    """Everything but what names a run or tells when it was made."""
    ledger, records = Ledger(uri), load(uri, "ablation")
    runs = find_runs(ledger._client, ledger._client.get_experiment_by_name("ablation").experiment_id)
    assert all(path.is_file() for path in records.predictions.values())
    return {
        "runs": sorted((run.info.run_name, run.info.status) for run in runs),
        "metrics": sorted(
            (run.info.run_name, key, repr(value)) for run in runs for key, value in run.data.metrics.items()
        ),
        "params": sorted((run.info.run_name, *param) for run in runs for param in run.data.params.items()),
        "inputs": sorted((run.info.run_name, i.dataset.digest) for run in runs for i in run.inputs.dataset_inputs),
        "metric rows": [line for line in contents(uri) if line.startswith('INSERT INTO "metrics"')].__len__(),
        "header": records.header,
        "cells": records.cells.drop(columns="mlflow_run_id").to_csv(),
        "history": records.history.to_csv(),
        "predictions": len(records.predictions),
    }


def test_a_driver_killed_at_any_commit_is_made_good_by_the_next(tmp_path: Path) -> None:
    whole, *resumed = states_after_kills(tmp_path, Sample(rows=ROWS[:1], ending={(ROWS[0], 1): "FAILED"}), stride=10)
    assert len(resumed) > 4
    for found in resumed:
        assert found == whole


@pytest.mark.slow
def test_a_driver_killed_at_every_single_commit_is_made_good_by_the_next(tmp_path: Path) -> None:
    whole, *resumed = states_after_kills(tmp_path, Sample(ending={(ROWS[0], 1): "FAILED"}), stride=1)
    assert len(resumed) > 90
    for found in resumed:
        assert found == whole


def test_a_cell_of_a_killed_driver_is_running_and_taken_over(uri: str) -> None:
    def driver() -> None:
        ledger = opened(uri)
        ledger.log_epochs(cell_key(), Sample().told_epochs(Sample().cell_headers()[0]))
        os.kill(os.getpid(), signal.SIGKILL)  # nothing was flushed

    assert in_child(driver) == signal.SIGKILL
    ledger = opened(uri)
    assert ledger.status_of(cell_key()) == "RUNNING"
    assert load(uri, "ablation").cells["status"].tolist() == ["RUNNING", "MISSING", "MISSING", "MISSING"]
    run_study(ledger, Sample())
    assert load(uri, "ablation").history.groupby(["row", "seed", "metric"]).size().eq(3).all()
    assert len(runs_of(ledger)) == 6


def test_a_kill_while_the_database_is_made_leaves_no_half_database(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"

    def driver() -> None:
        killed_at(1)
        Ledger(uri)

    assert in_child(driver) == signal.SIGKILL
    assert not (tmp_path / "mlflow.db").exists()
    opened(uri)
    assert load(uri, "ablation").cells["status"].eq("MISSING").all()


def test_a_database_that_another_driver_made_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    mine, theirs = tmp_path / "mine.db", tmp_path / "mlflow.db"
    mine.write_text("mine")
    theirs.write_text("theirs")
    _move_unless_taken(mine, theirs)
    assert theirs.read_text() == "theirs"


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("postgresql://host/db", r"no tracking URI: expected sqlite:///FILE or http\(s\)://SERVER"),
        ("mlruns", "no tracking URI"),
        ("sqlite:///:memory:", "names no file"),
        ("sqlite:///", "names no file"),
        (
            "http://127.0.0.1:9",
            r"the ledger at http://127\.0\.0\.1:9 cannot be used: .*refused; start the MLflow server",
        ),
    ],
)
def test_an_address_that_leads_nowhere_is_refused(address: str, message: str) -> None:
    with pytest.raises(LedgerError, match=message) as caught:
        Ledger(address)
    assert "\n" not in str(caught.value)


def test_a_server_that_accepts_and_never_answers_is_given_up_within_ten_seconds() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        before = time.monotonic()
        with pytest.raises(LedgerError, match="timed out"):
            Ledger(f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert time.monotonic() - before < 10


def test_a_server_that_is_no_mlflow_server_is_refused() -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        with pytest.raises(LedgerError, match="cannot be used"):
            Ledger(f"http://127.0.0.1:{other.server_port}")
        other.shutdown()


def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("not a database, but long enough to have a header of one hundred bytes" * 3)
    before = path.read_bytes()
    with pytest.raises(LedgerError, match=r"notes\.txt is not a usable SQLite database"):
        Ledger(f"sqlite:///{path}")
    assert path.read_bytes() == before


def test_a_database_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "other.db"
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE patients (id INTEGER)")
    before = path.read_bytes()
    with pytest.raises(LedgerError, match="not one of MLflow's"):
        Ledger(f"sqlite:///{path}")
    assert path.read_bytes() == before


def test_a_database_of_an_older_mlflow_names_the_upgrade(uri: str) -> None:
    with closing(sqlite3.connect(uri.removeprefix("sqlite:///"))) as database:
        database.execute("UPDATE alembic_version SET version_num = 'bda7b8c39065'")
        database.commit()
    with pytest.raises(LedgerError, match="mlflow db upgrade"):
        Ledger(uri)


@contextmanager
def ordinary_user() -> Iterator[None]:
    """Root may write anywhere: give that up for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_folder_and_a_database_that_are_read_only_are_refused() -> None:
    with tempfile.TemporaryDirectory() as name:  # not pytest's folder, which another user may not enter
        folder = Path(name)
        new_database(folder)
        (folder / "mlflow.db").chmod(0o444)
        folder.chmod(0o555)
        with ordinary_user():
            for path in (folder / "new.db", folder / "below" / "new.db", folder / "mlflow.db"):
                with pytest.raises(LedgerError, match=r"read-only|cannot create the folder"):
                    Ledger(f"sqlite:///{path}")
        folder.chmod(0o755)


def test_a_folder_in_place_of_the_database_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="is a folder: name a file"):
        Ledger(f"sqlite:///{tmp_path}")


def test_a_server_takes_no_artifact_root(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="only with a local store"):
        Ledger("http://127.0.0.1:9", tmp_path)


def test_a_deleted_study_names_how_to_restore_it(uri: str) -> None:
    ledger = opened(uri)
    ledger._client.delete_experiment(ledger._experiment_id)
    with pytest.raises(LedgerError, match="mlflow experiments restore"):
        opened(uri)


def test_a_contradicting_declaration_is_refused_with_all_its_problems(uri: str) -> None:
    sample, ledger = Sample(), Ledger(uri)
    cells = [
        *sample.cell_headers(),
        sample.cell_headers()[0],
        replace(sample.cell_headers()[1], key="k", row_key="none"),
    ]
    with pytest.raises(LedgerError, match=r"is used twice.*two cells for.*names an unknown row none"):
        ledger.open(sample.header(), sample.row_headers(), cells)
    assert ledger._client.get_experiment_by_name("ablation") is None, "nothing was written"


def test_a_parameter_that_changes_under_one_key_is_refused(uri: str) -> None:
    run_study(Ledger(uri), Sample())
    with pytest.raises(LedgerError, match=r"logged with other values of strategy\.depth: a parameter never changes"):
        opened(uri, Sample(params={"strategy.depth": "8"}))


def test_calls_that_make_no_sense_are_refused(uri: str, tmp_path: Path) -> None:
    sample, ledger = Sample(), opened(uri)
    cell = sample.cell_headers()[0]
    with pytest.raises(LedgerError, match="no cell unheard-of"):
        ledger.log_epochs("unheard-of", sample.told_epochs(cell))
    with pytest.raises(LedgerError, match="cannot end as 'RUNNING'"):
        ledger.finish(cell.key, CellOutcome("RUNNING", START_MS))
    with pytest.raises(LedgerError, match=r"gone\.npz cannot be read"):
        ledger.finish(cell.key, replace(sample.outcome(cell), predictions=tmp_path / "gone.npz"))
    assert ledger.status_of(cell.key) is None
    with pytest.raises(LedgerError, match="longer than MLflow's 250 characters"):
        ledger.log_epochs(cell.key, [Epoch(1, START_MS, {"val/" + "x" * 250: 1.0})])
    ledger.finish(cell.key, sample.outcome(cell))
    with pytest.raises(LedgerError, match="log its epochs before"):
        ledger.log_epochs(cell.key, sample.told_epochs(cell))
    with pytest.raises(LedgerError, match=r"tag spft\.changes has .* characters; MLflow takes 8000"):
        ledger.open(sample.header(), [replace(r, changes={"a": "b" * 9000}) for r in sample.row_headers()], [])


# ------------------------------------------------------------------------------------------------ locks, noise, speed


@contextmanager
def locked(uri: str, seconds: float) -> Iterator[threading.Thread]:
    """Another writer holds the database."""
    ready = threading.Event()

    def hold() -> None:
        with closing(sqlite3.connect(uri.removeprefix("sqlite:///"), isolation_level=None)) as database:
            database.execute("BEGIN EXCLUSIVE")
            ready.set()
            time.sleep(seconds)
            database.execute("ROLLBACK")

    thread = threading.Thread(target=hold)
    thread.start()
    ready.wait()
    yield thread
    thread.join()


def test_a_database_locked_for_a_while_is_waited_for_and_nothing_is_lost(uri: str) -> None:
    ledger, sample = opened(uri), Sample()
    with locked(uri, 1.5):
        for cell in sample.cell_headers():
            ledger.log_epochs(cell.key, sample.told_epochs(cell))
        ledger.flush()
    assert load(uri, "ablation").history.groupby(["row", "seed", "metric"]).size().eq(3).all()


def test_a_locked_database_is_waited_for_at_the_start_too(uri: str, caplog: pytest.LogCaptureFixture) -> None:
    with locked(uri, 2.0), caplog.at_level(logging.WARNING):
        Ledger(uri)
    assert "locked by another process" in caplog.text


@pytest.mark.slow
def test_a_lock_longer_than_sqlites_own_patience_is_told_and_retried(
    uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    ledger, sample = opened(uri), Sample()
    cell = sample.cell_headers()[0]
    ledger.log_epochs(cell.key, sample.told_epochs(cell))
    with locked(uri, 25), caplog.at_level(logging.WARNING):
        ledger.flush()
    assert "locked or away" in caplog.text
    ledger.PATIENCE_S = 1
    ledger.log_epochs(cell.key, [Epoch(4, START_MS + 4000, {"val/macro_auc": 0.5})])
    with locked(uri, 25), pytest.raises(LedgerError, match="end the process that locks"):
        ledger.flush()
    ledger.flush()
    history = load(uri, "ablation").history
    assert history.loc[history["metric"] == "val/macro_auc", "epoch"].tolist() == [1, 2, 3, 4], "nothing was lost"


def test_a_creation_whose_answer_was_lost_is_found_and_not_repeated(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.exceptions import MlflowException

    ledger, lost = Ledger(uri), []

    def losing(create: Callable[..., Any]) -> Callable[..., Any]:
        def and_lose(*args: Any) -> Any:
            made = create(*args)
            lost.append(create.__name__)
            if lost.count(create.__name__) > 1:
                return made
            raise MlflowException("API request to http://server failed with exception: connection lost")

        return and_lose

    for name in ("create_experiment", "create_run"):
        monkeypatch.setattr(ledger._client, name, losing(getattr(ledger._client, name)))
    run_study(ledger, Sample(rows=ROWS[:1], seeds=(0,)))
    assert lost == ["create_experiment", "create_run", "create_run"], "one of them for the row, one for its cell"
    assert sorted(run.info.run_name for run in runs_of(ledger)) == [ROWS[0], f"{ROWS[0]} · seed 0"]


def test_a_full_disk_or_a_wrong_argument_is_not_waited_for(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger, sample = opened(uri), Sample()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ledger._client, "log_text", full)
    before = time.monotonic()
    with pytest.raises(LedgerError, match=r"writing effective\.json.*No space left on device"):
        ledger.finish(cell_key(), sample.outcome(sample.cell_headers()[0]))
    assert time.monotonic() - before < 5
    monkeypatch.undo()
    assert ledger.status_of(cell_key()) == "RUNNING"
    ledger.finish(cell_key(), sample.outcome(sample.cell_headers()[0]))
    assert ledger.status_of(cell_key()) == "FINISHED"


def test_a_whole_study_prints_nothing_and_writes_nothing_outside_its_storage(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from tests.ledger_samples import *\n"
        "from analysis.records import load\n"
        "ledger = Ledger(sys.argv[1]); run_study(ledger, Sample(), Path(sys.argv[2]))\n"
        "records = load(sys.argv[1], 'ablation'); assert len(list(records.predictions.values())) == 4\n"
    )
    root = Path(__file__).parents[2]
    (tmp_path / "cwd").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", script, f"sqlite:///{tmp_path / 'storage' / 'mlflow.db'}", str(tmp_path)],
        cwd=tmp_path / "cwd",
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list((tmp_path / "cwd").iterdir()) == []
    assert {path.name for path in (tmp_path / "storage").iterdir()} == {"mlflow.db", "artifacts"}


def test_telemetry_is_off(uri: str) -> None:
    Ledger(uri)
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"


def test_the_ui_command_names_the_store(uri: str, tmp_path: Path) -> None:
    ledger = opened(uri)
    assert ledger.ui_command() == f"mlflow ui --backend-store-uri {uri}"
    assert ledger.ui_path() == f"/#/experiments/{ledger._experiment_id}/runs?viewStateShareKey=spft"
    view = json.loads(ledger._client.get_experiment(ledger._experiment_id).tags["mlflow.sharedViewState.spft"])
    assert view["selectedColumns"][0] == "metrics.`test/macro_auc/mean`"


def test_no_run_ends_before_it_began_though_its_cells_come_from_the_store(uri: str) -> None:
    ledger = Ledger(uri)
    run_study(ledger, Sample())  # told as trained long ago
    assert all(run.info.end_time >= run.info.start_time for run in runs_of(ledger))


@pytest.mark.slow
def test_a_metric_costs_at_most_150_microseconds_of_processor_time_in_bulk(uri: str) -> None:
    sample = Sample(seeds=tuple(range(10)), epochs=50, metrics=tuple(f"val/m{i}" for i in range(17)))
    ledger = opened(uri, sample)
    costs = []
    for cell in sample.cell_headers():
        epochs = sample.told_epochs(cell)
        ledger.log_epochs(cell.key, [Epoch(0, START_MS, {"train/loss": 1.0})])
        ledger.flush()
        before = time.process_time()
        ledger.log_epochs(cell.key, epochs)
        ledger.flush()
        costs.append((time.process_time() - before) / 1000)
    print(f"{1e6 * statistics.median(costs):.0f} µs a metric")
    assert statistics.median(costs) < 150e-6
