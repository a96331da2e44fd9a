"""How far a study has come, from its ledger."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import pandas as pd
from rich.table import Table
from rich.text import Text

from analysis.records import StudyRecords

_SHOWN = 4  # seeds whose epochs a line names


def status_table(records: StudyRecords) -> Table:
    """One line a row and data set: cells by status, and the epochs that each has reached.

    Names are shown as they are: nothing in them is read as markup.
    """
    header, cells, history = records.header, records.cells, records.history
    several = len(header.datasets) > 1
    table = Table(title=Text(_title(records)), title_justify="left")
    for column in ("row", *(["data set"] if several else []), "cells", "epochs reached"):
        table.add_column(column, overflow="fold")
    for dataset in header.datasets:
        for row in header.rows:
            own = cells[(cells["row"] == row) & (cells["dataset"] == dataset)]
            seen = history[(history["row"] == row) & (history["dataset"] == dataset)]
            epochs = {int(seed): int(epoch) for seed, epoch in zip(*_last_epochs(seen), strict=True)}
            line = [row, *([dataset] if several else []), _counts(own["status"]), _epochs(epochs)]
            table.add_row(*map(Text, line))
    return table


def _last_epochs(history: pd.DataFrame) -> tuple[list[int], list[int]]:
    """Seeds, and the last epoch of each."""
    last = history.groupby("seed")["epoch"].max()
    return last.index.tolist(), last.tolist()


def _title(records: StudyRecords) -> str:
    header = records.header
    synthetic = " SYNTHETIC DATA." if header.synthetic else ""
    return (
        f"{header.study}: {header.title}. {_counts(records.cells['status'])} of {len(records.cells)} cells.{synthetic}"
    )


def _counts(statuses: Iterable[object]) -> str:
    """`3 finished, 1 running`; a declared cell without a run waits."""
    counts = Counter("waiting" if status == "MISSING" else str(status).lower() for status in statuses)
    return ", ".join(f"{n} {status}" for status, n in sorted(counts.items()))


def _epochs(reached: Mapping[int, int]) -> str:
    """`seed 0: 12, seed 1: 3`; of many seeds the range."""
    if not reached:
        return "–"
    if len(reached) <= _SHOWN:
        return ", ".join(f"seed {seed}: {epoch}" for seed, epoch in reached.items())
    return f"{min(reached.values())} to {max(reached.values())} in {len(reached)} seeds"
