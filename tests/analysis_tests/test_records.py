"""Reading a study back: what the ledger wrote, nothing else, and one clear error where there is nothing."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow.utils.validation import _validate_metric_name

from analysis import schema
from analysis.records import StudyRecords, load
from analysis.tracking import LedgerError
from study.ledger import Epoch, Ledger
from tests.ledger_samples import CLASSES, ROWS, START_MS, Sample, contents, digest, drawn, new_database, run_study

FACTS = [
    "study", "dataset", "row", "row_index", "seed", "status", "error", "best_epoch", "mlflow_run_id", "weights_sha256",
    "trajectory_sha256", "split_digest", "config_digest", "noop_of", "undefined_classes",
]  # fmt: skip


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return new_database(tmp_path)


def recorded(uri: str, sample: Sample, folder: Path | None = None) -> StudyRecords:
    run_study(Ledger(uri), sample, folder)
    return load(uri, sample.name)


def test_cells_come_back_as_they_were_told(uri: str) -> None:
    sample = Sample(datasets=("chestxray14", "ham10000"))
    cells = recorded(uri, sample).cells
    assert cells.columns.tolist()[: len(FACTS)] == FACTS
    places = list(itertools.product(sample.datasets, sample.rows, sample.seeds))
    assert cells[["dataset", "row", "seed"]].apply(tuple, axis=1).tolist() == places
    for cell, line in zip(sample.cell_headers(), cells.to_dict("records"), strict=True):
        told = sample.outcome(cell)
        assert (line["status"], line["best_epoch"], line["error"]) == ("FINISHED", 2, None)
        assert (line["weights_sha256"], line["trajectory_sha256"]) == (told.weights_sha256, told.trajectory_sha256)
        assert (line["config_digest"], line["split_digest"]) == (cell.config_digest, cell.split_digest)
        assert (line["undefined_classes"], line["noop_of"]) == (CLASSES[-1:], None)
        measured = {name: line[name.removeprefix("test/")] for name in told.metrics if name.startswith("test/")}
        assert measured == pytest.approx({n: told.metrics[n] for n in measured}, abs=0, nan_ok=True)
    assert set(cells.columns[len(FACTS) :]) == {"macro_auc", "mAP@50", *(f"auc/{name}" for name in CLASSES)}
    assert {str(dtype) for dtype in cells.dtypes.iloc[len(FACTS) :]} == {"float64"}


def test_cells_that_failed_were_pruned_or_never_ran_have_a_line_and_no_figures(uri: str) -> None:
    ledger, sample = (
        Ledger(uri),
        Sample(rows=ROWS[:1], seeds=(0, 1, 2, 3), ending={(ROWS[0], 1): "FAILED", (ROWS[0], 2): "PRUNED"}),
    )
    ledger.open(sample.header(), sample.row_headers(), sample.cell_headers())
    for cell in sample.cell_headers()[:3]:
        ledger.finish(cell.key, sample.outcome(cell))
    cells = load(uri, "ablation").cells
    assert cells["status"].tolist() == ["FINISHED", "FAILED", "PRUNED", "MISSING"]
    assert cells["error"].tolist() == [None, "CUDA out of memory\n  in loop.py", None, None]
    assert cells["mlflow_run_id"].isna().tolist() == [False, False, False, True]
    assert cells["macro_auc"].isna().tolist() == [False, True, True, True]


def test_a_study_that_has_only_been_declared_can_be_read(uri: str) -> None:
    ledger, sample = Ledger(uri), Sample()
    ledger.open(sample.header(), sample.row_headers(), sample.cell_headers())
    records = load(uri, "ablation")
    assert records.cells["status"].eq("MISSING").all()
    assert records.cells.columns.tolist() == FACTS
    assert (len(records.history), records.predictions) == (0, {})
    assert records.history.columns.tolist() == ["dataset", "row", "seed", "epoch", "metric", "value"]


def test_a_cell_that_failed_after_it_had_finished_shows_no_old_figures(uri: str) -> None:
    sample = Sample()
    run_study(Ledger(uri), sample)
    failing = replace(sample, ending={(ROWS[0], 0): "FAILED"})
    run_study(Ledger(uri), failing)
    assert math.isnan(load(uri, "ablation").cells.loc[0, "macro_auc"])


def test_histories_are_tidy_complete_and_without_what_belongs_to_no_epoch(uri: str) -> None:
    sample = Sample()
    history = recorded(uri, sample).history
    expected = pd.DataFrame(
        [
            (cell.dataset, cell.row, cell.seed, epoch.epoch, name, value)
            for cell in sample.cell_headers()
            for epoch in sample.told_epochs(cell)
            for name, value in epoch.metrics.items()
        ],
        columns=history.columns,
    )
    order = ["dataset", "row", "seed", "metric", "epoch"]
    assert history.sort_values(order, ignore_index=True).equals(
        expected.sort_values(order, ignore_index=True).astype(history.dtypes)
    )
    assert history["row"].drop_duplicates().tolist() == list(sample.rows), "cells come in table order"


def test_an_epoch_trained_anew_counts_with_its_last_values(uri: str) -> None:
    ledger, sample = Ledger(uri), Sample()
    ledger.open(sample.header(), sample.row_headers(), sample.cell_headers())
    key = sample.cell_headers()[0].key
    ledger.log_epochs(key, [Epoch(1, START_MS, {"val/macro_auc": 0.9}), Epoch(2, START_MS + 1, {"val/macro_auc": 0.8})])
    ledger.log_epochs(key, [Epoch(1, START_MS + 50, {"val/macro_auc": 0.5})])
    ledger.flush()
    assert load(uri, "ablation").history["value"].tolist() == [0.5, 0.8]


def test_rows_carry_marks_changes_and_a_run_a_data_set(uri: str) -> None:
    ledger, sample = Ledger(uri), Sample(datasets=("a", "b"))
    run_study(ledger, sample)
    head, unfreezing = load(uri, "ablation").rows
    assert (head.name, head.index, head.marks, unfreezing.marks) == (
        ROWS[0],
        0,
        {"unfreezing": False},
        {"unfreezing": True},
    )
    assert unfreezing.changes == {"strategy.depth": 10, "name": "Nodule/Mass"}
    assert unfreezing.run_ids == {d: ledger.run_id(digest("row", d, ROWS[1])) for d in ("a", "b")}


def test_only_the_last_declaration_is_read(uri: str) -> None:
    run_study(Ledger(uri), Sample(rows=ROWS[:3]))
    records = recorded(uri, Sample(rows=ROWS[1:2], seeds=(1,)))
    assert [row.name for row in records.rows] == [ROWS[1]]
    assert len(records.cells) == 1
    assert set(records.history["seed"]) == {1}


def test_studies_in_one_ledger_do_not_mix(uri: str) -> None:
    first, second = Sample(), replace(Sample(), name="depth", rows=ROWS[2:])
    run_study(Ledger(uri), first)
    records = recorded(uri, second)
    assert set(records.history["row"]) == set(second.rows)
    assert len(load(uri, "ablation").cells) == 4


def test_predictions_lie_where_the_ledger_put_them(uri: str, tmp_path: Path) -> None:
    sample = Sample(ending={(ROWS[1], 0): "PRUNED"})
    records = recorded(uri, sample, tmp_path)
    finished = records.cells[records.cells["status"] == "FINISHED"]
    assert set(records.predictions) == set(finished["mlflow_run_id"])
    assert len(records.predictions.items()) == len(records.predictions.values()) == 3
    with np.load(records.predictions[finished["mlflow_run_id"].iloc[0]]) as arrays:
        assert arrays["scores"].shape == (4, len(CLASSES))
        assert arrays["scores"][0, 0] == np.float32(drawn(sample.cell_headers()[0].key, "0", CLASSES[0]))
    assert records.predictions.get("no such run") is None
    with pytest.raises(KeyError):
        records.predictions["no such run"]


def test_predictions_that_are_gone_are_missed_when_they_are_read(uri: str, tmp_path: Path) -> None:
    records = recorded(uri, Sample(), tmp_path)
    run_id = records.cells["mlflow_run_id"].iloc[0]
    (tmp_path / "artifacts" / run_id / "artifacts" / "predictions.npz").unlink()
    with pytest.raises(LedgerError, match=rf"run {run_id} had its predictions at .*, which is gone"):
        records.predictions[run_id]


def test_reading_changes_nothing(uri: str, tmp_path: Path) -> None:
    run_study(Ledger(uri), Sample(), tmp_path)
    before, files = contents(uri), sorted(tmp_path.rglob("*"))
    load(uri, "ablation")
    assert contents(uri) == before
    assert sorted(tmp_path.rglob("*")) == files


def test_an_unknown_study_names_the_known_ones(uri: str) -> None:
    with pytest.raises(LedgerError, match=r"no study 'ablation' in sqlite:.*; it holds none"):
        load(uri, "ablation")
    for name in ("runs", "depth"):
        run_study(Ledger(uri), replace(Sample(), name=name))
    with pytest.raises(LedgerError, match="it holds depth, runs"):
        load(uri, "Default")


def test_a_ledger_that_does_not_exist_is_not_created(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match=r"there is no ledger at .*mlflow\.db: run a study first"):
        load(f"sqlite:///{tmp_path / 'mlflow.db'}", "ablation")
    assert list(tmp_path.iterdir()) == []


def test_a_header_of_another_version_is_refused_with_the_remedy(uri: str) -> None:
    ledger = Ledger(uri)
    run_study(ledger, Sample())
    ledger._client.set_experiment_tag(ledger._experiment_id, schema.TAG_HEADER, '{"study": "ablation", "colour": 1}')
    with pytest.raises(LedgerError, match="written by another version; run the study again"):
        load(uri, "ablation")
    run_study(Ledger(uri), Sample())
    assert load(uri, "ablation").cells["status"].eq("FINISHED").all()


# ------------------------------------------------------------------------------------------------ the schema


@given(st.text(max_size=30) | st.text(alphabet="/.:4A@ _-ä", max_size=12))
def test_every_name_has_a_key_that_mlflow_accepts_and_that_turns_back(name: str) -> None:
    key = schema.metric_key(name)
    _validate_metric_name(key)
    assert schema.metric_name(key) == name


def test_ordinary_names_are_their_own_keys() -> None:
    for name in ("val/macro_auc", "test/auc/Nodule/Mass", "train/loss", "test/auc/Pleural_Thickening", "a-b c.d"):
        assert schema.metric_key(name) == name
    assert schema.metric_key("test/mAP@50") == "test/mAP:40:50"


@pytest.mark.parametrize("length", [0, 4_000, 20_000])
def test_a_header_turns_back_from_its_tags(length: int) -> None:
    header = Sample(notes=("n" * length,)).header()
    tags = schema.header_tags(header)
    assert schema.header_from_tags(tags) == header
    assert max(len(value) for value in tags.values()) <= 5_000
    assert list(tags)[-1] == schema.TAG_HEADER, "the pointer is written last"
    assert schema.header_from_tags({"mlflow.note.content": "not ours"}) is None


@pytest.mark.slow
def test_hundreds_of_cells_are_read_in_seconds(uri: str) -> None:
    sample = Sample(rows=tuple(f"row {i}" for i in range(20)), seeds=tuple(range(10)), epochs=20)
    sample = replace(sample, metrics=tuple(f"val/m{i}" for i in range(17)))
    ledger = Ledger(uri)
    ledger.open(sample.header(), sample.row_headers(), sample.cell_headers())
    for cell in sample.cell_headers():
        ledger.log_epochs(cell.key, sample.told_epochs(cell))
        ledger.finish(cell.key, sample.outcome(cell))
    ledger.close(sample.header())
    before = time.perf_counter()
    records = load(uri, "ablation")
    elapsed = time.perf_counter() - before
    print(f"read {len(records.cells)} cells and {len(records.history)} values in {elapsed:.1f} s")
    assert (len(records.cells), len(records.history)) == (200, 80_000)
    assert elapsed < 5  # of a thousand, the benchmarks tell
