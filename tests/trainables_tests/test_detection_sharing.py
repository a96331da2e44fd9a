"""Detection under the plan: sharing changes no bit of any cell."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.detection_extra import needs_detection
from tests.studies_for_tests import run_study
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
