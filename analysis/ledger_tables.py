"""A local ledger read straight from MLflow's SQLite tables.

Importing mlflow takes seconds, and its object mapping more with every run; a report, a status or a verification needs
neither. Only tables and columns that MLflow has had since 1.0 are read, and tests hold that what is read is what
MLflow's own client reads.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from analysis import schema
from analysis.tracking import LOCK_PATIENCE_S, LedgerError, check_database

Values = Mapping[tuple[str, int], float | None]  # (metric's key, epoch) → value as it is stored, None for NaN


@dataclass(frozen=True)
class LedgerRun:
    """What a report needs of an MLflow run: where its artifacts are, its tags, the latest values of its metrics."""

    run_id: str
    artifact_uri: str
    tags: Mapping[str, str]
    metrics: Mapping[str, float]


class LedgerTables:
    """One look at a database: all that is read belongs to the same moment, also while a driver writes."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        """Read through an open connection, see `open_tables`."""
        self._connection = connection

    def experiment(self, name: str) -> tuple[str, dict[str, str]] | None:
        """Id and tags of the experiment of this name that is not deleted."""
        found = self._connection.execute(
            "SELECT experiment_id FROM experiments WHERE name = ? AND lifecycle_stage = 'active'", (name,)
        ).fetchone()
        if found is None:
            return None
        tags = self._connection.execute("SELECT key, value FROM experiment_tags WHERE experiment_id = ?", found)
        return str(found[0]), dict(tags)

    def studies(self) -> list[str]:
        """Names of the experiments that are studies of ours."""
        named = self._connection.execute(
            "SELECT name FROM experiments JOIN experiment_tags USING (experiment_id) "
            "WHERE lifecycle_stage = 'active' AND key = ?",
            (schema.TAG_HEADER,),
        )
        return [name for (name,) in named]

    def current_runs(self, experiment_id: str) -> list[LedgerRun]:
        """The runs of the study as last declared, youngest first."""
        declared = self._connection.execute(
            "SELECT run_uuid, artifact_uri FROM runs JOIN tags USING (run_uuid) "
            "WHERE experiment_id = ? AND lifecycle_stage = 'active' AND key = ? AND value = 'true' "
            "ORDER BY start_time DESC, run_uuid",
            (int(experiment_id), schema.TAG_CURRENT),
        ).fetchall()
        return [
            LedgerRun(run_id, artifact_uri, dict(self._tags(run_id)), dict(self._latest(run_id)))
            for run_id, artifact_uri in declared
        ]

    def history(self, run_ids: Iterable[str]) -> dict[str, Values]:
        """Run id → its metrics by epoch, sorted by key and epoch; of an epoch told twice the last value."""
        return {run_id: self._history(run_id) for run_id in run_ids}

    def _tags(self, run_id: str) -> sqlite3.Cursor:
        return self._connection.execute("SELECT key, value FROM tags WHERE run_uuid = ?", (run_id,))

    def _latest(self, run_id: str) -> Iterator[tuple[str, float]]:
        rows = self._connection.execute(
            "SELECT key, CASE WHEN is_nan THEN NULL ELSE value END FROM latest_metrics WHERE run_uuid = ?", (run_id,)
        )
        return ((key, float("nan") if value is None else value) for key, value in rows)

    def _history(self, run_id: str) -> Values:
        rows = self._connection.execute(
            "SELECT key, step, CASE WHEN is_nan THEN NULL ELSE value END FROM metrics "
            "WHERE run_uuid = ? AND key NOT GLOB ? AND key NOT GLOB ? ORDER BY key, step, timestamp",
            (run_id, f"{schema.TEST}*", f"{schema.BEST}*"),
        )
        return {(key, epoch): value for key, epoch, value in rows}


@contextmanager
def open_tables(path: Path) -> Iterator[LedgerTables]:
    """The tables of a database, as they are at one moment.

    Raises:
        LedgerError: the file is missing, damaged, locked for longer than a minute, or no database of MLflow's.
    """
    check_database(path)
    # Opened for writing where that is allowed, since a killed writer's journal must be rolled back first.
    address = f"file:{quote(str(path))}?mode=rw"
    try:
        with closing(sqlite3.connect(address, uri=True, timeout=LOCK_PATIENCE_S, isolation_level=None)) as connection:
            connection.execute("BEGIN")
            yield LedgerTables(connection)
    except sqlite3.Error as error:
        remedy = f"bring its schema up to date (`mlflow db upgrade sqlite:///{path}`), or name another file"
        raise LedgerError(f"the ledger at {path} cannot be read: {error}; {remedy}") from error
