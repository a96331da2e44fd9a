"""`--smoke` of every study, as users run it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pandas as pd
import pytest

from study.spec import Choices, load_study, shipped_studies
from tests.detection_extra import INSTALLED, REASON
from tests.studies_for_tests import ROOT

pytestmark = pytest.mark.slow

# What is promised of two idle cores is asserted where no other tests run beside these.
ALONE = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) == 1


def test_the_smoke_run_of_the_ablation_takes_less_than_a_minute_through_ray(tmp_path: Path) -> None:
    started = time.monotonic()
    done = _launch("ablation", "--smoke", "--storage", str(tmp_path))
    seconds = time.monotonic() - started
    assert done.returncode == 0, done.stderr
    assert "SYNTHETIC" in done.stdout
    report = tmp_path / "ablation" / "report"
    assert {"report.html", "table.md", "table.tex", "table.csv", "cells.csv"} <= {p.name for p in report.iterdir()}
    assert len(pd.read_csv(report / "cells.csv")) == 8
    if ALONE:
        assert seconds < 60


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all studies, as a user has it: data sets are drawn once, and equal stages are trained once."""
    return tmp_path_factory.mktemp("studies")


# The smoke runs of these are timed here, are parts of the joint study's, or say less than tests of their own do.
ELSEWHERE = ("ablation", "detection_ablation", "segmentation_ablation", "cross_dataset")


@pytest.mark.parametrize("study", [name for name in shipped_studies() if name not in ELSEWHERE])
def test_the_smoke_run_of_every_other_study_ends_with_a_table_and_needs_no_network(study: str, storage: Path) -> None:
    if "detection" in study and not INSTALLED:
        pytest.skip(REASON)
    searches = load_study(shipped_studies()[study]).search is not None
    timed = study in ("detection", "segmentation")
    fewer = () if searches or timed else ("--seeds", "0")  # of the embedded studies one seed shows the same
    started = time.monotonic()
    done = _launch(
        study, "--smoke", "--storage", str(storage), "--executor", "local", *fewer, within=_without_network()
    )
    seconds = time.monotonic() - started
    assert done.returncode == 0, done.stderr
    if timed and ALONE:
        assert seconds < 90
    table = f"{study}-confirm" if searches else study
    cells = pd.read_csv(storage / table / "report" / "cells.csv")
    assert set(cells["status"]) == {"FINISHED"}
    if searches:
        trials = pd.read_csv(storage / study / "report" / "trials.csv")
        assert set(trials["status"]) <= {"FINISHED", "PRUNED"}
        assert len(trials) == load_study(shipped_studies()[study], Choices(smoke=True)).search.trials  # type: ignore[union-attr]


@cache
def _without_network() -> tuple[str, ...]:
    """What starts a command in a network of its own, which holds the loopback and nothing else; () where none may."""
    prefix = ("unshare", "-r", "-n", "sh", "-c", 'ip link set lo up && exec "$@"', "sh")
    try:
        allowed = subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        allowed = False
    return prefix if allowed else ()


def _launch(*arguments: str, within: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [*within, sys.executable, str(ROOT / "study" / "launch.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, cwd=ROOT)
