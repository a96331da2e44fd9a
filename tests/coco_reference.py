"""Average precision by pycocotools, COCO's own code: what every AP of ours is compared with."""

from __future__ import annotations

import contextlib
import io
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pytest

if TYPE_CHECKING:
    from trainables.detection_metrics import Truth  # needs the extra `detection`

Predictions = npt.NDArray[np.float32]


def by_pycocotools(predictions: Predictions, truth: Truth, classes: int, max_det: int) -> npt.NDArray[np.float64]:
    """(2, C): AP50 and AP of each class, NaN where pycocotools says −1."""
    reason = "pycocotools is not installed: it is what AP is compared with"
    COCO = pytest.importorskip("pycocotools.coco", reason=reason).COCO  # noqa: N806
    COCOeval = pytest.importorskip("pycocotools.cocoeval", reason=reason).COCOeval  # noqa: N806
    sides = truth.xyxy[:, 2:] - truth.xyxy[:, :2]
    true = COCO()
    true.dataset = {
        "images": [{"id": i + 1} for i in range(truth.images)],
        "categories": [{"id": c + 1} for c in range(classes)],
        "annotations": [
            {
                "id": n + 1,
                "image_id": int(truth.image[n]) + 1,
                "category_id": int(truth.label[n]) + 1,
                "bbox": [*truth.xyxy[n, :2].tolist(), *sides[n].tolist()],
                "area": float(sides[n].prod()),
                "iscrowd": 0,
            }
            for n in range(len(truth.image))
        ],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        true.createIndex()
        found = [
            {
                "image_id": image + 1,
                "category_id": int(line[5]) + 1,
                "bbox": [
                    float(line[0]),
                    float(line[1]),
                    float(line[2]) - float(line[0]),
                    float(line[3]) - float(line[1]),
                ],
                "score": float(line[4]),
            }
            for image, lines in enumerate(predictions)
            for line in lines
            if line[5] >= 0
        ]
        run = COCOeval(true, true.loadRes(found), "bbox")
        run.params.maxDets = [1, 10, max_det]
        run.evaluate()
        run.accumulate()
    precision = run.eval["precision"][:, :, :, 0, 2]
    defined = precision[0].max(axis=0) > -1
    return np.where(defined, np.stack((precision[0].mean(axis=0), precision.mean(axis=(0, 1)))), np.nan)
