"""Whole studies through Ray, as users run them: from command to table."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd

from tests.benchmarks.measuring import Effort, Figure, Measured
from tests.benchmarks.processes import fresh_storage, launch, overrides
from tests.studies_for_tests import TINY

SEARCH_SECONDS = 360.0


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


def whole_search(effort: Effort) -> Measured:
    """The embedded search of 20 trials with its confirmation, as users run it: from command to the winners' table."""
    chosen: dict[str, Any] = {"search.trials": 20}
    if effort.smallest:
        chosen = {**TINY, "search.trials": 5, "search.confirm": 1}
    runs, told = [], {}
    for _ in range(effort.repeats):
        with fresh_storage() as storage:
            runs.append(launch("search", *overrides(chosen), "--json", "--storage", str(storage), watch="family"))
            told = _found(storage, runs[-1].output)
    return Measured(
        {
            "whole command": Figure(statistics.median(ran.seconds for ran in runs), "s", at_most=SEARCH_SECONDS),
            "most memory of all processes": Figure(max(ran.peak_bytes for ran in runs) / 1e9, "GB"),
        },
        {"seconds": [ran.seconds for ran in runs], "overrides": chosen, **told},
    )


def _found(storage: Path, output: str) -> dict[str, Any]:
    """What became of the trials, and the table of the winners beside the default."""
    _, confirmed = (json.loads(line) for line in output.strip().splitlines()[-2:])
    trials = pd.read_csv(storage / "search" / "report" / "trials.csv")
    return {
        "trials": dict(Counter(trials["status"])),
        "trajectories": int(trials["trajectory"].nunique()),
        "units_of_the_confirmation": confirmed["units"],
        "table": (storage / "search-confirm" / "report" / "table.md").read_text(encoding="utf-8"),
    }
