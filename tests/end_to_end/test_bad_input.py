"""Bad input through the real command line: one clear message that names place and remedy, status 2, nothing begun.

Launches are grouped, and two run at a time. Those that import torch or MLflow are marked slow.
"""

from __future__ import annotations

import os
import socket
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from bad_inputs import STUDY, Told, launch, launch_all, refused, written

from study.ledger import Ledger
from tests.ledger_samples import Sample, new_database, run_study

# ------------------------------------------------------------------------------------------------------- the options


def test_everything_wrong_with_the_options_is_said_at_once_each_with_its_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "data" / "nih").mkdir(parents=True)
    told = launch(
        tmp_path,
        *("ablation", "-o", "strategy.depth", "-o", "strategy.step=[1", "-o", "ema.decay=0.9", "-o", "ema.decay=0.99"),
        *("--seeds", "0,one", "--storage", "file/outputs", "--tracking-uri", "ftp://server", "--executor", "slurm"),
        *("--data-root", "chestxray14=data/nhi", "--data-root", "ham10000=file", "--timeout", "0"),
    )
    refused(
        told,
        "-o strategy.depth: expected KEY=VALUE, such as strategy.depth=6",
        "-o strategy.step=[1: the value cannot be read as YAML",
        "-o ema.decay=0.9 and -o ema.decay=0.99: ema.decay is given twice; leave one of them out",
        "--seeds 0,one: expected whole numbers with commas, such as 0,1,2",
        "--data-root chestxray14=data/nhi: no such folder; give the folder that holds the data set as distributed; "
        "did you mean data/nih?",
        "--data-root ham10000=file: is no folder",
        "--storage file/outputs: cannot be made: file is no folder; give a writable folder",
        "--tracking-uri ftp://server: expected sqlite:///FILE or http(s)://SERVER[:PORT]",
        "--executor slurm: expected ray or local",
        "--timeout 0: expected seconds above 0",
        errors=10,
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "file"]


