"""Segmentation as the plan sees it: SAM 2's shape from its config.json, the structures that the settings name."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from trainables.data.chest_scene import STRUCTURES
from trainables.data.index import DataError, Index
from trainables.data.mask_files import FOLDER
from trainables.prompts import PROMPTS
from trainables.sam2_costs import ClipShape, sam2_costs
from trainables.sam2_files import Sam2Files, find_sam2
from trainables.settings import Settings
from trainables.task_kind import Classes, ModelFacts, TaskKind

if TYPE_CHECKING:
    from trainables.data.mask_cache import MaskCache
    from trainables.data.opened import Data
    from trainables.segmentation import Segmentation


def sam2_facts(settings: Settings, classes: Classes, download: bool) -> ModelFacts:
    """Facts of a SAM 2 at the settings' image size.

    Raises:
        BackboneError: it cannot be found or read, or does not take this image size.
    """
    files = _files(settings.model.backbone, download)
    size = settings.dataset.image_size
    files.check_image_size(size)
    return ModelFacts(
        name=files.name,
        weights_digest=files.weights_digest(),
        shape_digest=_shape_digest(settings, files),
        mean=files.mean,
        std=files.std,
        costs=sam2_costs(files, ClipShape(size, len(classes), len(PROMPTS))),
    )


def _shape_digest(settings: Settings, files: Sam2Files) -> str:
    """The architecture, and what chooses the masks and memory frames that frozen activations hold."""
    given = settings.segmentation
    facts = [files.config_digest, given.structures, given.masks, given.min_mask_quality, settings.dataset.split_seed]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


@cache
def _files(name: str, download: bool) -> Sam2Files:
    return find_sam2(name, download=download)


def _structures(settings: Settings, index: Index) -> Classes:
    """The structures; refuses data sets that have no masks of them, as far as can be told without reading any."""
    given, data = settings.segmentation, settings.dataset
    if index.synthetic:
        present = STRUCTURES if data.name == "phantom" else ()
        missing = [name for name in given.structures if name not in present]
        if missing:
            raise DataError(
                f"{data.name}: has no masks of {', '.join(missing)}; "
                f"{'it has ' + ', '.join(present) if present else 'the data set phantom has some'}"
            )
    elif given.masks is None and data.root is not None:
        for name in given.structures:
            folder = Path(data.root).expanduser() / FOLDER / name
            if not folder.is_dir():
                raise DataError(
                    f"{data.name}: no masks of {name!r}: no folder {folder}; name the structures that there are with "
                    "segmentation.structures, or a table of run-length codes with segmentation.masks"
                )
    return given.structures


def _masks_are_contents(settings: Settings, index: Index) -> str:
    return ""  # masks are images: hashed while they are decoded, and compared on reuse


def _notes(settings: Settings) -> tuple[str, ...]:
    kind = settings.segmentation.prompt
    notes = [
        f"Dice: 2·|A ∩ B| / (|A| + |B|) at {settings.dataset.image_size} px ({settings.dataset.fit}), mean over images "
        "of each structure, then over structures; 1 where mask and prediction are both empty (as often as "
        "cells.csv says under both_empty).",
        "Each image is segmented from a memory: an image of the training split of another patient, with its masks, "
        "chosen by a hash of the image's name. The prompt is a box around the whole image, so nothing of an image's "
        "own masks reaches its prediction.",
        f"Figures named oracle come from a {kind} drawn from the image's own mask; nothing is chosen by them.",
        "SAM 2 without object pointers and without its score of whether there is an object.",
    ]
    if settings.weighting.enabled:
        notes.append("Class weights multiply all that their structure adds to the loss; they start from pixel counts.")
    if settings.model.backbone == "tiny-sam2":
        notes.append("tiny-sam2: its frozen parts were drawn at random and have learnt nothing.")
    else:
        notes.append("The mask decoder starts from SAM 2's own: seeds differ by the order of images and by dropout.")
    if settings.segmentation.masks is not None:
        notes.append(
            "The masks are CheXmask's: made by a model and checked by reverse classification accuracy, not by experts; "
            f"those below {settings.segmentation.min_mask_quality:g} are left out."
        )
    return tuple(notes)


def _masks(settings: Settings, data: Data) -> MaskCache:
    from trainables.data.mask_cache import open_masks

    return open_masks(settings.dataset, settings.segmentation, data.index, root=data.root, folder=data.decoded)


def _contents(settings: Settings, data: Data) -> str:
    """Digest of the decoded images and masks."""
    both = f"{data.images.contents_digest} {_masks(settings, data).contents_digest}"
    return hashlib.sha256(both.encode()).hexdigest()


def _open(settings: Settings, data: Data) -> Segmentation:
    from trainables.segmentation import Segmentation

    files = find_sam2(settings.model.backbone, download=True)
    costs = sam2_facts(settings, settings.segmentation.structures, download=True).costs
    return Segmentation(settings, data.index, data.images, _masks(settings, data), files, costs)


SEGMENTATION = TaskKind(
    main_metric="mean_dice",
    metric_label="mean Dice",
    classes=_structures,
    facts=sam2_facts,
    targets_digest=_masks_are_contents,
    notes=_notes,
    open=_open,
    contents=_contents,
)
