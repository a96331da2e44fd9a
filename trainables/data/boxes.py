"""Boxes of findings: read from ChestX-ray14's list, which the phantom is drawn with too, or from a COCO json file.

A box is relative to its whole image, (x1, y1, x2, y2) in [0, 1]; `Boxes.in_input` puts it where the image lies in the
network input. Which classes have boxes and which images were looked at is known without opening an image.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from trainables.data.chestxray14 import BOX_SPELLING, BOXES_FILE
from trainables.data.index import DataError, Index
from trainables.data.placing import Fit, place
from trainables.data.tables import read_rows, root_of
from trainables.settings import Settings

_LISTED_SIZE = 1024  # px: what ChestX-ray14's list counts in, whatever size the copy of the images has
_SPELLING = {there: here for here, there in BOX_SPELLING.items()}
# The header's bracketed name holds commas, so that it is four fields.
_CHESTXRAY14_COLUMNS = {name: [name] for name in ("Image Index", "Finding Label", "Bbox [x", "y", "w", "h]")}
_OUTSIDE = 0.01  # a box may leave its image by this share, as rounding and tools do; it is cut at the border


@dataclass(frozen=True, eq=False)
class Boxes:
    """The boxes of an index.

    Attributes:
        classes: C names, in order.
        rows: (M,) row of the index, ascending.
        labels: (M,) position in `classes`.
        xyxy: (M, 4) float64, relative to the whole image, x1 < x2, y1 < y2.
        sizes: (N, 2) width and height of every image of the index, px; only their ratio matters.
        annotated: (N,) whether an image was looked at for boxes: where not, nothing may be learnt from it.
    """

    classes: tuple[str, ...]
    rows: npt.NDArray[np.intp]
    labels: npt.NDArray[np.int64]
    xyxy: npt.NDArray[np.float64]
    sizes: npt.NDArray[np.int64]
    annotated: npt.NDArray[np.bool_]

    def of(self, rows: npt.NDArray[np.intp]) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
        """Boxes of rows, in the rows' order: (K,) position within `rows`, (K,) position within this."""
        first = np.searchsorted(self.rows, rows, "left")
        counts = np.searchsorted(self.rows, rows, "right") - first
        place_in_batch = np.repeat(np.arange(len(rows)), counts)
        offsets = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return place_in_batch, np.repeat(first, counts) + offsets

    def in_input(self, image_size: int, fit: Fit) -> npt.NDArray[np.float64]:
        """(M, 4) boxes in px of the network input of image_size × image_size px."""
        sizes, which = np.unique(self.sizes[self.rows], axis=0, return_inverse=True)
        places = np.array([place(w, h, image_size, fit) for w, h in sizes.tolist()]).reshape(-1, 4)[which]
        boxes: npt.NDArray[np.float64] = self.xyxy * np.tile(places[:, 2:], 2) + np.tile(places[:, :2], 2)
        return boxes

    def digest(self) -> str:
        """sha256 of everything."""
        h = hashlib.sha256("\0".join(self.classes).encode())
        for array in (self.rows, self.labels, self.xyxy, self.sizes, self.annotated):
            h.update(np.ascontiguousarray(array).tobytes())
        return h.hexdigest()


@dataclass(frozen=True, eq=False)
class BoxList:
    """A file of boxes as read: images by the names it gives them.

    Attributes:
        classes: in the file's order.
        images: name → (width, height), px.
        names, labels, xyxy: (M,), (M,) and (M, 4), as in `Boxes`.
    """

    path: Path
    classes: tuple[str, ...]
    images: Mapping[str, tuple[int, int]]
    names: tuple[str, ...]
    labels: npt.NDArray[np.int64]
    xyxy: npt.NDArray[np.float64]


def load_boxes(settings: Settings, index: Index, root: Path) -> Boxes:
    """The boxes of an index's images, of its classes that were not dropped; read once while the file stays the same.

    Args:
        root: folder of the data set, drawn or distributed.

    Raises:
        DataError: the data set has no boxes, or its file of boxes is missing, damaged or of other images.
    """
    path = box_file(settings, root)
    stat = path.stat()
    return _boxes_of(path, index, stat.st_mtime_ns, stat.st_size)


