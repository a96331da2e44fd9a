"""Average precision by faster-coco-eval as COCO defines it; precision and recall at the best F1, from its matches.

Predictions are (N, D, 6) float32, a line an image: x1, y1, x2, y2 in px of the network input, score, class; rows that
hold no box have class −1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from faster_coco_eval import COCO, COCOeval_faster

Floats = npt.NDArray[np.float64]
IOUS = np.linspace(0.5, 0.95, 10)  # COCO's thresholds


@dataclass(frozen=True)
class Quality:
    """Quality of detections, (C,) each, NaN for classes without a true box.

    Attributes:
        ap50, ap: average precision at IoU 0.5, and its mean over IoU 0.5 … 0.95.
        precision, recall: at IoU 0.5, of the boxes whose score reaches `score`.
        score: the one threshold for all classes that maximises the mean F1 over classes; 0 without predictions.
    """

    ap50: Floats
    ap: Floats
    precision: Floats
    recall: Floats
    score: float


@dataclass(frozen=True)
class Truth:
    """True boxes of N images.

    Attributes:
        image: (M,) position of each box's image.
        label: (M,) class; xyxy: (M, 4) corners, in the predictions' units.
    """

    images: int
    image: npt.NDArray[np.intp]
    label: npt.NDArray[np.int64]
    xyxy: Floats


def evaluate(predictions: npt.NDArray[np.float32], truth: Truth, classes: int, max_det: int) -> Quality:
    """COCO evaluation of boxes of all sizes, at most max_det an image and class.

    Args:
        predictions: (N, D, 6), see the module.
        truth: boxes of the same N images.
    """
    true = _coco(truth, classes)
    found = _found(predictions)
    if not len(found):
        nothing = np.where(np.bincount(truth.label, minlength=classes) > 0, 0.0, np.nan)
        return Quality(nothing, nothing.copy(), nothing.copy(), nothing.copy(), 0.0)
    predicted = true.loadRes(found)
    precision = _run(true, predicted, IOUS, max_det).eval["precision"][:, :, :, 0, 0]  # (IoU, recall, class)
    ap = np.where(precision[0, 0] > -1, precision.mean(axis=1), np.nan)  # (IoU, class)
    hits = _hits(_run(true, predicted, IOUS[:1], max_det), len(found))
    counts = np.bincount(truth.label, minlength=classes)
    at_best = _at_best_f1(found[:, 5], found[:, 6].astype(np.intp) - 1, hits, counts)
    return Quality(ap[0], ap.mean(axis=0), *at_best)


def _run(true: COCO, predicted: COCO, ious: Floats, max_det: int) -> COCOeval_faster:
    run = COCOeval_faster(true, predicted, "bbox", print_function=_silent, extra_calc=True)
    run.params.iouThrs = ious
    run.params.maxDets = [max_det]
    run.params.areaRng, run.params.areaRngLbl = [[0, 1e10]], ["all"]
    run.evaluate()
    run.accumulate()
    return run


def _hits(run: COCOeval_faster, found: int) -> npt.NDArray[np.bool_]:
    """(K,) which predictions were matched to a true box; the run has one IoU threshold."""
    hits = np.zeros(found, np.bool_)
    hits[[int(pair.partition("_")[0]) - 1 for pair in run.eval["matched"]]] = True  # ids count from 1
    return hits


def _at_best_f1(
    scores: Floats, labels: npt.NDArray[np.intp], hits: npt.NDArray[np.bool_], counts: npt.NDArray[np.intp]
) -> tuple[Floats, Floats, float]:
    """Precision and recall of each class at the threshold with the best mean F1; of equals the lowest."""
    thresholds = np.unique(scores)
    precision = np.full((len(counts), len(thresholds)), np.nan)
    recall = precision.copy()
    for c in np.flatnonzero(counts):
        order = np.argsort(scores[labels == c])
        mine, right = scores[labels == c][order], hits[labels == c][order]
        first = np.searchsorted(mine, thresholds, "left")
        kept = len(mine) - first
        true_positives = right.sum() - np.concatenate(([0], np.cumsum(right)))[first]
        precision[c] = true_positives / np.maximum(kept, 1)
        recall[c] = true_positives / counts[c]
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    best = int(np.nanargmax(np.nanmean(f1[counts > 0], axis=0))) if counts.any() else 0
    return precision[:, best], recall[:, best], float(thresholds[best])


def _coco(truth: Truth, classes: int) -> COCO:
    corners = truth.xyxy
    sides = corners[:, 2:] - corners[:, :2]
    annotations = [
        {"id": n, "image_id": i + 1, "category_id": c + 1, "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0}
        for n, (i, c, (x, y), (w, h)) in enumerate(
            zip(truth.image.tolist(), truth.label.tolist(), corners[:, :2].tolist(), sides.tolist(), strict=True), 1
        )
    ]
    return COCO(
        {
            "info": {},
            "images": [{"id": i + 1, "width": 0, "height": 0} for i in range(truth.images)],
            "categories": [{"id": c + 1, "name": str(c)} for c in range(classes)],
            "annotations": annotations,
        }
    )


def _found(predictions: npt.NDArray[np.float32]) -> Floats:
    """(K, 7) image id, x, y, width, height, score, category id."""
    image, place = np.nonzero(predictions[:, :, 5] >= 0)
    boxes = predictions[image, place].astype(np.float64)
    sides = boxes[:, 2:4] - boxes[:, :2]
    return np.column_stack((image + 1, boxes[:, :2], sides, boxes[:, 4], boxes[:, 5] + 1))


def _silent(*_: object) -> None:
    """What the library says about its progress is not for our display."""
