"""Any data set of boxes in YOLO's form: `data.yaml` with the classes' names, image folders, a text file an image.

Folders are `images/train` with `labels/train`, or `train/images` with `train/labels` (val or valid, and test, alike),
or `images` with `labels` alone. A line of a text file is `class x_centre y_centre width height`, in parts of the image.
An image without a text file has no box. Image labels are the presence of boxes; every image is its own group, unless
`dataset.group_pattern` finds the patient in its name. The folders that data.yaml names are not looked at: they are
paths of another machine as often as not.

`dataset.split=official` takes the folders' split; without a test folder, val is the test and val is held out of train.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import yaml

from trainables.data.adapter import Adapter, DatasetInfo, Table
from trainables.data.boxes import Boxes, box_fault
from trainables.data.coco_folder import WORDS, split_marks
from trainables.data.files import IMAGE_SUFFIXES
from trainables.data.index import DataError, Refused
from trainables.data.name_groups import grouped_by_name
from trainables.data.tables import multi_hot, root_of, texts
from trainables.settings import DatasetSettings

YAML_FILES = ("data.yaml", "dataset.yaml", "data.yml")
_EDGE = 0.01  # of the image: written numbers are rounded


@dataclass(frozen=True)
class _Line:
    """A box: its class, and x_min, y_min, x_max, y_max in parts of the image."""

    image: str
    label: int
    corners: tuple[float, float, float, float]


def read_table(settings: DatasetSettings) -> Table:
    """List the images and read their text files; labels are the presence of boxes.

    Raises:
        DataError: no images, no names of the classes, no split where the official one is asked for, or a name
            without a group.
    """
    root = root_of(INFO.name, settings.root)
    classes = _classes(root)
    folders = _folders(root, settings)
    images = {name: part for part, folder in folders.items() for name in _images(root, folder)}
    lines, refused, without = _lines(root, list(images), len(classes))
    found: dict[str, set[str]] = {name: set() for name in images}
    for line in lines:
        found[line.image].add(classes[line.label])
    info = replace(INFO, classes=classes, channels=settings.channels or INFO.channels)
    groups, info = grouped_by_name(info, list(images), settings.group_pattern)
    return Table(
        texts(list(images)),
        groups,
        multi_hot([sorted(labels) for labels in found.values()], classes),
        official=split_marks(list(images.values())) if settings.split == "official" else None,
        info=info,
        refused=tuple(refused),
        warnings=(f"{without} images have no text file: read as images without a box",) if without else (),
    )


def read_boxes(settings: DatasetSettings) -> Boxes:
    """Boxes in pixels; the header of every image with a box is read for its size.

    Raises:
        DataError: as `read_table`, or an image whose size cannot be read.
    """
    from trainables.data.decode import size_of  # a plan reads tables, and needs no images

    root = root_of(INFO.name, settings.root)
    classes = _classes(root)
    names = [name for folder in _folders(root, settings).values() for name in _images(root, folder)]
    lines, refused, _ = _lines(root, names, len(classes))
    sizes = {name: size_of(root / name) for name in dict.fromkeys(line.image for line in lines)}
    corners = np.array([line.corners for line in lines], np.float64).reshape(-1, 4)
    scales = np.array([sizes[line.image] * 2 for line in lines], np.float64).reshape(-1, 4)
    return Boxes(
        classes,
        texts([line.image for line in lines]),
        np.array([line.label for line in lines], np.int64),
        corners * scales,
        np.full(len(lines), ""),
        {},
        np.ones(len(lines)),
        sizes,
        tuple(refused),
    )


def _classes(root: Path) -> tuple[str, ...]:
    path = next((root / name for name in YAML_FILES if (root / name).is_file()), None)
    if path is None:
        raise DataError(f"{INFO.name}: no {' or '.join(YAML_FILES)} in {root}: it names the classes")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise DataError(f"{path}: cannot be read as YAML: {(str(error).splitlines() or [''])[0]}") from error
    names = data.get("names") if isinstance(data, dict) else None
    if isinstance(names, dict) and sorted(names, key=str) == sorted(range(len(names)), key=str):
        names = [names[number] for number in range(len(names))]
    plain = isinstance(names, list) and all(isinstance(name, str | int | float) for name in names)
    if not plain or not names or len({str(name) for name in names}) != len(names):
        raise DataError(f"{path}: names: expected a list of the classes' names, each once, or a mapping from 0, 1, …")
    return tuple(str(name) for name in names)


def _folders(root: Path, settings: DatasetSettings) -> dict[str, Path]:
    """Split, or '' for the only folder → folder of images."""
    found: dict[str, Path] = {}
    for split, words in WORDS.items():
        there = [path for word in words for path in (root / "images" / word, root / word / "images") if path.is_dir()]
        if len(there) > 1:
            raise DataError(f"{INFO.name}: {split} may be {there[0]} or {there[1]}; leave one of them")
        if there:
            found[split] = there[0]
    if not found and (root / "images").is_dir():
        found = {"": root / "images"}
    if not found:
        raise DataError(f"{INFO.name}: no images/ or train/images/ in {root}; expected them beside labels/")
    if settings.split == "official" and not ({"train"} < set(found)):
        raise DataError(f"{INFO.name}: no train folder beside a val or test folder; set dataset.split=grouped")
    return found


def _images(root: Path, folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if entry.name.lower().endswith(IMAGE_SUFFIXES))
    return [f"{folder.relative_to(root).as_posix()}/{name}" for name in names]


def _lines(root: Path, names: list[str], classes: int) -> tuple[list[_Line], list[Refused], int]:
    """All boxes, those that cannot be used, and how many images have no text file."""
    lines: list[_Line] = []
    refused: list[Refused] = []
    without = 0
    for name in names:
        path = _text_file(root, name)
        if not path.is_file():
            without += 1
            continue
        for number, text in _texts(path):
            try:
                lines.append(_parsed(name, text, classes))
            except ValueError as error:
                refused.append(Refused(f"{path}, line {number}", str(error)))
    return lines, refused, without


def _texts(path: Path) -> Iterator[tuple[int, str]]:
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise DataError(f"{path}: cannot be read as text in UTF-8: {error}") from error
    return ((number, text) for number, text in enumerate(content.splitlines(), 1) if text.strip())


def _text_file(root: Path, name: str) -> Path:
    parts = list(Path(name).with_suffix(".txt").parts)
    parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    return root.joinpath(*parts)


def _parsed(image: str, text: str, classes: int) -> _Line:
    fields = text.split()
    if len(fields) != 5:
        raise ValueError(f"{len(fields)} values; expected class, x_centre, y_centre, width, height")
    label, x, y, width, height = int(fields[0]), *(float(field) for field in fields[1:])
    if not 0 <= label < classes:
        raise ValueError(f"class {label}; expected 0 … {classes - 1}, as data.yaml names them")
    corners = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    if min(corners) < -_EDGE or max(corners) > 1 + _EDGE:
        raise ValueError(f"box {' '.join(fields[1:])} reaches out of the image; expected parts of it, 0 … 1")
    inside = tuple(min(max(value, 0.0), 1.0) for value in corners)
    fault = box_fault(inside)
    if fault is not None:
        raise ValueError(fault)
    return _Line(image, label, (inside[0], inside[1], inside[2], inside[3]))


def image_folders(root: Path) -> list[Path]:
    """The root: names hold their folders."""
    return [root]


INFO = DatasetInfo(
    name="yolo",
    title="any data set in YOLO's form",
    classes=(),
    group_kind="image",
    single_label=False,
    channels=3,
    synthetic=False,
    licence="yours",
    notes=("Labels are the presence of boxes.",),
)
ADAPTER = Adapter(
    INFO, read_table, image_folders, options=frozenset({"channels", "group_pattern"}), read_boxes=read_boxes
)
