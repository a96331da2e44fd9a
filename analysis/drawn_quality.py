"""Quality of stored boxes and masks where test images count several times each: what a bootstrap needs.

Both are made once for a model; a draw of images is then a matter of weights. With every image counting once, the
figures are those of the ledger, by code that shares nothing with what wrote them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from analysis.statistics import Floats

Arrays = Mapping[str, npt.NDArray[np.generic]]
Counts = npt.NDArray[np.int32]

IOUS = np.linspace(0.5, 0.95, 10)  # COCO's thresholds
RECALLS = np.linspace(0.0, 1.0, 101)  # and the recalls at which it reads precision
_VALUES = 4_000_000  # numbers that are worked on together


class Drawable(Protocol):
    """A model's predictions of N images in C classes."""

    def replicates(self, counts: Counts) -> Floats:
        """(C, D) quality of each class where image i counts counts[i, d] times; NaN where it is undefined.

        Args:
            counts: (N, D).
        """


@dataclass(frozen=True, eq=False)
class Masks:
    """Dice (N, C) of every image and structure; NaN where there is none."""

    dice: Floats

    def replicates(self, counts: Counts) -> Floats:
        """Mean Dice over the images that have one."""
        defined = np.isfinite(self.dice)
        sums = np.where(defined, self.dice, 0.0).T @ counts
        weights = defined.T.astype(np.float64) @ counts
        return np.divide(sums, weights, out=np.full_like(sums, np.nan), where=weights > 0)


def masks_of(stored: Arrays) -> Masks:
    """From a segmenter's stored predictions: its Dice without any hint of where the structure is."""
    return Masks(np.asarray(stored["dice"], np.float64)[:, :, 0])


@dataclass(frozen=True, eq=False)
class _Found:
    """A class's boxes in the order of their scores: (K,) image of each, and whether it was matched, (10, K) by IoU."""

    image: npt.NDArray[np.intp]
    hit: npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Boxes:
    """Boxes by class, and (N, C) numbers of true ones."""

    found: tuple[_Found, ...]
    true: npt.NDArray[np.int64]

    def replicates(self, counts: Counts) -> Floats:
        """Average precision of each class, mean over IoU 0.5 … 0.95, as COCO defines it."""
        positives = self.true.T @ counts  # (C, D)
        return np.array([_average_precision(f, counts, p) for f, p in zip(self.found, positives, strict=True)])


def boxes_of(stored: Arrays) -> Boxes:
    """From a detector's stored predictions; boxes are matched to true ones greedily by score, as in COCO."""
    boxes = np.asarray(stored["boxes"], np.float64)
    images, classes = len(boxes), len(stored["classes"])
    image, label = np.asarray(stored["true_image"], np.intp), np.asarray(stored["true_class"], np.intp)
    corners = np.asarray(stored["true_xyxy"], np.float64)
    true = np.zeros((images, classes), np.int64)
    np.add.at(true, (image, label), 1)
    found = []
    for c in range(classes):
        parts = []
        for i in range(images):
            mine = boxes[i][boxes[i, :, 5] == c]
            mine = mine[np.argsort(-mine[:, 4], kind="stable")]
            parts.append((mine[:, 4], np.full(len(mine), i), _hits(mine, corners[(image == i) & (label == c)])))
        scores = np.concatenate([part[0] for part in parts])
        at = np.concatenate([part[1] for part in parts])
        hit = np.concatenate([part[2] for part in parts], axis=-1)
        order = np.argsort(-scores, kind="stable")
        right = np.flatnonzero(hit[:, order].any(axis=0))
        last = right[-1] + 1 if len(right) else 0  # what comes after the last hit changes no figure
        found.append(_Found(at[order][:last], hit[:, order[:last]]))
    return Boxes(tuple(found), true)


def _hits(found: Floats, true: Floats) -> npt.NDArray[np.bool_]:
    """(10, K) which boxes of one image and class, best score first, are matched at each IoU threshold."""
    hits = np.zeros((len(IOUS), len(found)), np.bool_)
    if not len(found) or not len(true):
        return hits
    overlap = iou(found[:, :4], true)
    for t, threshold in enumerate(IOUS):
        free = np.ones(len(true), np.bool_)
        for k in np.flatnonzero((overlap >= threshold).any(axis=1)).tolist():
            candidates = np.where(free, overlap[k], -1.0)
            best = len(true) - 1 - int(candidates[::-1].argmax())  # of equals the last, as in COCO
            if candidates[best] >= threshold:
                hits[t, k], free[best] = True, False
    return hits


def _average_precision(found: _Found, counts: Counts, positives: npt.NDArray[np.int64]) -> Floats:
    """(D,) AP; a box counts as often as its image does."""
    ap = np.zeros(len(positives))
    chunk = max(1, _VALUES // max(1, len(found.image)))
    for start in range(0, len(ap), chunk):
        part = slice(start, start + chunk)
        weights = counts[found.image, part].astype(np.float64)
        everything = weights.cumsum(axis=0)
        ap[part] = np.mean([_at_one_iou(weights, everything, hit, positives[part]) for hit in found.hit], axis=0)
    return np.where(positives > 0, ap, np.nan)


def _at_one_iou(
    weights: Floats, everything: Floats, hit: npt.NDArray[np.bool_], positives: npt.NDArray[np.int64]
) -> Floats:
    """(D,) mean over 101 recalls of the best precision from that recall on."""
    if not hit.any():
        return np.zeros(len(positives))
    right = (weights * hit[:, None]).cumsum(axis=0)
    precision = np.divide(right, everything, out=np.zeros_like(right), where=everything > 0)
    best = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
    recall = np.divide(right, positives, out=np.zeros_like(right), where=positives > 0)
    read = np.zeros(len(positives))
    for d in range(len(positives)):
        first = np.searchsorted(recall[:, d], RECALLS, side="left")
        reached = first < len(recall)
        read[d] = best[first[reached], d].sum() / len(RECALLS)
    return read


def iou(boxes: Floats, others: Floats) -> Floats:
    """(D, M) intersection over union of (D, 4) and (M, 4) corners."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    both = np.clip(high - low, 0, None).prod(axis=2)
    areas = [np.clip(b[:, 2:] - b[:, :2], 0, None).prod(axis=1) for b in (boxes, others)]
    union = areas[0][:, None] + areas[1][None, :] - both
    found: Floats = np.divide(both, union, out=np.zeros_like(both), where=union > 0)
    return found
