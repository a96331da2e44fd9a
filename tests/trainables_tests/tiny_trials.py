"""Small real material for tests of training: settings, trajectories, trials of a 4-block encoder; a BatchNorm task."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from study.store import Store
from trainables.activations import Activations
from trainables.backbone_files import find_backbone
from trainables.classification import Classification
from trainables.costs import IMAGES, Costs
from trainables.data.chestxray14 import CLASSES
from trainables.data.opened import Data
from trainables.loop import Trajectory
from trainables.metrics import class_aucs, macro, undefined
from trainables.requests import CacheRequest, Compute, Observer, TrialRequest, Watch
from trainables.results import CellResult, EpochRecord
from trainables.settings import DatasetSettings, Settings
from trainables.strategy import total_epochs
from trainables.task import Rows, Scores, Task
from trainables.trial import Trial
from trainables.views import Views

KEPT = ("Atelectasis", "Effusion", "Infiltration", "Nodule")
DATASET = DatasetSettings(name="phantom", images=160, image_size=32, drop_classes=tuple(set(CLASSES) - set(KEPT)))
COMPUTE = Compute("cpu", 1, "fp32")
CPU = torch.device("cpu")
NO_CACHE = CacheRequest("none", ())


def tiny_settings(encoder: Path, **groups: Mapping[str, Any]) -> Settings:
    """Two head epochs and four of stage 2 (k = 2, 4, 4, 4 of 4 blocks), four steps an epoch, the last one partial."""
    values: dict[str, dict[str, Any]] = {
        "model": {"backbone": str(encoder), "head_hidden": 16, "dropout": 0.2},
        "optimiser": {"batch_size": 32, "encoder_lr": 1e-3, "head_lr": 3e-3},
        "strategy": {"head_epochs": 2, "tune_epochs": 4, "depth": 4, "step": 2},
    }
    for group, changes in groups.items():
        values[group] = {**values.get(group, {}), **changes}
    return Settings.model_validate({"dataset": DATASET.model_dump(), **values})


def tiny_task(settings: Settings, data: Data, kind: type[Classification] = Classification) -> Classification:
    """The classification task, or a kind of it that does something besides."""
    return kind(settings, data.index, data.images, find_backbone(settings.model.backbone))


def activations(
    task: Task, request: CacheRequest = NO_CACHE, folder: Path | None = None, batch: int = 32
) -> Activations:
    """Activations served from `folder`, or never."""
    return Activations(task, COMPUTE, CPU, request, folder, "contents", batch)


def trajectory(
    task: Task,
    settings: Settings,
    seed: int = 0,
    averages: dict[str, tuple[float, float]] | None = None,
    served: Activations | None = None,
) -> Trajectory:
    """A trajectory before its first epoch, on one thread."""
    torch.set_num_threads(COMPUTE.threads)
    return Trajectory(task, settings, seed, COMPUTE, CPU, served or activations(task), averages or {})


def keys_of(name: str, epochs: int) -> tuple[str, ...]:
    """Keys of the states of one trajectory: as good as the plan's for a store."""
    return tuple(hashlib.sha256(f"{name}|{epoch}".encode()).hexdigest() for epoch in range(1, epochs + 1))


def trial_request(
    settings: Settings, observers: Sequence[Observer], *, epochs: int | None = None, **changes: Any
) -> TrialRequest:
    """A request for the first `epochs` epochs, watched to the trajectory's end."""
    keys = keys_of("trajectory", total_epochs(settings.strategy))
    request = TrialRequest(
        name="tiny",
        settings=settings,
        seed=0,
        keys=keys[:epochs],
        first=0,
        watches=tuple(Watch(observer, (keys[-1],)) for observer in observers),
        keep=frozenset(),
        cache=NO_CACHE,
        compute=COMPUTE,
    )
    return dataclasses.replace(request, **changes)


