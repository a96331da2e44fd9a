"""What the ledger is told about a study, and the pure functions that turn it into tags and metrics. No mlflow here."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from analysis import schema
from analysis.schema import CellStatus, StudyHeader, metric_key
from analysis.tracking import LedgerError

T = TypeVar("T")

PARAM_LENGTH, TAG_LENGTH, KEY_LENGTH, DIGEST_LENGTH = 6000, 8000, 250, 36  # MLflow's limits, characters


@dataclass(frozen=True)
class RowHeader:
    """A row on one data set. `key`: deterministic and unique in the study; `name`: as the table says it.

    `of_trials`: it is the parent of a search's trials, which differ in more than their seed, so they have no mean.
    """

    key: str
    name: str
    index: int
    dataset: str
    marks: dict[str, bool]
    changes: dict[str, object]
    params: dict[str, str]
    of_trials: bool = False


@dataclass(frozen=True)
class CellHeader:
    """A cell before it runs. `key` digests all that decides its result; `params` are its effective settings."""

    key: str
    row: str
    row_index: int
    seed: int
    dataset: str
    row_key: str
    params: dict[str, str]
    config_digest: str
    split_digest: str
    dataset_digest: str
    dataset_source: str
    stage_keys: tuple[str, ...]


@dataclass(frozen=True)
class Epoch:
    """Metrics after an epoch (counted from 1); `time_ms`: when it was trained, ms since 1970, the same on each call."""

    epoch: int
    time_ms: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class CellOutcome:
    """How a cell ended.

    Attributes:
        status: FINISHED, FAILED or PRUNED.
        end_ms: when, ms since 1970.
        error: why it failed.
        best_epoch: the epoch that was evaluated on test.
        metrics: 'test/…', and 'val/…' at the best epoch (stored as 'best/val/…').
        weights_sha256: of the weights that were evaluated.
        trajectory_sha256: of the raw weights after the last epoch.
        noop_of: name of the row with the same trajectory and observer at this seed.
        undefined_classes: classes with one value in the test split.
        effective: JSON-able configuration read back from the trained objects: artifact effective.json.
        predictions: file that becomes the artifact predictions.npz.
    """

    status: CellStatus
    end_ms: int
    error: str | None = None
    best_epoch: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    weights_sha256: str | None = None
    trajectory_sha256: str | None = None
    noop_of: str | None = None
    undefined_classes: tuple[str, ...] = ()
    effective: dict[str, Any] = field(default_factory=dict)
    predictions: Path | None = None


def check_declaration(header: StudyHeader, rows: Sequence[RowHeader], cells: Sequence[CellHeader]) -> None:
    """Refuse a declaration that contradicts itself, with all its problems at once."""
    keys = [row.key for row in rows] + [cell.key for cell in cells]
    places = [(cell.dataset, cell.row, cell.seed) for cell in cells]
    problems = [f"key {key} is used twice" for key in _twice(keys)]
    problems += [f"two cells for data set, row and seed {place}" for place in _twice(places)]
    problems += [f"key {key!r} holds a quote" for key in keys if "'" in key]
    known = {row.key for row in rows}
    problems += [f"cell {cell.key} names an unknown row {cell.row_key}" for cell in cells if cell.row_key not in known]
    if problems:
        raise LedgerError(f"study {header.study!r} is declared wrongly: {'; '.join(problems)}")


def _twice(items: Sequence[T]) -> list[T]:
    seen: set[T] = set()
    return [item for item in items if item in seen or seen.add(item)]  # type: ignore[func-returns-value]


def keep_counted(header: StudyHeader, before: StudyHeader | None) -> StudyHeader:
    """A header that has not counted yet keeps what earlier launches counted."""
    if before is None or header.units.executed is not None:
        return header
    counted = {name: getattr(before.units, name) for name in ("executed", "stopped_early", "recomputed")}
    return header.model_copy(update={"units": header.units.model_copy(update=counted)})


def checked_key(name: str) -> str:
    """A metric's key in MLflow, refused where it is too long."""
    key = metric_key(name)
    if len(key) > KEY_LENGTH:
        raise LedgerError(f"metric {name!r} is longer than MLflow's {KEY_LENGTH} characters: shorten its class name")
    return key


