"""Boxes on images, and the fusion of what several readers drew.

A data set's boxes are read when a task asks for them (`registry.read_boxes`), never with its table: classification
needs none, and `--plan` none either.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from trainables.data.index import DataError, Refused

FUSION_IOU = 0.55  # boxes of a class that overlap by more are one (weighted boxes fusion)
_STEP = 1e-9  # below float32's precision: orders boxes of equal weight, and weighs nothing

Corners = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Boxes:
    """The boxes of a data set, as drawn or (`fused`) one for all readers of an image.

    Attributes:
        classes: class names.
        names: (M,) image of each box, as the table names it.
        labels: (M,) int64 positions in `classes`.
        corners: (M, 4) float64 x_min, y_min, x_max, y_max in pixels of the original image.
        readers: (M,) who drew the box; '' where it is agreed upon.
        readers_of: image → its readers, those who drew no box included; empty for images with one agreed reading.
        shares: (M,) float64 share of the image's readers who drew the box; 1 as drawn.
        sizes: image → (width, height) in pixels, as far as the files state them.
        refused: boxes that cannot be used: no area, or outside of the image.
        looked_at: images that somebody looked at for boxes; None: all of the data set.
    """

    classes: tuple[str, ...]
    names: npt.NDArray[np.str_]
    labels: npt.NDArray[np.int64]
    corners: Corners
    readers: npt.NDArray[np.str_]
    readers_of: Mapping[str, frozenset[str]]
    shares: npt.NDArray[np.float64]
    sizes: Mapping[str, tuple[int, int]]
    refused: tuple[Refused, ...] = ()
    looked_at: frozenset[str] | None = None

    def __len__(self) -> int:
        return len(self.names)

    def of(self, names: Sequence[str]) -> list[npt.NDArray[np.intp]]:
        """Positions of the boxes of each of the images, in the order of the boxes."""
        where: dict[str, list[int]] = {}
        for position, name in enumerate(self.names.tolist()):
            where.setdefault(name, []).append(position)
        return [np.array(where.get(name, []), np.intp) for name in names]


def box_fault(corners: Sequence[float], size: tuple[int, int] | None = None) -> str | None:
    """What is wrong with a box (x_min, y_min, x_max, y_max), in an image of (width, height) if that is known."""
    x_min, y_min, x_max, y_max = corners
    if not all(map(math.isfinite, corners)):
        return f"box {_shown(corners)} is not finite"
    if x_max <= x_min or y_max <= y_min:
        return f"box {_shown(corners)} has no area; expected x_min < x_max and y_min < y_max"
    # Tools round a box's edge up to the next pixel: one pixel beyond the image is no error.
    width, height = size or (math.inf, math.inf)
    if x_min < 0 or y_min < 0 or x_max > width + 1 or y_max > height + 1:
        return f"box {_shown(corners)} reaches out of the image{f' of {width} × {height} px' if size else ''}"
    return None


def _shown(corners: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in corners)


def fused(boxes: Boxes) -> Boxes:
    """One set of boxes an image: those of several readers fused, agreed ones as they are, image by image.

    Raises:
        DataError: ensemble-boxes is not installed.
    """
    names = list(dict.fromkeys(boxes.names.tolist()))
    found = [
        _of_all_readers(boxes, rows, boxes.readers_of.get(name))
        for name, rows in zip(names, boxes.of(names), strict=True)
    ]
    counts = [len(labels) for _, labels, _ in found]
    return replace(
        boxes,
        names=np.repeat(np.array(names, np.str_), counts),
        labels=np.concatenate([np.empty(0, np.int64), *(labels for _, labels, _ in found)]),
        corners=np.concatenate([np.empty((0, 4)), *(corners for corners, _, _ in found)]),
        readers=np.full(sum(counts), ""),
        readers_of={},
        shares=np.concatenate([np.empty(0), *(shares for _, _, shares in found)]),
    )


def _of_all_readers(
    boxes: Boxes, rows: npt.NDArray[np.intp], readers: frozenset[str] | None
) -> tuple[Corners, npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    if readers is None:
        return boxes.corners[rows], boxes.labels[rows], boxes.shares[rows]
    own = [rows[boxes.readers[rows] == reader] for reader in sorted(readers)]
    return fuse_readers([boxes.corners[r] for r in own], [boxes.labels[r] for r in own])


def fuse_readers(
    corners: Sequence[Corners], labels: Sequence[npt.NDArray[np.int64]]
) -> tuple[Corners, npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Weighted boxes fusion of one image (Solovyev, Wang & Gabruseva 2021), every reader counting alike.

    Args:
        corners: (n, 4) boxes of each reader, readers without any included.
        labels: (n,) classes of each reader's boxes.

    Returns:
        corners (m, 4), labels (m,) and share of the readers (m,), sorted by label, then corners.

    Raises:
        DataError: the library is not installed.
    """
    try:
        from ensemble_boxes import weighted_boxes_fusion  # type: ignore[import-untyped]
    except ImportError as error:
        raise DataError(
            "fusing readers' boxes needs ensemble-boxes: install the extra with pip install 'spft-studies[detection]'"
        ) from error
    pooled = np.concatenate([*corners, np.empty((0, 4))])
    if len(pooled) == 0:
        return np.empty((0, 4)), np.empty(0, np.int64), np.empty(0)
    # The library wants [0, 1]; overlaps and means do not depend on the scale of either axis.
    scale = np.tile(np.maximum(pooled.reshape(-1, 2).max(0), 1.0), 2)
    ordered = [_order(boxes, classes) for boxes, classes in zip(corners, labels, strict=True)]
    starts = np.cumsum([0, *map(len, ordered)])
    fused, shares, classes = weighted_boxes_fusion(
        [boxes[order] / scale for boxes, order in zip(corners, ordered, strict=True)],
        [1 - _STEP * np.arange(start, start + len(order)) for start, order in zip(starts, ordered, strict=False)],
        [found[order] for found, order in zip(labels, ordered, strict=True)],
        iou_thr=FUSION_IOU,
    )
    boxes, found = np.asarray(fused, np.float64) * scale, np.asarray(classes, np.int64)
    order = _order(boxes, found)
    return boxes[order], found[order], np.round(np.asarray(shares, np.float64)[order], 6)


def _order(corners: Corners, labels: npt.NDArray[np.int64]) -> npt.NDArray[np.intp]:
    """By label, then corners: the fusion depends on the order of equal boxes, and a table's rows may be shuffled."""
    return np.lexsort((*corners.T[::-1], labels))
