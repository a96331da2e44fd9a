"""`unified` as users run it: three tasks by one command, one report, and figures of predictions beside the truth."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from tests.detection_extra import needs_detection
from tests.studies_for_tests import ROOT

pytestmark = [pytest.mark.slow, needs_detection]

STUDIES = ("ablation", "detection_ablation", "segmentation_ablation")


def launch(storage: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "study" / "launch.py"), *arguments, "--storage", str(storage)]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, check=False, cwd=ROOT)


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where unified was run to its end, the trials of its three studies beside each other."""
    folder = tmp_path_factory.mktemp("unified")
    started = time.monotonic()
    done = launch(folder, "unified", "--smoke")
    seconds = time.monotonic() - started
    assert done.returncode == 0, done.stderr
    assert "12 trials to run" in done.stdout
    if int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) == 1:
        assert seconds < 90, "on two idle cores"
    assert "SYNTHETIC" in done.stdout
    assert "One strategy, three tasks" in done.stdout
    return folder


def test_one_report_has_the_steps_of_all_tasks_and_every_study_its_own(storage: Path) -> None:
    with (storage / "unified/report/joint.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["study"] for line in lines] == [name for name in STUDIES for _ in range(4)]
    assert {line["metric"] for line in lines} == {"macro_auc", "map50_95", "mean_dice"}
    assert all(line["n"] == "1" and line["mean"] for line in lines)
    page = (storage / "unified/report/report.html").read_text()
    assert page.count("Predictions beside the truth") >= 2
    for name in STUDIES:
        assert (storage / name / "report/report.html").is_file()


def test_trials_beside_those_of_other_studies_train_to_the_bits_of_their_study_alone(
    storage: Path, tmp_path: Path
) -> None:
    hashes = ["row", "weights_sha256", "trajectory_sha256", "best_epoch"]
    study = "segmentation_ablation"  # whose workers had trained other tasks before
    done = launch(tmp_path, study, "--smoke", "--seeds", "0", "--executor", "local")
    assert done.returncode == 0, done.stderr
    alone, beside = (pd.read_csv(folder / study / "report/cells.csv")[hashes] for folder in (tmp_path, storage))
    pd.testing.assert_frame_equal(alone, beside)


def test_predictions_are_shown_beside_the_truth_and_again_by_report(storage: Path) -> None:
    figures = [storage / study / "report/figures/pictures-0.svg" for study in STUDIES[1:]]
    before = [figure.read_bytes() for figure in figures]
    for figure in figures:
        figure.unlink()
    assert launch(storage, "report", "unified").returncode == 0
    assert [figure.read_bytes() for figure in figures] == before


def test_status_verify_and_report_speak_of_all_of_it(storage: Path) -> None:
    status = launch(storage, "status", "unified")
    assert status.returncode == 0, status.stderr
    assert all(f"{name}: " in status.stdout for name in STUDIES)
    assert launch(storage, "verify", "unified").returncode == 0
    table = storage / "unified/report/joint.csv"
    table.write_text(table.read_text().replace("mean_dice", "mean_luck", 1))
    drifted = launch(storage, "verify", "unified")
    assert drifted.returncode == 1
    assert "unified: joint.csv, line 10: segmentation_ablation · phantom" in drifted.stdout
    assert launch(storage, "report", "unified").returncode == 0
    assert launch(storage, "verify", "unified").returncode == 0


def test_a_study_that_unified_has_run_is_not_run_again_alone(storage: Path) -> None:
    results = {path: path.stat().st_mtime_ns for path in (storage / "results").rglob("result.json")}
    assert len(results) == 12
    shutil.rmtree(storage / "detection_ablation/pictures")
    assert launch(storage, "report", "unified").returncode == 0
    assert "are not kept in this storage" in (storage / "unified/report/report.html").read_text(), "so much is said"
    done = launch(storage, "detection_ablation", "--smoke", "--seeds", "0", "--executor", "local")
    assert done.returncode == 0, done.stderr
    assert "trials to run" not in done.stdout
    assert {path: path.stat().st_mtime_ns for path in (storage / "results").rglob("result.json")} == results
    assert (storage / "detection_ablation/report/figures/pictures-0.png").is_file(), "and images are kept again"
