"""COCO annotation files: images, categories and boxes, checked as they are read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainables.data.boxes import Boxes, box_fault
from trainables.data.index import DataError, Refused
from trainables.data.tables import texts

_BROKEN = (KeyError, TypeError, ValueError, OverflowError)  # entries that lack something, or hold something else
_LONGEST = 1000  # characters of a name: arrays of names are as wide as the longest


@dataclass(frozen=True)
class CocoBox:
    """One annotation: corners are x_min, y_min, x_max, y_max in pixels."""

    image: str
    category: str
    corners: tuple[float, float, float, float]


@dataclass(frozen=True)
class Coco:
    """A file's contents.

    Attributes:
        sizes: file name → (width, height), in the file's order, images without boxes included.
        categories: names, in the order of their ids.
        refused: images and annotations that cannot be used.
    """

    path: Path
    sizes: dict[str, tuple[int, int]]
    categories: tuple[str, ...]
    boxes: tuple[CocoBox, ...]
    refused: tuple[Refused, ...]


def read_coco(path: Path) -> Coco:
    """Read a COCO json file of boxes; segmentations are not looked at.

    Raises:
        DataError: the file cannot be read, is no JSON, or lacks images, annotations or categories.
    """
    data = _parsed(path)
    categories = _categories(path, data["categories"])
    refused: list[Refused] = []
    names: dict[Any, str] = {}
    sizes: dict[str, tuple[int, int]] = {}
    for number, image in enumerate(data["images"]):
        try:
            name, size = _name(image["file_name"]), (int(image["width"]), int(image["height"]))
            if name in sizes:
                raise ValueError(f"image {name} is listed twice")
            names[image["id"]] = name
            sizes[name] = size
        except _BROKEN as error:
            refused.append(Refused(f"{path}, images[{number}]", _reason(error)))
    boxes: list[CocoBox] = []
    for number, annotation in enumerate(data["annotations"]):
        try:
            boxes.append(_box(annotation, names, sizes, categories))
        except _BROKEN as error:
            refused.append(Refused(f"{path}, annotations[{number}]", _reason(error)))
    return Coco(path, sizes, tuple(categories[key] for key in sorted(categories)), tuple(boxes), tuple(refused))


def to_boxes(files: list[Coco], classes: tuple[str, ...], class_of: dict[str, str]) -> Boxes:
    """Boxes of several files; `class_of` names the class of a category, and leaves out those it does not name."""
    kept = [box for file in files for box in file.boxes if box.category in class_of]
    return Boxes(
        classes,
        texts([box.image for box in kept]),
        np.array([classes.index(class_of[box.category]) for box in kept], np.int64),
        np.array([box.corners for box in kept], np.float64).reshape(-1, 4),
        np.full(len(kept), ""),
        {},
        np.ones(len(kept)),
        {name: size for file in files for name, size in file.sizes.items()},
        tuple(refused for file in files for refused in file.refused),
    )


def _parsed(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is no JSON in UTF-8: {error}") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(data, dict) or not isinstance(data.get(key), list):
            raise DataError(f"{path}: holds no list {key!r}; expected a COCO file of images, annotations, categories")
    return dict(data)


def _categories(path: Path, listed: list[Any]) -> dict[int, str]:
    try:
        return {int(category["id"]): str(category["name"]) for category in listed}
    except _BROKEN as error:
        raise DataError(f"{path}: categories: {_reason(error)}; expected an id and a name for each") from error


def _box(
    annotation: Any, names: dict[Any, str], sizes: dict[str, tuple[int, int]], categories: dict[int, str]
) -> CocoBox:
    image, category = annotation["image_id"], annotation["category_id"]
    if image not in names:
        raise ValueError(f"image_id {image!r} is not among the images")
    if category not in categories:
        raise ValueError(f"category_id {category!r} is not among the categories")
    if annotation.get("iscrowd"):
        raise ValueError("is a crowd; only single boxes can be learnt")
    x, y, width, height = (float(value) for value in annotation["bbox"])
    corners = (x, y, x + width, y + height)
    fault = box_fault(corners, sizes[names[image]])
    if fault is not None:
        raise ValueError(fault)
    return CocoBox(names[image], categories[category], corners)


def _name(given: Any) -> str:
    name = str(given) if isinstance(given, str | int) else ""
    if not name or len(name) > _LONGEST or "\0" in name:
        raise ValueError(f"file_name of {len(name)} characters; expected a file's name")
    return name


def _reason(error: Exception) -> str:
    return f"no {error}" if isinstance(error, KeyError) else str(error)
