"""The table of several studies: steps side by side, each metric by itself; the page with every study's own parts."""

from __future__ import annotations

import csv
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from simulated_study import HOSTILE, Simulated, simulate

from analysis.joint import JointHeader, joint_terminal_table, verify_joint, write_joint_report
from analysis.joint_table import joint_notes, joint_table
from analysis.records import StudyRecords
from analysis.tables import RecordsError, build_table

HEADER = JointHeader("unified", "One strategy, three tasks", "Three ablations.", "python study/launch.py unified")
NAMES = ("head only", "+ unfreezing")


def study(name: str, task: str, rows: tuple[str, ...] = NAMES, **changes: object) -> StudyRecords:
    """A simulated study of two steps."""
    options: dict[str, object] = {"rows": rows, "parts": ("unfreezing",), "datasets": ("phantom",)}
    records = simulate(Simulated(**(options | changes)), seed=len(name))  # type: ignore[arg-type]
    header = records.header.model_copy(update={"study": name, "task": task, "metric_label": f"{task} quality"})
    marked = [replace(row, marks={"unfreezing": row.index > 0}) for row in records.rows]
    return replace(records, header=header, rows=tuple(marked), cells=records.cells.assign(study=name))


@pytest.fixture
def studies() -> list[StudyRecords]:
    return [
        study("ablation", "classification"),
        study("detection_ablation", "detection", ("neck and head", "+ unfreezing"), synthetic=("phantom",)),
    ]


def test_a_line_has_the_figures_of_every_task_and_no_figure_is_of_two(studies: list[StudyRecords]) -> None:
    tables = [build_table(records) for records in studies]
    table = joint_table(HEADER, tables)
    assert table.columns[:3] == ("Step", "unfreezing", "classification: classification quality (phantom)")
    assert table.columns[4] == "detection: detection quality (phantom, synthetic)"
    assert [line[0] for line in table.lines] == ["head only / neck and head", "+ unfreezing"]
    assert [line[1] for line in table.lines] == ["–", "✓"]
    for column, records in ((2, studies[0]), (4, studies[1])):
        for line, row in zip(table.lines, records.header.rows, strict=True):
            values = records.cells[records.cells["row"] == row][records.header.main_metric].to_numpy(float)
            assert line[column] == f"{values.mean():.4f} ± {values.std(ddof=1):.4f}"
    pairs = studies[1].cells.pivot_table(index="seed", columns="row", values=studies[1].header.main_metric)
    difference = float(np.mean(pairs["+ unfreezing"] - pairs["neck and head"]))
    assert table.lines[1][5].startswith(f"{difference:+.4f} (".replace("-", "−"))
    assert "cannot be compared" in " ".join(joint_notes(tables))
    assert "SYNTHETIC DATA" in table.caption


def test_missing_cells_are_counted_in_the_table_and_told_under_it() -> None:
    gap = (("phantom", "+ unfreezing", 1, "FAILED"),)
    tables = [build_table(study("a", "classification")), build_table(study("b", "detection", failed=gap))]
    table = joint_table(HEADER, tables)
    assert table.lines[1][4].endswith("(n = 2 of 3)")
    assert "1 cell without a result" in joint_notes(tables)[0]


def test_studies_whose_rows_are_other_steps_are_refused(studies: list[StudyRecords]) -> None:
    other = replace(studies[1], rows=tuple(replace(row, marks={"unfreezing": True}) for row in studies[1].rows))
    with pytest.raises(RecordsError, match="rows of 'detection_ablation' are not the steps of 'ablation'"):
        joint_table(HEADER, [build_table(studies[0]), build_table(other)])


def test_the_page_holds_the_joint_table_and_every_study_with_anchors_of_its_own(
    studies: list[StudyRecords], tmp_path: Path
) -> None:
    page = write_joint_report(HEADER, studies, tmp_path, [None, None])
    text = page.read_text()
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert {"steps", "s0-study", "s0-table", "s1-table", "s1-curves", "origin"} <= set(ids)
    assert set(re.findall(r'href="#([^"]+)"', text)) <= set(ids)
    assert text.count("<img src=") >= 4, "the studies' own figures"
    assert "SYNTHETIC DATA" in text
    assert {path.name for path in tmp_path.iterdir()} == {"table.md", "table.tex", "joint.csv", "report.html"}
    assert "neck and head" in (tmp_path / "table.md").read_text()
    assert r"\begin{tabular}" in (tmp_path / "table.tex").read_text()


def test_the_table_for_machines_names_study_task_and_runs_and_drift_is_found(
    studies: list[StudyRecords], tmp_path: Path
) -> None:
    write_joint_report(HEADER, studies, tmp_path, [None, None])
    with (tmp_path / "joint.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["study"], line["task"]) for line in lines] == [
        ("ablation", "classification"),
        ("ablation", "classification"),
        ("detection_ablation", "detection"),
        ("detection_ablation", "detection"),
    ]
    assert all(line["cell_run_ids"] for line in lines)
    assert verify_joint(studies, tmp_path) == []
    text = (tmp_path / "joint.csv").read_text()
    (tmp_path / "joint.csv").write_text(text.replace(lines[3]["mean"], "0.123456"))
    (drift,) = verify_joint(studies, tmp_path)
    assert drift.startswith("joint.csv, line 5: detection_ablation · phantom · + unfreezing · neck and head, mean:")
    (tmp_path / "joint.csv").unlink()
    assert verify_joint(studies, tmp_path) == ["joint.csv: the file is not there; write the report again"]


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    studies = [study("a", "classification", HOSTILE[:2]), study("b", "detection", HOSTILE[:2])]
    header = JointHeader("unified", HOSTILE[0], HOSTILE[0], HOSTILE[0])
    text = write_joint_report(header, studies, tmp_path, [None, None]).read_text()
    assert "<script" not in text
    assert "&lt;script&gt;" in text


def test_the_terminal_shows_a_line_a_step(studies: list[StudyRecords]) -> None:
    table = joint_terminal_table(HEADER, studies)
    assert table.row_count == 2
    assert len(table.columns) == 3