def test_options_that_do_not_fit_the_study_are_said_at_once_and_by_their_own_name(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(STUDY, encoding="utf-8")
    told = launch(
        tmp_path,
        *("study.yaml", "--smoke", "--seeds", "0,0,-1", "--data-root", f"ham10000={tmp_path}", "--plan"),
        *("-o", "strategy.depht=4", "-o", "optimiser=3", "-o", "strategy.unfreezing=slow", "-o", "strategy.depth=0"),
        *("-o", "weighting.decay=3", "-o", "title.of=x", "-o", "ema={decay: 2}"),
    )
    refused(
        told,
        "error --smoke: study.yaml has no `smoke` keys that say what its smallest run is; add them, or leave it",
        "error --data-root ham10000=",
        "the study has no data set 'ham10000'; it has phantom",
        "error --seeds 0,0,-1: seeds.2: expected at least 0; found -1",
        "error -o strategy.depht=4: unknown key; did you mean strategy.depth?",
        "error -o optimiser=3: expected a group of keys (batch_size, encoder_lr, head_lr",
        "error -o strategy.unfreezing=slow: expected 'none', 'progressive', 'static' or 'plain'; found 'slow'",
        "error -o strategy.depth=0: expected at least 1 or 'all'; found 0",
        "error -o weighting.decay=3: unknown key; did you mean ema.decay?",
        "error -o title.of=x: title is not a group of keys",
        "error -o ema={decay: 2}: ema.decay: expected less than 1; found 2",
        errors=10,
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Told]:
    """Launches with one fault each, that ends before anything else can be looked at."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "study.yaml").write_text(STUDY + "datasets: [ham10000, phantom]\n", encoding="utf-8")
    data = ("--data-root", str(folder))
    cases = {
        "unknown option": ["ablation", "--sharing"],
        "unknown study": ["ablatoin"],
        "missing file": ["studies/mine.yaml"],
        "folder for a file": [str(folder)],
        "unknown data set": ["ablation", "--dataset", "chestxray"],
        "duplicate seeds": ["ablation", "--seeds", "0,1,0"],
        "folder for several": ["study.yaml", *data, "--plan"],
        "folder for a phantom": ["ablation", *data, "--plan"],
        "no folder": ["ablation", "--dataset", "ham10000", "--backbone", "tiny-phantom"],
        "twice by two options": ["ablation", "--dataset", "phantom", "-o", "dataset.name=ham10000", "--plan"],
        "two executors": ["ablation", "--executor", "local", "--address", "auto"],
        "bucket": ["ablation", "--storage", "gs://bucket/results"],
        "closed ports": ["ablation", "--address", "127.0.0.1:1", "--tracking-uri", "http://127.0.0.1:1"],
        "a server without a name": ["ablation", "--tracking-uri", "http://no-such-host.invalid:5000"],
    }
    told = launch_all({name: (folder, arguments) for name, arguments in cases.items()})
    assert [path.name for path in folder.iterdir()] == ["study.yaml"], "nothing is left behind"
    return told


@pytest.mark.parametrize(
    ("case", "said", "errors"),
    [
        ("unknown option", ["No such option: --sharing", "--no-sharing", "See `launch.py ablation --help`."], 1),
        ("unknown study", ["ablatoin: no such study or file; did you mean ablation?; shipped studies: ablation, "], 1),
        ("missing file", ["studies/mine.yaml: no such file; give a study file, or one of ablation, "], 1),
        ("folder for a file", [": is no file; give a study file, or one of ablation, "], 1),
        ("unknown data set", ["--dataset chestxray: unknown data set 'chestxray'; did you mean chestxray14?"], 1),
        ("duplicate seeds", ["--seeds 0,1,0: 0 given twice; each may stand there once"], 1),
        (
            "folder for several",
            ["the study has several data sets; say which: --data-root NAME=DIR with one of ham10000, phantom"],
            1,
        ),
        ("folder for a phantom", ["phantom is drawn, not read from a folder; name the data set with --dataset"], 1),
        ("no folder", ["ham10000: no folder given; say where the data set lies: --data-root ham10000=DIR"], 1),
        ("twice by two options", ["--dataset phantom and -o dataset.name=ham10000: give one of them"], 1),
        ("two executors", ["--address auto and --executor local: trials run either there or here"], 1),
        ("bucket", ["--storage gs://…: expected a folder or s3://BUCKET/PREFIX"], 1),
        (
            "closed ports",
            [
                "--address 127.0.0.1:1: nothing answers there (Connection refused)",
                "--tracking-uri http://127.0.0.1:1: nothing answers there (Connection refused); start the server",
            ],
            2,
        ),
        ("a server without a name", ["--tracking-uri http://no-such-host.invalid:5000: nothing answers there ("], 1),
    ],
)
def test_an_option_that_cannot_be_followed(alone: dict[str, Told], case: str, said: list[str], errors: int) -> None:
    refused(alone[case], *said, errors=errors)
    assert alone[case].out == ""


# ---------------------------------------------------------------------------------------------------- the study file

WRONG = """\
study: wrong
title: Wrong in every way
seeds: [0, 1, 0]
stratgy: {depth: 4}
strategy: {depth: six, decay: 0.9}
optimiser:
  batch_size: 0
  encoder_lr: 1e-4
  batch_size.of: 3
rows:
  list:
    - name: 1e-4
      set: {strategy.unfreezing: gradual}
    - name: twice
      set: {strategy.depth: 4, strategy: {depth: 6}}
  factorial:
    ema.enabled: [true]
profiles:
  ham1000: {strategy.depth: 4}
  phantom: {ema.decay: 3}
smoke: {seeds: [-1]}
"""


def test_everything_wrong_with_a_file_is_said_at_once_with_line_key_and_remedy(tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_text(WRONG, encoding="utf-8")
    told = launch(tmp_path, "wrong.yaml")
    refused(
        told,
        "error wrong.yaml:3: seeds: 0 given twice; each may stand there once",
        "error wrong.yaml:4: stratgy: unknown key; did you mean strategy?",
        "error wrong.yaml:5: strategy.depth: expected a whole number or 'all'; found 'six'",
        "error wrong.yaml:5: strategy.decay: unknown key; did you mean ema.decay?",
        "error wrong.yaml:7: optimiser.batch_size: given twice, as a value and as a group with optimiser.batch_size.of",
        "error wrong.yaml:19: profiles.ham1000: unknown data set; did you mean ham10000?",
        "error wrong.yaml:20: profiles.phantom.ema.decay: expected less than 1; found 3",
        "error wrong.yaml:15: rows.list.1.set: strategy.depth: given twice, dotted and nested; remove one of them",
        "error wrong.yaml:21: smoke.seeds.0: expected at least 0; found -1",
        errors=9,
    )
    assert [path.name for path in tmp_path.iterdir()] == ["wrong.yaml"]


def test_rows_in_two_forms_and_rows_that_cannot_be_told_apart(tmp_path: Path) -> None:
    two_forms = STUDY + "  factorial:\n    ema.enabled: [true, false]\n"
    same = STUDY + "    - name: only row\n      set: {strategy.depth: 10}\n"
    for name, text in (("two.yaml", two_forms), ("same.yaml", same)):
        (tmp_path / name).write_text(text, encoding="utf-8")
    told = launch_all({name: (tmp_path, [name]) for name in ("two.yaml", "same.yaml")})
    refused(
        told["two.yaml"],
        "two.yaml:6: rows: expected exactly one of list, cumulative, leave_one_out, factorial; found list, factorial",
    )
    refused(told["same.yaml"], "same.yaml:6: rows: row 'only row' is declared twice")


def nested_aliases() -> str:
    """Nine levels of nine: 400 characters that stand for 3·10⁸ values."""
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{n}: &{n} [{', '.join([f'*{before}'] * 9)}]" for before, n in zip("abcdefgh", "bcdefghi", strict=True)]
    return "\n".join(lines)


UNREADABLE: dict[str, tuple[str | bytes, str]] = {
    "object": (
        "study: x\nseeds: !!python/object/apply:os.system ['touch ran']\n",
        ":2: !!python/object/apply:os.system asks for an object; text, numbers, lists and mappings alone are read",
    ),
    "twice": ("study: x\nseeds: [0]\nstudy: y\n", ":3: key 'study' is given twice, first in line 1"),
    "tab": ("study: x\nrows:\n\tlist: []\n", ":3: a tab; indent with spaces"),
    "latin": ("study: x\ntitle: \xe9tude\n".encode("latin-1"), ":2: not UTF-8 text; save the file as UTF-8"),
    "aliases": (nested_aliases(), ": too large: more than 200,000 values once its aliases are written out"),
    "deep": ("study: " + "[" * 5000, ": nested too deeply"),
    "list": ("- study\n", ": expected a mapping of keys such as study, seeds, rows at the top; found a list"),
    "empty": ("", "found an empty file"),
    "bracket": ("study: x\nseeds: [0\ntitle: y\n", ":3: expected ',' or ']', but got ':'"),
    "binary": (np.random.default_rng(0).bytes(4000), "not UTF-8 text"),
    "enormous": (b"", ": too large: more than 500,000 bytes; is it a study file?"),
}


@pytest.fixture(scope="module")
def unreadable(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Told]]:
    folder = tmp_path_factory.mktemp("unreadable")
    for name, (content, _) in UNREADABLE.items():
        path = folder / f"{name}.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with (folder / "enormous.yaml").open("wb") as file:
        file.truncate(20_000_000_000)  # a hole: twenty gigabytes that no disk holds
    return folder, launch_all({name: (folder, [f"{name}.yaml"]) for name in UNREADABLE})


@pytest.mark.parametrize("case", UNREADABLE)
def test_a_file_that_is_no_study(unreadable: tuple[Path, dict[str, Told]], case: str) -> None:
    folder, told = unreadable
    refused(told[case], f"error {case}.yaml", UNREADABLE[case][1])
    assert not (folder / "ran").exists()
    assert not (folder / "outputs").exists()


# ---------------------------------------------------------------------------------------------------------- storage


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Small file systems of their own, mounted with the given options."""
    places: list[Path] = []

    def mount(options: str) -> Path:
        place = tmp_path / f"mounted{len(places)}"
        place.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True, check=False
        )
        if done.returncode != 0:
            pytest.skip(f"no file system can be mounted here: {done.stderr.decode().strip()}")
        places.append(place)
        return place

    yield mount
    for place in places:
        subprocess.run(["umount", str(place)], check=True)


