"""Each task in miniature: a real model and a few drawn images, for the rules that every task keeps."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from study.store import Store
from trainables.activations import Activations
from trainables.data.chestxray14 import CLASSES
from trainables.data.opened import Data, Folders, open_data
from trainables.loop import Trajectory
from trainables.requests import CacheRequest, Compute, Observer, TrialRequest, Watch
from trainables.settings import Settings
from trainables.strategy import total_epochs
from trainables.task import Rows, Task
from trainables.tasks import TASKS
from trainables.trial import Trial

COMPUTE = Compute("cpu", 1, "fp32")
CPU = torch.device("cpu")
NO_CACHE = CacheRequest("none", ())
KEPT = ("Atelectasis", "Effusion", "Infiltration", "Nodule")
IMAGES = {"train": 22, "val": 9, "test": 5}  # batches of 8: the last one partial in every split
DATASET = {"name": "phantom", "images": 160, "drop_classes": tuple(c for c in CLASSES if c not in KEPT)}
OPTIMISER = {"batch_size": 8, "encoder_lr": 1e-3, "head_lr": 2e-3}
STRATEGY = {"head_epochs": 1, "tune_epochs": 2, "depth": 4, "step": 2}  # k = 0, 2, 4


class Few:
    """A task on the first images of each split; everything else is the task's own."""

    def __init__(self, task: Task) -> None:
        self._task = task

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def rows(self, split: str) -> Rows:
        return self._task.rows(split)[: IMAGES[split]]


@dataclass(frozen=True)
class Case:
    """A task in miniature.

    Attributes:
        changes: group of settings → its values, beside those that all cases share.
    """

    name: str
    task: str
    changes: Mapping[str, Mapping[str, Any]]

    def settings(self, **groups: Mapping[str, Any]) -> Settings:
        """Its settings, with groups merged in."""
        values: dict[str, dict[str, Any]] = {
            "dataset": dict(DATASET),
            "optimiser": dict(OPTIMISER),
            "strategy": dict(STRATEGY),
        }
        for changes in (self.changes, groups):
            for group, change in changes.items():
                values[group] = {**values.get(group, {}), **change}
        return Settings.model_validate({"task": self.task, **values})

    def open(self, folder: Path, **groups: Mapping[str, Any]) -> Task:
        """The task, on images that are drawn under `folder` once."""
        settings = self.settings(**groups)
        task: Any = Few(TASKS[settings.task].open(settings, opened(settings, folder)))
        return task

    def trajectory(
        self,
        task: Task,
        *,
        seed: int = 0,
        averages: dict[str, tuple[float, float]] | None = None,
        cache: CacheRequest = NO_CACHE,
        folder: Path | None = None,
        **groups: Mapping[str, Any],
    ) -> Trajectory:
        """A trajectory before its first epoch, on one thread."""
        torch.set_num_threads(COMPUTE.threads)
        settings = self.settings(**groups)
        served = Activations(task, COMPUTE, CPU, cache, folder, "contents", settings.optimiser.batch_size)
        return Trajectory(task, settings, seed, COMPUTE, CPU, served, averages or {})

    def request(self, observers: Sequence[Observer], **groups: Mapping[str, Any]) -> TrialRequest:
        """All of its epochs as one trial that these observers watch to the end."""
        settings = self.settings(**groups)
        keys = tuple(
            hashlib.sha256(f"{self.name} {epoch}".encode()).hexdigest()
            for epoch in range(total_epochs(settings.strategy))
        )
        watches = tuple(Watch(observer, keys[-1:]) for observer in observers)
        keep = frozenset(keys[-1:])
        return TrialRequest(self.name, settings, 0, keys, 0, watches, keep=keep, cache=NO_CACHE, compute=COMPUTE)

    def trial(self, request: TrialRequest, task: Task, store: Store) -> Trial:
        """A trial over a store, from where the store has it."""
        torch.set_num_threads(COMPUTE.threads)
        return Trial(request, task, store, {"contents_digest": "contents", "index_digest": "index"})


def opened(settings: Settings, folder: Path) -> Data:
    """The data set of these settings, opened once a session."""
    return _opened(settings.dataset.model_dump_json(), folder)


@cache
def _opened(dataset_json: str, folder: Path) -> Data:
    from trainables.settings import DatasetSettings

    settings = DatasetSettings.model_validate_json(dataset_json)
    return open_data(settings, Folders(folder / "drawn", folder / "decoded", folder / "splits"))


CASES = {
    case.name: case
    for case in (
        Case(
            "classification",
            "classification",
            {"dataset": {"image_size": 32}, "model": {"backbone": "tiny-phantom", "head_hidden": 16}},
        ),
        Case(
            "detection by YOLO",
            "detection",
            {"dataset": {"image_size": 64, "fit": "letterbox"}, "model": {"backbone": "tiny-yolo"}},
        ),
        Case(
            "detection by RT-DETR",
            "detection",
            {"dataset": {"image_size": 64, "fit": "letterbox"}, "model": {"backbone": "tiny-rtdetr"}},
        ),
        Case(
            "segmentation",
            "segmentation",
            {"dataset": {"image_size": 64}, "model": {"backbone": "tiny-sam2"}},
        ),
        *(
            Case(
                f"classification by {encoder.removeprefix('timm:')}",
                "classification",
                {"dataset": {"image_size": 64}, "model": {"backbone": encoder, "small": True, "head_hidden": 16}},
            )
            for encoder in ("timm:resnet50", "timm:densenet121", "timm:inception_v3", "albef")
        ),
    )
}

Opened = Callable[[str], Task]
