"""The embedded ablation against the same 12 cells as independent trials of a plain Ray Tune script."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from tests.benchmarks.measuring import Effort, Figure, Measured, median_ratio, pairs_in_turn
from tests.benchmarks.processes import fresh_storage, launch, overrides, run_python
from tests.studies_for_tests import TINY

TOLERANCE = 1e-6  # between the test macro AUCs of both: the same cells were trained


@dataclass(frozen=True)
class _Run:
    seconds: float
    cells: pd.Series[float]  # test macro AUC by row and seed


def against_plain_ray(effort: Effort) -> Measured:
    """Whole commands in turn, both on all of this machine's slots with one thread a trial."""
    chosen: dict[str, Any] = {**TINY, "seeds": [0]} if effort.smallest else {}
    pairs = pairs_in_turn(lambda: _ours(chosen), lambda: _plain(chosen), effort.repeats)
    gap = max(float((ours.cells - plain.cells).abs().max()) for ours, plain in pairs)
    return Measured(
        {
            "plain Ray Tune / ours, whole command": Figure(
                median_ratio([(ours.seconds, plain.seconds) for ours, plain in pairs]), "×"
            ),
            "ours": Figure(statistics.median(ours.seconds for ours, _ in pairs), "s"),
            "plain Ray Tune": Figure(statistics.median(plain.seconds for _, plain in pairs), "s"),
            "largest difference of a test macro AUC": Figure(gap, "", at_most=TOLERANCE),
        },
        {
            "overrides": chosen,
            "cells": len(pairs[0][0].cells),
            "pairs_whole_seconds": [[ours.seconds, plain.seconds] for ours, plain in pairs],
        },
    )


def _ours(chosen: dict[str, Any]) -> _Run:
    with fresh_storage() as storage:
        ran = launch("ablation", *overrides(chosen), "--json", "--storage", str(storage))
        report = Path(json.loads(ran.output.strip().splitlines()[-1])["report"])
        return _Run(ran.seconds, _by_cell(pd.read_csv(report.parent / "cells.csv")))


def _plain(chosen: dict[str, Any]) -> _Run:
    with fresh_storage() as storage:
        ran = run_python(["-m", "tests.benchmarks.plain_ray_tune", str(storage), *overrides(chosen)])
        told = json.loads(ran.output.strip().splitlines()[-1])
        return _Run(ran.seconds, _by_cell(pd.DataFrame(told["cells"])))


def _by_cell(cells: pd.DataFrame) -> pd.Series[float]:
    return cells.set_index(["row", "seed"])["macro_auc"].sort_index()