def test_a_full_and_a_read_only_storage_are_refused_before_training(
    tmp_path: Path, mounted: Callable[[str], Path]
) -> None:
    full, read_only = mounted("size=64k"), mounted("ro")
    with (full / "ballast").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 64 * 1024)
    told = launch_all(
        {
            str(place): (tmp_path, ["ablation", "--storage", str(place), "--executor", "local"])
            for place in (full, read_only)
        }
    )
    refused(told[str(full)], f"{full}")
    assert "No space left on device" in told[str(full)].err or "full" in told[str(full)].err
    assert written(full) == ["ballast"]
    refused(
        told[str(read_only)], f"--storage {read_only}: cannot be written: {read_only} is on a read-only file system"
    )


# ----------------------------------------------------------------------------------------------------------- ledgers


@pytest.fixture(scope="module")
def ledgers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Told]]:
    """Commands that read a ledger, where there is none."""
    folder = tmp_path_factory.mktemp("ledgers")
    (folder / "notes.txt").write_text("no database", encoding="utf-8")
    with closing(sqlite3.connect(folder / "other.db")) as base:
        base.execute("CREATE TABLE t (x)")
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        (folder / "sub").mkdir()
        cases = {
            **{command: [command, "ablation"] for command in ("status", "report", "verify")},
            "ui": ["ui"],
            "ui at a file": ["ui", "--tracking-uri", f"sqlite:///{folder / 'notes.txt'}"],
            "status of another database": ["status", "ablation", "--tracking-uri", f"sqlite:///{folder / 'other.db'}"],
            "status at a folder": ["status", "ablation", "--tracking-uri", f"sqlite:///{folder}"],
            "status of no address": ["status", "ablation", "--tracking-uri", "postgres"],
            "status of a closed port": ["status", "ablation", "--tracking-uri", "http://127.0.0.1:1"],
            "run into a folder": ["ablation", "--tracking-uri", f"sqlite:///{folder}"],
            "run into another database": ["ablation", "--tracking-uri", f"sqlite:///{folder / 'other.db'}"],
        }
        told = launch_all({name: (folder, arguments) for name, arguments in cases.items()})
        assert taken.getsockname()
    assert sorted(path.name for path in folder.iterdir()) == ["notes.txt", "other.db", "sub"]
    return folder, told


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("status", "there is no ledger at "),
        ("report", "there is no ledger at "),
        ("verify", "there is no ledger at "),
        ("ui", "mlflow.db: run a study first, or give its --storage or --tracking-uri"),
        ("ui at a file", "notes.txt is not a usable SQLite database"),
        ("status of another database", "other.db is an SQLite database, but not one of MLflow's"),
        ("status at a folder", "there is no ledger at "),
        ("status of no address", "--tracking-uri postgres: expected sqlite:///FILE or http(s)://SERVER[:PORT]"),
        ("status of a closed port", "--tracking-uri http://127.0.0.1:1: nothing answers there (Connection refused)"),
        ("run into a folder", "is a folder; name a file in it: sqlite:///"),
        ("run into another database", "other.db is an SQLite database, but not one of MLflow's"),
    ],
)
def test_a_ledger_that_is_not_there_is_said_and_none_is_made(
    ledgers: tuple[Path, dict[str, Told]], case: str, said: str
) -> None:
    folder, told = ledgers
    refused(told[case], said)
    assert (folder / "notes.txt").read_text(encoding="utf-8") == "no database"
    with closing(sqlite3.connect(folder / "other.db")) as base:
        assert base.execute("SELECT name FROM sqlite_master").fetchall() == [("t",)]


@pytest.mark.slow
def test_a_study_that_the_ledger_does_not_hold_is_named_with_those_that_it_holds(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    run_study(Ledger(new_database(tmp_path / "results")), Sample())
    before = written(tmp_path / "results")
    for command in ("status", "report", "verify"):
        told = launch(tmp_path, command, "rnus", "--storage", "results")
        refused(told, "no study 'rnus' in sqlite:///", "it holds ablation")
    assert written(tmp_path / "results") == before


# -------------------------------------------------------------------------------------------------- what -v is for


def test_a_traceback_is_shown_with_v_alone(tmp_path: Path) -> None:
    arguments = ["status", "ablation", "--storage", "nowhere"]
    told = launch_all({"plain": (tmp_path, arguments), "verbose": (tmp_path, [*arguments, "-v"])})
    refused(told["plain"], "there is no ledger at")
    assert told["verbose"].status == 2
    assert "Traceback (most recent call last)" in told["verbose"].err
    assert told["verbose"].errors == told["plain"].errors
