"""Read a study back from the ledger (MLflow). The only file of the analysis that imports mlflow.

`load` finds the study's current runs in one paged search and their histories in bulk. `connect` and `find_runs` serve
the ledger's writer as well, so that both sides refuse the same bad addresses in the same words.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np
import pandas as pd

from analysis import schema
from analysis.schema import StudyHeader
from analysis.tracking import (
    LOCK_PATIENCE_S,
    SQLITE,
    LedgerError,
    check_database,
    environment,
    first_line,
    sqlite_path,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

PROBE_TIMEOUT_S = 4  # for connecting and again for the answer: an unreachable server is told within 8 s
MISSING = "MISSING"  # status of a declared cell without a run


@dataclass(frozen=True)
class RowRecord:
    """A row of the table."""

    name: str
    index: int
    marks: dict[str, bool] = field(default_factory=dict)
    changes: dict[str, object] = field(default_factory=dict)
    run_ids: dict[str, str] = field(default_factory=dict)  # data set → MLflow run of the row


@dataclass(frozen=True)
class StudyRecords:
    """A study as the ledger holds it.

    Attributes:
        header: facts of the study.
        rows: in table order.
        cells: one line a declared cell, also those that failed or never ran: study, dataset, row, row_index, seed,
            status (CellStatus, or 'MISSING' where no run exists), error, best_epoch, mlflow_run_id, weights_sha256,
            trajectory_sha256, split_digest, config_digest, noop_of, undefined_classes (tuple), then a float column a
            test metric without its prefix ('macro_auc', 'auc/Hernia', …; NaN where the cell has none).
        history: tidy, one line a metric and epoch: dataset, row, seed, epoch, metric, value.
        predictions: MLflow run id → local path of predictions.npz (names, groups, labels, scores, classes).
    """

    header: StudyHeader
    rows: tuple[RowRecord, ...]
    cells: pd.DataFrame
    history: pd.DataFrame
    predictions: dict[str, Path] = field(default_factory=dict)


def load(tracking_uri: str, study: str) -> StudyRecords:
    """Read a study as it was last declared; runs of earlier declarations are left out.

    Args:
        tracking_uri: sqlite:///FILE or http(s)://SERVER.
        study: its name, which is the MLflow experiment's.

    Raises:
        LedgerError: no such ledger or study, or one that another version wrote.
    """
    client = connect(tracking_uri)
    experiment_id, header = _find_study(client, tracking_uri, study)
    runs = find_runs(client, experiment_id, f"tags.`{schema.TAG_CURRENT}` = 'true'")
    cells = _cells_by_place(header, [run for run in runs if run.data.tags.get(schema.TAG_KIND) == "cell"])
    row_runs = [run for run in runs if run.data.tags.get(schema.TAG_KIND) == "row"]
    return StudyRecords(
        header=header,
        rows=tuple(_row(name, index, row_runs) for index, name in enumerate(header.rows)),
        cells=_cells_frame(header, cells),
        history=_history_frame(tracking_uri, experiment_id, cells),
        predictions=Predictions(
            {
                run.info.run_id: run.info.artifact_uri
                for run in cells.values()
                if _status(run) == "FINISHED" and run.data.tags.get(schema.TAG_PREDICTIONS)
            },
            tracking_uri,
        ),
    )


class Predictions(dict[str, Path]):
    """Run id → local path of predictions.npz, resolved when it is read.

    A path of this machine is used as it lies; a server's artifact is downloaded once, into a folder that lives as
    long as this object.
    """

    def __init__(self, artifact_uris: Mapping[str, str], tracking_uri: str) -> None:
        """`artifact_uris`: run id → MLflow artifact folder of the run."""
        super().__init__(dict.fromkeys(artifact_uris, Path(schema.PREDICTIONS)))
        self._artifact_uris = dict(artifact_uris)
        self._tracking_uri = tracking_uri
        self._resolved: dict[str, Path] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __getitem__(self, run_id: str) -> Path:
        """Local path.

        Raises:
            KeyError: the run has no predictions.
            LedgerError: the artifact is not where the ledger says.
        """
        if run_id not in self._resolved:
            self._resolved[run_id] = self._resolve(run_id, self._artifact_uris[run_id])
        return self._resolved[run_id]

    def get(self, run_id: str, default: Any = None) -> Any:
        """Local path, or the default where the run has no predictions."""
        return self[run_id] if run_id in self else default  # noqa: SIM401 (which would call itself)

    def items(self) -> Any:
        """Pairs of run id and local path, each resolved as it comes."""
        return [(run_id, self[run_id]) for run_id in self]

    def values(self) -> Any:
        """Local paths, each resolved as it comes."""
        return [self[run_id] for run_id in self]

    def _resolve(self, run_id: str, artifact_uri: str) -> Path:
        address = urlsplit(artifact_uri)
        if address.scheme in ("", "file"):
            path = Path(url2pathname(address.path) if address.scheme else artifact_uri, schema.PREDICTIONS)
            if path.is_file():
                return path
            raise LedgerError(
                f"run {run_id} had its predictions at {path}, which is gone: put the folder of artifacts back, or "
                "delete the run and run the study again"
            )
        return self._download(run_id)

    def _download(self, run_id: str) -> Path:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="spft-predictions-")
        folder = Path(self._folder.name, run_id)
        folder.mkdir(exist_ok=True)
        try:
            return Path(MlflowClient(self._tracking_uri).download_artifacts(run_id, schema.PREDICTIONS, str(folder)))
        except (MlflowException, OSError) as error:
            raise LedgerError(
                f"{schema.PREDICTIONS} of run {run_id} cannot be had from {self._tracking_uri}: {first_line(error)}"
            ) from error


# ------------------------------------------------------------------------------------------------ the tracking store


def connect(tracking_uri: str) -> MlflowClient:
    """A client of an existing ledger, checked to answer; MLflow's chatter and telemetry are turned off.

    Raises:
        LedgerError: within 10 s where the address is none, the server does not answer, or the file is missing or not
            an MLflow database. A database locked by another process is waited for.
    """
    quiet_mlflow()
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    scheme = urlsplit(tracking_uri).scheme
    if tracking_uri.startswith(SQLITE):
        check_database(sqlite_path(tracking_uri))
    elif scheme not in ("http", "https"):
        raise LedgerError(f"{tracking_uri!r} is no tracking URI: expected sqlite:///FILE or http(s)://SERVER")
    try:
        with environment(MLFLOW_HTTP_REQUEST_MAX_RETRIES="0", MLFLOW_HTTP_REQUEST_TIMEOUT=str(PROBE_TIMEOUT_S)):
            client = MlflowClient(tracking_uri)
            client.search_experiments(max_results=1)
    except MlflowException as error:
        remedy = "start the MLflow server or correct the address"
        if tracking_uri.startswith(SQLITE):
            remedy = f"bring its schema up to date (`mlflow db upgrade {tracking_uri}`), or name another file"
        raise LedgerError(f"the ledger at {tracking_uri} cannot be used: {first_line(error)}; {remedy}") from error
    return client


def quiet_mlflow() -> None:
    """Turn off MLflow's telemetry and its notes on success; a user's own setting of a variable stays."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    import mlflow  # noqa: F401  (importing it sets up the loggers that are turned down here)

    logging.getLogger("mlflow.store").setLevel(logging.WARNING)  # 'Creating initial MLflow database tables…'
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # prints each error that it also raises


