"""The ledger of a study in MLflow: one run a row and data set, one nested run a cell. The only writer to MLflow.

An experiment is a study. Each run carries a deterministic key (tag `spft.key`) by which it is found again, also after
the driver was killed at any point: nothing is created twice, nothing equal is written twice, and a finished study that
is run again leaves the store as it was. Only the driver writes.

What makes a kill harmless: a run is created together with its tags in one transaction; metrics carry the time of
training, so that logging one again meets MLflow's primary key (key, time, step, value) and is dropped; and a cell's
status tag, written last, alone says whether it has ended. A cell has no run before it starts.
"""

from __future__ import annotations

import json
import logging
import math
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from analysis import schema
from analysis.records import connect, find_runs, quiet_mlflow
from analysis.schema import CellStatus, StudyHeader, metric_key
from analysis.tracking import (
    LOCK_PATIENCE_S,
    SQLITE,
    LedgerError,
    environment,
    first_line,
    patiently,
    prepare_database,
    prepare_folder,
    sqlite_path,
)
from study.ledger_entries import (
    DIGEST_LENGTH,
    PARAM_LENGTH,
    TAG_LENGTH,
    CellHeader,
    CellOutcome,
    Epoch,
    RowHeader,
    aggregates,
    as_json,
    check_declaration,
    check_tag,
    checked_key,
    file_digest,
    keep_counted,
    outcome_digest,
    outcome_metrics,
    outcome_tags,
    row_status,
    same,
    shortened,
)

if TYPE_CHECKING:
    from mlflow.entities import Metric, Run

__all__ = ["CellHeader", "CellOutcome", "Epoch", "Ledger", "LedgerError", "RowHeader"]

log = logging.getLogger(__name__)
T = TypeVar("T")

METRICS_A_BATCH, TAGS_A_BATCH = 1000, 100  # MLflow's limits of one log_batch; parameters as tags
VIEW = "spft"  # the view of the runs' table that the UI opens with: MLflow itself shows no metric there
VIEW_TAG = f"mlflow.sharedViewState.{VIEW}"
RUN_STATUS = {"RUNNING": "RUNNING", "FINISHED": "FINISHED", "FAILED": "FAILED", "PRUNED": "KILLED"}


@dataclass
class _Record:
    """What a run holds in MLflow, kept in step with every write, so that nothing equal is written again."""

    run_id: str
    name: str
    status: str
    start_ms: int
    end_ms: int | None
    tags: dict[str, str]
    params: dict[str, str]
    metrics: dict[str, float]  # latest values
    inputs: set[tuple[str, str]]  # data sets: name, digest

    @classmethod
    def of(cls, run: Run) -> _Record:
        inputs = {(i.dataset.name, i.dataset.digest) for i in run.inputs.dataset_inputs}
        data, info = run.data, run.info
        return cls(
            info.run_id, info.run_name, info.status, info.start_time, info.end_time,
            dict(data.tags), dict(data.params), dict(data.metrics), inputs,
        )  # fmt: skip


