"""docs/studies.md tells of every shipped study, and its commands are ones that the program takes."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from study.options import read_data_roots, read_overrides
from study.spec import Choices, find_study, load_study, shipped_joint_studies, shipped_studies

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "studies.md").read_text()
COMMANDS = [line for line in TEXT.splitlines() if line.startswith("python study/launch.py ")]


def words(command: str) -> list[str]:
    return shlex.split(command)[2:]


def test_every_shipped_study_is_told_of_and_none_else() -> None:
    table = TEXT[TEXT.index("| study |") : TEXT.index("What can be run")]
    told = {
        name
        for line in table.splitlines()[2:]
        for name in re.findall(r"`(\w+)`", line.split("|")[1:2][0] if "|" in line else "")
    }
    assert told == {*shipped_studies(), *shipped_joint_studies()}


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.endswith("--plan")])
def test_the_plans_of_the_document_are_made(command: str, tmp_path: Path) -> None:
    run = [sys.executable, str(ROOT / "study" / "launch.py"), *words(command), "--storage", str(tmp_path)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert f"plan of {words(command)[0]}" in done.stdout


@pytest.mark.parametrize("command", [c for c in COMMANDS if not c.endswith("--plan")])
def test_the_other_commands_of_the_document_declare_a_study(command: str, tmp_path: Path) -> None:
    name, *options = words(command)
    given: dict[str, list[str]] = {"--dataset": [], "--data-root": [], "-o": []}
    for option, value in zip(options[::2], options[1::2], strict=True):
        given[option].append(value.replace("DIR", str(tmp_path)))
    overrides = read_overrides(given["-o"], None, None)
    chosen = Choices(
        overrides.values,
        next(iter(given["--dataset"]), None),
        read_data_roots(given["--data-root"]),
        typed=overrides.typed,
    )
    study = load_study(find_study(name), chosen)
    assert study.name == name
    assert not any(dataset.startswith("phantom") for dataset in study.datasets)
