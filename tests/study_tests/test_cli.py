"""The command line as a user meets it: one clear message and exit status 2 for bad input, and nothing started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import jsonschema
import pytest
from small_studies import document, write

from study.spec import shipped_joint_studies, shipped_studies
from trainables.data.registry import DATASETS

LAUNCH = Path(__file__).resolve().parents[2] / "study" / "launch.py"
PATIENCE = 3 * 10  # seconds: 10 are promised, and tests may run beside others on few cores


@dataclass(frozen=True)
class Told:
    status: int
    out: str
    err: str


def launch(folder: Path, *arguments: str) -> Told:
    """`python study/launch.py …` from another folder, as a user with a checkout elsewhere would call it."""
    done = subprocess.run(
        [sys.executable, str(LAUNCH), *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        env=os.environ | {"COLUMNS": "160", "NO_COLOR": "1", "HF_HUB_OFFLINE": "1"},
    )
    return Told(done.returncode, done.stdout, done.stderr)


# -------------------------------------------------------------------------------------------------- what is said


def test_help_says_how_a_study_is_run_and_what_other_commands_there_are(tmp_path: Path) -> None:
    told = launch(tmp_path, "--help")
    assert told.status == 0
    assert told.err == ""
    assert "launch.py STUDY [OPTIONS]" in told.out
    for command in ("list", "schema", "check", "search", "ablate-best", "status", "report", "verify", "ui"):
        assert f" {command} " in told.out


def test_the_help_of_a_study_names_every_option(tmp_path: Path) -> None:
    told = launch(tmp_path, "ablation", "--help")
    assert told.status == 0
    options = (
        "--override --seeds --smoke --dataset --data-root --backbone --storage --tracking-uri --address --executor"
    )
    for option in [*options.split(), "--no-sharing", "--plan", "--json", "--verbose"]:
        assert option in told.out


def test_list_names_every_shipped_study_and_data_set(tmp_path: Path) -> None:
    told = launch(tmp_path, "list")
    assert told.status == 0
    first_words = [line.split()[0] for line in told.out.splitlines() if line.startswith("  ")]
    assert first_words == [*shipped_studies(), *shipped_joint_studies(), *DATASETS]
    assert "(12 cells)" in told.out


def test_the_printed_schema_accepts_a_study_and_refuses_a_wrong_key(tmp_path: Path) -> None:
    told = launch(tmp_path, "schema")
    assert told.status == 0
    schema = json.loads(told.out)
    jsonschema.validate(document(), schema)
    with pytest.raises(jsonschema.ValidationError, match="stratgy"):
        jsonschema.validate(document() | {"stratgy": {}}, schema)


def test_check_reads_a_data_set_as_a_study_would(tmp_path: Path) -> None:
    """Real drawing: the smallest phantom whose four commonest classes can be measured."""
    from trainables.data.chestxray14 import CLASSES

    kept = {"Atelectasis", "Effusion", "Infiltration", "Nodule"}
    dropped = ",".join(c for c in CLASSES if c not in kept)
    told = launch(
        tmp_path, "check", "phantom", "-o", "dataset.images=160", "-o", f"dataset.drop_classes=[{dropped}]", "--json"
    )
    assert (told.status, told.err) == (0, "")
    facts = json.loads(told.out)
    assert facts["images"] == sum(split["images"] for split in facts["splits"].values()) == 160
    assert facts["groups"] == sum(split["groups"] for split in facts["splits"].values())
    assert set(facts["splits"]["test"]["positives"]) == kept
    assert list(tmp_path.iterdir()) == [], "checking leaves nothing behind"


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["check", "mnist"], "unknown data set 'mnist'; known are chestxray14, "),
        (["check", "phantom", "-o", "dataset.image=100"], "dataset.image: Extra inputs are not permitted"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_message_and_status_2_and_starts_nothing(
    tmp_path: Path, arguments: list[str], said: str
) -> None:
    told = launch(tmp_path, *arguments)
    assert told.status == 2
    assert told.out == ""
    assert told.err.count("error ") == 1
    assert said in told.err
    assert "Traceback" not in told.err
    assert list(tmp_path.iterdir()) == []


def test_every_wrong_option_and_key_is_said_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, document([{"name": "a", "set": {"strategy.depth": 0}}], ema={"decay": 3}))
    told = launch(tmp_path, str(path), "-o", "nosuch.key=1", "-o", "title=", "--dataset", "mnist")
    assert told.status == 2
    for place in (
        "study.yaml:1: rows.list.0.set.strategy.depth: ",
        "study.yaml:1: ema.decay: ",
        "-o nosuch.key=1: ",
        "-o title=: ",
        "--dataset mnist: ",
    ):
        assert f"error {place}" in told.err
    told = launch(tmp_path, "ablation", "--seeds", "x", "-o", "a", "-o", "b")
    assert told.status == 2
    assert [line.split(":")[0] for line in told.err.splitlines()] == ["error -o a", "error -o b", "error --seeds x"]


def test_a_traceback_is_shown_with_v_alone(tmp_path: Path) -> None:
    told = launch(tmp_path, "ablation", "--dataset", "mnist", "-v")
    assert told.status == 2
    assert "Traceback (most recent call last)" in told.err
    assert told.err.splitlines()[-1].startswith("error --dataset mnist: unknown data set 'mnist'; expected one of")


def test_an_option_that_does_not_exist_is_status_2(tmp_path: Path) -> None:
    told = launch(tmp_path, "ablation", "--sharing")
    assert told.status == 2
    assert "No such option: --sharing" in told.err
    assert "Traceback" not in told.err


def test_a_storage_that_cannot_be_written_is_refused_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    told = launch(tmp_path, "ablation", "--executor", "local", "--storage", "file/outputs")
    assert told.status == 2
    assert "--storage file/outputs: cannot be made: file is no folder; give a writable folder" in told.err
    assert "Traceback" not in told.err


@pytest.mark.parametrize(
    "command",
    ["status", pytest.param("report", marks=pytest.mark.slow), pytest.param("verify", marks=pytest.mark.slow)],
)
def test_a_study_that_was_never_run_is_said_and_no_ledger_is_made(tmp_path: Path, command: str) -> None:
    told = launch(tmp_path, command, "ablation", "--storage", "outputs")
    assert told.status == 2
    assert told.err.count("error ") == 1
    assert "there is no ledger at" in told.err
    assert "run a study first" in told.err
    assert "Traceback" not in told.err
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------- secrets


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["ablation", "--tracking-uri", "http://ann:s3cr3t@127.0.0.1:1"],
            "--tracking-uri http://…@127.0.0.1:1: holds a user or password, which others can read in process lists; "
            "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
        ),
        (["status", "ablation", "--tracking-uri=https://s3cr3t@host"], "--tracking-uri=https://…@host: holds"),
        (["ui", "--tracking-uri", "http://ann:s3cr3t/x@host"], "--tracking-uri http://…@host: holds"),
        (
            ["search", "--optuna-storage", "postgresql+psycopg://ann:s3cr3t@db/optuna"],
            "--optuna-storage postgresql+psycopg://…@db/optuna: holds a user or password, which others can read in "
            "process lists; leave the password out, and set PGPASSWORD",
        ),
        (["ablation", "--storage", "s3://key:s3cr3t@bucket/x"], "--storage s3://…@bucket/x: holds"),
        (["ablation", "-o", "model.backbone=https://ann:s3cr3t@host/x"], "-o model.backbone=https://…@host/x: holds"),
    ],
)
def test_an_address_with_a_password_is_refused_and_not_shown(tmp_path: Path, arguments: list[str], said: str) -> None:
    told = launch(tmp_path, *arguments, "-v")
    assert told.status == 2
    assert f"error {said}" in told.err
    assert "s3cr3t" not in told.out + told.err
    assert not any(tmp_path.iterdir())
