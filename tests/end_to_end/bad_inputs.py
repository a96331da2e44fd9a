"""What the tests of bad input launch: the command line as a user starts it, and small data sets that can be harmed."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from tests.studies_for_tests import ROOT
from trainables.data.chestxray14 import CLASSES, HEADER

PROMISED_SECONDS = 10.0
KEPT = "Effusion"
TABLE = "Data_Entry_2017_v2020.csv"
STUDY = """\
study: small
title: A small study
seeds: [0]
strategy: {head_epochs: 1, tune_epochs: 1}
dataset: {image_size: 32}
rows:
  list:
    - name: only row
"""


@dataclass(frozen=True)
class Told:
    """What a launch said, and how long it took."""

    status: int
    out: str
    err: str
    seconds: float
    allowed: float

    @property
    def errors(self) -> list[str]:
        """The messages, without what marks them."""
        return [line.removeprefix("error ") for line in self.err.splitlines() if line.startswith("error ")]


def launch(folder: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> Told:
    """`python study/launch.py …` from a folder of the user's."""
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(ROOT / "study" / "launch.py"), *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"COLUMNS": "80", "NO_COLOR": "1", "HF_HUB_OFFLINE": "1"} | dict(environment or {}),
    )
    seconds = time.monotonic() - started
    # What is promised holds on a machine that has a core to spare; tests share theirs with other processes.
    crowd = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
    return Told(done.returncode, done.stdout, done.stderr, seconds, PROMISED_SECONDS * crowd)


def launch_all(cases: Mapping[str, tuple[Path, Sequence[str]]]) -> dict[str, Told]:
    """Several launches, two at a time: they mostly wait for imports."""
    with ThreadPoolExecutor(2) as pool:
        told = pool.map(lambda case: launch(case[0], *case[1]), cases.values())
        return dict(zip(cases, told, strict=True))


def refused(told: Told, *said: str, errors: int = 1) -> None:
    """One message (or as many as there are faults) that says all this; status 2, no traceback, in time."""
    assert told.status == 2, told
    assert "Traceback" not in told.err
    assert len(told.errors) == errors, told.err
    for part in said:
        assert part in told.err, told.err
    assert told.seconds < told.allowed


def written(storage: Path) -> list[str]:
    """Files that a launch left in its storage."""
    return sorted(str(path.relative_to(storage)) for path in storage.rglob("*") if path.is_file())


def chest_data(root: Path, patients: int = 40) -> Path:
    """ChestX-ray14 in small, an image a patient: every second one with an effusion, the rest without finding."""
    (root / "images").mkdir(parents=True)
    names = [f"{patient:08d}_000.png" for patient in range(patients)]
    pixels = np.random.default_rng(0).integers(0, 255, (patients, 32, 32), np.uint8)
    for name, image in zip(names, pixels, strict=True):
        Image.fromarray(image).save(root / "images" / name)
    with (root / TABLE).open("w", newline="", encoding="utf-8") as file:
        file.write(HEADER + "\n")
        found = [KEPT if patient % 2 else "No Finding" for patient in range(patients)]
        csv.writer(file).writerows(
            [name, finding, 0, patient, "050Y", "M", "PA", 32, 32, 1, 1]
            for patient, (name, finding) in enumerate(zip(names, found, strict=True))
        )
    (root / "train_val_list.txt").write_text("\n".join(names[: patients - 8]) + "\n", encoding="utf-8")
    (root / "test_list.txt").write_text("\n".join(names[patients - 8 :]) + "\n", encoding="utf-8")
    return root


def chest_options(root: Path, storage: Path) -> list[str]:
    """Options of a study on `chest_data`."""
    dropped = ",".join(name for name in CLASSES if name != KEPT)
    return [
        *("--dataset", "chestxray14", "--data-root", str(root), "--storage", str(storage)),
        *("--backbone", "tiny-phantom", "--executor", "local", "-o", f"dataset.drop_classes=[{dropped}]"),
        *("-o", "weighting.boosts={}"),
    ]
