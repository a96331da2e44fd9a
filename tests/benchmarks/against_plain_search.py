"""A search against plain Ray Tune with OptunaSearch: the same space, number of configurations and data."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from tests.benchmarks.measuring import Effort, Figure, Measured, median_ratio, pairs_in_turn
from tests.benchmarks.processes import fresh_storage, launch, overrides, run_python
from tests.benchmarks.search_space import DECAYS, search_overrides

TRIALS = 2 * len(DECAYS)  # on two cores no core waits at the end, of ours or of theirs
LEAST_GAIN = 4.0


class _Run(NamedTuple):
    seconds: float
    evaluated: int
    best: float


def against_plain_search(effort: Effort) -> Measured:
    """Whole commands in turn, both on all of this machine's slots with one thread a trial; nothing is pruned."""
    trials, theirs = (len(DECAYS), 2) if effort.smallest else (TRIALS, TRIALS)
    chosen = search_overrides(trials, effort.smallest)
    pairs = pairs_in_turn(lambda: _ours(chosen), lambda: _plain(chosen, theirs), effort.repeats)
    return Measured(
        {
            "plain Ray Tune / ours, whole command": Figure(
                median_ratio([(ours.seconds, plain.seconds) for ours, plain in pairs]), "×", at_least=LEAST_GAIN
            ),
            "ours": Figure(statistics.median(ours.seconds for ours, _ in pairs), "s"),
            "plain Ray Tune": Figure(statistics.median(plain.seconds for _, plain in pairs), "s"),
            "configurations that ours evaluated": Figure(min(ours.evaluated for ours, _ in pairs), ""),
            "configurations that plain Ray Tune evaluated": Figure(min(plain.evaluated for _, plain in pairs), ""),
            "best validation macro AUC, ours": Figure(statistics.median(ours.best for ours, _ in pairs), ""),
            "best validation macro AUC, plain": Figure(statistics.median(plain.best for _, plain in pairs), ""),
        },
        {
            "overrides": chosen,
            "decays": len(DECAYS),
            "pairs_whole_seconds": [[ours.seconds, plain.seconds] for ours, plain in pairs],
        },
    )


def _ours(chosen: dict[str, Any]) -> _Run:
    with fresh_storage() as storage:
        ran = launch("search", *overrides(chosen), "--json", "--storage", str(storage))
        told = json.loads(ran.output.strip().splitlines()[-1])
        trials = pd.read_csv(Path(told["report"]).parent / "trials.csv")
        finished = trials[trials["status"] == "FINISHED"]
        return _Run(ran.seconds, len(finished), float(finished["metric"].max()))


def _plain(chosen: dict[str, Any], trials: int) -> _Run:
    with fresh_storage() as storage:
        arguments = ["-m", "tests.benchmarks.plain_ray_search", str(storage), str(trials), *overrides(chosen)]
        ran = run_python(arguments)
        told = json.loads(ran.output.strip().splitlines()[-1])["trials"]
        return _Run(ran.seconds, len(told), max(trial["val_auc"] for trial in told))