def find_runs(client: MlflowClient, experiment_id: str, condition: str = "") -> list[Run]:
    """All undeleted runs of an experiment that meet an MLflow filter, with their tags, parameters and metrics."""
    runs: list[Run] = []
    token = None
    while True:
        page = client.search_runs([experiment_id], condition, max_results=1000, page_token=token)
        runs.extend(page)
        token = page.token
        if not token:
            return runs


# ------------------------------------------------------------------------------------------------ runs → records


def _find_study(client: MlflowClient, tracking_uri: str, study: str) -> tuple[str, StudyHeader]:
    experiment = client.get_experiment_by_name(study)
    try:
        if experiment is not None and experiment.lifecycle_stage == "active":
            header = schema.header_from_tags(experiment.tags)
            if header is not None:
                return experiment.experiment_id, header
    except ValueError as error:
        raise LedgerError(
            f"the header of study {study!r} in {tracking_uri} is unreadable ({first_line(error)}): it was written by "
            "another version; run the study again to write it anew (finished cells are not trained again)"
        ) from error
    known = sorted(e.name for e in client.search_experiments() if schema.TAG_HEADER in e.tags)
    raise LedgerError(f"no study {study!r} in {tracking_uri}; it holds {', '.join(known) or 'none'}")


def _row(name: str, index: int, runs: Iterable[Run]) -> RowRecord:
    own = [run for run in runs if run.data.tags.get(schema.TAG_ROW) == name]
    tags = own[0].data.tags if own else {}
    return RowRecord(
        name=name,
        index=index,
        marks=json.loads(tags.get(schema.TAG_MARKS, "{}")),
        changes=json.loads(tags.get(schema.TAG_CHANGES, "{}")),
        run_ids={run.data.tags[schema.TAG_DATASET]: run.info.run_id for run in own},
    )


