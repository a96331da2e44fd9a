"""Many tiny cells through Ray: what share of the slots' time is not training, and whether the driver's memory is flat.

A step of a worker is a trial's set-up or an epoch, with what it reads and writes. The control plane's share is what is
left of the slots' time when all steps are taken from it: 1 − Σ seconds of steps / (slots × seconds), from the moment
when every slot has begun its first step to the one when the first slot has ended its last: neither the start of worker
processes nor the last trials, of which fewer than slots are left, belong to it.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from typing import Any, NamedTuple

from tests.benchmarks.measuring import Effort, Figure, Measured
from tests.benchmarks.processes import fresh_storage, overrides, run_python
from tests.studies_for_tests import TINY

MOST_SHARE = 0.10
MOST_GROWTH = 0.03  # of the driver's memory, over the last two thirds of the study


class Step(NamedTuple):
    """What a worker did: it was heard of at `end`, in seconds since 1970, and took `seconds` in process `worker`."""

    end: float
    worker: int
    seconds: float

    @property
    def start(self) -> float:
        """When it began."""
        return self.end - self.seconds


class Sample(NamedTuple):
    """The driver at a moment: resident bytes, and processor seconds since its start."""

    time: float
    bytes: int
    cpu_seconds: float


def long_study(effort: Effort) -> Measured:
    """300 cells: ten rows over 30 seeds, each seed's head stage shared."""
    rows, seeds = (2, 3) if effort.smallest else (10, 30)
    chosen = wide_study(rows, seeds)
    runs = [_watched(chosen) for _ in range(effort.repeats)]
    shares = [control_plane_share(steps, steady=not effort.smallest) for steps, _ in runs]
    growths = [growth(samples, steps) for steps, samples in runs]
    trials = seeds * (rows + 1)
    spent = [samples[-1].cpu_seconds / trials for _, samples in runs]
    return Measured(
        {
            "control plane's share of the slots' time": Figure(statistics.median(shares), "", at_most=MOST_SHARE),
            "growth of the driver, last two thirds": Figure(statistics.median(growths), "", at_most=MOST_GROWTH),
            "most memory of the driver": Figure(max(s.bytes for _, samples in runs for s in samples) / 1e6, "MB"),
            "the driver's processor time a trial": Figure(statistics.median(spent), "s"),
            "a step of a worker": Figure(statistics.median(s.seconds for steps, _ in runs for s in steps), "s"),
        },
        {
            "cells": rows * seeds,
            "trials": trials,
            "overrides": chosen,
            "shares": shares,
            "growths": growths,
            "slots": len({step.worker for step in runs[0][0]}),
            "steps_seconds": [step.seconds for step in runs[0][0]],
            "driver_megabytes": [round(sample.bytes / 1e6, 1) for sample in runs[0][1]],
        },
    )


def wide_study(rows: int, seeds: int) -> dict[str, Any]:
    """Overrides of the ablation: as many rows, each with a rate of its own, and as many seeds."""
    listed = [{"name": f"row {i}", "set": {"optimiser.encoder_lr": 1e-5 * (i + 1)}} for i in range(rows)]
    return dict(TINY) | {"seeds": list(range(seeds)), "rows": {"list": listed}}


def control_plane_share(steps: list[Step], *, steady: bool = True) -> float:
    """Share of the slots' time in which no step ran, while all slots had trials to run.

    Args:
        steady: False takes the whole time, for runs that are too short to have a steady part.

    Raises:
        RuntimeError: workers came or went meanwhile, so that the number of slots is none.
    """
    by_worker: dict[int, list[Step]] = defaultdict(list)
    for step in steps:
        by_worker[step.worker].append(step)
    first, last = min(s.start for s in steps), max(s.end for s in steps)
    begin = max(min(s.start for s in own) for own in by_worker.values()) if steady else first
    end = min(max(s.end for s in own) for own in by_worker.values()) if steady else last
    if end - begin < 0.5 * (last - first):
        raise RuntimeError("slots did not work at the same time for most of the study: workers came or went")
    worked = sum(max(0.0, min(s.end, end) - max(s.start, begin)) for s in steps)
    return 1 - worked / (len(by_worker) * (end - begin))


def growth(samples: list[Sample], steps: list[Step]) -> float:
    """By which share of it the driver's memory grew over the last two thirds of the trials' time."""
    first, last = min(s.start for s in steps), max(s.end for s in steps)
    inside = [s for s in samples if first + (last - first) / 3 <= s.time <= last]
    tenth = max(1, len(inside) // 10)
    before, after = (statistics.mean(s.bytes for s in part) for part in (inside[:tenth], inside[-tenth:]))
    return after / before - 1


def _watched(chosen: dict[str, Any]) -> tuple[list[Step], list[Sample]]:
    with fresh_storage() as storage:
        record = storage / "watched.json"
        arguments = ["ablation", "--executor", "ray", *overrides(chosen), "--storage", str(storage)]
        run_python(["-m", "tests.benchmarks.watched_launch", str(record), *arguments])
        seen = json.loads(record.read_text(encoding="utf-8"))
    return [Step(*step) for step in seen["steps"]], [Sample(*sample) for sample in seen["samples"]]
