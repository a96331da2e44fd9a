"""One driver a study and storage: a lock that the system frees when its holder dies, and a note of who holds it."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from study.documents import StudyError


@contextmanager
def claimed(folder: Path, study: str, command: str) -> Iterator[None]:
    """Hold a study of a storage for as long as the context lasts.

    Args:
        folder: of the storage's locks.
        study: its name.
        command: what a second driver is told to wait for.

    Raises:
        StudyError: another driver runs the study there; at once, with host, process, start and command. Or its file
            system has no locks.
    """
    lock, note = FileLock(lock_file(folder, study), timeout=0), folder / f"{study}.json"
    try:
        lock.acquire()
    except Timeout:
        raise StudyError([f"{study} is being run in this storage already{_holder(note)}"]) from None
    except OSError as error:
        told = f"cannot be locked ({error.strerror}); mount it with locks, or give another --storage"
        raise StudyError([f"{lock_file(folder, study)}: {told}"]) from error
    try:
        _write_note(note, command)
        yield
    finally:
        note.unlink(missing_ok=True)
        lock.release()


def lock_file(folder: Path, study: str) -> Path:
    """The file that is locked."""
    return folder / f"{study}.lock"


def _write_note(note: Path, command: str) -> None:
    facts = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.time(), "command": command}
    partial = note.with_name(f".{note.name}.{os.getpid()}")
    partial.write_text(json.dumps(facts), encoding="utf-8")
    partial.replace(note)


def _holder(note: Path) -> str:
    """Who it is, and what to do; a holder that has only just begun may not have said yet."""
    try:
        return held_by(json.loads(note.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return held_by({})


def held_by(facts: Mapping[str, Any]) -> str:
    """What a second driver is told of the first, by what that one noted of itself."""
    if "since" not in facts:
        return ", by a process that has just begun: wait for it, or give another --storage"
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(facts["since"]))
    return (
        f", by process {facts['pid']} on {facts['host']} since {since} ({facts['command']}): wait for it, stop it "
        f"with `kill -INT {facts['pid']}` there, or give another --storage"
    )
