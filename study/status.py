"""How far a study has come, from its ledger."""

from __future__ import annotations

from collections import Counter

from rich.table import Table

from analysis.records import StudyRecords


def status_table(records: StudyRecords) -> Table:
    """One line a row and data set: cells by status, and the epochs its running cells have reached."""
    table = Table(title=f"{records.header.study}: {records.header.title}", title_justify="left")
    for column in ("row", "data set", "cells", "epochs reached"):
        table.add_column(column)
    cells, history = records.cells, records.history
    for dataset in records.header.datasets:
        for row in records.header.rows:
            own = cells[(cells["row"] == row) & (cells["dataset"] == dataset)]
            counts = Counter(own["status"])
            said = ", ".join(f"{n} {status.lower()}" for status, n in sorted(counts.items()))
            seen = history[(history["row"] == row) & (history["dataset"] == dataset)]
            epochs = dict(seen.groupby("seed")["epoch"].max())
            reached = ", ".join(f"seed {seed}: {epoch}" for seed, epoch in epochs.items())
            table.add_row(row, dataset, said, reached or "–")
    return table
