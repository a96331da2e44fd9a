"""A plan and its results in the ledger's terms: which cell sees which metric, what is a no-op, what was executed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from small_studies import chain, document, planned

from study.chains import Chain
from study.declare import cell_headers, counted_units, epochs_of, finished_outcome, no_ops, row_headers, study_header
from study.ledger_entries import check_declaration
from study.plan import Plan
from study.store import Store
from trainables.costs import Costs
from trainables.results import CellResult, EpochRecord

HEAD = {"name": "head", "set": {"strategy.unfreezing": "none"}}
TO_4 = {"name": "K = 4", "set": {"strategy.depth": 4}}
TO_10 = {"name": "K = 10", "set": {"strategy.depth": 10}}
EMA = {"name": "EMA", "set": {"strategy.depth": 10, "ema.enabled": True, "ema.decay": 0.9, "ema.tau": 20}}


def record(epoch: int, units: int = 0, cache: str | None = None, **changes: Any) -> EpochRecord:
    values: dict[str, Any] = {
        "epoch": epoch,
        "time_ms": 1000 * epoch,
        "seconds": 0.5,
        "units": units,
        "evaluation_units": 3,
        "metrics": {"train/loss": 0.5},
        "trajectory_sha256": f"after {epoch}",
        "effective": {"trainable": ["head"], "learning_rates": {"first_step": 1.0, "last_step": 0.5}},
        "cache": cache,
        "events": [],
    }
    return EpochRecord(**values | changes)


def result(of: Chain, history: Sequence[EpochRecord], **changes: Any) -> CellResult:
    values: dict[str, Any] = {
        "observer": of.observer.name,
        "copy": of.observer.copy,
        "best_epoch": 3,
        "last_epoch": len(history),
        "stopped_early": False,
        "metrics": {"test/macro_auc": 0.75, "val/macro_auc": 0.8},
        "undefined": (),
        "weights_sha256": f"weights of {of.leaf} by {of.observer.copy}",
        "trajectory_sha256": f"end of {of.leaf}",
        "evaluation_units": 5,
        "history": list(history),
        "provenance": {"hardware": "cpu"},
    }
    return CellResult(**values | changes)


# ------------------------------------------------------------------------------------------------------- metrics


def test_a_cell_sees_the_validation_metrics_of_its_own_copy_alone(tmp_path: Path) -> None:
    plan = planned(tmp_path, document([TO_10, EMA], seeds=[0]))
    metrics = {
        "train/loss": 0.5,
        "lr/head": 1e-3,
        "unfrozen_blocks": 2.0,
        "class_weight/Hernia": 1.25,
        "val/raw/macro_auc": 0.6,
        "val/raw/auc/Hernia": 0.61,
        "val/ema 0.9 tau 20/macro_auc": 0.7,
        "val/ema 0.9 tau 20/auc/Hernia": 0.71,
        "val/ema 0.99 tau 20/macro_auc": 0.9,  # of a row of another study
    }
    common = {k: v for k, v in metrics.items() if not k.startswith("val/")} | {"cost/units": 7.0, "cost/seconds": 0.5}
    (seen,) = epochs_of(chain(plan, "K = 10"), [record(3, units=7, metrics=metrics)])
    assert (seen.epoch, seen.time_ms) == (3, 3000)
    assert seen.metrics == common | {"val/macro_auc": 0.6, "val/auc/Hernia": 0.61}
    (seen,) = epochs_of(chain(plan, "EMA"), [record(3, units=7, metrics=metrics)])
    assert seen.metrics == common | {"val/macro_auc": 0.7, "val/auc/Hernia": 0.71}


def test_in_the_head_stage_every_copy_is_the_raw_weights(tmp_path: Path) -> None:
    """E1 = 2: averages start with stage 2, whose first epoch is the third."""
    plan = planned(tmp_path, document([EMA], seeds=[0]))
    history = [
        record(e, metrics={"val/raw/macro_auc": e / 10, "val/ema 0.9 tau 20/macro_auc": e / 100}) for e in (1, 2, 3, 4)
    ]
    seen = epochs_of(plan.chains[0], history)
    assert [e.metrics["val/macro_auc"] for e in seen] == [0.1, 0.2, 0.03, 0.04]
    assert [e.epoch for e in seen] == [1, 2, 3, 4]


def test_a_metric_that_was_undefined_in_an_epoch_is_not_told(tmp_path: Path) -> None:
    plan = planned(tmp_path, document([TO_10], seeds=[0]))
    (seen,) = epochs_of(plan.chains[0], [record(3, metrics={"val/raw/auc/Nodule": 0.5})])
    assert seen.metrics == {"val/auc/Nodule": 0.5, "cost/units": 0.0, "cost/seconds": 0.5}


def test_an_outcome_names_what_was_evaluated_and_what_trained_in_each_run_of_epochs(tmp_path: Path) -> None:
    plan = planned(tmp_path, document([TO_10], seeds=[0]))
    only, store = plan.chains[0], Store(tmp_path / "outputs")

    def effective(blocks: int, first: float, last: float) -> dict[str, Any]:
        return {"trainable": [blocks], "learning_rates": {"first_step": first, "last_step": last}}

    history = [
        record(1, effective=effective(0, 1.0, 0.9)),
        record(2, effective=effective(0, 0.8, 0.7)),
        record(3, effective=effective(2, 0.6, 0.5)),
    ]
    outcome = finished_outcome(only, result(only, history, undefined=("Hernia",)), store, "an earlier row")
    assert (outcome.status, outcome.end_ms, outcome.best_epoch, outcome.noop_of) == (
        "FINISHED",
        3000,
        3,
        "an earlier row",
    )
    assert outcome.undefined_classes == ("Hernia",)
    assert outcome.predictions == store.predictions(only.leaf, only.observer.name)
    assert outcome.effective["phases"] == [
        {
            "first_epoch": 1,
            "last_epoch": 2,
            "facts": {"trainable": [0]},
            "learning_rates": {"first_step": 1.0, "last_step": 0.7},
        },
        {
            "first_epoch": 3,
            "last_epoch": 3,
            "facts": {"trainable": [2]},
            "learning_rates": {"first_step": 0.6, "last_step": 0.5},
        },
    ]
    assert history[0].effective == effective(0, 1.0, 0.9), "the record itself is left alone"


# -------------------------------------------------------------------------------------------------------- no-ops


def test_a_row_that_came_out_as_an_earlier_one_at_a_seed_is_a_no_op(tmp_path: Path) -> None:
    plan = planned(tmp_path, document([HEAD, TO_4, TO_10]))
    same = {"trajectory_sha256": "t", "weights_sha256": "w"}
    results = [
        (chain(plan, "K = 10", 0), result(chain(plan, "K = 10", 0), [], **same)),
        (chain(plan, "head", 0), result(chain(plan, "head", 0), [], **same)),
        (chain(plan, "K = 4", 0), result(chain(plan, "K = 4", 0), [], **same, best_epoch=4)),  # chose another epoch
        (chain(plan, "head", 1), result(chain(plan, "head", 1), [], **same)),  # the first at its seed
        (chain(plan, "K = 10", 1), result(chain(plan, "K = 10", 1), [], trajectory_sha256="t", weights_sha256="v")),
    ]
    assert no_ops(results) == {chain(plan, "K = 10", 0).key: "head"}
    assert no_ops(results[::-1]) == no_ops(results), "whatever the order in which they finished"


def test_rows_of_different_data_sets_are_no_ops_of_nothing(tmp_path: Path) -> None:
    plan = planned(tmp_path, document([HEAD], seeds=[0], datasets=["phantom", "phantom-derm"]))
    same = {"trajectory_sha256": "t", "weights_sha256": "w"}
    assert no_ops([(c, result(c, [], **same)) for c in plan.chains]) == {}


# ---------------------------------------------------------------------------------------------------------- units


def units_of(plan: Plan) -> tuple[int, int, dict[int, int], int]:
    """Images to train on; units of an image in the head stage from pooled vectors; uncached at k; a whole forward."""
    costs: Costs = plan.chains[0].material.costs
    n = int((plan.chains[0].material.index.split == 0).sum())
    full = costs.embedding + 12 * costs.blocks[0]
    by_k = {k: full + costs.head + 2 * (costs.head + k * costs.blocks[0]) for k in (2, 4, 6, 8)}
    return n, 3 * costs.head, by_k, full


def epochs(counted: Sequence[int], cached: int = 2) -> list[EpochRecord]:
    """Records with these units, the first `cached` of them served from the pooled cache."""
    return [record(e, units, "pooled" if e <= cached else None) for e, units in enumerate(counted, 1)]


def test_executed_units_are_those_of_distinct_epochs_and_of_building_the_caches_they_read(tmp_path: Path) -> None:
    """K = 4 (k = 2 4 4 4) and K = 10 (k = 2 4 6 8) share two head epochs and two of stage 2."""
    plan = planned(tmp_path, document([TO_4, TO_10], seeds=[0]))
    n, pooled, at, full = units_of(plan)
    four = epochs([n * u for u in (pooled, pooled, at[2], at[4], at[4], at[4])])
    ten = epochs([n * u for u in (pooled, pooled, at[2], at[4], at[6], at[8])])
    results = [
        (chain(plan, "K = 4"), result(chain(plan, "K = 4"), four)),
        (chain(plan, "K = 10"), result(chain(plan, "K = 10"), ten)),
    ]
    units = counted_units(plan, results, {"pooled": n * full, "of another study": 10**12})
    by_hand = n * (full + 2 * pooled + at[2] + at[4] + 2 * at[4] + at[6] + at[8])
    assert units.executed == by_hand == plan.units.shared
    assert (units.alone, units.shared, units.floor) == (plan.units.alone, plan.units.shared, plan.units.floor)
    assert (units.stopped_early, units.recomputed) == (0, 0)


def test_what_early_stopping_left_out_is_counted_as_planned_and_only_where_no_cell_went(tmp_path: Path) -> None:
    """K = 4 stops after its third epoch, K = 10 after its fifth: of 8 planned epochs, 4 4 of one and 8 of the other."""
    plan = planned(tmp_path, document([TO_4, TO_10], seeds=[0]))
    n, pooled, at, full = units_of(plan)
    four = epochs([n * u for u in (pooled, pooled, at[2])])
    ten = epochs([n * u for u in (pooled, pooled, at[2], at[4], at[6])])
    results = [
        (chain(plan, "K = 4"), result(chain(plan, "K = 4"), four, stopped_early=True)),
        (chain(plan, "K = 10"), result(chain(plan, "K = 10"), ten, stopped_early=True)),
    ]
    units = counted_units(plan, results, {"pooled": n * full})
    assert units.executed == n * (full + 2 * pooled + at[2] + at[4] + at[6])
    assert units.stopped_early == n * (2 * at[4] + at[8])
    assert units.recomputed == 0
    assert units.executed + units.stopped_early == plan.units.shared


def test_an_observer_that_stopped_leaves_nothing_out_where_another_went_on(tmp_path: Path) -> None:
    impatient = {"name": "impatient", "set": {"strategy.depth": 10, "stopping.patience": 1}}
    plan = planned(tmp_path, document([TO_10, impatient], seeds=[0]))
    n, pooled, at, full = units_of(plan)
    whole = epochs([n * u for u in (pooled, pooled, at[2], at[4], at[6], at[8])])
    results = [
        (chain(plan, "impatient"), result(chain(plan, "impatient"), whole[:4], stopped_early=True)),
        (chain(plan, "K = 10"), result(chain(plan, "K = 10"), whole)),
    ]
    units = counted_units(plan, results, {"pooled": n * full})
    assert (units.executed, units.stopped_early) == (plan.units.shared, 0)


def test_a_cache_that_did_not_serve_is_recomputed_work(tmp_path: Path) -> None:
    """The second head epoch ran without its cache: a whole forward pass a image more than planned."""
    plan = planned(tmp_path, document([TO_10], seeds=[0]))
    n, pooled, at, full = units_of(plan)
    counted = [pooled, pooled + full, at[2], at[4], at[6], at[8]]
    history = epochs([n * u for u in counted], cached=1)
    units = counted_units(plan, [(plan.chains[0], result(plan.chains[0], history))], {"pooled": n * full})
    assert units.recomputed == n * full
    assert units.executed == plan.units.shared + n * full


def test_while_cells_are_missing_nothing_is_said_to_be_left_out_or_recomputed(tmp_path: Path) -> None:
    plan = planned(tmp_path, document([TO_10]))
    n, pooled, at, full = units_of(plan)
    history = epochs([n * u for u in (pooled, pooled, at[2], at[4], at[6], at[8])])
    done = chain(plan, "K = 10", 1)
    units = counted_units(plan, [(done, result(done, history))], {"pooled": n * full})
    assert units.executed == n * (full + 2 * pooled + at[2] + at[4] + at[6] + at[8])
    assert (units.stopped_early, units.recomputed) == (0, 0)
    assert counted_units(plan, [], {}).executed == 0


# -------------------------------------------------------------------------------------------------------- headers


def test_headers_hold_every_row_and_cell_with_complete_settings(tmp_path: Path) -> None:
    plan = planned(tmp_path, document([HEAD, TO_10], report={"compare": "first", "notes": ["of the study"]}))
    rows = row_headers(plan)
    cells = cell_headers(plan, rows)
    header = study_header(plan, counted_units(plan, [], {}), {"command": "c"})
    check_declaration(header, list(rows.values()), cells)
    assert [(c.row, c.seed, c.dataset) for c in cells] == [
        ("head", 0, "phantom"),
        ("head", 1, "phantom"),
        ("K = 10", 0, "phantom"),
        ("K = 10", 1, "phantom"),
    ]
    assert header.comparisons == (("K = 10", "head"),)
    assert header.synthetic == ("phantom",)
    assert header.notes[-1] == "of the study"
    assert any("ynthetic" in note for note in header.notes)
    head = rows["phantom", "head"]
    assert head.params["strategy.unfreezing"] == "none"
    assert json.loads(head.params["strategy.head_epochs"]) == 2
    assert "dataset.root" not in head.params
    assert cells[0].params == head.params | {"seed": "0"}
    assert cells[0].config_digest == cells[1].config_digest != cells[2].config_digest
    assert [len(c.stage_keys) for c in cells] == [2, 2, 5, 5]  # head | rest, and head | 2 | 4 | 6 | 8


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_tolerance_mode_is_said(tmp_path: Path, dtype: str) -> None:
    plan = planned(tmp_path, document([HEAD], execution={"cache_dtype": dtype}))
    notes = " ".join(study_header(plan, counted_units(plan, [], {}), {}).notes)
    assert ("fp16" in notes) == (dtype == "float16")


def test_a_smoke_run_says_that_it_means_nothing(tmp_path: Path) -> None:
    from small_studies import loaded

    from study.plan import make_plan
    from study.spec import Choices

    for smoke in (False, True):
        plan = make_plan(
            loaded(tmp_path, document([HEAD], smoke={"seeds": [0]}), Choices(smoke=smoke)), storage=tmp_path
        )
        notes = " ".join(study_header(plan, counted_units(plan, [], {}), {}).notes)
        assert ("smoke run" in notes) == smoke
