"""The boxes of an index as a detector learns them: one set an image, of classes that have any, placed in its input.

They come from the data set's adapter, readers fused, or from a COCO json file of the user's own (`detection.boxes`).
Which classes have boxes and which images were looked at is known without opening an image.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt

from trainables.data.boxes import Boxes, box_fault, fused
from trainables.data.coco import read_coco, to_boxes
from trainables.data.index import DataError, Index
from trainables.data.placing import Fit, place
from trainables.data.registry import read_boxes
from trainables.data.tables import root_of
from trainables.settings import DatasetSettings, Settings


@dataclass(frozen=True, eq=False)
class BoxTargets:
    """The boxes of an index.

    Attributes:
        classes: C names, in order.
        rows: (M,) row of the index, ascending.
        labels: (M,) position in `classes`.
        corners: (M, 4) float64 x_min, y_min, x_max, y_max, px of the original image.
        sizes: (N, 2) width and height of the index's original images, px; 0 where neither a file of boxes nor, for
            images with boxes, the image itself was asked (`with_sizes`).
        annotated: (N,) whether an image was looked at for boxes: where not, nothing may be learnt from it.
    """

    classes: tuple[str, ...]
    rows: npt.NDArray[np.intp]
    labels: npt.NDArray[np.int64]
    corners: npt.NDArray[np.float64]
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
        """(M, 4) boxes in px of the network input of image_size × image_size px, cut at their image's border."""
        own = self.sizes[self.rows]
        relative = np.clip(self.corners / np.tile(own, 2), 0, 1)
        sizes, which = np.unique(own, axis=0, return_inverse=True)
        places = np.array([place(w, h, image_size, fit) for w, h in sizes.tolist()]).reshape(-1, 4)[which]
        boxes: npt.NDArray[np.float64] = relative * np.tile(places[:, 2:], 2) + np.tile(places[:, :2], 2)
        return boxes

    def digest(self) -> str:
        """sha256 of everything."""
        h = hashlib.sha256("\0".join(self.classes).encode())
        for array in (self.rows, self.labels, self.corners, self.sizes, self.annotated):
            h.update(np.ascontiguousarray(array).tobytes())
        return h.hexdigest()


def load_box_targets(settings: Settings, index: Index, root: Path) -> BoxTargets:
    """The boxes of an index's images, of its classes that were not dropped; read once in a process.

    Args:
        root: folder of the data set, drawn or distributed.

    Raises:
        DataError: the data set has no boxes, its file of boxes is missing, damaged or of other images, or holds boxes
            that are none.
    """
    given = settings.detection.boxes
    if given is None:
        dataset = settings.dataset.model_copy(update={"root": str(root), "flips": "none", "cache_gb": None})
        return _targets_of(dataset.model_dump_json(), None, index, ())
    path = root / Path(given).expanduser()  # an absolute path stands alone
    if not path.is_file():
        raise DataError(f"detection.boxes: {path} does not exist; expected a COCO json file")
    stat = path.stat()
    return _targets_of("", path, index, (stat.st_mtime_ns, stat.st_size))


def real_box_targets(settings: Settings, index: Index) -> BoxTargets:
    """Boxes of a real data set, from the folder that the settings name.

    Raises:
        DataError: see `load_box_targets`.
    """
    return load_box_targets(settings, index, root_of(settings.dataset.name, settings.dataset.root))


def with_sizes(targets: BoxTargets, index: Index, decoded: npt.NDArray[np.int64]) -> BoxTargets:
    """The targets with the size of every image that has a box, as it was decoded where no file of boxes told it.

    Args:
        targets: boxes of the index.
        index: whose images.
        decoded: (N, 2) width and height of the images, px.

    Raises:
        DataError: a box that leaves its image.
    """
    unknown = np.array([row for row in np.unique(targets.rows).tolist() if not targets.sizes[row].all()], np.intp)
    if not len(unknown):
        return targets
    sizes = targets.sizes.copy()
    sizes[unknown] = decoded[unknown]
    for row, corners in zip(targets.rows.tolist(), targets.corners.tolist(), strict=True):
        if fault := box_fault(corners, tuple(sizes[row].tolist())):
            raise DataError(f"{index.dataset}: image {index.names[row]}: {fault}; mend or remove the box")
    return replace(targets, sizes=sizes)


