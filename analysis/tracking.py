"""Where a ledger lies: its address, and the checks of a local one that come before MLflow touches it.

Left to itself MLflow creates tables in any SQLite file, and retries what cannot succeed for minutes. Imports no mlflow.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

log = logging.getLogger(__name__)

SQLITE = "sqlite:///"
LOCK_PATIENCE_S = 60  # how long a locked database is waited for


class LedgerError(RuntimeError):
    """The ledger cannot be reached, read or written; the message names the place and the remedy."""


def sqlite_path(tracking_uri: str) -> Path:
    """Absolute path of the file in a sqlite:///FILE address."""
    name = tracking_uri.removeprefix(SQLITE)
    if not name or name == ":memory:" or "?" in name or not tracking_uri.startswith(SQLITE):
        raise LedgerError(
            f"{tracking_uri!r} names no file: expected sqlite:///FILE, absolute as in sqlite:////srv/my.db"
        )
    return Path(name).absolute()


def _check_database(path: Path) -> None:
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


def _prepare_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LedgerError(f"cannot create the folder {folder} ({error.strerror}): choose another storage") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise LedgerError(f"the folder {folder} is read-only: choose another storage or allow writing there")


def _prepare_database(path: Path) -> None:
    """Make sure that an MLflow database can be written at this path.

    A new one is made beside it and moved there complete: MLflow takes seconds over its tables, and a driver killed
    meanwhile would leave a database that no later start can use.
    """
    _prepare_folder(path.parent)
    if path.is_dir():
        raise LedgerError(f"{path} is a folder: name a file in it, as in {SQLITE}{path / 'mlflow.db'}")
    if not path.exists() or path.stat().st_size == 0:
        _create_database(path)
    if not os.access(path, os.W_OK):
        raise LedgerError(f"the database {path} is read-only: choose another storage or allow writing there")
    try:
        with closing(sqlite3.connect(path, timeout=LOCK_PATIENCE_S, isolation_level=None)) as database:
            database.execute("BEGIN IMMEDIATE")
            database.execute("ROLLBACK")
    except sqlite3.DatabaseError as error:
        raise LedgerError(f"{path} is not a usable SQLite database ({error}): name another file or move it") from error


@contextlib.contextmanager
def environment(**values: str) -> Iterator[None]:
    """Set environment variables for a while: MLflow's HTTP client takes its patience from nowhere else."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]


