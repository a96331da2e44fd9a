"""Small real material for tests of segmentation: 60 phantoms at 64 px with their masks, and the tiny SAM 2."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from trainables.data.chestxray14 import CLASSES
from trainables.data.mask_cache import MaskCache
from trainables.data.opened import Data, Folders, open_data
from trainables.segmentation import Segmentation
from trainables.settings import DatasetSettings, Settings
from trainables.tasks import TASKS

FREQUENT = ("Effusion",)  # measurable in every split of so few images
DATASET = DatasetSettings(
    name="phantom", images=60, image_size=64, drop_classes=tuple(name for name in CLASSES if name not in FREQUENT)
)
STRUCTURES = ("left_lung", "right_lung", "heart")


def segmentation_settings(**groups: Mapping[str, Any]) -> Settings:
    """One head epoch and two of stage 2 (k = 2, 4 of 4 layers), batches of 8 of which the last is partial."""
    values: dict[str, dict[str, Any]] = {
        "model": {"backbone": "tiny-sam2"},
        "optimiser": {"batch_size": 8, "encoder_lr": 3e-3, "head_lr": 3e-3},
        "strategy": {"head_epochs": 1, "tune_epochs": 2, "depth": 4, "step": 2},
    }
    for group, changes in groups.items():
        values[group] = {**values.get(group, {}), **changes}
    return Settings.model_validate({"task": "segmentation", "dataset": DATASET.model_dump(), **values})


def segmentation_data(folder: Path) -> Data:
    """The phantoms, drawn and decoded under a folder."""
    return open_data(DATASET, Folders(folder / "drawn", folder / "decoded", folder / "splits"))


def segmentation_task(settings: Settings, data: Data) -> Segmentation:
    """The task as a worker opens it."""
    torch.set_num_threads(1)  # as a trial computes
    task = TASKS["segmentation"].open(settings, data)
    assert isinstance(task, Segmentation)
    return task


def with_masks(task: Segmentation, masks: npt.NDArray[np.bool_], known: npt.NDArray[np.bool_] | None = None) -> None:
    """Give a task other masks, (N, C, S, S), and leave its memory frames as they are."""
    bits = np.packbits(masks.reshape(*masks.shape[:2], -1), axis=-1)
    known = task._masks.known if known is None else known
    task._masks = dataclasses.replace(task._masks, bits=bits, known=known)


def all_masks(task: Segmentation) -> npt.NDArray[np.bool_]:
    """(N, C, S, S) masks of a task."""
    masks: MaskCache = task._masks
    return masks.of(np.arange(len(masks.bits)))
