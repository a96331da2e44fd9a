"""Detection as the plan sees it: classes that have boxes, a detector's costs from its YAML."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from trainables.data.box_targets import BoxTargets, load_box_targets, real_box_targets, with_sizes
from trainables.data.chest_scene import BOXED
from trainables.data.index import SPLITS, DataError, Index
from trainables.detectors import detector_facts, find_detector, require_extra
from trainables.settings import Settings
from trainables.task_kind import Classes, ModelError, ModelFacts, TaskKind

if TYPE_CHECKING:
    from trainables.data.opened import Data
    from trainables.detection import Detection

DRAWN_WITH_BOXES = "phantom"


def boxed_classes(settings: Settings, index: Index) -> Classes:
    """Classes that have boxes, of which each occurs in the training split.

    Raises:
        DataError: there is none, or one that cannot be learnt, or a split without any box.
    """
    counts = _drawn_counts(index) if _drawn(settings) else _listed_counts(settings, index)
    if not counts:
        kept = f"; keep one of {', '.join(BOXED)}" if _drawn(settings) else ""
        raise DataError(f"{index.dataset}: no class with boxes is left{kept}")
    absent = [name for name, of_split in counts.items() if not of_split["train"]]
    if absent:
        raise DataError(
            f"{index.dataset}: no training box of {', '.join(absent)}; leave it out with "
            f"dataset.drop_classes=[{','.join(absent)}], or take more images"
        )
    _refuse_splits_without_boxes(index, counts)
    return tuple(counts)


_Counts = dict[str, dict[str, int]]  # class → split → boxes


def _drawn_counts(index: Index) -> _Counts:
    """A finding of `BOXED` is drawn with one box wherever it is present, so nothing needs to be drawn for a plan."""
    positives = {split: index.class_counts(split)[0].tolist() for split in SPLITS}
    return {
        name: {split: positives[split][column] for split in SPLITS}
        for column, name in enumerate(index.classes)
        if name in BOXED
    }


def _listed_counts(settings: Settings, index: Index) -> _Counts:
    boxes = real_box_targets(settings, index)
    labels = {split: boxes.labels[boxes.of(index.rows(split))[1]] for split in SPLITS}
    return {
        name: {split: int((labels[split] == number).sum()) for split in SPLITS}
        for number, name in enumerate(boxes.classes)
    }


def _refuse_splits_without_boxes(index: Index, of_class: _Counts) -> None:
    """No epoch could be chosen without a validation box, and nothing measured without one to test on."""
    counts = {split: sum(of_split[split] for of_split in of_class.values()) for split in SPLITS}
    empty = [split for split, count in counts.items() if not count]
    if empty:
        shown = ", ".join(f"{split} {count}" for split, count in counts.items())
        raise DataError(
            f"{index.dataset}: no box in {' and '.join(empty)} (boxes: {shown}); take more images, drop fewer "
            "classes, or split anew with another dataset.split_seed"
        )


def _drawn(settings: Settings) -> bool:
    return settings.dataset.name == DRAWN_WITH_BOXES and settings.detection.boxes is None


def _facts(settings: Settings, classes: Classes, download: bool) -> ModelFacts:
    if settings.dataset.fit == "crop":
        raise ModelError("dataset.fit: crop would cut boxes off; detection needs letterbox, or squash")
    require_extra()
    return detector_facts(settings, classes)


def _annotated(settings: Settings, index: Index) -> npt.NDArray[np.bool_] | None:
    return None if _drawn(settings) else real_box_targets(settings, index).annotated


def _boxes_digest(settings: Settings, index: Index) -> str:
    return "of the scenes" if _drawn(settings) else real_box_targets(settings, index).digest()


def _notes(settings: Settings) -> tuple[str, ...]:
    data = settings.dataset
    notes = [
        f"Detection: AP by faster-coco-eval as COCO defines it, on images of {data.image_size} px ({data.fit}), at "
        f"most {settings.detection.max_det} boxes an image (maxDets), of all sizes; classes without a box in the test "
        "split are undefined and left out of the means. Precision and recall at IoU 0.5, of the boxes whose score "
        "reaches one threshold for all classes: that with the best mean F1 on the split itself.",
    ]
    if settings.weighting.enabled:
        notes.append("Class weights multiply the whole classification loss of a class, positives and negatives alike.")
    if settings.dataset.name == "chestxray14" and settings.detection.boxes is None:
        notes.append(
            "chestxray14: only images that BBox_List_2017.csv names take part; findings that it does not box on them "
            "count as absent."
        )
    return tuple(notes)


def _opened_boxes(settings: Settings, data: Data) -> BoxTargets:
    """The boxes, checked against what was planned.

    Raises:
        DataError: the file of boxes does not hold the classes that the plan found.
    """
    boxes = with_sizes(load_box_targets(settings, data.index, data.root), data.index, data.images.sizes)
    planned = boxed_classes(settings, data.index)
    if boxes.classes != planned:
        raise DataError(f"{data.index.dataset}: boxes of {', '.join(boxes.classes)}, planned {', '.join(planned)}")
    return boxes


def _contents(settings: Settings, data: Data) -> str:
    parts = (data.images.contents_digest, _opened_boxes(settings, data).digest())
    return hashlib.sha256("|".join(parts).encode()).hexdigest()


def _open(settings: Settings, data: Data) -> Detection:
    from trainables.detection import Detection

    return Detection(settings, data.index, data.images, _opened_boxes(settings, data), find_detector(settings))


DETECTION = TaskKind(
    main_metric="map50_95",
    metric_label="mAP@50-95",
    classes=boxed_classes,
    facts=_facts,
    targets_digest=_boxes_digest,
    notes=_notes,
    open=_open,
    contents=_contents,
    annotated=_annotated,
    libraries=("ultralytics", "torchvision", "faster-coco-eval"),
)