class Ledger:
    """Writer of one study's runs: `open`, then `log_epochs` and `finish` for the cells, then `close`.

    Every call may be repeated. A locked database or a server that is away is waited for, `PATIENCE_S` a call; then
    `LedgerAwayError` is raised and nothing that was buffered is lost.
    """

    PATIENCE_S: float = LOCK_PATIENCE_S
    END_PATIENCE_S: float = 300.0  # of a study that is trained, and waits for nothing but a server that starts again

    def __init__(self, tracking_uri: str, artifact_root: Path | None = None) -> None:
        """Connect, and create the database of a local store that has none.

        Args:
            tracking_uri: sqlite:///FILE or http(s)://SERVER.
            artifact_root: folder for artifacts of a local store; default: `artifacts` beside the database.

        Raises:
            LedgerError: the store is unreachable, unusable or read-only.
        """
        quiet_mlflow()
        self.artifact_root: Path | None = None
        if tracking_uri.startswith(SQLITE):
            database = sqlite_path(tracking_uri)
            tracking_uri = f"{SQLITE}{database}"
            prepare_database(database, _create_database)
            self.artifact_root = (artifact_root or database.parent / "artifacts").absolute()
            prepare_folder(self.artifact_root)
        elif artifact_root is not None:
            raise LedgerError(f"{tracking_uri} keeps artifacts itself: give an artifact root only with a local store")
        self.tracking_uri = tracking_uri
        self._client = connect(tracking_uri)
        self._experiment_id = ""
        self._experiment_tags: dict[str, str] = {}
        self._study = ""
        self._rows: dict[str, RowHeader] = {}
        self._cells: dict[str, CellHeader] = {}
        self._records: dict[str, _Record] = {}  # by key
        self._buffer: dict[str, list[Metric]] = {}  # by cell key
        self._complete: set[str] = set()  # cells that had ended well before this session

    # -------------------------------------------------------------------------------------------- the study

    def open(self, header: StudyHeader, rows: Sequence[RowHeader], cells: Sequence[CellHeader]) -> None:
        """Declare the study: find or create the rows' runs, take over the cells' runs, retire all others.

        Raises:
            LedgerError: the declaration contradicts itself, or a run's parameters differ from those it was logged with.
        """
        check_declaration(header, rows, cells)
        self.flush()  # of a study opened before
        self._study = header.study
        self._rows = {row.key: row for row in rows}
        self._cells = {cell.key: cell for cell in cells}
        self._find_experiment(header)
        self._records = self._find_records()
        self._write_header(header)
        self._write_experiment_tags({VIEW_TAG: _view(header)})
        opened_ms = _now_ms()
        for row in rows:  # the UI lists the youngest first: the table's first row shall lead
            self._describe_row(row, opened_ms - row.index)
        for cell in cells:
            if cell.key in self._records:
                self._describe_cell(cell, opened_ms)
        for key in self._records.keys() - self._rows.keys() - self._cells.keys():
            self._write_tags(key, {schema.TAG_CURRENT: "false"})
        self._complete = {cell.key for cell in cells if self.status_of(cell.key) in ("FINISHED", "PRUNED")}

    def extend(self, header: StudyHeader, cells: Sequence[CellHeader]) -> None:
        """Declare further cells of rows that are declared: for a study that grows while it runs.

        Raises:
            LedgerError: as `open`.
        """
        new = [cell for cell in cells if cell.key not in self._cells]
        check_declaration(header, [*self._rows.values()], [*self._cells.values(), *new])
        self._cells |= {cell.key: cell for cell in new}
        self._write_header(header)
        for cell in new:
            if cell.key in self._records:
                self._describe_cell(cell, _now_ms())
                if self.status_of(cell.key) in ("FINISHED", "PRUNED"):
                    self._complete.add(cell.key)

    def attach(self, key: str, file: Path, folder: str) -> None:
        """Keep a file as an artifact of a row or cell, in place of one of its name."""
        self._persist(f"writing {file.name}", self._client.log_artifact, self.run_id(key), str(file), folder)

    def close(self, header: StudyHeader) -> None:
        """Write what is buffered, the header, and each row's mean, sample standard deviation and n; end the rows."""
        self.flush()
        self._write_header(header)
        for row in self._rows.values():
            cells = [key for key, cell in self._cells.items() if cell.row_key == row.key]
            records = [self._records[key] for key in cells if key in self._records]
            ends_ms = [r.end_ms for r in records if r.end_ms is not None]
            end_ms = max([self._records[row.key].start_ms, *ends_ms])  # cells may be older than the row: from the store
            if row.of_trials:
                self._end(row.key, "FINISHED", end_ms)
                continue
            finished = [r for r in records if r.tags[schema.TAG_STATUS] == "FINISHED"]
            self._write_aggregates(row.key, finished, end_ms)
            self._end(row.key, row_status([self.status_of(key) for key in cells]), end_ms)

    def _find_experiment(self, header: StudyHeader) -> None:
        from mlflow.exceptions import MlflowException

        def find_or_create() -> Any:
            found = self._client.get_experiment_by_name(header.study)
            if found is None:
                tags = {"mlflow.note.content": f"{header.title}\n\n{header.description}".strip()}
                root = None if self.artifact_root is None else self.artifact_root.as_uri()
                try:
                    self._client.create_experiment(header.study, root, tags)
                except MlflowException as error:
                    if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another driver was first
                        raise
                found = self._client.get_experiment_by_name(header.study)
            return found

        experiment = self._persist(f"opening study {header.study!r}", find_or_create)
        if experiment.lifecycle_stage != "active":
            raise LedgerError(
                f"study {header.study!r} was deleted in MLflow: restore it (`mlflow experiments restore "
                f"--experiment-id {experiment.experiment_id}`) or give the study another name"
            )
        self._experiment_id, self._experiment_tags = experiment.experiment_id, dict(experiment.tags)

    def _find_records(self) -> dict[str, _Record]:
        """All runs of ours in the experiment, by key; of two with one key (two drivers at once) the older counts."""
        runs = self._persist("reading the runs", find_runs, self._client, self._experiment_id)
        records: dict[str, _Record] = {}
        for run in sorted(runs, key=lambda run: (run.info.start_time, run.info.run_id)):
            key = run.data.tags.get(schema.TAG_KEY)
            if key in records:
                log.warning(
                    "runs %s and %s have the same key: the second is retired", records[key].run_id, run.info.run_id
                )
                key = f"{key} (run {run.info.run_id})"
            if key is not None:
                records[key] = _Record.of(run)
        return records

    def _write_header(self, header: StudyHeader) -> None:
        """Replace the experiment's header; the units that earlier launches counted stay until new ones are given."""
        try:
            header = keep_counted(header, schema.header_from_tags(self._experiment_tags))
        except ValueError as error:
            log.warning("the header of %r is unreadable (%s) and written anew", header.study, first_line(error))
        tags = schema.header_tags(header)
        self._write_experiment_tags(tags)
        for name in [n for n in self._experiment_tags if n.startswith(schema.TAG_HEADER) and n not in tags]:
            self._persist("writing the header", self._delete_experiment_tag, name)

    def _write_experiment_tags(self, tags: Mapping[str, str]) -> None:
        for name, value in tags.items():
            if self._experiment_tags.get(name) != value:
                set_tag = self._client.set_experiment_tag
                self._persist("writing the study's tags", set_tag, self._experiment_id, name, value)
                self._experiment_tags[name] = value

    def _delete_experiment_tag(self, name: str) -> None:
        present = self._client.get_experiment(self._experiment_id).tags
        if name in present:
            self._client.delete_experiment_tag(self._experiment_id, name)
        del self._experiment_tags[name]

    def _describe_row(self, row: RowHeader, start_ms: int) -> None:
        tags = self._common_tags("row", row.key, row.name, row.index, row.dataset) | {
            schema.TAG_MARKS: as_json(row.marks),
            schema.TAG_CHANGES: as_json(row.changes),
        }
        self._describe(row.key, self._run_name(row.name, row.dataset), tags, row.params, start_ms)

    def _describe_cell(self, cell: CellHeader, start_ms: int) -> None:
        tags = self._common_tags("cell", cell.key, cell.row, cell.row_index, cell.dataset) | {
            "mlflow.parentRunId": self._records[cell.row_key].run_id,
            schema.TAG_SEED: str(cell.seed),
            schema.TAG_CONFIG: cell.config_digest,
            schema.TAG_SPLIT: cell.split_digest,
            schema.TAG_STAGES: as_json(cell.stage_keys),
        }
        name = f"{self._run_name(cell.row, cell.dataset)} · seed {cell.seed}"
        self._describe(cell.key, name, tags, cell.params, start_ms)
        self._write_input(cell)

    def _run_name(self, row: str, dataset: str) -> str:
        several = len({header.dataset for header in self._rows.values()}) > 1
        return f"{row} · {dataset}" if several else row

    def _common_tags(self, kind: str, key: str, row: str, row_index: int, dataset: str) -> dict[str, str]:
        return {
            schema.TAG_KIND: kind,
            schema.TAG_KEY: key,
            schema.TAG_CURRENT: "true",
            schema.TAG_STUDY: self._study,
            schema.TAG_ROW: row,
            schema.TAG_ROW_INDEX: str(row_index),
            schema.TAG_DATASET: dataset,
        }

    # -------------------------------------------------------------------------------------------- cells

    def log_epochs(self, cell_key: str, epochs: Sequence[Epoch]) -> None:
        """Add epochs to a cell, which starts it; written in batches, at the latest by `flush` or `finish`.

        Epochs of a cell that had ended well before this session are in the ledger already and are passed over; a
        failed cell runs again. NaN and ±inf are kept as such.

        Raises:
            LedgerError: the cell is unknown or was finished in this session.
        """
        if cell_key in self._complete or not epochs:
            return
        if self.status_of(cell_key) in ("FINISHED", "PRUNED"):
            raise LedgerError(f"cell {cell_key} is finished: log its epochs before that")
        metrics = [metric for e in epochs for metric in _metrics(e.metrics, e.time_ms, e.epoch)]
        self._start(cell_key, epochs[0].time_ms)
        buffer = self._buffer.setdefault(cell_key, [])
        if len(buffer) + len(metrics) < METRICS_A_BATCH:
            buffer.extend(metrics)
            return
        self._flush_cell(cell_key)
        self._log_metrics(cell_key, metrics)  # not by the buffer, which would hold them twice if the call is repeated

    def flush(self) -> None:
        """Write all buffered epochs."""
        for key in list(self._buffer):
            self._flush_cell(key)

    def finish(self, cell_key: str, outcome: CellOutcome) -> None:
        """End a cell; its status is written last. The same outcome again changes nothing.

        Raises:
            LedgerError: the cell is unknown, the outcome is none, or the predictions are not there.
        """
        if outcome.status not in ("FINISHED", "FAILED", "PRUNED"):
            raise LedgerError(f"cell {cell_key} cannot end as {outcome.status!r}: expected FINISHED, FAILED or PRUNED")
        predictions = None if outcome.predictions is None else file_digest(outcome.predictions)
        digest = outcome_digest(outcome, predictions)
        status = self.status_of(cell_key)
        if status == outcome.status and self._records[cell_key].tags.get(schema.TAG_OUTCOME) == digest:
            return
        if status is None:
            self._start(cell_key, outcome.end_ms)
        self._flush_cell(cell_key)
        self._write_artifacts(cell_key, outcome)
        self._write_latest(cell_key, outcome_metrics(outcome.metrics), outcome.end_ms)
        self._write_tags(cell_key, outcome_tags(outcome, predictions, self._records[cell_key].tags))
        self._end(cell_key, RUN_STATUS[outcome.status], outcome.end_ms)
        self._write_tags(cell_key, {schema.TAG_STATUS: outcome.status, schema.TAG_OUTCOME: digest})

    def status_of(self, cell_key: str) -> CellStatus | None:
        """A cell's status; None before it has started. RUNNING also after its driver was killed."""
        if cell_key not in self._cells:
            raise LedgerError(f"no cell {cell_key} in study {self._study!r}: declare it in `open`")
        record = self._records.get(cell_key)
        return None if record is None else record.tags[schema.TAG_STATUS]  # type: ignore[return-value]

    def run_id(self, key: str) -> str:
        """MLflow run of a row or cell."""
        if key not in self._records:
            raise LedgerError(f"no run with key {key} in study {self._study!r}: a cell has one from its first epoch on")
        return self._records[key].run_id

    def ui_command(self) -> str:
        """What opens the MLflow UI: a command for a local store, else the address of the study on the server."""
        if not self.tracking_uri.startswith(SQLITE):
            return f"{self.tracking_uri.rstrip('/')}{self.ui_path()}"
        return f"mlflow ui --backend-store-uri {shlex.quote(self.tracking_uri)}"

    def ui_path(self) -> str:
        """Where the study lies below the UI's address: its runs, with the main metric's mean, deviation and n."""
        return f"/#/experiments/{self._experiment_id}/runs?viewStateShareKey={VIEW}"

    def _start(self, cell_key: str, start_ms: int) -> None:
        """Make a cell RUNNING, and its row with it: a new run, or a failed one again."""
        cell = self._cells[cell_key]
        if self.status_of(cell_key) is None:
            self._describe_cell(cell, start_ms)
        elif self.status_of(cell_key) != "RUNNING":
            self._write_tags(cell_key, {schema.TAG_STATUS: "RUNNING", schema.TAG_OUTCOME: "", schema.TAG_ERROR: ""})
        for key in (cell_key, cell.row_key):
            self._resume(key)

    def _flush_cell(self, cell_key: str) -> None:
        buffer = self._buffer.get(cell_key, [])
        while buffer:
            self._log_metrics(cell_key, buffer[:METRICS_A_BATCH])
            del buffer[:METRICS_A_BATCH]
        self._buffer.pop(cell_key, None)

    def _log_metrics(self, cell_key: str, metrics: Sequence[Metric]) -> None:
        for part in _parts(metrics, METRICS_A_BATCH):
            self._log_batch(cell_key, metrics=part)
            self._records[cell_key].metrics |= {metric.key: metric.value for metric in part}

    def _write_artifacts(self, cell_key: str, outcome: CellOutcome) -> None:
        run_id = self._records[cell_key].run_id
        texts = {"effective.json": json.dumps(outcome.effective, indent=1, sort_keys=True)}
        if outcome.error is not None and len(outcome.error) > TAG_LENGTH:
            texts["error.txt"] = outcome.error
        for name, text in texts.items():
            self._persist(f"writing {name}", self._client.log_text, run_id, text, name)
        if outcome.predictions is not None:
            with _named(outcome.predictions, schema.PREDICTIONS) as path:
                self._persist("writing predictions", self._client.log_artifact, run_id, str(path))
        _forget_artifact_store(run_id)

    # -------------------------------------------------------------------------------------------- runs

    def _describe(self, key: str, name: str, tags: dict[str, str], params: Mapping[str, str], start_ms: int) -> None:
        """Find or create a run, and bring name, tags and parameters to what they shall be."""
        if key not in self._records:
            born = tags if tags[schema.TAG_KIND] == "row" else tags | {schema.TAG_STATUS: "RUNNING"}
            self._records[key] = self._create(key, name, born, start_ms)
        record = self._records[key]
        if record.name != name:
            self._persist(f"naming run {name!r}", self._client.update_run, record.run_id, None, name)
            record.name = name
        self._write_tags(key, tags)
        self._write_params(key, params)

    def _create(self, key: str, name: str, tags: dict[str, str], start_ms: int) -> _Record:
        """A new run with its tags, in one transaction. A retry looks first whether the run was made after all."""
        attempts = 0

        def create() -> Any:
            nonlocal attempts
            attempts += 1
            condition = f"tags.`{schema.TAG_KEY}` = '{key}'"
            found = find_runs(self._client, self._experiment_id, condition) if attempts > 1 else []
            return found[0] if found else self._client.create_run(self._experiment_id, start_ms, tags, name)

        for tag, value in tags.items():
            check_tag(tag, value)
        return _Record.of(self._persist(f"creating run {name!r}", create))

    def _resume(self, key: str) -> None:
        record = self._records[key]
        if record.status != "RUNNING":
            self._persist("resuming a run", self._client.update_run, record.run_id, "RUNNING")
            record.status = "RUNNING"

    def _end(self, key: str, status: str, end_ms: int) -> None:
        record = self._records[key]
        if (record.status, record.end_ms) != (status, end_ms):
            self._persist("ending a run", self._client.set_terminated, record.run_id, status, end_ms)
            record.status, record.end_ms = status, end_ms

    def _write_tags(self, key: str, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        record = self._records[key]
        changed = {name: value for name, value in tags.items() if record.tags.get(name) != value}
        for name, value in changed.items():
            check_tag(name, value)
        for part in _parts([RunTag(name, value) for name, value in changed.items()], TAGS_A_BATCH):
            self._log_batch(key, tags=part)
        record.tags |= changed

    def _write_params(self, key: str, params: Mapping[str, str]) -> None:
        """Log parameters that are not there yet; those beyond MLflow's length in full as artifact parameters.json."""
        from mlflow.entities import Param

        record = self._records[key]
        wanted = {metric_key(name): shortened(value) for name, value in params.items()}
        differing = [name for name, value in wanted.items() if record.params.get(name, value) != value]
        if differing:
            raise LedgerError(
                f"run {record.name!r} of study {self._study!r} was logged with other values of "
                f"{', '.join(differing[:3])}: "
                "a parameter never changes, so the key of a run must change with it; or give the study another name"
            )
        new = [Param(name, value) for name, value in wanted.items() if name not in record.params]
        if new and any(len(value) > PARAM_LENGTH for value in params.values()):
            text = json.dumps(dict(params), indent=1, sort_keys=True)
            self._persist("writing parameters", self._client.log_text, record.run_id, text, "parameters.json")
        for part in _parts(new, TAGS_A_BATCH):
            self._log_batch(key, params=part)
        record.params |= wanted

    def _write_input(self, cell: CellHeader) -> None:
        """The cell's data set and its split as MLflow data set inputs."""
        from mlflow.entities import Dataset, DatasetInput

        record, source = self._records[cell.key], json.dumps({"uri": cell.dataset_source})
        digests = {cell.dataset: cell.dataset_digest, f"{cell.dataset} split": cell.split_digest}
        wanted = [(name, digest[:DIGEST_LENGTH]) for name, digest in digests.items()]
        new = [named for named in wanted if named not in record.inputs]
        if new:
            inputs = [DatasetInput(Dataset(name, digest, "local", source)) for name, digest in new]
            self._persist("logging the data set", self._client.log_inputs, record.run_id, inputs)
            record.inputs.update(new)

    def _write_latest(self, key: str, values: Mapping[str, float], time_ms: int) -> None:
        """Make these the latest values of metrics without epochs (step 0); equal ones are left alone."""
        from mlflow.entities import Metric

        record, changed = self._records[key], []
        for name, value in values.items():
            time_of_key = time_ms
            if name in record.metrics:
                if same(record.metrics[name], value):
                    continue
                history = self._persist("reading", self._client.get_metric_history, record.run_id, name)
                time_of_key = max(time_ms, 1 + max(metric.timestamp for metric in history))
            changed.append(Metric(name, value, time_of_key, 0))
        for part in _parts(changed, METRICS_A_BATCH):
            self._log_batch(key, metrics=part)
        record.metrics |= {metric.key: metric.value for metric in changed}

    def _write_aggregates(self, row_key: str, finished: Sequence[_Record], time_ms: int) -> None:
        values = aggregates([record.metrics for record in finished])
        for name in self._records[row_key].metrics.keys() - values.keys():  # of seeds that are declared no more
            values[name] = 0.0 if name.endswith("/n") else math.nan
        self._write_latest(row_key, values, time_ms)

    def _log_batch(self, key: str, **what: Sequence[Any]) -> None:
        run_id = self._records[key].run_id
        self._persist(f"writing {next(iter(what))}", partial(self._client.log_batch, run_id, **what))

    def _persist(self, what: str, action: Callable[..., T], *args: Any) -> T:
        """Do what may be repeated, until the store takes it or patience ends."""
        from mlflow.exceptions import MlflowException

        def once() -> T:
            with environment(MLFLOW_HTTP_REQUEST_MAX_RETRIES="0"):  # its own retries take minutes, and may do twice
                return action(*args)

        return patiently(once, f"{what} (ledger {self.tracking_uri})", (MlflowException, OSError), self.PATIENCE_S)


def _create_database(path: Path) -> None:
    """MLflow's tables in a new file."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    SqlAlchemyStore(f"{SQLITE}{path}", str(path.parent / "artifacts")).engine.dispose()


def _forget_artifact_store(run_id: str) -> None:
    """MLflow keeps the stores of its last thousand runs, each with a pool of threads, a queue and their locks."""
    from mlflow.tracking._tracking_service import utils

    utils._artifact_repos_cache.pop(run_id, None)


@contextmanager
def _named(path: Path, name: str) -> Iterator[Path]:
    """The file under the name that its artifact shall have; a copy where it has another."""
    if path.name == name:
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(shutil.copyfile(path, Path(folder, name)))


def _metrics(values: Mapping[str, float], time_ms: int, step: int) -> list[Metric]:
    from mlflow.entities import Metric

    return [Metric(checked_key(name), float(value), time_ms, step) for name, value in values.items()]


def _view(header: StudyHeader) -> str:
    """State of MLflow's table of runs: columns for the main metric of rows and of cells."""
    if header.search:
        return as_json({"selectedColumns": [f"metrics.`{metric_key(schema.BEST + schema.VAL + header.main_metric)}`"]})
    metric = metric_key(schema.TEST + header.main_metric)
    return as_json({"selectedColumns": [f"metrics.`{metric}{of}`" for of in ("/mean", "/std", "/n", "")]})


def _parts(items: Sequence[T], size: int) -> Iterable[Sequence[T]]:
    return (items[i : i + size] for i in range(0, len(items), size))


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