@cache
def _targets_of(dataset_json: str, path: Path | None, index: Index, _stamp: tuple[int, ...]) -> BoxTargets:
    boxes = fused(_usable(_listed(dataset_json, path, index), index))
    classes = _ordered(boxes, index)
    row_of = _rows_of(boxes, index)
    column = {name: number for number, name in enumerate(classes)}
    kept = [
        (row_of[name], column[boxes.classes[label]], number)
        for number, (name, label) in enumerate(zip(boxes.names.tolist(), boxes.labels.tolist(), strict=True))
        if name in row_of and boxes.classes[label] in column
    ]
    table = np.array(sorted(kept), dtype=np.int64).reshape(-1, 3)
    sizes = np.zeros((len(index), 2), np.int64)
    for name, size in boxes.sizes.items():
        if name in row_of:
            sizes[row_of[name]] = size
    return BoxTargets(
        classes,
        table[:, 0].astype(np.intp),
        table[:, 1],
        boxes.corners[table[:, 2]],
        sizes,
        _looked_at(boxes, row_of, index),
    )


def _listed(dataset_json: str, path: Path | None, index: Index) -> Boxes:
    if path is not None:
        coco = read_coco(path)
        named = {name: name for name in coco.categories}
        return replace(to_boxes([coco], coco.categories, named), looked_at=frozenset(coco.sizes))
    boxes = read_boxes(DatasetSettings.model_validate_json(dataset_json))
    if boxes is None:
        raise DataError(
            f"{index.dataset}: no boxes come with this data set, or with this copy of it; set detection.boxes to a "
            "COCO json file"
        )
    return boxes


def _usable(boxes: Boxes, index: Index) -> Boxes:
    if boxes.refused:
        first = boxes.refused[0]
        raise DataError(
            f"{index.dataset}: {first.place}: {first.reason} ({len(boxes.refused)} such boxes in all; the command "
            "`check` lists them); mend or remove them"
        )
    return boxes


def _ordered(boxes: Boxes, index: Index) -> tuple[str, ...]:
    """The index's classes that have boxes, then the others that do, without the dropped ones.

    A class that has no box at all is none: nothing could be learnt or measured.
    """
    present = [boxes.classes[label] for label in np.unique(boxes.labels).tolist()]
    own = [name for name in index.classes if name in present]
    return (*own, *(name for name in present if name not in own and name not in index.dropped))


def _rows_of(boxes: Boxes, index: Index) -> dict[str, int]:
    """Listed image → row of the index; a name may lack folder and extension where that leaves no doubt."""
    exact = {name: row for row, name in enumerate(index.names.tolist())}
    seen = Counter(PurePosixPath(name).stem for name in exact)
    stems = {PurePosixPath(name).stem: row for name, row in exact.items() if seen[PurePosixPath(name).stem] == 1}
    listed = _images_of(boxes)
    found = {name: exact.get(name, stems.get(PurePosixPath(name).stem)) for name in listed}
    row_of = {name: row for name, row in found.items() if row is not None}
    if not row_of:
        raise DataError(
            f"{index.dataset}: none of the {len(found)} images that have boxes is in the data set; the first is "
            f"{next(iter(found), 'none')}, the data set's first is {index.names[0]}"
        )
    return row_of


def _images_of(boxes: Boxes) -> Iterable[str]:
    return dict.fromkeys([*boxes.sizes, *boxes.names.tolist(), *sorted(boxes.looked_at or ())])


def _looked_at(boxes: Boxes, row_of: dict[str, int], index: Index) -> npt.NDArray[np.bool_]:
    # Every finding of a phantom that has a place was drawn with its box.
    marks = np.full(len(index), boxes.looked_at is None or index.synthetic)
    marks[[row_of[name] for name in boxes.looked_at or () if name in row_of]] = True
    return marks
