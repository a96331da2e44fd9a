"""The paper's numbers: their inconsistencies are found from the numbers, and they stand beside our rows."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest
from simulated_study import Simulated, simulate

from analysis.published import CATALOGUE, FOLDER, PublishedError, inconsistencies, load, load_all, set_beside
from analysis.statistics import summarise
from analysis.tables import build_table


def test_every_published_file_is_in_the_catalogue_and_reads() -> None:
    assert {path.name for path in FOLDER.glob("*.csv")} == {source.file for source in CATALOGUE}
    for numbers in load_all():
        lines = list(csv.reader((FOLDER / numbers.source.file).open(encoding="utf-8")))
        assert len(numbers.labels) == len(lines) - 1


@pytest.mark.parametrize(
    ("file", "fragments"),
    [
        ("chexpert_validation", ["0.8420", "13 defined rows is 0.8343"]),
        ("chexpert_comparison", ["Ours (SPFT)", "0.8343"]),
        ("chestxray14_unfreeze_depth", ["'all'", "0.8320", "14 defined rows is 0.8230"]),
        ("ablation", ["best of 3 runs", "0.8314", "0.0015", "+0.0025", "+0.0008"]),
        ("ham10000_baselines", ["best of 3 runs", "0.9320", "0.0206"]),
    ],
)
def test_known_inconsistencies_are_found(file: str, fragments: list[str]) -> None:
    text = " ".join(inconsistencies(load(file)))
    assert all(fragment in text for fragment in fragments), text


@pytest.mark.parametrize("file", ["chestxray14_runs", "ham10000_runs", "detection", "segmentation"])
def test_nothing_is_held_against_consistent_tables(file: str) -> None:
    assert inconsistencies(load(file)) == []


def test_a_corrected_figure_is_no_longer_held_against_the_table() -> None:
    numbers = load("chexpert_validation")
    values = numbers.values.copy()
    values[numbers.labels.index("Macro AUC")] = 0.8343
    assert inconsistencies(replace(numbers, values=values)) == []


def test_published_rows_stand_beside_ours_by_their_marks() -> None:
    table = build_table(simulate(Simulated(rows=("a", "b", "c", "d"), published="ablation.csv")))
    beside = set_beside(table)
    assert beside is not None
    assert [(line.label, line.row) for line in beside.lines] == [
        ("MLP Head Only", "a"),
        ("+ Prog. Unfreezing", "b"),
        ("+ Class Weights", "c"),
        ("+ EMA (Full)", "d"),
    ]
    assert [line.ours for line in beside.lines] == [line.summary for line in table.lines]
    assert "no spread is given" in " ".join(beside.remarks)


def test_three_runs_become_mean_and_sample_std_beside_our_classes() -> None:
    table = build_table(simulate(Simulated(published="chestxray14_runs")))
    beside = set_beside(table)
    assert beside is not None
    lines = {line.label: line for line in beside.lines}
    assert lines["Macro AUC"].published == summarise([0.8331, 0.8302, 0.8309])
    thickening = lines["Pleural Thickening"].ours  # our class is Pleural_Thickening
    grid = table.per_class[0]
    assert thickening is not None
    assert thickening.mean == grid.mean[-1, grid.labels.index("Pleural_Thickening")]


def test_columns_that_are_models_stand_beside_rows_of_that_name() -> None:
    plan = Simulated(rows=("top-10", "all layers"), parts=(), published="chestxray14_unfreeze_depth")
    beside = set_beside(build_table(simulate(plan)))
    assert beside is not None
    assert {(line.label.split(", ")[1], line.row) for line in beside.lines} == {
        ("top10", "top-10"),
        ("all", "all layers"),
    }


def test_other_data_are_named_as_no_replication() -> None:
    beside = set_beside(build_table(simulate(Simulated(datasets=("phantom",), published="ablation"))))
    assert beside is not None
    assert "phantom are of other data and no replication" in " ".join(beside.remarks)


def test_an_unknown_table_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(PublishedError, match=r"no published table 'tabel'; known: ablation\.csv"):
        load("tabel")
    (tmp_path / "ablation.csv").write_text("row,unfreezing,class_weights,ema,macro_auc\nHead,0,0,0,good\n")
    with pytest.raises(PublishedError, match=r"ablation\.csv: .*'good'; expected a number or N/A"):
        load("ablation", tmp_path)


def test_cited_models_and_ours_find_the_rows_that_stand_for_them() -> None:
    rows = ("InceptionV3", "ResNet50", "ResNet50 + SPFT", "DenseNet121", "ALBEF (only images)", "SPFT")
    beside = set_beside(build_table(simulate(Simulated(rows=rows, published="ham10000_baselines.csv"))))
    assert beside is not None
    assert [line.row for line in beside.lines] == [
        "InceptionV3",
        "ResNet50",
        "DenseNet121",
        "ALBEF (only images)",
        "SPFT",
    ]


def test_several_published_tables_stand_one_after_another() -> None:
    files = ("chexpert_comparison.csv", "chexpert_validation.csv")
    simulated = simulate(Simulated(rows=("SPFT",)))
    table = build_table(simulated)
    both = set_beside(replace(table, header=table.header.model_copy(update={"published": files})))
    assert both is not None
    assert both.source.place == "Table 8 and Table 9"
    labels = [line.label for line in both.lines]
    assert labels.index("CheXzero (Tiu et al. 2022)") < labels.index("Pleural Other")
    assert {line.row for line in both.lines if line.label in ("Ours (SPFT)", "Edema")} == {"SPFT"}
    assert len(both.remarks) == len(set(both.remarks))
    assert sum("13 defined rows is 0.8343" in text for text in both.inconsistencies) >= 1
