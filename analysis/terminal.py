"""The study's table for a terminal of 80 columns."""

from __future__ import annotations

import math

from rich import box
from rich.table import Table
from rich.text import Text

from analysis.layout import caption, dataset_name, mean_std, number, signed
from analysis.records import StudyRecords
from analysis.tables import StudyTable, TableLine, build_table
from analysis.wording import absent_notes, noop_notes, what_pairs_show


def terminal_table(records: StudyRecords) -> Table:
    """A line a row: marks, mean ± std, n, and the difference from the reference row with its 95 % half width.

    Names are shown as they are: nothing in them is read as markup.
    """
    table = build_table(records)
    header = table.header
    grid = Table(title=Text(caption(table)), caption=Text("\n".join(_remarks(table))), box=box.SIMPLE_HEAD)
    grid.title_justify = grid.caption_justify = "left"
    grid.add_column("Row", overflow="fold", min_width=12)
    if header.parts:
        grid.add_column("On", no_wrap=True)
    grid.add_column(Text(header.metric_label), justify="right", no_wrap=True, min_width=15)
    grid.add_column("n", justify="right", no_wrap=True)
    if table.comparisons:
        grid.add_column("Δ ± 95 %", justify="right", no_wrap=True, min_width=16)
    for dataset in header.datasets:
        if len(header.datasets) > 1:
            grid.add_row(Text(dataset_name(table, dataset), style="italic"))
        for line in table.lines_of(dataset):
            grid.add_row(*map(Text, _cells(line, table)))
        grid.add_section()
    return grid


def _cells(line: TableLine, table: StudyTable) -> list[str]:
    header, declared = table.header, len(table.header.seeds)
    n = str(line.summary.n) if line.summary.n == declared else f"{line.summary.n}/{declared}"
    marks = "".join("✓" if line.marks.get(part) else "–" for part in header.parts)
    cells = [line.row, *([marks] if header.parts else []), mean_std(line.summary), n]
    return [*cells, *([_difference(line)] if table.comparisons else [])]


def _difference(line: TableLine) -> str:
    """Δ against the row's first reference; the report has all of them."""
    if not line.comparisons:
        return ""
    paired, mark = line.comparisons[0].paired, " *" if line.comparisons[0].marked else ""
    half = (paired.high - paired.low) / 2
    return signed(paired.delta) + ("" if math.isnan(half) else f" ± {number(half)}") + mark


def _remarks(table: StudyTable) -> list[str]:
    remarks = [f"On: {', '.join(table.header.parts)}."] if table.header.parts else []
    pairs = sorted({c.paired.n for c in table.comparisons})
    remarks += [what_pairs_show(n) for n in pairs]
    remarks += [f"Attention: {problem}" for problem in table.problems]
    return remarks + absent_notes(table.absent) + noop_notes(table)
