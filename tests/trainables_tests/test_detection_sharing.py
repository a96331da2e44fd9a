"""Detection under the plan: sharing changes no bit of any cell, and its figures follow from what is kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.coco_reference import by_pycocotools
from tests.detection_extra import needs_detection
from tests.studies_for_tests import Ran, run_study
from trainables.data.chest_scene import BOXED

KEPT = ("Effusion", "Nodule")
SMALL = {
    "seeds": [0],
    "dataset.images": 120,
    "dataset.image_size": 64,
    "dataset.drop_classes": [name for name in BOXED if name not in KEPT],
    "strategy.head_epochs": 1,
    "strategy.tune_epochs": 2,
    "strategy.step": 5,
}


@pytest.mark.slow
@needs_detection
def test_every_cell_of_the_ablation_is_that_of_a_run_without_sharing(tmp_path: Path) -> None:
    shared = run_study(tmp_path / "shared", SMALL, study="detection_ablation")
    alone = run_study(tmp_path / "alone", SMALL, study="detection_ablation", sharing=False)
    assert shared.complete
    assert alone.complete
    ours, theirs = shared.cells(), alone.cells()
    assert len(ours) == 4
    for column in ("weights_sha256", "trajectory_sha256", "map50_95", "map50", "precision", "recall", "best_epoch"):
        assert ours[column].tolist() == theirs[column].tolist(), column
    assert ours["trajectory_sha256"].nunique() == 3, "EMA observes the trajectory of the row before it"
    units = shared.header.units
    assert units.executed == shared.plan.units.shared
    assert units.executed < alone.header.units.executed
    _figures_follow_from_kept_predictions(shared, ours)


def _figures_follow_from_kept_predictions(ran: Ran, cells: pd.DataFrame) -> None:
    """AP by pycocotools, from the files alone; precision and recall by our own rule, for which there is no other."""
    from trainables.detection_metrics import Truth, evaluate

    predictions = ran.records().predictions
    for _, cell in cells.iterrows():
        with np.load(predictions[cell["mlflow_run_id"]]) as stored:
            kept = dict(stored)
        truth = Truth(len(kept["names"]), kept["true_image"], kept["true_class"], kept["true_xyxy"])
        classes, most = kept["classes"].tolist(), int(kept["max_det"])
        ap50, ap = by_pycocotools(kept["boxes"], truth, len(classes), most)
        quality = evaluate(kept["boxes"], truth, len(classes), most)
        again = {"ap50": ap50, "ap50_95": ap, "precision": quality.precision, "recall": quality.recall}
        means = {"ap50": "map50", "ap50_95": "map50_95", "precision": "precision", "recall": "recall"}
        for name, values in again.items():
            assert cell[[f"{name}/{c}" for c in classes]].tolist() == pytest.approx(values.tolist(), abs=1e-6)
            assert cell[means[name]] == pytest.approx(np.nanmean(values), abs=1e-6)
