"""What Ray costs: a study through Ray with one slot against the same study in this process, and a stage's start.

One slot, and as many threads a trial as in-process, leave nothing to gain from Ray: what remains is its price. A trial
asks for half a core more than it computes with, so that a second one never fits and a core is left to the driver.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from study.plan import Plan
from study.schedule import Schedule
from study.store import RESULT, result_folder
from tests.benchmarks.measuring import Effort, Figure, Measured, median_difference, pairs_in_turn
from tests.benchmarks.processes import fresh_storage, launch, launch_timed, overrides, same_bits
from tests.studies_for_tests import TINY, planned

MOST_SECONDS, MOST_START = 12.0, 0.3


@dataclass(frozen=True)
class TrialTimes:
    """When a trial trained, seconds since 1970: the start of its first epoch, the end of its last one's validation."""

    start: float
    end: float
    epochs: int


@dataclass(frozen=True)
class _Run:
    """A study that was run in one slot.

    Attributes:
        pauses: seconds from the end of a trial's last epoch to the start of the next one's first, each trial but one.
        building: seconds to build a trial and take it to its first state (in-process only).
        closing: seconds that states and results take after a trial's last epoch (in-process only).
    """

    seconds: float
    pauses: tuple[float, ...]
    cells: pd.DataFrame
    building: tuple[float, ...] = ()
    closing: tuple[float, ...] = ()


def ray_overhead(effort: Effort) -> Measured:
    """The embedded ablation, 12 cells: whole commands in turn, and the pauses between consecutive trials."""
    chosen = _one_slot(dict(TINY) if effort.smallest else {})
    pairs = pairs_in_turn(lambda: _in_process(chosen), lambda: _through_ray(chosen), effort.repeats)
    return _compared(pairs, chosen)


def ray_overhead_short(effort: Effort) -> Measured:
    """As many trials with as little training as there can be: the same price, seen with less noise."""
    chosen = _one_slot(dict(TINY) | ({} if effort.smallest else {"seeds": [0, 1, 2]}))
    pairs = pairs_in_turn(lambda: _in_process(chosen), lambda: _through_ray(chosen), effort.repeats)
    return _compared(pairs, chosen)


def _one_slot(chosen: dict[str, Any]) -> dict[str, Any]:
    return chosen | {"execution.cpus": max(1.0, (os.cpu_count() or 1) - 0.5)}


def _compared(pairs: list[tuple[_Run, _Run]], chosen: dict[str, Any]) -> Measured:
    local, ray = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    closing = statistics.median(seconds for run in local for seconds in run.closing)
    local_start = statistics.median(seconds for run in local for seconds in run.pauses) - closing
    ray_start = statistics.median(seconds for run in ray for seconds in run.pauses) - closing
    return Measured(
        {
            "Ray over in-process, whole command": Figure(
                median_difference([(a.seconds, b.seconds) for a, b in pairs]), "s", at_most=MOST_SECONDS
            ),
            # From the end of the trial before, its state and results written, to the first epoch.
            "a stage's start on a warm actor": Figure(ray_start, "s", at_most=MOST_START),
            "a stage's start in-process": Figure(local_start, "s"),
            "of that, building the trial": Figure(
                statistics.median(seconds for run in local for seconds in run.building), "s"
            ),
            "state and results at a trial's end": Figure(closing, "s"),
            "cells with equal bits, share": Figure(
                float(all(same_bits(a.cells, b.cells) for a, b in pairs)), "", at_least=1.0
            ),
        },
        {
            "overrides": chosen,
            "cells": len(local[0].cells),
            "trials": len(local[0].pauses) + 1,
            "pairs_whole_seconds": [[a.seconds, b.seconds] for a, b in pairs],
            "ray_pauses_seconds": [list(run.pauses) for run in ray],
            "local_pauses_seconds": [list(run.pauses) for run in local],
        },
    )


def _in_process(chosen: dict[str, Any]) -> _Run:
    with fresh_storage() as storage:
        ran = launch_timed(storage, "ablation", "--executor", "local", *overrides(chosen))
        trials = trials_in_time(planned(storage, chosen), storage)
    ends = [count - 1 for count in itertools.accumulate(trial.epochs for trial in trials)]
    closing = tuple(ran.afters[end] for end in ends)
    return _Run(ran.seconds, pauses_between(trials), ran.cells, ran.begins[1:], closing)


def _through_ray(chosen: dict[str, Any]) -> _Run:
    with fresh_storage() as storage:
        ran = launch("ablation", "--executor", "ray", *overrides(chosen), "--json", "--storage", str(storage))
        report = Path(json.loads(ran.output.strip().splitlines()[-1])["report"])
        trials = trials_in_time(planned(storage, chosen), storage)
        return _Run(ran.seconds, pauses_between(trials), pd.read_csv(report.parent / "cells.csv"))


def pauses_between(trials: list[TrialTimes]) -> tuple[float, ...]:
    """Seconds between consecutive trials.

    Raises:
        RuntimeError: two trials trained at the same time.
    """
    pauses = tuple(after.start - before.end for before, after in itertools.pairwise(trials))
    if min(pauses, default=0.0) < 0:
        raise RuntimeError(f"trials overlap by {-min(pauses):.2f} s: there was more than one slot")
    return pauses


def trials_in_time(plan: Plan, storage: Path) -> list[TrialTimes]:
    """The trials of a finished study as its results tell of them, first to last."""
    schedule = Schedule(plan, plan.chains, lambda chain: False, lambda key: False)
    histories = _histories(plan, storage)
    trials = []
    for node in schedule.nodes:
        history = max((histories[chain.key] for chain in node.chains), key=len)
        trained = history[node.request.first : node.request.last]  # patience may have ended it sooner
        if trained:
            start = trained[0]["time_ms"] / 1e3 - trained[0]["seconds"]
            trials.append(TrialTimes(start, trained[-1]["time_ms"] / 1e3, len(trained)))
    return sorted(trials, key=lambda trial: trial.start)


def _histories(plan: Plan, storage: Path) -> dict[str, list[dict[str, Any]]]:
    folders = {chain.key: result_folder(storage, chain.leaf, chain.observer.name) for chain in plan.chains}
    return {key: json.loads((folder / RESULT).read_text())["history"] for key, folder in folders.items()}
