"""Training that fails, as a user meets it: the cell says why in table, ledger and exit status, its siblings finish."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml

from analysis.records import load
from study.spec import Choices, load_study
from study.store import Store
from tests.studies_for_tests import ROOT
from trainables.trial import Checkpoint

pytestmark = pytest.mark.slow

LAUNCH = [sys.executable, str(ROOT / "study" / "launch.py")]
SMALL: dict[str, Any] = {
    "title": "faults",
    "seeds": [0],
    "dataset": {"images": 600},
    "model": {"head_hidden": 64},
    "strategy": {"head_epochs": 1, "tune_epochs": 3, "unfreezing": "static", "depth": 2},
}
SOUND = {"name": "sound", "set": {"strategy.unfreezing": "none"}}


def declared(folder: Path, name: str, rows: list[dict[str, Any]], **changes: Any) -> Path:
    """A study file."""
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"study": name, **SMALL, **changes, "rows": {"list": rows}}), encoding="utf-8")
    return path


def run(command: list[str], study: Path, storage: Path, *options: str) -> subprocess.CompletedProcess[str]:
    arguments = [*command, str(study), "--storage", str(storage), *options]
    return subprocess.run(arguments, capture_output=True, text=True, timeout=500, check=False)


def words(text: str) -> str:
    """Output without the line breaks of a terminal."""
    return " ".join(text.split())


def cells_of(storage: Path, study: str) -> pd.DataFrame:
    return load(f"sqlite:///{storage.resolve() / 'mlflow.db'}", study).cells.set_index("row")


def states_of(storage: Path) -> dict[str, tuple[int, int]]:
    """State → epochs completed, and when it was written."""
    found = {}
    for path in (storage / "states").glob("*/state.json"):
        found[path.parent.name] = (json.loads(path.read_text())["epoch"], path.stat().st_mtime_ns)
    return found


def test_a_loss_that_explodes_fails_its_cell_alone_and_leaves_a_state_to_go_on_from(tmp_path: Path) -> None:
    exploding = {"name": "exploding", "set": {"optimiser.encoder_lr": 1e30, "optimiser.tune_head_lr": 1e-3}}
    study = declared(tmp_path, "faults", [SOUND, exploding])
    done = run(LAUNCH, study, tmp_path / "out", "--executor", "ray")
    assert done.returncode == 1, done.stderr
    assert "exploding · seed 0: FAILED" in words(done.stdout)
    assert "Traceback" not in done.stdout + done.stderr
    cells = cells_of(tmp_path / "out", "faults")
    assert cells.loc["sound", "status"] == "FINISHED"
    assert cells.loc["exploding", "status"] == "FAILED"
    error = cells.loc["exploding", "error"]
    assert "epoch 2" in error and "the state after epoch 1 is kept" in error
    assert "lower optimiser.encoder_lr (1e+30)" in error

    [(kept, (epoch, written))] = states_of(tmp_path / "out").items()
    assert epoch == 1 and kept[:12] in error
    assert finite(tmp_path / "out", kept)

    calmer = {"name": "calmer", "set": {"optimiser.encoder_lr": 1e-4, "optimiser.tune_head_lr": 1e-3}}
    again = run(LAUNCH, declared(tmp_path, "faults", [SOUND, calmer]), tmp_path / "out", "--executor", "local")
    assert again.returncode == 0, again.stderr
    assert states_of(tmp_path / "out") == {kept: (1, written)}  # stage 1 was not trained again
    assert set(cells_of(tmp_path / "out", "faults").loc[["sound", "calmer"], "status"]) == {"FINISHED"}


def finite(storage: Path, key: str) -> bool:
    def usable(checkpoint: Checkpoint) -> bool:
        return all(bool(torch.isfinite(t).all()) for t in checkpoint.state.tensors.values())

    return Store(storage).newest([key], usable) is not None


def test_memory_that_is_refused_fails_the_cell_says_what_to_change_and_is_there_for_the_next(tmp_path: Path) -> None:
    """A real limit on the process: one batch of everything does not fit, the usual batches before and after do."""
    enormous = {"strategy.unfreezing": "static", "strategy.depth": 12, "optimiser.batch_size": 480}
    rows = [{"name": "enormous", "set": enormous}, SOUND]
    study = declared(tmp_path, "memory", rows, dataset={"images": 600, "image_size": 128})
    limited = [sys.executable, str(Path(__file__).parent / "limited_memory.py"), "1500"]
    done = run(limited, study, tmp_path / "out", "--executor", "local")
    assert done.returncode == 1, done.stderr
    cells = cells_of(tmp_path / "out", "memory")
    assert cells.loc["sound", "status"] == "FINISHED"
    assert cells.loc["enormous", "status"] == "FAILED"
    error = cells.loc["enormous", "error"]
    assert error.startswith("out of memory in epoch ")
    for what in ("480 images of 128 px", "optimiser.batch_size", "dataset.image_size", "device cpu", " GB free"):
        assert what in error
    assert "again" not in done.stdout  # the same batch would not fit into the same memory


def test_a_stage_that_hangs_is_given_up_with_status_1_and_the_option_is_named(tmp_path: Path) -> None:
    """No epoch is finished within a hundredth of a second: every stage counts as hung, whatever it does."""
    study = declared(tmp_path, "hanging", [SOUND], execution={"max_failures": 1})
    done = run(LAUNCH, study, tmp_path / "out", "--executor", "local", "--timeout", "0.01")
    assert done.returncode == 1, done.stderr
    assert "was not finished within 0.01 s and counts as hung" in words(done.stdout)
    error = cells_of(tmp_path / "out", "hanging").loc["sound", "error"]
    assert "--timeout" in error and error.endswith("(given up after 2 attempts)")


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "1e9", "soon"])
def test_a_timeout_that_is_no_time_is_refused(seconds: str, tmp_path: Path) -> None:
    study = declared(tmp_path, "hanging", [SOUND])
    assert load_study(study, Choices()).name == "hanging"
    done = run(LAUNCH, study, tmp_path / "out", "--timeout", seconds)
    assert done.returncode == 2
    assert "--timeout" in done.stderr
    assert not (tmp_path / "out").exists()
