"""TBX11K: `annotations/json/TBX11K_{train,val}.json` (COCO) and images in `imgs/{health,sick,tb,…}`.

Image labels are those of its boxes: active and obsolete tuberculosis, or one class for both
(`dataset.merge_classes=true`). Healthy and otherwise sick images have neither; `dataset.only_tb=true` leaves them out.
An image of the folder `tb` without a box has tuberculosis of an unknown kind: unlabelled for the two classes, positive
for the merged one. The third category, PulmonaryTuberculosis, has no box in train and val.

Labels of the test part are withheld: `dataset.split=official` tests on val and holds val out of train; `grouped` splits
train and val anew, by image, since no patient id was released.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from trainables.data.adapter import Adapter, DatasetInfo, Table
from trainables.data.boxes import Boxes
from trainables.data.coco import Coco, read_coco, to_boxes
from trainables.data.index import CHEST_RADIOGRAPHS, SPLITS, UNLABELLED, DataError, Refused
from trainables.data.tables import root_of, texts
from trainables.settings import DatasetSettings

CATEGORIES = {"ActiveTuberculosis": "Active TB", "ObsoletePulmonaryTuberculosis": "Obsolete TB"}
CLASSES = tuple(CATEGORIES.values())
MERGED = ("Tuberculosis",)
UNKNOWN_KIND = "PulmonaryTuberculosis"
PARTS = {"train": "train", "val": "test"}  # distributed part → its place in the official split


def read_table(settings: DatasetSettings) -> Table:
    """Read the two COCO files; labels are the presence of boxes.

    Raises:
        DataError: a missing or unreadable file.
    """
    files = _files(settings)
    sizes = [file.sizes for file in files]
    names = [name for part in sizes for name in part]
    twice = sorted(set(sizes[0]) & set(sizes[1]))
    refused = [refused for file in files for refused in file.refused]
    refused += [Refused(f"{files[1].path}", f"image {name} is listed in the train file too") for name in twice]
    labels, untold = _labels(files, names, settings.merge_classes)
    marks = np.repeat([SPLITS.index(split) for split in PARTS.values()], [len(part) for part in sizes])
    table = Table(
        texts(names),
        texts(names),
        labels,
        official=marks.astype(np.uint8) if settings.split == "official" else None,
        strata=_labels(files, names, merge=False)[0],
        info=replace(INFO, classes=MERGED if settings.merge_classes else CLASSES, notes=_notes(settings)),
        refused=tuple(refused),
        warnings=tuple([f"{untold} images of tb/ have no box of a known kind"] if untold else []),
    )
    return table.take(np.sort(np.unique(table.names, return_index=True)[1])) if twice else table


def read_boxes(settings: DatasetSettings) -> Boxes:
    """Boxes of train and val; those of an unknown kind count where the classes are merged.

    Raises:
        DataError: a missing or unreadable file.
    """
    if settings.merge_classes:
        return to_boxes(_files(settings), MERGED, dict.fromkeys((*CATEGORIES, UNKNOWN_KIND), MERGED[0]))
    return to_boxes(_files(settings), CLASSES, CATEGORIES)


def _files(settings: DatasetSettings) -> list[Coco]:
    root = root_of(INFO.name, settings.root)
    suffix = "_only_tb" if settings.only_tb else ""
    paths = [root / "annotations" / "json" / f"TBX11K_{part}{suffix}.json" for part in PARTS]
    for path in paths:
        if not path.is_file():
            raise DataError(f"{path} does not exist; expected TBX11K as distributed: annotations/json and imgs")
    return [read_coco(path) for path in paths]


def _labels(files: list[Coco], names: list[str], merge: bool) -> tuple[npt.NDArray[np.int8], int]:
    """(N, C) labels, and how many images of tb/ have no box of a known kind."""
    found: dict[str, set[str]] = {}
    for box in (box for file in files for box in file.boxes):
        found.setdefault(box.image, set()).add(box.category)
    kinds = np.array([[category in found.get(name, ()) for category in CATEGORIES] for name in names], np.int8)
    kinds = kinds.reshape(len(names), len(CATEGORIES))
    untold = np.array([name.startswith("tb/") for name in names], bool) & ~kinds.any(1)
    if merge:
        return (kinds.any(1) | untold).astype(np.int8)[:, None], int(untold.sum())
    kinds[untold] = UNLABELLED
    return kinds, int(untold.sum())


def _notes(settings: DatasetSettings) -> tuple[str, ...]:
    notes = list(INFO.notes)
    if settings.only_tb:
        notes.append("Images with tuberculosis alone.")
    if settings.split == "official":
        notes.append("The test split is the official val part, since test labels are withheld.")
    return tuple(notes)


def image_folders(root: Path) -> list[Path]:
    """`imgs`, under which the names' folders lie."""
    return [folder for folder in (root / "imgs",) if folder.is_dir()]


INFO = DatasetInfo(
    name="tbx11k",
    title="TBX11K",
    classes=(),
    group_kind="image",
    single_label=False,
    channels=1,
    synthetic=False,
    licence="CC BY-NC-SA 4.0",
    notes=("No patient id was released: the split is by image.",),
    claims=CHEST_RADIOGRAPHS,
)
ADAPTER = Adapter(
    INFO, read_table, image_folders, options=frozenset({"only_tb", "merge_classes"}), read_boxes=read_boxes
)
