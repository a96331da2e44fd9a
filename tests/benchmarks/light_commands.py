"""What answers before anything heavy is imported: `--help`, `--plan` of the embedded default and of 10,000 cells."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import yaml

from tests.benchmarks.measuring import Effort, Figure, Measured
from tests.benchmarks.processes import Ran, fresh_storage, launch

HELP_SECONDS = 0.6
WIDE_SECONDS, WIDE_MEGABYTES = 4.0, 400.0
FULL_ROWS, FULL_SEEDS = 1000, 10  # no two rows share a stage, so every cell brings keys of its own
SMALLEST_ROWS, SMALLEST_SEEDS = 8, 2


def light_commands(effort: Effort) -> Measured:
    """`--help` and `--plan --json` of the embedded default, in turn."""
    helps, plans = [], []
    with fresh_storage() as storage:
        for _ in range(effort.repeats):
            helps.append(launch("--help"))
            plans.append(launch("ablation", "--plan", "--json", "--storage", str(storage)))
    return Measured(
        {
            "--help": Figure(_seconds(helps), "s", at_most=HELP_SECONDS),
            "--plan, embedded default": Figure(_seconds(plans), "s"),
        },
        {"help_seconds": [ran.seconds for ran in helps], "plan_seconds": [ran.seconds for ran in plans]},
    )


def wide_plan(effort: Effort) -> Measured:
    """`--plan` of 10,000 cells on the embedded data, of which no two rows share a stage."""
    rows, seeds = (SMALLEST_ROWS, SMALLEST_SEEDS) if effort.smallest else (FULL_ROWS, FULL_SEEDS)
    with fresh_storage() as storage:
        study = write_wide_study(storage, rows, seeds)
        runs = [
            launch(str(study), "--plan", "--json", "--storage", str(storage / "empty"), watch="own")
            for _ in range(effort.repeats)
        ]
    plan: dict[str, Any] = json.loads(runs[0].output)
    return Measured(
        {
            "--plan": Figure(_seconds(runs), "s", at_most=WIDE_SECONDS),
            "most memory": Figure(max(ran.peak_bytes for ran in runs) / 1e6, "MB", at_most=WIDE_MEGABYTES),
        },
        {
            "cells": plan["cells"],
            "stages": plan["stages"],
            "shared_stages": plan["shared_stages"],
            "seconds": [ran.seconds for ran in runs],
        },
    )


def write_wide_study(folder: Path, rows: int, seeds: int) -> Path:
    """A study file whose rows differ from the first epoch on, in rates and depth as a wide search would."""
    declared = [
        {"name": f"row {i}", "set": {"optimiser.head_lr": 1e-3 + 1e-6 * i, "strategy.depth": 1 + i % 10}}
        for i in range(rows)
    ]
    study = {
        "study": "wide",
        "title": "A wide search",
        "seeds": list(range(seeds)),
        "rows": {"list": declared},
        "report": {"compare": "first"},
    }
    path = folder / "wide.yaml"
    path.write_text(yaml.safe_dump(study, sort_keys=False), encoding="utf-8")
    return path


def _seconds(runs: list[Ran]) -> float:
    return statistics.median(ran.seconds for ran in runs)
