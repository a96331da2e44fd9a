"""Simulated ledgers: what a study of the method's form leaves behind, with the failures that real ones have."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.records import RowRecord, StudyRecords
from analysis.schema import StudyHeader, Units
from analysis.statistics import class_auc

CLASSES = (
    "Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax",
    "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia",
)  # fmt: skip
ROWS = ("MLP head only", "+ progressive unfreezing", "+ class weights", "+ EMA")
PARTS = ("unfreezing", "class weights", "ema")
HOSTILE = (r"a|b_&%$<script>alert(1)</script>", r"\input{x} ~^#{}", "_*`md`*_ [x](javascript:1)", "naïve – Δ η > 0")


@dataclass(frozen=True)
class Simulated:
    """What to simulate. Seeds shift all rows of a data set together, so that paired differences vary less than rows."""

    rows: tuple[str, ...] = ROWS
    seeds: tuple[int, ...] = (0, 1, 2)
    datasets: tuple[str, ...] = ("chestxray14",)
    classes: tuple[str, ...] = CLASSES
    parts: tuple[str, ...] = PARTS
    effect: float = 0.008  # of each row over the one before
    pair_noise: float = 0.002
    failed: tuple[tuple[str, str, int, str], ...] = ()  # (data set, row, seed, status)
    undefined: tuple[str, ...] = ()
    unlabelled: float = 0.0  # share of the labels that are −1
    noop: tuple[tuple[str, str], ...] = ()  # (row, the row it equals)
    published: str | None = None
    description: str = "Adds the parts of the method one at a time."
    extra_metrics: tuple[str, ...] = ()
    epochs: int = 30
    test_images: int = 0  # > 0: predictions are simulated and written
    comparisons: tuple[tuple[str, str], ...] | None = None
    notes: tuple[str, ...] = ("RAD-DINO was pretrained on the images of ChestX-ray14; test images may have been seen.",)
    synthetic: tuple[str, ...] = field(default=())


def simulate(plan: Simulated = Simulated(), folder: Path | None = None, seed: int = 7) -> StudyRecords:
    """Records of a simulated study; predictions, if any, are written into the folder."""
    rng = np.random.default_rng(seed)
    ease = rng.uniform(0.70, 0.93, len(plan.classes))
    luck = {(d, s): rng.normal(0, 0.006) for d in plan.datasets for s in plan.seeds}
    cells: list[dict[str, object]] = []
    history: list[tuple[object, ...]] = []
    predictions: dict[str, Path] = {}
    truth = _truth(plan, rng) if plan.test_images else None
    for d, dataset in enumerate(plan.datasets):
        for r, row in enumerate(plan.rows):
            for s in plan.seeds:
                twin = dict(plan.noop).get(row)
                level = plan.rows.index(twin) if twin else r
                noise = np.random.default_rng([seed, d, level, s])
                shift = luck[dataset, s] + level * plan.effect - 0.02 * d + noise.normal(0, plan.pair_noise)
                aucs = ease + shift + noise.normal(0, 0.008, len(ease))
                scores = None
                if truth is not None:
                    blur = (0.5 - 8 * shift) * noise.normal(0, 1, truth["signal"].shape)
                    scores = (truth["signal"] + blur).astype(np.float32)
                    aucs = class_auc(truth["labels"], scores)
                cell = _cell(plan, (dataset, row, s), np.minimum(aucs, 0.995), noise)
                cells.append(cell)
                if cell["status"] == "FINISHED":
                    history.extend(_history(plan, cell, level, noise))
                    if truth is not None and scores is not None and folder is not None:
                        run = str(cell["mlflow_run_id"])
                        predictions[run] = _store(folder / run / "predictions.npz", truth, scores)
    frame = pd.DataFrame(cells)
    tidy = pd.DataFrame(history, columns=list(HISTORY))
    return StudyRecords(_header(plan), _rows(plan), frame, tidy, predictions)


ERROR = "CUDA out of memory: tried to allocate 2 GiB\n  in trainables/loop.py"
HISTORY = ("dataset", "row", "seed", "epoch", "metric", "value")


def _header(plan: Simulated) -> StudyHeader:
    steps = tuple((row, reference) for reference, row in zip(plan.rows, plan.rows[1:], strict=False))
    cells = len(plan.rows) * len(plan.seeds) * len(plan.datasets)
    return StudyHeader(
        study="ablation",
        title="Ablation of SPFT",
        description=plan.description,
        task="classification",
        main_metric="macro_auc",
        metric_label="macro AUC",
        rows=plan.rows,
        seeds=plan.seeds,
        datasets=plan.datasets,
        parts=plan.parts,
        comparisons=steps if plan.comparisons is None else plan.comparisons,
        per_class=True,
        classes=dict.fromkeys(plan.datasets, plan.classes),
        dropped={plan.datasets[0]: ("No Finding",)},
        synthetic=plan.synthetic,
        published=plan.published,
        notes=plan.notes,
        units=Units(
            alone=cells * 250, shared=cells * 120, floor=cells * 100, executed=cells * 118, stopped_early=cells * 2
        ),
        provenance={"command": "python study/launch.py ablation --seeds 0,1,2", "torch": "2.14.1", "machine": "x86_64"},
    )


def _rows(plan: Simulated) -> tuple[RowRecord, ...]:
    return tuple(
        RowRecord(
            name=row,
            index=i,
            marks={part: i > p for p, part in enumerate(plan.parts)},
            changes={"strategy.depth": 10 + i},
            run_ids={dataset: _digest("row", dataset, row)[:32] for dataset in plan.datasets},
        )
        for i, row in enumerate(plan.rows)
    )


def _cell(
    plan: Simulated, key: tuple[str, str, int], aucs: np.ndarray, noise: np.random.Generator
) -> dict[str, object]:
    dataset, row, seed = key
    status = next((st for d, r, s, st in plan.failed if (d, r, s) == (dataset, row, seed)), "FINISHED")
    identity = (dataset, dict(plan.noop).get(row, row), str(seed))
    finished = status == "FINISHED"
    cell: dict[str, object] = {
        "study": "ablation", "dataset": dataset, "row": row, "row_index": plan.rows.index(row), "seed": seed,
        "status": status, "error": ERROR if status == "FAILED" else "",
        "best_epoch": int(noise.integers(12, plan.epochs)) if finished else None,
        "mlflow_run_id": None if status == "MISSING" else _digest("run", dataset, row, str(seed))[:32],
        "weights_sha256": _digest("w", *identity) if finished else None,
        "trajectory_sha256": _digest("t", *identity) if finished else None,
        "split_digest": _digest("split", dataset) if finished else None,
        "config_digest": _digest("config", row) if finished else None,
        "noop_of": dict(plan.noop).get(row), "undefined_classes": plan.undefined if finished else (),
    }  # fmt: skip
    defined = {name: float(a) for name, a in zip(plan.classes, aucs, strict=True) if name not in plan.undefined}
    measured: dict[str, float] = {"macro_auc": float(np.mean(list(defined.values())))}
    measured |= {f"auc/{name}": defined.get(name, np.nan) for name in plan.classes}
    measured |= {name: float(noise.uniform(0.3, 0.6)) for name in plan.extra_metrics}
    return cell | {name: value if finished else np.nan for name, value in measured.items()}


def _history(
    plan: Simulated, cell: dict[str, object], level: int, noise: np.random.Generator
) -> list[tuple[object, ...]]:
    final, best = float(str(cell["macro_auc"])), int(str(cell["best_epoch"]))
    last = min(plan.epochs, best + 7)
    epochs = np.arange(1, last + 1)
    head = plan.epochs // 3
    curve = final + 0.005 - 0.06 * np.exp(-epochs / 4) - 0.02 * level * np.exp(-np.maximum(0, epochs - head) / 4)
    series = {
        "val/macro_auc": curve + noise.normal(0, 0.003, last),
        "unfrozen_blocks": np.where(level > 0, np.clip(2 * (1 + (epochs - head - 1) // 2), 0, 10) * (epochs > head), 0),
        "train/loss": 0.4 * np.exp(-epochs / 10) + 0.2,
    }
    identity = tuple(cell[name] for name in HISTORY[:3])
    return [
        (*identity, int(epoch), metric, float(value))
        for metric, values in series.items()
        for epoch, value in zip(epochs, values, strict=True)
    ]


def _truth(plan: Simulated, rng: np.random.Generator) -> dict[str, np.ndarray]:
    n = plan.test_images
    labels = (rng.random((n, len(plan.classes))) < 0.3).astype(np.uint8)
    labels[:2] = [[0], [1]]
    for name in plan.undefined:
        labels[:, plan.classes.index(name)] = 0
    if plan.unlabelled:
        labels = labels.astype(np.int8)
        labels[2:][rng.random((n - 2, len(plan.classes))) < plan.unlabelled] = -1
    return {
        "names": np.array([f"image{i:05d}.png" for i in range(n)]),
        "groups": np.array([f"patient{i // 2:05d}" for i in range(n)]),
        "labels": labels,
        "classes": np.array(plan.classes),
        "signal": labels + rng.normal(0, 1.0, labels.shape),
    }


def _store(path: Path, truth: dict[str, np.ndarray], scores: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, scores=scores, **{name: truth[name] for name in ("names", "groups", "labels", "classes")})
    return path


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def names(prefix: str, count: int) -> Sequence[str]:
    """Distinct long names."""
    return tuple(f"{prefix} {i:03d} with a rather long and winding description of what changes" for i in range(count))
