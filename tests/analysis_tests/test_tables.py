"""Tables from records: what is averaged, what is paired, what is named."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from simulated_study import CLASSES, ROWS, Simulated, simulate

from analysis.statistics import paired
from analysis.tables import RecordsError, build_table, metric_columns


def test_a_line_is_mean_and_sample_std_over_its_seeds_with_its_runs() -> None:
    records = simulate()
    line = build_table(records).lines[1]
    cells = records.cells[records.cells["row"] == line.row]
    assert line.summary.mean == pytest.approx(cells["macro_auc"].mean(), abs=1e-15)
    assert line.summary.std == pytest.approx(cells["macro_auc"].std(ddof=1), abs=1e-15)
    assert line.run_ids == dict(zip(cells["seed"], cells["mlflow_run_id"], strict=True))
    assert line.row_run_id == records.rows[1].run_ids["chestxray14"]
    assert line.best_seed == cells.set_index("seed")["macro_auc"].idxmax()


def test_a_failed_cell_takes_its_pair_away_and_is_named() -> None:
    records = simulate(Simulated(failed=(("chestxray14", "+ class weights", 1, "FAILED"),)))
    table = build_table(records)
    before, after = table.comparisons[1], table.comparisons[2]
    values = records.cells.set_index(["row", "seed"])["macro_auc"]
    expected = paired(
        [values["+ class weights", s] for s in (0, 2)], [values["+ progressive unfreezing", s] for s in (0, 2)]
    )
    assert (before.seeds, before.paired) == ((0, 2), expected)
    assert after.seeds == (0, 2)
    assert [(c.row, c.seed, c.status) for c in before.absent] == [("+ class weights", 1, "FAILED")]
    assert "CUDA out of memory" in table.absent[0].error


@pytest.mark.parametrize("status", ["FAILED", "PRUNED", "RUNNING", "MISSING"])
def test_a_cell_that_did_not_finish_enters_no_figure_whatever_it_measured(status: str) -> None:
    records = simulate(Simulated(failed=(("chestxray14", "+ EMA", 2, status),)))
    cells = records.cells.copy()
    cells.loc[cells["status"] == status, ["macro_auc", "auc/Hernia"]] = 0.999
    table, clean = build_table(replace(records, cells=cells)), build_table(records)
    assert table.lines == clean.lines
    assert table.lines[-1].summary.n == 2
    assert np.array_equal(table.per_class[0].mean, clean.per_class[0].mean)


def test_a_declared_cell_without_a_line_is_missing() -> None:
    records = simulate()
    table = build_table(replace(records, cells=records.cells.drop(index=0)))
    assert [(c.row, c.seed, c.status) for c in table.absent] == [(ROWS[0], 0, "MISSING")]
    assert table.comparisons[0].paired.n == 2


def test_a_finished_cell_without_the_main_metric_is_absent_and_said_to_be() -> None:
    records = simulate()
    cells = records.cells.copy()
    cells.loc[0, "macro_auc"] = math.nan
    table = build_table(replace(records, cells=cells))
    assert table.absent[0].status == "NO METRIC"
    assert "1 finished cells hold no test value of macro_auc" in table.problems[0]


def test_a_study_of_which_nothing_ran_is_a_table_of_gaps() -> None:
    plan = Simulated(failed=tuple(("chestxray14", row, seed, "MISSING") for row in ROWS for seed in (0, 1, 2)))
    records = simulate(plan)
    bare = replace(records, cells=records.cells.drop(columns=[c for c in records.cells if "auc" in c]))
    table = build_table(bare)
    assert [line.summary.n for line in table.lines] == [0] * 4
    assert len(table.absent) == 12
    assert not any(comparison.marked for comparison in table.comparisons)


def test_three_seeds_never_bear_a_mark_however_small_p_is() -> None:
    table = build_table(simulate(Simulated(effect=0.02, pair_noise=1e-7)))
    assert all(comparison.p_holm < 0.05 for comparison in table.comparisons[:1])
    assert not any(comparison.marked for comparison in table.comparisons)
    assert {comparison.attainable_holm for comparison in table.comparisons} == {0.75}


def test_ten_seeds_with_a_clear_effect_bear_marks_and_without_one_none() -> None:
    seeds = tuple(range(10))
    marked = build_table(simulate(Simulated(seeds=seeds, effect=0.02))).comparisons
    assert all(comparison.marked for comparison in marked)
    assert marked[0].attainable_holm == pytest.approx(3 * 2**-9)
    unmarked = build_table(simulate(Simulated(seeds=seeds, effect=0.0, pair_noise=0.01))).comparisons
    assert not any(comparison.marked for comparison in unmarked)


def test_holm_counts_the_comparisons_of_all_data_sets() -> None:
    one = build_table(simulate(Simulated(datasets=("a",)))).comparisons
    two = build_table(simulate(Simulated(datasets=("a", "b")))).comparisons
    assert one[0].paired.p == two[0].paired.p
    smallest = min(two, key=lambda c: c.paired.p)
    assert smallest.p_holm == pytest.approx(min(1.0, 6 * smallest.paired.p))


def test_a_no_op_row_is_flagged_with_the_row_and_seeds_it_equals() -> None:
    table = build_table(simulate(Simulated(noop=(("+ EMA", "+ class weights"),))))
    assert table.lines[-1].noop_of == {"+ class weights": (0, 1, 2)}
    assert set(table.comparisons[-1].differences) == {0.0}


def test_undefined_and_dropped_classes_are_named_and_in_no_mean() -> None:
    table = build_table(simulate(Simulated(undefined=("Hernia",))))
    assert table.facts[0].undefined == ("Hernia",)
    assert table.facts[0].dropped == ("No Finding",)
    hernia = table.per_class[0].labels.index("Hernia")
    assert (table.per_class[0].n[:, hernia] == 0).all()
    assert np.isnan(table.per_class[0].mean[:, hernia]).all()


def test_classes_with_a_slash_in_their_name_keep_it() -> None:
    table = build_table(simulate(Simulated(classes=("Nodule/Mass", "Edema"))))
    assert table.per_class[0].labels == ("Nodule/Mass", "Edema")


def test_per_class_figures_are_means_over_seeds() -> None:
    records = simulate()
    grid = build_table(records).per_class[0]
    cells = records.cells[records.cells["row"] == ROWS[2]]
    assert grid.mean[2, 3] == pytest.approx(cells[f"auc/{CLASSES[3]}"].mean())
    assert grid.std[2, 3] == pytest.approx(cells[f"auc/{CLASSES[3]}"].std(ddof=1))


def test_cells_of_different_splits_are_called_incomparable() -> None:
    records = simulate()
    cells = records.cells.copy()
    cells.loc[3, "split_digest"] = "f" * 64
    assert "different splits" in build_table(replace(records, cells=cells)).problems[0]


def test_cells_with_different_defined_classes_are_called_incomparable() -> None:
    records = simulate(Simulated(undefined=("Hernia",)))
    cells = records.cells.copy()
    cells.at[3, "undefined_classes"] = ()
    assert "undefined classes differ" in build_table(replace(records, cells=cells)).problems[0]


def test_the_order_of_the_cells_does_not_matter() -> None:
    records = simulate(Simulated(datasets=("b", "a")))
    shuffled = records.cells.sample(frac=1, random_state=1)
    assert build_table(replace(records, cells=shuffled)).lines == build_table(records).lines


def test_metrics_stand_main_first_then_overall_then_classes_in_their_order() -> None:
    columns = metric_columns(simulate(Simulated(extra_metrics=("zeta", "beta"))))
    assert columns == ["macro_auc", "beta", "zeta", *(f"auc/{name}" for name in CLASSES)]


def test_contradictory_records_are_refused_with_every_contradiction_in_one_message() -> None:
    records = simulate()
    cells = records.cells.copy()
    cells.loc[0, "row"], cells.loc[2, "seed"] = "unheard of", 1
    with pytest.raises(RecordsError) as caught:
        build_table(replace(records, cells=cells, rows=records.rows[:-1]))
    for fragment in ("'unheard of'", "seed 1 appears twice", "row '+ EMA' of the header has no row record"):
        assert fragment in str(caught.value)
    with pytest.raises(RecordsError, match="split_digest"):
        build_table(replace(records, cells=records.cells.drop(columns="split_digest")))
