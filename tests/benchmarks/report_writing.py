"""What a report costs: `report` of a finished study of 1,000 cells from its ledger, as a command of its own."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path

from study.ledger import Ledger
from tests.benchmarks.measuring import Effort, Figure, Measured
from tests.benchmarks.processes import fresh_storage, launch
from tests.ledger_samples import Sample, run_study

MOST_SECONDS = 5.0
# 20 metrics by epoch, of which the report draws the first and the block counts; 20 epochs a cell: 400,000 values.
METRICS = ("val/macro_auc", "unfrozen_blocks", "train/loss", *(f"val/auc/class {i}" for i in range(14)))
FULL = Sample(rows=tuple(f"row {i}" for i in range(100)), seeds=tuple(range(10)), epochs=20, metrics=METRICS)
SMALLEST = replace(FULL, rows=("row 0", "row 1"), seeds=(0, 1), epochs=3)


def report_writing(effort: Effort) -> Measured:
    """`report`, `verify` and `status` of the same ledger; no cell keeps predictions, so nothing is bootstrapped."""
    sample = SMALLEST if effort.smallest else FULL
    with fresh_storage() as storage:
        _fill(storage, sample)
        where = [sample.name, "--storage", str(storage)]
        reports = [launch("report", *where).seconds for _ in range(effort.repeats)]
        statuses = [launch("status", *where).seconds for _ in range(effort.repeats)]
        verified = launch("verify", *where)
    return Measured(
        {
            "report": Figure(statistics.median(reports), "s", at_most=MOST_SECONDS),
            "status": Figure(statistics.median(statuses), "s"),
            "verify": Figure(verified.seconds, "s"),
        },
        {
            "cells": len(sample.rows) * len(sample.seeds),
            "values": len(sample.rows) * len(sample.seeds) * sample.epochs * (len(sample.metrics) + 3),
            "report_seconds": reports,
            "status_seconds": statuses,
            "verify_said": json.dumps(verified.output.strip()),
        },
    )


def _fill(storage: Path, sample: Sample) -> None:
    """Through the ledger itself, as a run would; takes two minutes for 1,000 cells."""
    run_study(Ledger(f"sqlite:///{storage / 'mlflow.db'}"), sample)
