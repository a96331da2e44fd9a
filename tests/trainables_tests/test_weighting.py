"""Class weights by hand: frequency, boosts, clipping of what is used but not of the state, refinement by quality."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainables.settings import WeightingSettings
from trainables.weighting import initial_state, refine, training_weights

CLASSES = ("a", "b", "c")
POSITIVES = np.array([10, 40, 50])
NEGATIVES = np.array([90, 60, 50])
PLAIN = WeightingSettings(enabled=True)

# Positives of ChestX-ray14's 112,120 images (Data_Entry_2017), in the data set's order of classes.
NIH_IMAGES = 112_120
NIH = {
    "Atelectasis": 11559,
    "Cardiomegaly": 2776,
    "Effusion": 13317,
    "Infiltration": 19894,
    "Mass": 5782,
    "Nodule": 6331,
    "Pneumonia": 1431,
    "Pneumothorax": 5302,
    "Consolidation": 4667,
    "Edema": 2303,
    "Emphysema": 2516,
    "Fibrosis": 1686,
    "Pleural_Thickening": 3385,
    "Hernia": 227,
}


def nih(s: WeightingSettings) -> np.ndarray:
    positives = np.array(list(NIH.values()))
    return initial_state(positives, NIH_IMAGES - positives, tuple(NIH), s)


def test_initial_weights_are_the_ratio_of_negatives_to_positives_scaled_to_mean_1() -> None:
    # 90/10 = 9, 60/40 = 1.5, 50/50 = 1; their mean is 11.5 / 3
    expected = [27 / 11.5, 4.5 / 11.5, 3 / 11.5]
    assert initial_state(POSITIVES, NEGATIVES, CLASSES, PLAIN) == pytest.approx(expected, rel=1e-6)


def test_without_normalisation_the_ratios_stand() -> None:
    s = PLAIN.model_copy(update={"normalise": False})
    assert initial_state(POSITIVES, NEGATIVES, CLASSES, s) == pytest.approx([9, 1.5, 1], rel=1e-6)


def test_a_boost_multiplies_its_class_before_normalisation() -> None:
    s = PLAIN.model_copy(update={"boosts": {"b": 2.0}})
    # 9, 3, 1; mean 13 / 3
    assert initial_state(POSITIVES, NEGATIVES, CLASSES, s) == pytest.approx([27 / 13, 9 / 13, 3 / 13], rel=1e-6)


def test_classes_that_every_image_has_are_weighted_alike_and_not_by_zero_over_zero() -> None:
    """A data set of boxes of one class, all of whose images have one."""
    for s in (PLAIN, PLAIN.model_copy(update={"normalise": False})):
        assert initial_state(np.array([40]), np.array([0]), ("nodule",), s).tolist() == [1.0]
        assert initial_state(np.array([40, 40]), np.array([0, 0]), ("a", "b"), s).tolist() == [1.0, 1.0]
    boosted = PLAIN.model_copy(update={"boosts": {"b": 3.0}})
    assert initial_state(np.array([40, 40]), np.array([0, 0]), ("a", "b"), boosted).tolist() == [0.5, 1.5]


def test_a_class_without_positives_gets_a_large_but_finite_weight() -> None:
    s = PLAIN.model_copy(update={"normalise": False})
    assert initial_state(np.array([0]), np.array([100]), ("a",), s) == pytest.approx([1e8])


def test_where_every_image_has_every_class_all_weigh_alike() -> None:
    """As where tuberculosis is the only class, and images with it are all there are: N_neg = 0, no 0 / 0."""
    s = WeightingSettings(enabled=True)
    u = initial_state(np.array([40, 40]), np.array([0, 0]), ("a", "b"), s)
    assert u.tolist() == [1.0, 1.0]
    assert refine(u, np.array([0.5, 0.9]), s).mean() == pytest.approx(1)


def test_training_clips_what_it_uses_and_leaves_the_state_as_it_is() -> None:
    u = np.array([0.1, 1.0, 20.0])
    assert training_weights(u, PLAIN).tolist() == [0.5, 1.0, 5.0]
    assert u.tolist() == [0.1, 1.0, 20.0]
    unclipped = PLAIN.model_copy(update={"clip": None, "normalise": False})
    assert training_weights(u, unclipped).tolist() == u.tolist()


def test_refinement_starts_from_the_unclipped_state() -> None:
    u = np.array([0.1, 20.0])
    s = WeightingSettings(enabled=True, eta=1.0, normalise=False)
    # mean 0.7: the first class lies 0.1 below; 0.1 · 1.1, not 0.5 · 1.1
    assert refine(u, np.array([0.6, 0.8]), s) == pytest.approx([0.11, 20.0])
    assert training_weights(refine(u, np.array([0.6, 0.8]), s), s) == pytest.approx([0.5, 5.0])


def test_refinement_by_hand_with_a_class_that_has_no_auc() -> None:
    u = np.array([1.5, 1.0, 0.5])
    # Mean of the defined two: 0.7. Gaps 0.1 and 0; η = ½: 1.5 · 1.05 = 1.575. Sum 3.075, mean 1.025.
    expected = [1.575 / 1.025, 1.0 / 1.025, 0.5 / 1.025]
    assert refine(u, np.array([0.6, 0.8, np.nan]), PLAIN) == pytest.approx(expected, rel=1e-12)


def test_without_normalisation_only_classes_below_the_mean_move() -> None:
    s = WeightingSettings(enabled=True, eta=0.5, normalise=False)
    u = np.array([2.0, 3.0, 4.0])
    assert refine(u, np.array([0.5, 0.9, np.nan]), s) == pytest.approx([2.2, 3.0, 4.0])


def test_eta_zero_changes_nothing() -> None:
    u = np.array([0.3, 2.0, 1.1])
    s = PLAIN.model_copy(update={"eta": 0.0})
    assert refine(u, np.array([0.1, 0.5, 0.9]), s).tolist() == u.tolist()


def test_no_defined_class_changes_nothing() -> None:
    u = np.array([0.3, 2.0, 1.1])
    assert refine(u, np.full(3, np.nan), PLAIN).tolist() == u.tolist()


states = st.lists(st.tuples(st.floats(0.01, 100), st.floats(0, 1) | st.just(float("nan"))), min_size=1, max_size=14)


@given(states, st.floats(0, 3))
def test_refinement_keeps_the_mean_and_never_lowers_a_weaker_class_against_a_stronger(
    drawn: list[tuple[float, float]], eta: float
) -> None:
    u = np.array([weight for weight, _ in drawn])
    u /= u.mean()
    quality = np.array([q for _, q in drawn])
    refined = refine(u, quality, PLAIN.model_copy(update={"eta": eta}))
    assert refined.mean() == pytest.approx(1.0)
    growth = refined / u
    order = [i for i in np.argsort(quality) if np.isfinite(quality[i])]
    assert all(growth[weak] >= growth[strong] * (1 - 1e-12) for weak, strong in pairwise(order))


@given(states)
def test_refinement_does_not_change_its_argument(drawn: list[tuple[float, float]]) -> None:
    u = np.array([weight for weight, _ in drawn])
    before = u.tolist()
    refine(u, np.array([q for _, q in drawn]), PLAIN)
    assert u.tolist() == before


def test_on_nih_counts_the_mean_lies_above_most_weights() -> None:
    weights = nih(PLAIN)
    above = {name for name, w in zip(NIH, weights, strict=True) if w > 1}
    assert above == {"Pneumonia", "Fibrosis", "Hernia"}
    assert (weights < 1).sum() == 11
    # Infiltration: 92,226 / 19,894 = 4.6359 of a mean of 64.1; Hernia alone is 492.9, clipped from 7.7 to 5.
    assert weights[3] == pytest.approx(0.0723, abs=5e-4)
    used = training_weights(weights, PLAIN)
    assert used[3] == 0.5
    assert used[13] == 5.0


def test_without_normalisation_every_nih_weight_is_above_1() -> None:
    assert (nih(PLAIN.model_copy(update={"normalise": False})) > 1).all()
