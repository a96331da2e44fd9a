"""Any data set of boxes in COCO's form: json files of images, categories and annotations, and image folders.

The json files are `annotations/*train*.json`, `*val*.json`, `*test*.json`, or `train/_annotations.coco.json` and its
like in `valid` and `test`, or the single one that `dataset.table` names. Image labels are the presence of boxes;
categories that no box has are left out. Every image is its own group, unless `dataset.group_pattern` finds the patient
in its name.

`dataset.split=official` takes the files' split; without a test file, val is the test and val is held out of train.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from trainables.data.adapter import Adapter, DatasetInfo, Table
from trainables.data.boxes import Boxes
from trainables.data.coco import Coco, read_coco, to_boxes
from trainables.data.files import IMAGE_SUFFIXES
from trainables.data.index import SPLITS, DataError, Refused
from trainables.data.name_groups import grouped_by_name
from trainables.data.tables import multi_hot, root_of, texts
from trainables.settings import DatasetSettings

WORDS = {"train": ("train",), "val": ("val", "valid"), "test": ("test",)}  # split → what files and folders say
_IN_FOLDER = "_annotations.coco.json"


def read_table(settings: DatasetSettings) -> Table:
    """Read the json files; labels are the presence of boxes.

    Raises:
        DataError: no file, one that cannot be read, no split where the official one is asked for, or a name without a
            group.
    """
    files = _files(settings)
    coco = {part: read_coco(path) for part, path in files.items()}
    names: dict[str, str] = {}
    refused: list[Refused] = []
    for part, file in coco.items():
        refused += file.refused
        for name in file.sizes:
            if name in names:
                refused.append(Refused(f"{file.path}", f"image {name} is listed in {files[names[name]].name} too"))
            names.setdefault(name, part)
    classes = _classes(list(coco.values()))
    found: dict[str, set[str]] = {name: set() for name in names}
    for box in (box for file in coco.values() for box in file.boxes):
        found[box.image].add(box.category)
    info = replace(INFO, classes=classes, channels=settings.channels or INFO.channels)
    groups, info = grouped_by_name(info, list(names), settings.group_pattern)
    return Table(
        texts(list(names)),
        groups,
        multi_hot([sorted(found[name]) for name in names], classes),
        official=split_marks(list(names.values())) if settings.split == "official" else None,
        info=info,
        refused=tuple(refused),
    )


def read_boxes(settings: DatasetSettings) -> Boxes:
    """Boxes of all files.

    Raises:
        DataError: as `read_table`.
    """
    coco = [read_coco(path) for path in _files(settings).values()]
    classes = _classes(coco)
    return to_boxes(coco, classes, {name: name for name in classes})


def _files(settings: DatasetSettings) -> dict[str, Path]:
    """Split, or '' for the only file → json file."""
    root = root_of(INFO.name, settings.root)
    if settings.table is not None:
        path = root / Path(settings.table).expanduser()
        if not path.is_file():
            raise DataError(f"dataset.table: {path} is not a file; name the json file relative to {root}, or absolute")
        found = {"": path}
    else:
        found = {split: path for split in SPLITS for path in _of_split(root, split)}
    if not found:
        raise DataError(
            f"{INFO.name}: no json file in {root}: expected annotations/*train*.json or train/{_IN_FOLDER}, or "
            "dataset.table"
        )
    if settings.split == "official" and not ({"train"} < set(found)):
        raise DataError(f"{INFO.name}: no train file beside a val or test file; set dataset.split=grouped")
    return found


def _of_split(root: Path, split: str) -> list[Path]:
    """The json file of a split, if there is one.

    Raises:
        DataError: there are several.
    """
    words = WORDS[split]
    found = sorted({path for word in words for path in (root / "annotations").glob(f"*{word}*.json")})
    found += [path for word in words if (path := root / word / _IN_FOLDER).is_file()]
    if len(found) > 1:
        several = " or ".join(str(path) for path in found[:3])
        raise DataError(f"{INFO.name}: {split} may be {several}; leave one, or name a single file by dataset.table")
    return found


def split_marks(parts: list[str]) -> npt.NDArray[np.uint8]:
    """Positions in SPLITS of (N,) parts, 'train', 'val' or 'test'; without a test part, val is the test."""
    place = {part: SPLITS.index(part) for part in SPLITS}
    if "test" not in parts:
        place["val"] = place["test"]
    return np.array([place[part] for part in parts], np.uint8)


def _classes(files: list[Coco]) -> tuple[str, ...]:
    """Categories that some box has, in the order of the files."""
    used = {box.category for file in files for box in file.boxes}
    classes = tuple(dict.fromkeys(name for file in files for name in file.categories if name in used))
    if not classes:
        raise DataError(f"{files[0].path}: holds no box that can be used; there is nothing to learn")
    return classes


def image_folders(root: Path) -> list[Path]:
    """Every folder under the root that holds images, the root's own first."""
    return [Path(at) for at, _, files in os.walk(root) if any(f.lower().endswith(IMAGE_SUFFIXES) for f in files)]


INFO = DatasetInfo(
    name="coco",
    title="any data set in COCO's form",
    classes=(),
    group_kind="image",
    single_label=False,
    channels=3,
    synthetic=False,
    licence="yours",
    notes=("Labels are the presence of boxes.",),
)
ADAPTER = Adapter(
    INFO, read_table, image_folders, options=frozenset({"table", "channels", "group_pattern"}), read_boxes=read_boxes
)
