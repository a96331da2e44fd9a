"""States and results as stores keep them, small enough to be read by eye."""

from __future__ import annotations

import dataclasses
import json

import torch

from trainables.loop import State
from trainables.requests import Observer
from trainables.results import CellResult, EpochRecord
from trainables.trial import Checkpoint

KEY, LEAF = "k" * 64, "l" * 64
OBSERVER = Observer(0.9, 20.0, None).name


def record(epoch: int, trajectory: str | None = None) -> EpochRecord:
    return EpochRecord(
        epoch=epoch,
        time_ms=1_760_000_000_000 + epoch,
        seconds=0.25,
        units=10 * epoch,
        evaluation_units=epoch,
        metrics={"train/loss": 0.7 / epoch, "val/raw/macro_auc": float("nan") if epoch == 1 else 0.625},
        trajectory_sha256=trajectory or f"{epoch:064d}",
        effective={"trainable": ["head.0.weight"], "learning_rates": {"first_step": 1e-3, "last_step": 3e-4}},
        cache=None,
        events=["a cache could not serve"],
    )


def checkpoint(epoch: int = 2, size: int = 50) -> Checkpoint:
    """Tensors that all hold the epoch's number, so that a mixture of two saves would show."""
    tensors = {"model/head.weight": torch.full((size, 4), float(epoch)), "average/ema 0.9 tau 20/w": torch.arange(3.0)}
    best = {("raw", 1): {"head.weight": torch.ones(5)}, ("ema 0.9 tau 20", epoch): {"head.weight": torch.zeros(2, 2)}}
    state = State(epoch, tensors, {"ema 0.9 tau 20": 7}, [0.5, 1.5])
    history = [record(e) for e in range(1, epoch + 1)]
    return Checkpoint(state, history, {"hardware": "cpu", "torch": "2", "contents_digest": "c"}, best)


def result(*trajectories: str, observer: str = OBSERVER) -> CellResult:
    history = [record(e, t) for e, t in enumerate(trajectories or ("a", "b"), start=1)]
    return CellResult(
        observer=observer,
        copy="raw",
        best_epoch=1,
        last_epoch=len(history),
        stopped_early=False,
        metrics={"test/macro_auc": 0.8125, "test/auc/Hernia": float("nan")},
        undefined=("Hernia",),
        weights_sha256="w" * 64,
        trajectory_sha256=history[-1].trajectory_sha256,
        evaluation_units=5,
        history=history,
        provenance={"hardware": "cpu"},
    )


def said(made: Checkpoint) -> str:
    """Everything a checkpoint holds, NaN equal to NaN."""
    tensors = {name: t.tolist() for name, t in made.state.tensors.items()}
    best = {str(at): {name: t.tolist() for name, t in own.items()} for at, own in made.best.items()}
    facts = [made.state.epoch, made.state.averages, made.state.class_state, made.provenance]
    return json.dumps([tensors, best, facts, [dataclasses.asdict(r) for r in made.history]], sort_keys=True)


def always(_: Checkpoint) -> bool:
    return True