def begin(request: TrialRequest, task: Task, store: Store) -> Trial:
    """A trial over a store."""
    return Trial(request, task, store, {"contents_digest": "contents", "index_digest": "index"})


def finish(trial: Trial) -> Trial:
    """Step until the trial is done."""
    while not trial.done:
        trial.step()
    return trial


def timeless(record: EpochRecord) -> dict[str, Any]:
    """A record without what the clock says."""
    facts = dataclasses.asdict(record)
    return {name: value for name, value in facts.items() if name not in ("time_ms", "seconds")}


def outcome(result: CellResult | None) -> dict[str, Any]:
    """A result without what the clock says."""
    assert result is not None, "there is no result"
    facts = {f.name: getattr(result, f.name) for f in dataclasses.fields(result)}
    return facts | {"history": [timeless(record) for record in result.history]}


class NormModel(nn.Module):
    """Three Linear–BatchNorm–ReLU–Dropout blocks: buffers of both kinds, and dropout, in every encoder part."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6))
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5)) for _ in range(3)
        )
        self.neck = nn.LayerNorm(6)
        self.classifier = nn.Linear(6, 2)

    def base(self) -> Sequence[nn.Module]:
        return [self.embedding, self.neck]

    def blocks(self) -> Sequence[nn.Module]:
        return list(self.layers)

    def head(self) -> nn.Module:
        return self.classifier

    def module(self) -> nn.Module:
        return self

    def advance(self, x: Tensor, start: int, stop: int) -> Tensor:
        if start == IMAGES and stop > IMAGES:
            x = self.embedding(x)
        for block in self.layers[max(start, 0) : min(max(stop, 0), 3)]:
            x = block(x)
        return self.neck(x) if start <= 3 < stop else x

    def predict(self, features: Tensor, side: None = None) -> Tensor:
        return self.classifier(features)


class NormTask:
    """Two classes on random vectors, through `NormModel`: a task whose encoder has BatchNorm, as detectors have."""

    main_metric = "macro_auc"
    classes = ("one", "two")
    costs = Costs(embedding=1, blocks=(2, 2, 2), head=1)
    views = Views(80)

    def __init__(self) -> None:
        rng = np.random.default_rng(7)
        self.x = torch.from_numpy(rng.standard_normal((80, 5)).astype(np.float32)) * 2 + 1
        self.labels = (rng.random((80, 2)) < 0.4).astype(np.uint8)

    def build(self, seed: int) -> NormModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return NormModel()

    def rows(self, split: str) -> Rows:
        return {"train": np.arange(48), "val": np.arange(48, 64), "test": np.arange(64, 80)}[split]

    def inputs(self, rows: Rows, device: torch.device) -> Tensor:
        return self.x[torch.from_numpy(rows)].to(device)

    def side_inputs(self, rows: Rows, device: torch.device, *, training: bool) -> None:
        """Nothing."""

    def class_counts(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        positives = self.labels[:48].sum(0, dtype=np.int64)
        return positives, 48 - positives

    def loss(self, outputs: Tensor, rows: Rows, class_weights: Tensor | None) -> Tensor:
        targets = torch.from_numpy(self.labels[rows]).float()
        return functional.binary_cross_entropy_with_logits(outputs, targets, pos_weight=class_weights)

    def predictions(self, outputs: Tensor) -> npt.NDArray[np.float32]:
        return torch.sigmoid(outputs).numpy()

    def score(self, predictions: npt.NDArray[np.float32], rows: Rows) -> Scores:
        aucs = class_aucs(self.labels[rows], predictions)
        return Scores({"macro_auc": macro(aucs)}, aucs, undefined(aucs, self.classes))

    def describe(self, predictions: npt.NDArray[np.float32], rows: Rows) -> Mapping[str, npt.NDArray[np.generic]]:
        return {"labels": self.labels[rows], "scores": predictions}

    def transforms(self) -> dict[str, object]:
        return {}
