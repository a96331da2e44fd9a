"""What training leaves behind, as plain data that a driver reads without torch: epoch records, cell results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


class TrainingError(RuntimeError):
    """Training cannot go on, and would not if it were tried again; the cell fails with this message."""


class MemoryRefusedError(TrainingError):
    """Memory was refused, and would be again to a worker that is given no more of it."""


@dataclass(frozen=True)
class EpochRecord:
    """What one epoch of a trajectory did.

    Attributes:
        epoch: epochs completed, from 1.
        time_ms: end of the epoch, milliseconds since 1970; a metric's timestamp in the ledger.
        seconds: wall time of the epoch.
        units, evaluation_units: counted in the loop (see `trainables.costs`).
        metrics: 'train/loss', 'val/<copy>/<metric>', 'lr/<group>', 'unfrozen_blocks', 'class_weight/<class>'.
        trajectory_sha256: digest of the raw weights after the epoch.
        effective: the configuration read back from the trained objects.
        cache: name of the activation cache that served the epoch, if one did.
        events: what did not go as planned: caches that could not serve, damaged rows.
    """

    epoch: int
    time_ms: int
    seconds: float
    units: int
    evaluation_units: int
    metrics: dict[str, float]
    trajectory_sha256: str
    effective: dict[str, Any]
    cache: str | None
    events: list[str]


@dataclass(frozen=True)
class CellResult:
    """What a cell ends with: its observer's chosen epoch, evaluated once on the test split.

    Attributes:
        observer, copy: names of the observer and of the weights it evaluates.
        best_epoch, last_epoch: epochs completed at the chosen epoch, and at the observer's end.
        stopped_early: its patience ran out.
        metrics: 'test/<metric>' of the chosen epoch's weights, and 'val/<metric>' of the same.
        undefined: classes that the test split cannot measure.
        weights_sha256: of the evaluated weights; trajectory_sha256: of the raw weights after last_epoch.
        history: one record an epoch, up to last_epoch.
        provenance: hardware, library versions, image contents, and the memory that it took of a whole GPU.
    """

    observer: str
    copy: str
    best_epoch: int
    last_epoch: int
    stopped_early: bool
    metrics: dict[str, float]
    undefined: tuple[str, ...]
    weights_sha256: str
    trajectory_sha256: str
    evaluation_units: int
    history: list[EpochRecord]
    provenance: dict[str, str]