Place = tuple[str, str, int]  # data set, row, seed


def _cells_by_place(header: StudyHeader, runs: Iterable[Run]) -> dict[Place, Run]:
    """The declared cells that have a run, in table order."""
    cells: dict[Place, Run] = {}
    for run in runs:
        tags = run.data.tags
        place = (tags[schema.TAG_DATASET], tags[schema.TAG_ROW], int(tags[schema.TAG_SEED]))
        if place in cells:
            raise LedgerError(
                f"study {header.study!r} has two current runs of row {place[1]!r}, seed {place[2]}, data set "
                f"{place[0]!r}: {cells[place].info.run_id} and {run.info.run_id}; run the study again to mend it"
            )
        cells[place] = run
    return {place: cells[place] for place in _declared(header) if place in cells}


def _declared(header: StudyHeader) -> list[Place]:
    return [(d, r, s) for d in header.datasets for r in header.rows for s in header.seeds]


def _cells_frame(header: StudyHeader, cells: Mapping[Place, Run]) -> pd.DataFrame:
    places = _declared(header)
    facts = [_facts(header, place, cells.get(place)) for place in places]
    frame = pd.DataFrame(facts, dtype=object).astype({"row_index": int, "seed": int, "best_epoch": "Int64"})
    metrics = pd.DataFrame([_test_metrics(cells.get(place)) for place in places], dtype=float)
    return pd.concat([frame, metrics], axis=1)


def _facts(header: StudyHeader, place: Place, run: Run | None) -> dict[str, Any]:
    tags: Mapping[str, str] = run.data.tags if run is not None else {}
    best = tags.get(schema.TAG_BEST_EPOCH)
    return {
        "study": header.study,
        "dataset": place[0],
        "row": place[1],
        "row_index": header.rows.index(place[1]),
        "seed": place[2],
        "status": MISSING if run is None else _status(run),
        "error": tags.get(schema.TAG_ERROR) or None,
        "best_epoch": int(best) if best else None,
        "mlflow_run_id": None if run is None else run.info.run_id,
        "weights_sha256": tags.get(schema.TAG_WEIGHTS) or None,
        "trajectory_sha256": tags.get(schema.TAG_TRAJECTORY) or None,
        "split_digest": tags.get(schema.TAG_SPLIT) or None,
        "config_digest": tags.get(schema.TAG_CONFIG) or None,
        "noop_of": tags.get(schema.TAG_NOOP_OF) or None,
        "undefined_classes": tuple(json.loads(tags.get(schema.TAG_UNDEFINED) or "[]")),
    }


def _status(run: Run) -> str:
    return str(run.data.tags[schema.TAG_STATUS])


def _test_metrics(run: Run | None) -> dict[str, float]:
    """Test metrics of a finished cell; a cell that is not finished has none, whatever an earlier attempt left."""
    if run is None or _status(run) != "FINISHED":
        return {}
    values = {schema.metric_name(key): _stored_value(value) for key, value in sorted(run.data.metrics.items())}
    return {name.removeprefix(schema.TEST): value for name, value in values.items() if name.startswith(schema.TEST)}


def _stored_value(value: float) -> float:
    """A metric's value as it was logged: MLflow's SQL stores hold ±inf as the largest double."""
    return value * np.inf if abs(value) == sys.float_info.max else value


# ------------------------------------------------------------------------------------------------ histories


HISTORY = ["dataset", "row", "seed", "epoch", "metric", "value"]