def outcome_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """'test/…' as it is; anything else belongs to the best epoch and must not mix with the curve of its name."""
    named = {name if name.startswith(schema.TEST) else schema.BEST + name: value for name, value in metrics.items()}
    return {checked_key(name): float(value) for name, value in named.items()}


def outcome_tags(outcome: CellOutcome, predictions: str | None, before: Mapping[str, str]) -> dict[str, str]:
    """Tags of an outcome; one that has no value is emptied where an earlier attempt left one."""
    values = {
        schema.TAG_ERROR: shortened(outcome.error, TAG_LENGTH, "error.txt") if outcome.error else None,
        schema.TAG_BEST_EPOCH: None if outcome.best_epoch is None else str(outcome.best_epoch),
        schema.TAG_WEIGHTS: outcome.weights_sha256,
        schema.TAG_TRAJECTORY: outcome.trajectory_sha256,
        schema.TAG_NOOP_OF: outcome.noop_of,
        schema.TAG_PREDICTIONS: predictions,
        schema.TAG_UNDEFINED: as_json(outcome.undefined_classes),
    }
    return {name: value or "" for name, value in values.items() if value or name in before}


def outcome_digest(outcome: CellOutcome, predictions: str | None) -> str:
    """sha256 over everything but the time and the place of the predictions."""
    facts = {name: value for name, value in vars(outcome).items() if name != "end_ms"} | {"predictions": predictions}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """sha256 of a file."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise LedgerError(f"predictions {path} cannot be read ({error.strerror}): evaluate the cell again") from error


def aggregates(cells: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """'test/…/mean', '/std' (n−1; NaN below two) and '/n' of each test metric over the cells that define it."""
    values: dict[str, list[float]] = {}
    for metrics in cells:
        for name, value in metrics.items():
            if name.startswith(schema.TEST) and not math.isnan(value):
                values.setdefault(name, []).append(value)
    result: dict[str, float] = {}
    for name, found in sorted(values.items()):
        spread = statistics.stdev(found) if len(found) > 1 else math.nan
        result |= {f"{name}/mean": statistics.fmean(found), f"{name}/std": spread, f"{name}/n": float(len(found))}
    return result


def row_status(cells: Sequence[CellStatus | None]) -> str:
    """MLflow status of a row that is closed: KILLED where cells were pruned or never came to an end."""
    if "FAILED" in cells:
        return "FAILED"
    return "FINISHED" if all(status == "FINISHED" for status in cells) else "KILLED"


def same(a: float, b: float) -> bool:
    """Whether a stored value `a` is the value `b` to store; NaN equals NaN."""
    largest = math.nextafter(math.inf, 0)  # what MLflow's SQL stores hold for inf
    return a == b or (math.isnan(a) and math.isnan(b)) or (math.isinf(b) and a == math.copysign(largest, b))


def shortened(value: str, limit: int = PARAM_LENGTH, artifact: str = "parameters.json") -> str:
    """A value that fits: head and tail with its length, digest and the artifact that holds it in full."""
    if len(value) <= limit:
        return value
    digest = hashlib.sha256(value.encode()).hexdigest()[:16]
    note = f"\n… {len(value)} characters, sha256 {digest}…, in full in {artifact} …\n"
    head = limit // 4
    return value[:head] + note + value[len(value) - (limit - head - len(note)) :]


def check_tag(name: str, value: str) -> None:
    """Refuse what MLflow would cut short."""
    if len(value) > TAG_LENGTH:
        raise LedgerError(f"tag {name} has {len(value)} characters; MLflow takes {TAG_LENGTH}: shorten {value[:60]!r}…")


def as_json(value: object) -> str:
    """Canonical JSON for a tag."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False)