@cache
def _boxes_of(path: Path, index: Index, *_stamp: int) -> Boxes:
    listed = read_list(path)
    classes = _ordered(listed.classes, index)
    sizes, annotated, row_of = _rows_of_images(listed, index)
    if index.synthetic:
        annotated[:] = True  # every finding that has a place was drawn with its box
    column = {name: number for number, name in enumerate(classes)}
    kept = [
        (row_of[name], column[listed.classes[label]], number)
        for number, (name, label) in enumerate(zip(listed.names, listed.labels.tolist(), strict=True))
        if name in row_of and listed.classes[label] in column
    ]
    table = np.array(sorted(kept), dtype=np.int64).reshape(-1, 3)
    return Boxes(classes, table[:, 0].astype(np.intp), table[:, 1], listed.xyxy[table[:, 2]], sizes, annotated)


def _ordered(listed: Sequence[str], index: Index) -> tuple[str, ...]:
    """The index's classes that have boxes, then the others that do, without the dropped ones."""
    own = [name for name in index.classes if name in listed]
    return (*own, *(name for name in listed if name not in own and name not in index.dropped))


def box_file(settings: Settings, root: Path) -> Path:
    """The file of boxes that the settings mean: `detection.boxes`, or ChestX-ray14's own list.

    Raises:
        DataError: neither.
    """
    given = settings.detection.boxes
    if given is not None:
        path = root / Path(given).expanduser()  # an absolute path stands alone
        if not path.is_file():
            raise DataError(f"detection.boxes: {path} does not exist; expected a COCO json file")
        return path
    path = root / BOXES_FILE
    if not path.is_file():
        raise DataError(
            f"{settings.dataset.name}: no boxes: {path} does not exist; set detection.boxes to a COCO json file"
        )
    return path


def real_boxes(settings: Settings, index: Index) -> Boxes:
    """Boxes of a real data set, from the folder that the settings name.

    Raises:
        DataError: see `load_boxes`.
    """
    return load_boxes(settings, index, root_of(settings.dataset.name, settings.dataset.root))


def _rows_of_images(
    listed: BoxList, index: Index
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_], dict[str, int]]:
    """Sizes and marks of the index's images, and listed name → row; names may lack folder and extension."""
    exact = {name: row for row, name in enumerate(index.names.tolist())}
    stems = {PurePosixPath(name).stem: row for name, row in exact.items()}
    row_of = {}
    for name in listed.images:
        row = exact.get(name, stems.get(PurePosixPath(name).stem))
        if row is not None:
            row_of[name] = row
    if not row_of:
        first = next(iter(listed.images), "none")
        raise DataError(
            f"{listed.path}: none of its {len(listed.images)} images is in the data set {index.dataset}; the first is "
            f"{first}, the data set's first is {index.names[0]}"
        )
    sizes = np.ones((len(index), 2), np.int64)
    annotated = np.zeros(len(index), np.bool_)
    for name, row in row_of.items():
        sizes[row] = listed.images[name]
        annotated[row] = True
    return sizes, annotated, row_of


# -- files ----------------------------------------------------------------------------------------------------------


def read_list(path: Path) -> BoxList:
    """Read a file of boxes: COCO where its name ends with .json, ChestX-ray14's list otherwise.

    Raises:
        DataError: it cannot be read, or a box is none; names the line or the annotation.
    """
    return read_coco(path) if path.suffix == ".json" else _read_chestxray14(path)


