"""Where a ledger lies: its address, and the checks of a local one that come before MLflow touches it.

Left to itself MLflow creates tables in any SQLite file, and retries what cannot succeed for minutes. Imports no mlflow.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

log = logging.getLogger(__name__)
T = TypeVar("T")

SQLITE = "sqlite:///"
LOCK_PATIENCE_S = 60  # how long a locked database is waited for


class LedgerError(RuntimeError):
    """The ledger cannot be reached, read or written; the message names the place and the remedy."""


class LedgerAwayError(LedgerError):
    """The ledger is locked by another process, or its server is away: the same call may succeed later.

    `reason`: what the store said, one line.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


def sqlite_path(tracking_uri: str) -> Path:
    """Absolute path of the file in a sqlite:///FILE address."""
    name = tracking_uri.removeprefix(SQLITE)
    if not name or name == ":memory:" or "?" in name or not tracking_uri.startswith(SQLITE):
        raise LedgerError(
            f"{tracking_uri!r} names no file: expected sqlite:///FILE, absolute as in sqlite:////srv/my.db"
        )
    return Path(name).absolute()


def check_database(path: Path) -> None:
    """Refuse what is not an MLflow database before MLflow would create or alter it, or retry for minutes."""
    if not path.is_file():
        raise LedgerError(f"there is no ledger at {path}: run a study first, or give its --storage or --tracking-uri")
    try:
        tables = _tables(path)
    except sqlite3.DatabaseError as error:
        raise LedgerError(f"{path} is not a usable SQLite database ({error}): name another file or move it") from error
    if not {"alembic_version", "experiments", "runs"} <= tables:
        raise LedgerError(f"{path} is an SQLite database, but not one of MLflow's: name another file or move it")


def _tables(path: Path) -> set[str]:
    """Names of a database's tables. Opened for writing, since a killed writer's journal must be rolled back first."""
    for wait_s in (1, LOCK_PATIENCE_S):
        with contextlib.closing(sqlite3.connect(f"file:{quote(str(path))}?mode=rw", uri=True, timeout=wait_s)) as base:
            try:
                return {name for (name,) in base.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or wait_s == LOCK_PATIENCE_S:
                    raise
                log.warning("%s is locked by another process; waiting up to %d s", path, LOCK_PATIENCE_S)
    raise AssertionError("unreachable: the last attempt returns or raises")


def prepare_folder(folder: Path) -> None:
    """Make sure that a folder exists and can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LedgerError(f"cannot create the folder {folder} ({error.strerror}): choose another storage") from error
    if not _may_write(folder):
        raise LedgerError(f"the folder {folder} is read-only: choose another storage or allow writing there")


def _may_write(path: Path) -> bool:
    return os.access(path, os.W_OK, effective_ids=os.access in os.supports_effective_ids)


def prepare_database(path: Path, create: Callable[[Path], None]) -> None:
    """Make sure that a database can be written at this path; `create` makes one in a folder of its own.

    A new database is moved to its place complete: MLflow takes seconds over its tables, and a driver killed meanwhile
    would leave a database that no later start can use.
    """
    prepare_folder(path.parent)
    if path.is_dir():
        raise LedgerError(f"{path} is a folder: name a file in it, as in {SQLITE}{path / 'mlflow.db'}")
    if not path.exists() or path.stat().st_size == 0:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            new = Path(folder, path.name)
            create(new)
            _move_unless_taken(new, path)
    if not _may_write(path):
        raise LedgerError(f"the database {path} is read-only: choose another storage or allow writing there")


def _move_unless_taken(new: Path, path: Path) -> None:
    """Put a database at a path that has none, or an empty file.

    Another driver may have been first, and its database may be in use by now: it must not be replaced.
    """
    try:
        path.hardlink_to(new)
    except OSError:  # something is there, or the file system knows no hard links
        if not path.exists() or path.stat().st_size == 0:
            new.replace(path)


@contextlib.contextmanager
def environment(**values: str) -> Iterator[None]:
    """Set environment variables for a while: MLflow's HTTP client takes its patience from nowhere else.

    Those that have their value already are left alone, also afterwards: changing the environment is not safe while
    other threads read it, so whoever works in a thread sets them before that starts.
    """
    before = {name: os.environ.get(name) for name, value in values.items() if os.environ.get(name) != value}
    os.environ.update({name: values[name] for name in before})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def first_line(error: BaseException) -> str:
    """What an error says, without the pages that databases append and the layers that HTTP libraries wrap around."""
    if str(error).startswith("API request to"):
        while error.__cause__ or error.__context__:
            error = error.__cause__ or error.__context__ or error
    lines = [line for line in str(error).strip().splitlines() if not line.startswith("(raised as a result of")] or [""]
    return (lines[0] or type(error).__name__)[:300]


def patiently(
    action: Callable[[], T], what: str, errors: tuple[type[Exception], ...], patience_s: float = LOCK_PATIENCE_S
) -> T:
    """The result of an action that may be repeated, tried again while a lock or an absent server makes it fail.

    Raises:
        LedgerAwayError: it still fails when patience has ended.
        LedgerError: it fails with one of `errors` that waiting does not mend.
    """
    give_up, pause_s = time.monotonic() + patience_s, 0.2
    while True:
        try:
            return action()
        except errors as error:
            if not _passing(error):
                raise LedgerError(f"{what} failed: {first_line(error)}") from error
            if time.monotonic() > give_up:
                raise LedgerAwayError(
                    f"{what} failed for {patience_s:g} s: {first_line(error)}; end the process that locks the "
                    "database, or start its server, and run the study again: it resumes",
                    first_line(error),
                ) from error
            log.warning("%s: locked or away (%s); trying again", what, first_line(error))
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 5.0)


def _passing(error: BaseException) -> bool:
    """Whether an error may pass by waiting: a lock, or a server that is away, restarting or busy."""
    import requests

    if isinstance(error, OSError):  # of requests too; but a full disk does not pass
        return isinstance(error, requests.ConnectionError | requests.Timeout)
    text, code = str(error), getattr(error, "error_code", "")
    if "(sqlite3." in text:  # MLflow calls all of them temporary: a full disk, a missing table, a read-only file
        return "is locked" in text
    lost = text.startswith("API request to") and ("failed with exception" in text or "timeout exception" in text)
    return lost or code in ("TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED")
