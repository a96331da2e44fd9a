"""Small studies that the tests run for real, and how to run them in this process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from analysis.records import StudyRecords, load
from analysis.report import write_report
from analysis.schema import StudyHeader
from study.documents import apply
from study.driver import RunOptions, run_plan
from study.plan import Plan, make_plan
from study.spec import Choices, find_study, load_study
from study.storage.places import Address

ROOT = Path(__file__).resolve().parents[1]

# The smallest run in which every part of the ablation acts: two unfreezing steps, weights refined, decays that differ.
TINY: Mapping[str, Any] = {
    "seeds": [0, 1],
    "dataset.images": 600,
    "strategy.head_epochs": 1,
    "strategy.tune_epochs": 2,
    "strategy.step": 4,
    "model.head_hidden": 64,
}


@dataclass(frozen=True)
class Ran:
    """A study that was run."""

    plan: Plan
    header: StudyHeader
    complete: bool
    storage: Path

    @property
    def uri(self) -> str:
        """Its ledger."""
        return f"sqlite:///{self.storage.resolve() / 'mlflow.db'}"

    def records(self) -> StudyRecords:
        """What its ledger holds."""
        return load(self.uri, self.plan.study.name)

    def cells(self) -> pd.DataFrame:
        """Its cells.csv, by row and seed."""
        folder = self.storage / self.plan.study.name / "report"
        write_report(self.records(), folder)
        return pd.read_csv(folder / "cells.csv").set_index(["row", "seed"]).sort_index()


def planned(
    storage: Path,
    overrides: Mapping[str, Any] = TINY,
    *,
    study: str = "ablation",
    sharing: bool = True,
    roots: Mapping[str, Path] | None = None,
) -> Plan:
    """A plan of a study, shipped or in a file, with overrides; `roots`: data set → folder."""
    data_roots = {dataset: str(root) for dataset, root in (roots or {}).items()}
    declared = load_study(find_study(study), Choices(apply({}, overrides), data_roots=data_roots))
    return make_plan(declared, storage=storage, sharing=sharing)


def run_study(
    storage: Path | Address,
    overrides: Mapping[str, Any] = TINY,
    *,
    study: str = "ablation",
    sharing: bool = True,
    executor: str = "local",
    address: str | None = None,
    roots: Mapping[str, Path] | None = None,
) -> Ran:
    """Plan and run a study with overrides, in this process."""
    plan = planned(Address.of(storage).folder, overrides, study=study, sharing=sharing, roots=roots)
    return _run(plan, storage, executor, address)


def run_smoke(
    storage: Path,
    study: str,
    *,
    executor: str,
    sharing: bool,
    dataset: str | None = None,
    root: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Ran:
    """What `--smoke` runs, with `--dataset`, `--data-root` and `-o` where they are given."""
    roots = {} if root is None else {"": str(root)}
    declared = load_study(find_study(study), Choices(apply({}, overrides or {}), dataset, roots, smoke=True))
    return _run(make_plan(declared, storage=storage, sharing=sharing), storage, executor, None)


def _run(plan: Plan, storage: Path | Address, executor: str, address: str | None) -> Ran:
    options = RunOptions(storage, command="a test", executor=executor, address=address)
    header, complete, _ = run_plan(plan, options, Console(quiet=True))
    return Ran(plan, header, complete, Address.of(storage).folder)
