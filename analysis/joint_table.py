"""Studies of one strategy in several tasks, side by side: a line a step of the strategy, columns a task and its metric.

Figures of different columns are of different metrics and are never averaged or compared with each other; every
difference is within a study, paired by seed, as its own table has it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table
from rich.text import Text

from analysis.layout import NOTHING, TextTable, interval, mean_std, signed
from analysis.records import StudyRecords
from analysis.tables import RecordsError, StudyTable, TableLine, build_table


@dataclass(frozen=True)
class JointHeader:
    """What a joint table needs to know besides its studies."""

    study: str
    title: str
    description: str
    command: str


@dataclass(frozen=True)
class _Column:
    """A study on one of its data sets."""

    table: StudyTable
    dataset: str

    @property
    def name(self) -> str:
        header = self.table.header
        synthetic = ", synthetic" if self.dataset in header.synthetic else ""
        return f"{header.task}: {header.metric_label} ({self.dataset}{synthetic})"

    @property
    def lines(self) -> tuple[TableLine, ...]:
        return self.table.lines_of(self.dataset)


def joint_table(header: JointHeader, tables: Sequence[StudyTable]) -> TextTable:
    """A line a step: its marks, then for each task mean ± std with n, and the difference from the reference row.

    Raises:
        RecordsError: the studies' rows are not the same steps.
    """
    columns = _columns(tables)
    parts = tables[0].header.parts
    titles = ["Step", *parts]
    for column in columns:
        titles += [column.name, "Δ (95 % interval)"] if column.table.comparisons else [column.name]
    lines = []
    for number, first in enumerate(columns[0].lines):
        cells = [_name([column.lines[number] for column in columns])]
        cells += ["✓" if first.marks.get(part) else NOTHING for part in parts]
        for column in columns:
            cells += _figures(column, column.lines[number])
        lines.append(tuple(cells))
    left = (True, *[False] * (len(titles) - 1))
    return TextTable(_caption(header, tables), tuple(titles), (("", tuple(lines)),), left)


def joint_notes(tables: Sequence[StudyTable]) -> list[str]:
    """How the table is read."""
    synthetic = dict.fromkeys(dataset for table in tables for dataset in table.header.synthetic)
    notes = [f"SYNTHETIC DATA: the images of {', '.join(synthetic)} are drawn, not taken."] if synthetic else []
    absent = sum(len(table.absent) for table in tables)
    if absent:
        notes.append(f"{absent} cell{'s' * (absent != 1)} without a result: see the tables of the studies.")
    return [
        *notes,
        "Each column has a metric of its own: figures of different columns cannot be compared. Mean ± sample standard "
        "deviation over n seeds, at the epoch chosen on validation.",
        "Δ is the mean difference from the study's reference row over pairs of the same seed, with its 95 % paired t "
        "interval; * as in the study's own table, whose p values are corrected within that study.",
        *dict.fromkeys(f"Attention: {problem}" for table in tables for problem in table.problems),
    ]


def joint_terminal_table(header: JointHeader, records: Sequence[StudyRecords]) -> Table:
    """The table for a terminal; names are shown as they are."""
    tables = [build_table(one) for one in records]
    columns = _columns(tables)
    grid = Table(title=Text(_caption(header, tables)), box=box.SIMPLE_HEAD, title_justify="left")
    grid.add_column("Step", overflow="fold", min_width=12)
    for column in columns:
        grid.add_column(Text(f"{column.table.header.task}\n{column.table.header.metric_label}"), justify="right")
    for number in range(len(columns[0].lines)):
        of_step = [column.lines[number] for column in columns]
        figures = [
            f"{mean_std(line.summary)}{_count(line, column)}" for line, column in zip(of_step, columns, strict=True)
        ]
        grid.add_row(Text(_name(of_step)), *map(Text, figures))
    return grid


def _columns(tables: Sequence[StudyTable]) -> list[_Column]:
    columns = [_Column(table, dataset) for table in tables for dataset in table.header.datasets]
    steps = [[list(line.marks.items()) for line in column.lines] for column in columns]
    for column, own in zip(columns, steps, strict=True):
        if own != steps[0]:
            raise RecordsError(
                f"the rows of {column.table.header.study!r} are not the steps of {tables[0].header.study!r}: run both "
                "again as they are declared now"
            )
    return columns


def _name(lines: Sequence[TableLine]) -> str:
    """The rows' name, or all of their names."""
    return " / ".join(dict.fromkeys(line.row for line in lines))


def _figures(column: _Column, line: TableLine) -> list[str]:
    figure = mean_std(line.summary) + (_count(line, column) if not math.isnan(line.summary.mean) else "")
    if not column.table.comparisons:
        return [figure]
    if not line.comparisons:
        return [figure, NOTHING]
    paired, mark = line.comparisons[0].paired, " *" if line.comparisons[0].marked else ""
    bounds = "" if math.isnan(paired.low) else f" ({interval(paired.low, paired.high)})"
    return [figure, f"{signed(paired.delta)}{bounds}{mark}"]


def _count(line: TableLine, column: _Column) -> str:
    declared = len(column.table.header.seeds)
    return "" if line.summary.n == declared else f" (n = {line.summary.n} of {declared})"


def _caption(header: JointHeader, tables: Sequence[StudyTable]) -> str:
    synthetic = " SYNTHETIC DATA." if any(table.header.synthetic for table in tables) else ""
    return f"{header.title}: the test split of each task.{synthetic}"
