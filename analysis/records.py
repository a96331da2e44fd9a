"""Read a study back from the ledger (MLflow). The only file of the analysis that imports mlflow.

`load` reads a local ledger from its tables (`analysis.ledger_tables`), without mlflow; of a server it finds the
study's current runs in one paged search and their histories in bulk. `connect` and `find_runs` serve the ledger's
writer as well, so that both sides refuse the same bad addresses in the same words.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit
from urllib.request import url2pathname

import pandas as pd

from analysis import schema
from analysis.credentials import SIGN_IN, holds_credentials, without_credentials
from analysis.ledger_tables import LedgerRun, Values, open_tables
from analysis.record_frames import Place, cells_frame, declared, history_frame, status_of
from analysis.schema import StudyHeader
from analysis.tracking import (
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
    with _reading(tracking_uri) as ledger:
        experiment_id, header = _find_study(ledger, tracking_uri, study)
        runs = ledger.current_runs(experiment_id)
        cells = _cells_by_place(header, [run for run in runs if run.tags.get(schema.TAG_KIND) == "cell"])
        history = ledger.history([run.run_id for run in cells.values()])
    row_runs = [run for run in runs if run.tags.get(schema.TAG_KIND) == "row"]
    return StudyRecords(
        header=header,
        rows=tuple(_row(name, index, row_runs) for index, name in enumerate(header.rows)),
        cells=cells_frame(header, cells),
        history=history_frame(cells, history),
        predictions=Predictions(
            {
                run.run_id: run.artifact_uri
                for run in cells.values()
                if status_of(run) == "FINISHED" and run.tags.get(schema.TAG_PREDICTIONS)
            },
            tracking_uri,
        ),
    )


def studies_of(tracking_uri: str) -> frozenset[str]:
    """Names of the studies that a ledger holds.

    Raises:
        LedgerError: no such ledger.
    """
    with _reading(tracking_uri) as ledger:
        return frozenset(ledger.studies())


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
    if holds_credentials(tracking_uri):
        raise LedgerError(
            f"{without_credentials(tracking_uri)}: an address that holds a user or password would show it in logs and "
            f"process lists; {SIGN_IN}"
        )
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
        if error.get_http_status_code() in (401, 403):
            raise LedgerError(f"{tracking_uri} {_refusal()}; {SIGN_IN}") from error
        if tracking_uri.startswith(SQLITE):
            remedy = f"bring its schema up to date (`mlflow db upgrade {tracking_uri}`), or name another file"
        raise LedgerError(f"the ledger at {tracking_uri} cannot be used: {first_line(error)}; {remedy}") from error
    return client


def _refusal() -> str:
    """How a server that has users refused us; MLflow also takes both names from ~/.mlflow/credentials."""
    user = os.environ.get("MLFLOW_TRACKING_USERNAME")
    if user is None and not os.environ.get("MLFLOW_TRACKING_TOKEN"):
        return "asks for a user, and MLFLOW_TRACKING_USERNAME is not set"
    return f"refuses user {user!r}" if user is not None else "refuses the token"


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


# ------------------------------------------------------------------------------------------------ sources


class _Source(Protocol):
    """Where a study is read from; see `LedgerTables` for what each call gives."""

    def experiment(self, name: str) -> tuple[str, dict[str, str]] | None: ...

    def studies(self) -> list[str]: ...

    def current_runs(self, experiment_id: str) -> list[LedgerRun]: ...

    def history(self, run_ids: Iterable[str]) -> dict[str, Values]: ...


def _reading(tracking_uri: str) -> AbstractContextManager[_Source]:
    if tracking_uri.startswith(SQLITE):
        return open_tables(sqlite_path(tracking_uri))
    return nullcontext(_Server(tracking_uri))


SERVER_RUNS, SERVER_RESULTS = 100, 25_000  # what one request for histories may ask for and answer with


class _Server:
    """A study on an MLflow server."""

    def __init__(self, tracking_uri: str) -> None:
        self._uri = tracking_uri
        self._client = connect(tracking_uri)
        self._keys: dict[str, list[str]] = {}  # run id → keys of its metrics by epoch

    def experiment(self, name: str) -> tuple[str, dict[str, str]] | None:
        found = self._client.get_experiment_by_name(name)
        if found is None or found.lifecycle_stage != "active":
            return None
        return found.experiment_id, dict(found.tags)

    def studies(self) -> list[str]:
        return [found.name for found in self._client.search_experiments() if schema.TAG_HEADER in found.tags]

    def current_runs(self, experiment_id: str) -> list[LedgerRun]:
        runs = find_runs(self._client, experiment_id, f"tags.`{schema.TAG_CURRENT}` = 'true'")
        for run in runs:
            told = (key for key in run.data.metrics if not key.startswith((schema.TEST, schema.BEST)))
            self._keys[run.info.run_id] = list(told)
        return [LedgerRun(r.info.run_id, r.info.artifact_uri, r.data.tags, r.data.metrics) for r in runs]

    def history(self, run_ids: Iterable[str]) -> dict[str, Values]:
        """One request a metric and 100 runs, through the server's bulk endpoint (MLflow's client does not offer it)."""
        holders: dict[str, list[str]] = defaultdict(list)
        found: dict[str, list[dict[str, Any]]] = {run_id: [] for run_id in run_ids}
        for run_id in found:
            for key in self._keys[run_id]:
                holders[key].append(run_id)
        for key, runs in sorted(holders.items()):
            for i in range(0, len(runs), SERVER_RUNS):
                for metric in self._request_history(key, runs[i : i + SERVER_RUNS]):
                    found[metric["run_id"]].append(metric)
        return {run_id: _last_values(metrics) for run_id, metrics in found.items()}

    def _request_history(self, key: str, run_ids: list[str]) -> list[dict[str, Any]]:
        from mlflow.utils.credentials import get_default_host_creds
        from mlflow.utils.rest_utils import http_request_safe

        answer = http_request_safe(
            get_default_host_creds(self._uri),
            "/ajax-api/2.0/mlflow/metrics/get-history-bulk",
            "GET",
            params={"run_id": run_ids, "metric_key": key, "max_results": SERVER_RESULTS},
        )
        metrics: list[dict[str, Any]] = answer.json()["metrics"]
        if len(metrics) < SERVER_RESULTS:
            return metrics
        if len(run_ids) == 1:
            raise LedgerError(
                f"run {run_ids[0]} holds {SERVER_RESULTS} or more values of {key!r}: more than one can read"
            )
        half = len(run_ids) // 2  # the answer was cut short
        return self._request_history(key, run_ids[:half]) + self._request_history(key, run_ids[half:])


def _last_values(metrics: list[dict[str, Any]]) -> Values:
    told = sorted(metrics, key=lambda metric: (metric["key"], int(metric["step"]), int(metric["timestamp"])))
    return {(metric["key"], int(metric["step"])): float(metric["value"]) for metric in told}


# ------------------------------------------------------------------------------------------------ runs → records


def _find_study(ledger: _Source, tracking_uri: str, study: str) -> tuple[str, StudyHeader]:
    experiment = ledger.experiment(study)
    try:
        if experiment is not None:
            header = schema.header_from_tags(experiment[1])
            if header is not None:
                return experiment[0], header
    except ValueError as error:
        raise LedgerError(
            f"the header of study {study!r} in {tracking_uri} is unreadable ({first_line(error)}): it was written by "
            "another version; run the study again to write it anew (finished cells are not trained again)"
        ) from error
    raise LedgerError(f"no study {study!r} in {tracking_uri}; it holds {', '.join(sorted(ledger.studies())) or 'none'}")


def _row(name: str, index: int, runs: Iterable[LedgerRun]) -> RowRecord:
    own = [run for run in runs if run.tags.get(schema.TAG_ROW) == name]
    tags = own[0].tags if own else {}
    return RowRecord(
        name=name,
        index=index,
        marks=json.loads(tags.get(schema.TAG_MARKS, "{}")),
        changes=json.loads(tags.get(schema.TAG_CHANGES, "{}")),
        run_ids={run.tags[schema.TAG_DATASET]: run.run_id for run in own},
    )


def _cells_by_place(header: StudyHeader, runs: Iterable[LedgerRun]) -> dict[Place, LedgerRun]:
    """The declared cells that have a run, in table order."""
    cells: dict[Place, LedgerRun] = {}
    for run in runs:
        tags = run.tags
        place = (tags[schema.TAG_DATASET], tags[schema.TAG_ROW], int(tags[schema.TAG_SEED]))
        if place in cells:
            raise LedgerError(
                f"study {header.study!r} has two current runs of row {place[1]!r}, seed {place[2]}, data set "
                f"{place[0]!r}: {cells[place].run_id} and {run.run_id}; run the study again to mend it"
            )
        cells[place] = run
    return {place: cells[place] for place in declared(header) if place in cells}
