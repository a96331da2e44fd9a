"""What the ledger costs: a metric in full batches, and a flush of one epoch as a running study does it."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace

from study.ledger import CellHeader, Ledger
from tests.benchmarks.measuring import Effort, Figure, Measured
from tests.benchmarks.processes import fresh_storage
from tests.ledger_samples import Sample

MOST_MICROSECONDS = 150.0
# An epoch of the ablation on 14 classes writes some 35 metrics; with class weights 14 more.
FULL = Sample(rows=("row",), seeds=tuple(range(10)), epochs=21, metrics=tuple(f"val/metric {i}" for i in range(47)))
SMALLEST = replace(FULL, seeds=(0, 1), epochs=3)


def ledger_writing(effort: Effort) -> Measured:
    """Metrics of many epochs into a fresh SQLite ledger, each repeat in a new one."""
    sample = SMALLEST if effort.smallest else FULL
    metrics, flushes, opens = [], [], []
    for _ in range(effort.repeats):
        with fresh_storage() as storage:
            started = time.perf_counter()
            ledger = Ledger(f"sqlite:///{storage / 'mlflow.db'}")
            ledger.open(sample.header(), sample.row_headers(), sample.cell_headers())
            opens.append(time.perf_counter() - started)
            flushes.append(_one_epoch_each(ledger, sample))
            metrics.append(_the_rest(ledger, sample))
            ledger.close(sample.header())
    return Measured(
        {
            "a metric": Figure(1e6 * statistics.median(metrics), "µs", at_most=MOST_MICROSECONDS),
            "a flush of one epoch": Figure(1e3 * statistics.median(flushes), "ms"),
            "a new ledger, opened": Figure(statistics.median(opens), "s"),
        },
        {
            "cells": len(sample.seeds),
            "metrics_an_epoch": len(sample.told_epochs(sample.cell_headers()[0])[0].metrics),
            "epochs": sample.epochs,
            "metric_seconds": metrics,
            "flush_seconds": flushes,
        },
    )


def _one_epoch_each(ledger: Ledger, sample: Sample) -> float:
    """Start every cell with its first epoch, then median seconds to write the second one of each."""
    for cell in sample.cell_headers():
        ledger.log_epochs(cell.key, sample.told_epochs(cell)[:1])
    ledger.flush()
    return statistics.median(_seconds(ledger, cell, sample, slice(1, 2)) for cell in sample.cell_headers())


def _the_rest(ledger: Ledger, sample: Sample) -> float:
    """Seconds a metric, over all cells' remaining epochs."""
    told = [sample.told_epochs(cell)[2:] for cell in sample.cell_headers()]
    count = sum(len(epoch.metrics) for epochs in told for epoch in epochs)
    return sum(_seconds(ledger, cell, sample, slice(2, None)) for cell in sample.cell_headers()) / count


def _seconds(ledger: Ledger, cell: CellHeader, sample: Sample, part: slice) -> float:
    epochs = sample.told_epochs(cell)[part]
    started = time.perf_counter()
    ledger.log_epochs(cell.key, epochs)
    ledger.flush()
    return time.perf_counter() - started
