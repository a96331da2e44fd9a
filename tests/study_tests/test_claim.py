"""One driver a study and storage: the second one is told at once, and the lock dies with its holder."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from study.documents import StudyError
from study.storage.claim import claimed
from tests.studies_for_tests import ROOT

HOLDER = """
import sys, time
from pathlib import Path
from study.storage.claim import claimed
with claimed(Path(sys.argv[1]), "ablation", "python study/launch.py ablation"):
    print("held", flush=True)
    time.sleep(600)
"""


@contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that runs the study."""
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_a_second_driver_is_told_who_runs_the_study_since_when_and_what_to_do(tmp_path: Path) -> None:
    with holder(tmp_path) as other:
        started = time.monotonic()
        with pytest.raises(StudyError) as caught, claimed(tmp_path, "ablation", "mine"):
            raise AssertionError("both run it")
        assert time.monotonic() - started < 1
    (said,) = caught.value.problems
    assert f"by process {other.pid} on {socket.gethostname()} since {time.strftime('%Y-')}" in said
    assert "(python study/launch.py ablation)" in said
    assert f"`kill -INT {other.pid}`" in said and "another --storage" in said


def test_other_studies_of_the_storage_are_free(tmp_path: Path) -> None:
    with holder(tmp_path), claimed(tmp_path, "depth", "mine"):
        pass


def test_the_lock_of_a_killed_driver_is_free_and_its_note_misleads_nobody(tmp_path: Path) -> None:
    with holder(tmp_path) as other:
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
    with claimed(tmp_path, "ablation", "mine"):
        assert f'"pid": {os.getpid()}' in (tmp_path / "ablation.json").read_text()
    assert not (tmp_path / "ablation.json").exists()


def test_a_holder_that_has_not_said_who_it_is_yet_is_respected(tmp_path: Path) -> None:
    with holder(tmp_path):
        (tmp_path / "ablation.json").unlink()
        with pytest.raises(StudyError, match="by a process that has just begun"), claimed(tmp_path, "ablation", "mine"):
            raise AssertionError("both run it")


def test_a_file_system_without_locks_is_named_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(StudyError) as caught, claimed(tmp_path, "ablation", "mine"):
        raise AssertionError("nobody knows who else runs it")
    (said,) = caught.value.problems
    assert said.startswith(f"{tmp_path / 'ablation.lock'}: cannot be locked (No locks available); mount it with locks")