def _history_frame(tracking_uri: str, experiment_id: str, cells: Mapping[Place, Run]) -> pd.DataFrame:
    """Tidy frame of all metrics by epoch; an epoch that was trained twice counts with its last values."""
    raw = _raw_history(tracking_uri, experiment_id, list(cells.values()))
    places = {run.info.run_id: place for place, run in cells.items()}
    raw = raw[raw["run_id"].isin(places) & ~raw["key"].str.startswith((schema.TEST, schema.BEST))]
    raw = raw.sort_values("timestamp", kind="stable").drop_duplicates(["run_id", "key", "epoch"], keep="last")
    names = {key: schema.metric_name(key) for key in raw["key"].unique()}
    tidy = pd.DataFrame(
        {
            "dataset": raw["run_id"].map({run_id: place[0] for run_id, place in places.items()}),
            "row": raw["run_id"].map({run_id: place[1] for run_id, place in places.items()}),
            "seed": raw["run_id"].map({run_id: place[2] for run_id, place in places.items()}),
            "epoch": raw["epoch"],
            "metric": raw["key"].map(names),
            "value": raw["value"].where(raw["value"].abs() != sys.float_info.max, raw["value"] * np.inf),
        },
        columns=HISTORY,
    )
    order = {run_id: i for i, run_id in enumerate(places)}
    ranks = raw.assign(cell=raw["run_id"].map(order)).sort_values(["cell", "key", "epoch"]).index
    return tidy.loc[ranks].reset_index(drop=True).astype({"seed": int, "epoch": int, "value": float})


def _raw_history(tracking_uri: str, experiment_id: str, runs: list[Run]) -> pd.DataFrame:
    """Columns run_id, key, epoch, value, timestamp (ms)."""
    if tracking_uri.startswith(SQLITE):
        return _history_from_database(tracking_uri, experiment_id)
    return _history_from_server(tracking_uri, runs)


def _history_from_database(tracking_uri: str, experiment_id: str) -> pd.DataFrame:
    """One query over MLflow's own table model.

    Measured with 1,000 cells × 20 epochs × 20 metrics: 2 s; `SqlAlchemyStore.get_metric_history_bulk` 14 s,
    `get_metric_history_bulk_interval` 100 s, `MlflowClient.get_metric_history` for each run and metric 125 s.
    """
    import sqlalchemy
    from mlflow.store.tracking.dbmodels.models import SqlMetric, SqlRun

    of_study = sqlalchemy.select(SqlRun.run_uuid).where(SqlRun.experiment_id == int(experiment_id))
    query = sqlalchemy.select(
        SqlMetric.run_uuid.label("run_id"),
        SqlMetric.key,
        SqlMetric.step.label("epoch"),
        SqlMetric.value,
        SqlMetric.timestamp,
        SqlMetric.is_nan,
    ).where(SqlMetric.run_uuid.in_(of_study))
    engine = sqlalchemy.create_engine(tracking_uri, connect_args={"timeout": LOCK_PATIENCE_S})
    try:
        frame = pd.read_sql(query, engine)
    finally:
        engine.dispose()
    frame["value"] = frame["value"].mask(frame.pop("is_nan").astype(bool))
    return frame


SERVER_RUNS, SERVER_RESULTS = 100, 25_000  # what one request for histories may ask for and answer with


def _history_from_server(tracking_uri: str, runs: list[Run]) -> pd.DataFrame:
    """One request a metric and 100 runs, through the server's bulk endpoint (MLflow's client does not offer it)."""
    keys = sorted({key for run in runs for key in run.data.metrics if not key.startswith((schema.TEST, schema.BEST))})
    found: list[dict[str, Any]] = []
    for key in keys:
        run_ids = [run.info.run_id for run in runs if key in run.data.metrics]
        for i in range(0, len(run_ids), SERVER_RUNS):
            found.extend(_request_history(tracking_uri, key, run_ids[i : i + SERVER_RUNS]))
    frame = pd.DataFrame(found, columns=["run_id", "key", "step", "value", "timestamp"])
    return frame.rename(columns={"step": "epoch"}).astype({"key": str, "run_id": str, "value": float})


def _request_history(tracking_uri: str, key: str, run_ids: list[str]) -> list[dict[str, Any]]:
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request_safe

    answer = http_request_safe(
        get_default_host_creds(tracking_uri),
        "/ajax-api/2.0/mlflow/metrics/get-history-bulk",
        "GET",
        params={"run_id": run_ids, "metric_key": key, "max_results": SERVER_RESULTS},
    )
    metrics: list[dict[str, Any]] = answer.json()["metrics"]
    if len(metrics) < SERVER_RESULTS:
        return metrics
    if len(run_ids) == 1:
        raise LedgerError(f"run {run_ids[0]} holds {SERVER_RESULTS} or more values of {key!r}: more than one can read")
    half = len(run_ids) // 2  # the answer was cut short
    return _request_history(tracking_uri, key, run_ids[:half]) + _request_history(tracking_uri, key, run_ids[half:])
