"""Test labels of which some are unknown: areas, intervals over patients and reports leave them out of their class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from simulated_study import ROWS, Simulated, simulate
from sklearn.metrics import roc_auc_score

from analysis.patients import patient_noise
from analysis.statistics import class_auc, delong, macro_replicates
from analysis.tables import build_table

MASKED = Simulated(rows=ROWS[:2], seeds=(0, 1), test_images=120, unlabelled=0.3)


def masked(rng: np.random.Generator, images: int = 80, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    labels = rng.choice(np.array([-1, 0, 1], np.int8), (images, classes))
    return labels, np.round(rng.normal(labels, 1.0), 1)


def auc_of_labelled(labels: np.ndarray, scores: np.ndarray) -> float:
    return float(roc_auc_score(labels[labels >= 0], scores[labels >= 0]))


def test_areas_are_over_labelled_images() -> None:
    labels, scores = masked(np.random.default_rng(0))
    expected = [auc_of_labelled(labels[:, c], scores[:, c]) for c in range(3)]
    assert class_auc(labels, scores) == pytest.approx(expected, abs=1e-12)


def test_bootstrap_draws_are_those_of_the_labelled_images_alone() -> None:
    labels, scores = masked(np.random.default_rng(1))
    groups = np.arange(80) // 2
    replicates, _ = macro_replicates(labels, scores[None], groups, rng=np.random.default_rng(5), draws=200)
    other = np.where(labels >= 0, scores, 99.0)
    again, _ = macro_replicates(labels, other[None], groups, rng=np.random.default_rng(5), draws=200)
    assert np.array_equal(replicates, again)


def test_one_class_alone_takes_no_unknown_labels() -> None:
    with pytest.raises(ValueError, match=r"labels hold \[-1\]; expected 0 and 1 only"):
        delong(np.array([0, 1, -1]), np.zeros((1, 3)))


def test_rows_are_compared_over_patients(tmp_path: Path) -> None:
    records = simulate(MASKED, tmp_path)
    (noise,) = patient_noise(records, build_table(records), np.random.default_rng(0), draws=200)
    by_cell = {}
    for _, cell in records.cells.iterrows():
        stored = np.load(records.predictions[cell["mlflow_run_id"]])
        labels, scores = stored["labels"], stored["scores"]
        assert (labels == -1).mean() == pytest.approx(0.3, abs=0.05)
        aucs = [auc_of_labelled(labels[:, c], scores[:, c]) for c in range(labels.shape[1])]
        by_cell[cell["row"], cell["seed"]] = np.array(aucs)
    difference = np.mean([by_cell[ROWS[1], s] - by_cell[ROWS[0], s] for s in (0, 1)], axis=0)
    assert noise.macro.value == pytest.approx(difference.mean(), abs=1e-6)
    assert [e.value for e in noise.classes.values()] == pytest.approx(difference.tolist(), abs=1e-6)
    assert noise.macro.low < noise.macro.value < noise.macro.high
