"""Small studies to fill a ledger with: all values are drawn from their names, so that a second telling is the same."""

from __future__ import annotations

import atexit
import functools
import hashlib
import itertools
import shutil
import sqlite3
import tempfile
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from analysis.records import find_runs
from analysis.schema import StudyHeader, Units
from study.ledger import CellHeader, CellOutcome, Epoch, Ledger, RowHeader

ROWS = ("MLP head only", "+ progressive unfreezing", "+ class weights", "+ EMA (full)")
CLASSES = ("Hernia", "Nodule/Mass", "Enlarged PA (50%)")
START_MS = 1_760_000_000_000


@dataclass(frozen=True)
class Sample:
    """A study; `metrics`: by epoch, `failing`: (row, seed) → status."""

    name: str = "ablation"
    rows: tuple[str, ...] = ROWS[:2]
    seeds: tuple[int, ...] = (0, 1)
    datasets: tuple[str, ...] = ("chestxray14",)
    epochs: int = 3
    metrics: tuple[str, ...] = ("train/loss", "val/macro_auc", "lr/head", "unfrozen_blocks")
    ending: dict[tuple[str, int], str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    params: dict[str, str] = field(default_factory=dict)

    def header(self, executed: int | None = None) -> StudyHeader:
        return StudyHeader(
            study=self.name,
            title="Ablation of SPFT",
            description="Adds the parts of the method one at a time.",
            task="classification",
            main_metric="macro_auc",
            metric_label="macro AUC",
            rows=self.rows,
            seeds=self.seeds,
            datasets=self.datasets,
            parts=("unfreezing",),
            classes=dict.fromkeys(self.datasets, CLASSES),
            dropped={},
            notes=self.notes,
            units=Units(alone=100, shared=60, floor=40, executed=executed),
            provenance={"command": "python study/launch.py ablation"},
        )

    def row_headers(self) -> list[RowHeader]:
        return [
            RowHeader(
                key=digest("row", dataset, name),
                name=name,
                index=index,
                dataset=dataset,
                marks={"unfreezing": index > 0},
                changes={"strategy.depth": 10, "name": "Nodule/Mass"},
                params={"strategy.depth": "10"},
            )
            for dataset in self.datasets
            for index, name in enumerate(self.rows)
        ]

    def cell_headers(self) -> list[CellHeader]:
        return [
            CellHeader(
                key=digest("cell", dataset, name, str(seed)),
                row=name,
                row_index=index,
                seed=seed,
                dataset=dataset,
                row_key=digest("row", dataset, name),
                params={"strategy.depth": "10", "weighting.boosts.Nodule/Mass (x)": "1.2", **self.params},
                config_digest=digest("config", name),
                split_digest=digest("split", dataset),
                dataset_digest=digest("index", dataset),
                dataset_source=f"{dataset} as distributed",
                stage_keys=(digest("head", str(seed)), digest("tune", name, str(seed))),
            )
            for dataset, (index, name), seed in itertools.product(self.datasets, enumerate(self.rows), self.seeds)
        ]

    def told_epochs(self, cell: CellHeader) -> list[Epoch]:
        return [
            Epoch(
                epoch=e,
                time_ms=START_MS + 1000 * e,
                metrics={name: drawn(cell.key, name, str(e)) for name in self.metrics}
                | {f"class_weight/{name}": drawn(cell.key, name, str(e)) for name in CLASSES},
            )
            for e in range(1, self.epochs + 1)
        ]

    def outcome(self, cell: CellHeader, folder: Path | None = None) -> CellOutcome:
        status = self.ending.get((cell.row, cell.seed), "FINISHED")
        end_ms = START_MS + 100_000 + cell.seed
        if status != "FINISHED":
            error = "CUDA out of memory\n  in loop.py" if status == "FAILED" else None
            return CellOutcome(status=status, end_ms=end_ms, error=error)  # type: ignore[arg-type]
        return CellOutcome(
            status="FINISHED",
            end_ms=end_ms,
            best_epoch=2,
            metrics={
                "test/macro_auc": drawn(cell.key, "test"),
                "test/mAP@50": drawn(cell.key, "map"),
                "val/macro_auc": drawn(cell.key, "val"),
                **{f"test/auc/{name}": drawn(cell.key, name) for name in CLASSES[:-1]},
                f"test/auc/{CLASSES[-1]}": float("nan"),
            },
            weights_sha256=digest("weights", cell.key),
            trajectory_sha256=digest("trajectory", cell.key),
            undefined_classes=CLASSES[-1:],
            effective={"trainable": ["head"], "lr": {"head": 1e-3}},
            predictions=None if folder is None else predictions_file(folder, cell.key),
        )


def run_study(ledger: Ledger, sample: Sample, folder: Path | None = None) -> None:
    """What a driver does."""
    ledger.open(sample.header(), sample.row_headers(), sample.cell_headers())
    for cell in sample.cell_headers():
        ledger.log_epochs(cell.key, sample.told_epochs(cell))
        ledger.finish(cell.key, sample.outcome(cell, folder))
    ledger.close(sample.header(executed=58))


def predictions_file(folder: Path, key: str) -> Path:
    """(4, 3) labels and scores, drawn from the key."""
    path = folder / f"{key[:12]}.npz"
    scores = np.array([[drawn(key, str(i), name) for name in CLASSES] for i in range(4)], dtype=np.float32)
    with path.open("wb") as file:
        np.savez(file, scores=scores, labels=(scores > 0.5).astype(np.uint8), classes=np.array(CLASSES))
    return path


def digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def drawn(*parts: str) -> float:
    """A number in [0, 1) that belongs to the parts."""
    return int(digest(*parts)[:12], 16) / 16**12


def new_database(folder: Path) -> str:
    """Address of an empty ledger in a folder: a copy, since MLflow takes seconds to make one."""
    shutil.copyfile(_empty_database(), folder / "mlflow.db")
    return f"sqlite:///{folder / 'mlflow.db'}"


@functools.cache
def _empty_database() -> Path:
    path = Path(tempfile.mkdtemp(prefix="spft-test-")) / "mlflow.db"
    atexit.register(shutil.rmtree, path.parent)
    Ledger(f"sqlite:///{path}")
    return path


def contents(uri: str) -> list[str]:
    """Everything a database holds, as SQL."""
    with closing(sqlite3.connect(uri.removeprefix("sqlite:///"))) as database:
        return list(database.iterdump())


def runs_of(ledger: Ledger) -> list[Any]:
    """All runs of the study, as MLflow lists them."""
    return find_runs(ledger._client, ledger._experiment_id)


def cell_key(row: str = ROWS[0], seed: int = 0, dataset: str = "chestxray14") -> str:
    return digest("cell", dataset, row, str(seed))


def opened(uri: str, sample: Sample = Sample()) -> Ledger:
    ledger = Ledger(uri)
    ledger.open(sample.header(), sample.row_headers(), sample.cell_headers())
    return ledger