def _read_chestxray14(path: Path) -> BoxList:
    """`BBox_List_2017.csv`: x, y, width and height in px of a 1024 px image, in columns that have no names but one."""
    names, classes, boxes, places = [], [], [], []
    for line, (name, finding, *numbers) in read_rows(path, _CHESTXRAY14_COLUMNS):
        place_ = f"{path}, line {line}"
        try:
            x, y, width, height = map(float, numbers)
        except ValueError:
            raise DataError(f"{place_}: box {', '.join(numbers)}; expected four numbers x, y, w, h") from None
        names.append(name)
        classes.append(_SPELLING.get(finding, finding))
        boxes.append((x, y, x + width, y + height))
        places.append(place_)
    known = tuple(sorted(set(classes)))
    labels = np.array([known.index(name) for name in classes])
    relative = _inside(np.array(boxes) / _LISTED_SIZE, places)
    return BoxList(path, known, dict.fromkeys(names, (_LISTED_SIZE, _LISTED_SIZE)), tuple(names), labels, relative)


def read_coco(path: Path) -> BoxList:
    """A COCO json file: `images` (id, file_name, width, height), `categories` (id, name), `annotations` (bbox in px).

    Categories that no annotation has are no classes: nothing could be learnt or measured.

    Raises:
        DataError: not such a file, an annotation of an unknown image or category, a crowd, or a box without area.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        images = {i["id"]: (str(i["file_name"]), (int(i["width"]), int(i["height"]))) for i in document["images"]}
        categories = {c["id"]: str(c["name"]) for c in document["categories"]}
        annotations: list[dict[str, Any]] = document["annotations"]
        used = [_coco_annotation(path, a, images, categories) for a in annotations]
    except DataError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: no COCO file ({type(error).__name__}: {error}); expected images, categories and annotations"
        ) from error
    present = {category for _, category, _ in used}
    classes = tuple(name for key, name in sorted(categories.items()) if key in present)
    labels = np.array([classes.index(categories[category]) for _, category, _ in used], np.int64)
    places = [f"{path}, annotation {a.get('id', number)}" for number, a in enumerate(annotations)]
    relative = _inside(np.array([box for _, _, box in used]).reshape(-1, 4), places)
    return BoxList(path, classes, dict(images.values()), tuple(name for name, _, _ in used), labels, relative)


def _coco_annotation(
    path: Path, annotation: Mapping[str, Any], images: Mapping[Any, Any], categories: Mapping[Any, str]
) -> tuple[str, Any, tuple[float, ...]]:
    """(image's name, category id, relative box)."""
    number = annotation.get("id", "without id")
    for kind, known in (("image", images), ("category", categories)):
        if annotation[f"{kind}_id"] not in known:
            raise DataError(f"{path}, annotation {number}: {kind} {annotation[f'{kind}_id']!r} is not listed")
    if annotation.get("iscrowd"):
        raise DataError(f"{path}, annotation {number}: a crowd; only single boxes can be learnt: remove it")
    name, (width, height) = images[annotation["image_id"]]
    try:
        x, y, w, h = map(float, annotation["bbox"])
    except (TypeError, ValueError):
        raise DataError(
            f"{path}, annotation {number}: bbox {annotation['bbox']!r}; expected four numbers x, y, width, height"
        ) from None
    if width < 1 or height < 1:
        raise DataError(f"{path}: image {name} of {width} × {height} px; expected its width and height")
    return name, annotation["category_id"], (x / width, y / height, (x + w) / width, (y + h) / height)


def _inside(boxes: npt.NDArray[np.float64], places: Sequence[str]) -> npt.NDArray[np.float64]:
    """Boxes cut at their images' borders.

    Raises:
        DataError: not finite, outside by more than a little, or without area; names the first.
    """
    cut = np.clip(boxes, 0, 1)
    bad = ~np.isfinite(boxes).all(1) | (np.abs(cut - boxes) > _OUTSIDE).any(1) | (cut[:, 2:] <= cut[:, :2]).any(1)
    for number in np.flatnonzero(bad)[:1].tolist():
        shown = ", ".join(f"{v:.4g}" for v in boxes[number])
        raise DataError(
            f"{places[number]}: box ({shown}), as shares of the image's sides, lies outside of it or has no area "
            f"({bad.sum()} such boxes in all); mend or remove them"
        )
    return cut
