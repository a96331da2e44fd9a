"""A study that Slurm runs, by docker/study.slurm; skipped where no Slurm answers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from tests.studies_for_tests import ROOT, TINY, Ran

HASHES = ["weights_sha256", "trajectory_sha256", "best_epoch"]
SMALL = [part for key, value in TINY.items() for part in ("-o", f"{key}={value}".replace(" ", ""))]
ASKED = ["--nodes=2", "--cpus-per-task=1", "--gpus-per-node=0"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def slurm() -> None:
    """Two idle nodes that see this machine's folders; of the session, so that it is asked before a study is run."""
    if shutil.which("sbatch") is None:
        pytest.skip("no Slurm here")
    asked = subprocess.run(["sinfo", "--noheader", "--format=%D %t"], capture_output=True, text=True, check=False)
    idle = sum(int(n) for n, state in (line.split() for line in asked.stdout.splitlines()) if state == "idle")
    if asked.returncode != 0 or idle < 2:
        pytest.skip(f"needs two idle nodes of Slurm: {asked.stderr.strip() or asked.stdout.strip()}")


def submitted(folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """A job; its output goes to job.log."""
    given = f"--export=ALL,VENV={Path(sys.executable).parents[1]},STORAGE={folder / 'storage'}"
    (folder / "storage").mkdir(exist_ok=True)
    command = ["sbatch", "--wait", "--parsable", *ASKED, f"--output={folder / 'job.log'}", given, "docker/study.slurm"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "SLURM_JOB"))}
    return subprocess.Popen([*command, *arguments], cwd=ROOT, env=clean, stdout=subprocess.PIPE)


def test_a_study_over_two_nodes_that_is_told_to_stop_goes_on_and_ends_with_the_same_bits(
    slurm: None, undisturbed: Ran, tmp_path: Path
) -> None:
    """The signal is the one that Slurm sends three minutes before a job's time is up."""
    first = submitted(tmp_path, "ablation", *SMALL)
    assert first.stdout is not None
    number = first.stdout.readline().decode().strip()
    states, log = tmp_path / "storage" / "states", tmp_path / "job.log"
    deadline = time.monotonic() + 400
    while not any(states.glob("*")):
        assert first.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    subprocess.run(["scancel", "--batch", "--signal=TERM", number], check=True)
    assert first.wait(200) != 0

    assert submitted(tmp_path, "ablation", *SMALL).wait(600) == 0, log.read_text()
    assert not list((tmp_path / "storage").glob(".ray-token*"))
    cells = pd.read_csv(tmp_path / "storage" / "ablation" / "report" / "cells.csv").set_index(["row", "seed"])
    pd.testing.assert_frame_equal(cells.sort_index()[HASHES], undisturbed.cells()[HASHES])


def test_a_job_without_its_environment_says_what_it_lacks(slurm: None, tmp_path: Path) -> None:
    log = tmp_path / "job.log"
    command = ["sbatch", "--wait", *ASKED, f"--output={log}", "--export=ALL,VENV=,STORAGE=", "docker/study.slurm"]
    assert subprocess.run([*command, "ablation"], cwd=ROOT, check=False, capture_output=True).returncode == 2
    assert "with VENV (an environment with ray), STORAGE (a folder)" in log.read_text()
