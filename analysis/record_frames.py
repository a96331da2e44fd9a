"""Runs of the ledger as frames: one line a cell, and one line a metric and epoch."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from analysis import schema
from analysis.ledger_tables import LedgerRun, Values
from analysis.schema import StudyHeader

MISSING = "MISSING"  # status of a declared cell without a run
Place = tuple[str, str, int]  # data set, row, seed


def declared(header: StudyHeader) -> list[Place]:
    """Places of the cells that a study declares, in table order."""
    return [(d, r, s) for d in header.datasets for r in header.rows for s in header.seeds]


def cells_frame(header: StudyHeader, cells: Mapping[Place, LedgerRun]) -> pd.DataFrame:
    """One line a declared cell, with or without a run; see `analysis.records.StudyRecords.cells`."""
    places = declared(header)
    facts = [_facts(header, place, cells.get(place)) for place in places]
    frame = pd.DataFrame(facts, dtype=object).astype({"row_index": int, "seed": int, "best_epoch": "Int64"})
    metrics = pd.DataFrame([_test_metrics(cells.get(place)) for place in places], dtype=float)
    return pd.concat([frame, metrics], axis=1)


def _facts(header: StudyHeader, place: Place, run: LedgerRun | None) -> dict[str, Any]:
    tags: Mapping[str, str] = run.tags if run is not None else {}
    best = tags.get(schema.TAG_BEST_EPOCH)
    return {
        "study": header.study,
        "dataset": place[0],
        "row": place[1],
        "row_index": header.rows.index(place[1]),
        "seed": place[2],
        "status": MISSING if run is None else status_of(run),
        "error": tags.get(schema.TAG_ERROR) or None,
        "best_epoch": int(best) if best else None,
        "mlflow_run_id": None if run is None else run.run_id,
        "weights_sha256": tags.get(schema.TAG_WEIGHTS) or None,
        "trajectory_sha256": tags.get(schema.TAG_TRAJECTORY) or None,
        "split_digest": tags.get(schema.TAG_SPLIT) or None,
        "config_digest": tags.get(schema.TAG_CONFIG) or None,
        "noop_of": tags.get(schema.TAG_NOOP_OF) or None,
        "undefined_classes": tuple(json.loads(tags.get(schema.TAG_UNDEFINED) or "[]")),
    }


def status_of(run: LedgerRun) -> str:
    """Status of a cell's run, see `analysis.schema.CellStatus`."""
    return str(run.tags[schema.TAG_STATUS])


def _test_metrics(run: LedgerRun | None) -> dict[str, float]:
    """Test metrics of a finished cell; a cell that is not finished has none, whatever an earlier attempt left."""
    if run is None or status_of(run) != "FINISHED":
        return {}
    values = {schema.metric_name(key): _stored_value(value) for key, value in sorted(run.metrics.items())}
    return {name.removeprefix(schema.TEST): value for name, value in values.items() if name.startswith(schema.TEST)}


def _stored_value(value: float) -> float:
    """A metric's value as it was logged: MLflow's SQL stores hold ±inf as the largest double."""
    return value * np.inf if abs(value) == sys.float_info.max else value


HISTORY = ["dataset", "row", "seed", "epoch", "metric", "value"]


def history_frame(cells: Mapping[Place, LedgerRun], history: Mapping[str, Values]) -> pd.DataFrame:
    """Tidy frame of all metrics by epoch: cells in table order, then by key and epoch."""
    values = [history[run.run_id] for run in cells.values()]
    owner = np.repeat(np.arange(len(cells)), [len(of_run) for of_run in values])
    told = [key for of_run in values for key, _ in of_run]
    keys = list(dict.fromkeys(told))
    key_of = {key: i for i, key in enumerate(keys)}
    stored = np.array([value for of_run in values for value in of_run.values()], dtype=np.float64)
    return pd.DataFrame(
        {
            "dataset": _taken([place[0] for place in cells], owner),
            "row": _taken([place[1] for place in cells], owner),
            "seed": np.array([place[2] for place in cells], dtype=np.int64)[owner],
            "epoch": np.array([epoch for of_run in values for _, epoch in of_run], dtype=np.int64),
            "metric": _taken([schema.metric_name(key) for key in keys], [key_of[key] for key in told]),
            "value": np.where(np.abs(stored) == sys.float_info.max, np.copysign(np.inf, stored), stored),
        },
        columns=HISTORY,
    )


def _taken(names: list[str], places: Sequence[int] | npt.NDArray[np.intp]) -> pd.Series[str]:
    return pd.Series(names, dtype="str").take(np.asarray(places, dtype=np.intp)).reset_index(drop=True)
