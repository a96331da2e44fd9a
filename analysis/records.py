"""Read a study back from the ledger (MLflow). The only file of the analysis that imports mlflow."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from analysis.schema import StudyHeader


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
