"""The ablation from declared study to table, on the embedded data, for real: in this process and through Ray."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from analysis.report import verify, write_report
from study.store import Store
from tests.studies_for_tests import TINY, Ran, run_study

HASHES = ["weights_sha256", "trajectory_sha256", "best_epoch"]


@pytest.fixture
def shared(undisturbed: Ran) -> Ran:
    return undisturbed


def same_numbers(a: Ran, b: Ran) -> None:
    """Equal weights, trajectories, test metrics and per-epoch metrics in every cell."""
    ours, theirs = a.cells(), b.cells()
    pd.testing.assert_frame_equal(ours[HASHES], theirs[HASHES])
    metrics = [c for c in ours.columns if c == "macro_auc" or c.startswith("auc/")]
    pd.testing.assert_frame_equal(ours[metrics], theirs[metrics], check_exact=True)
    by = ["row", "seed", "metric", "epoch"]
    curves = [r.records().history.set_index(by)["value"].sort_index() for r in (a, b)]
    trained = [c[~c.index.get_level_values("metric").str.startswith("cost/")] for c in curves]
    assert len(trained[0]) > 100
    pd.testing.assert_series_equal(trained[0], trained[1], check_exact=True)


def dump(ledger: Path) -> dict[str, list[tuple[object, ...]]]:
    with sqlite3.connect(ledger) as db:
        names = [name for (name,) in db.execute("select name from sqlite_master where type = 'table'")]
        return {name: sorted(db.execute(f"select * from {name}"), key=repr) for name in names}


def test_every_cell_finishes_with_a_defined_result(shared: Ran) -> None:
    cells = shared.cells()
    assert shared.complete
    assert len(cells) == 8
    assert set(cells["status"]) == {"FINISHED"}
    assert cells["macro_auc"].between(0.3, 1.0).all()


def test_rows_that_differ_only_in_the_average_share_their_trajectory_and_differ_in_weights(shared: Ran) -> None:
    cells = shared.cells()
    raw, averaged = cells.loc["+ Class weights"], cells.loc["+ EMA (full)"]
    assert (raw["trajectory_sha256"] == averaged["trajectory_sha256"]).all()
    assert (raw["weights_sha256"] != averaged["weights_sha256"]).all()


def test_executed_units_equal_the_planned_ones(shared: Ran) -> None:
    units = shared.header.units
    assert units.executed == units.shared
    assert units.stopped_early == units.recomputed == 0
    assert units.floor < units.shared < units.alone


def test_the_test_auc_is_that_of_the_kept_predictions(shared: Ran) -> None:
    cells, predictions = shared.cells(), shared.records().predictions
    for (_, _), cell in cells.iterrows():
        with np.load(predictions[cell["mlflow_run_id"]]) as kept:
            labels, scores, classes = kept["labels"], kept["scores"], kept["classes"]
        aucs = [roc_auc_score(labels[:, c], scores[:, c]) for c in range(len(classes))]
        assert cell["macro_auc"] == pytest.approx(np.mean(aucs), abs=1e-12)


def test_without_sharing_every_bit_is_the_same_and_the_cost_is_that_of_cells_alone(shared: Ran, tmp_path: Path) -> None:
    alone = run_study(tmp_path, sharing=False)
    same_numbers(shared, alone)
    assert alone.header.units.executed == alone.header.units.alone == shared.header.units.alone


def test_a_second_run_trains_nothing_and_changes_nothing(shared: Ran) -> None:
    before, stamps = dump(shared.storage / "mlflow.db"), _stamps(shared.storage)
    started = time.monotonic()
    again = run_study(shared.storage)
    assert time.monotonic() - started < 15
    assert again.complete
    assert _stamps(shared.storage) == stamps
    assert dump(shared.storage / "mlflow.db") == before


def test_a_report_rebuilt_from_the_ledger_is_the_same_and_drift_is_found(shared: Ran, tmp_path: Path) -> None:
    records = shared.records()
    write_report(records, tmp_path)
    assert verify(records, tmp_path) == []
    table = tmp_path / "cells.csv"
    text = table.read_text(encoding="utf-8")
    value = f"{records.cells['macro_auc'].iloc[0]:.4f}"[:5]
    assert value in text
    table.write_text(text.replace(value, "0.999", 1), encoding="utf-8")
    assert len(verify(records, tmp_path)) >= 1


def test_another_seed_trains_only_itself(shared: Ran, tmp_path: Path) -> None:
    first = run_study(tmp_path, {**TINY, "seeds": [0]})
    stamps = _stamps(tmp_path)
    both = run_study(tmp_path)
    assert first.complete and both.complete
    kept = {path: stamp for path, stamp in _stamps(tmp_path).items() if path in stamps}
    assert kept == stamps
    same_numbers(shared, both)


def test_a_decay_added_later_replays_from_stage_two_and_equals_one_declared_at_once(
    shared: Ran, tmp_path: Path
) -> None:
    without = {**TINY, "rows": {"list": [_weights_row(None)]}}
    run_study(tmp_path, without)
    head_states = _stamps(tmp_path, "states")
    both = {**TINY, "rows": {"list": [_weights_row(None), _weights_row(0.98)]}}
    added = run_study(tmp_path, both)
    assert added.complete
    assert head_states.items() <= _stamps(tmp_path, "states").items()  # the head stage was not trained again
    ours = added.cells().loc["decay 0.98", HASHES]
    pd.testing.assert_frame_equal(ours, shared.cells().loc["+ EMA (full)", HASHES])


def test_through_ray_every_bit_is_the_same(shared: Ran, tmp_path: Path) -> None:
    ran = run_study(tmp_path, executor="ray")
    same_numbers(shared, ran)
    units = ran.header.units
    assert units.executed == units.shared
    assert units.recomputed == 0


@pytest.mark.slow
def test_through_ray_without_sharing_every_bit_is_the_same(shared: Ran, tmp_path: Path) -> None:
    ran = run_study(tmp_path, {**TINY, "seeds": [1]}, executor="ray", sharing=False)
    ours, theirs = (cells.xs(1, level="seed")[HASHES] for cells in (shared.cells(), ran.cells()))
    pd.testing.assert_frame_equal(ours, theirs)
    assert ran.header.units.executed == ran.header.units.alone


def test_rows_that_come_out_the_same_are_flagged(tmp_path: Path) -> None:
    # With patience 1 both depths stop before they part, which no plan can know.
    rows = [{"name": f"depth {k}", "set": {"strategy.depth": k}} for k in (11, 12)]
    standing_still = {"optimiser.encoder_lr": 1e-9, "optimiser.tune_head_lr": 1e-9, "stopping.patience": 1}
    late_branch = {"strategy.tune_epochs": 4, "strategy.step": 11, "strategy.every": 3}
    ran = run_study(tmp_path, {**TINY, "seeds": [0], **standing_still, **late_branch, "rows": {"list": rows}})
    cells = ran.records().cells
    assert ran.header.units.stopped_early > 0
    assert ran.header.units.executed + ran.header.units.stopped_early == ran.header.units.shared
    assert cells.loc[cells["row"] == "depth 12", "noop_of"].tolist() == ["depth 11"]


def _weights_row(decay: float | None) -> dict[str, object]:
    average = {} if decay is None else {"ema.enabled": True, "ema.decay": decay}
    name = "raw" if decay is None else f"decay {decay}"
    return {"name": name, "set": {"weighting.enabled": True, **average}}


def _stamps(storage: Path, *folders: str) -> dict[str, int]:
    """When each state and result was written."""
    Store(storage)
    found = {}
    for folder in folders or ("states", "results"):
        for path in (storage / folder).rglob("*.json"):
            found[str(path.relative_to(storage))] = path.stat().st_mtime_ns
    return found
