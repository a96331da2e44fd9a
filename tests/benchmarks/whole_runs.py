"""Whole studies through Ray, as users run them: from command to table."""

from __future__ import annotations

import statistics
from typing import Any

from tests.benchmarks.measuring import Effort, Figure, Measured
from tests.benchmarks.processes import fresh_storage, launch, overrides
from tests.studies_for_tests import TINY


def smoke(effort: Effort) -> Measured:
    """`ablation --smoke`, the smallest honest run."""
    seconds = []
    for _ in range(effort.repeats):
        with fresh_storage() as storage:
            seconds.append(launch("ablation", "--smoke", "--storage", str(storage)).seconds)
    return Measured({"whole command": Figure(statistics.median(seconds), "s")}, {"seconds": seconds})


def embedded(effort: Effort) -> Measured:
    """The embedded ablation on this machine's slots, and the same command again when all is finished."""
    chosen: dict[str, Any] = dict(TINY) if effort.smallest else {}
    firsts, agains = [], []
    for _ in range(effort.repeats):
        with fresh_storage() as storage:
            arguments = ["ablation", *overrides(chosen), "--storage", str(storage)]
            firsts.append(launch(*arguments, watch="family"))
            agains.append(launch(*arguments).seconds)
    return Measured(
        {
            "whole command": Figure(statistics.median(ran.seconds for ran in firsts), "s"),
            "the same command again": Figure(statistics.median(agains), "s"),
            "most memory of all processes": Figure(max(ran.peak_bytes for ran in firsts) / 1e9, "GB"),
        },
        {"seconds": [ran.seconds for ran in firsts], "again_seconds": agains, "overrides": chosen},
    )
