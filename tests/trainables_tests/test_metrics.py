"""AUC by its definition: the share of positive–negative pairs in the right order, ties counting one half."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainables.metrics import class_aucs, macro, undefined


def auc_by_pairs(labels: npt.NDArray[np.uint8], scores: npt.NDArray[np.floating]) -> float:
    pairs = [(p, n) for p in scores[labels == 1].tolist() for n in scores[labels == 0].tolist()]
    return sum(1.0 if p > n else 0.5 if p == n else 0.0 for p, n in pairs) / len(pairs) if pairs else float("nan")


@given(st.integers(0, 10**6), st.integers(1, 30), st.integers(1, 5), st.sampled_from([2, 4, 1000]))
def test_aucs_are_the_shares_of_ordered_pairs(seed: int, images: int, classes: int, levels: int) -> None:
    rng = np.random.default_rng(seed)
    labels = (rng.random((images, classes)) < 0.3).astype(np.uint8)
    scores = (rng.integers(0, levels, (images, classes)) / levels).astype(np.float32)
    expected = [auc_by_pairs(labels[:, c], scores[:, c]) for c in range(classes)]
    aucs = class_aucs(labels, scores)
    assert aucs == pytest.approx(expected, abs=1e-12, nan_ok=True)
    defined = [a for a in expected if not np.isnan(a)]
    assert macro(aucs) == pytest.approx(sum(defined) / len(defined) if defined else float("nan"), nan_ok=True)


def test_perfect_reversed_and_constant_scores() -> None:
    labels = np.array([[0, 0, 0], [0, 0, 0], [1, 1, 1], [1, 1, 1]], dtype=np.uint8)
    scores = np.array([[0.1, 0.9, 0.5], [0.2, 0.8, 0.5], [0.3, 0.2, 0.5], [0.4, 0.1, 0.5]])
    assert class_aucs(labels, scores).tolist() == [1.0, 0.0, 0.5]


def test_a_class_with_one_value_is_undefined_left_out_and_named() -> None:
    labels = np.array([[0, 1, 0], [1, 1, 0], [0, 1, 0]], dtype=np.uint8)
    scores = np.array([[0.1, 0.5, 0.2], [0.9, 0.4, 0.1], [0.3, 0.6, 0.3]])
    aucs = class_aucs(labels, scores)
    assert aucs[0] == 1.0
    assert np.isnan(aucs[1:]).all()
    assert macro(aucs) == 1.0
    assert undefined(aucs, ("here", "always", "never")) == ("always", "never")


def test_without_any_defined_class_the_macro_is_undefined_too() -> None:
    aucs = class_aucs(np.zeros((4, 2), dtype=np.uint8), np.random.default_rng(0).random((4, 2)))
    assert np.isnan(macro(aucs))
    assert undefined(aucs, ("a", "b")) == ("a", "b")


def test_an_empty_split_defines_nothing() -> None:
    assert np.isnan(class_aucs(np.zeros((0, 3), dtype=np.uint8), np.zeros((0, 3)))).all()


@given(st.integers(0, 10**6))
def test_monotone_transforms_of_the_scores_do_not_change_the_auc(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = np.array([[0], [1]] * 10, dtype=np.uint8)
    scores = rng.integers(0, 12, (20, 1)).astype(np.float64)
    assert class_aucs(labels, np.exp(scores / 3)).tolist() == class_aucs(labels, scores).tolist()


@given(st.integers(0, 10**6))
def test_an_unlabelled_image_is_left_out_of_its_class_alone(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.choice(np.array([-1, 0, 1], np.int8), (40, 3))
    scores = rng.random((40, 3)).astype(np.float32)
    expected = [auc_by_pairs(labels[labels[:, c] >= 0, c], scores[labels[:, c] >= 0, c]) for c in range(3)]
    assert class_aucs(labels, scores) == pytest.approx(expected, abs=1e-12, nan_ok=True)
    scores[labels == -1] = 1 - scores[labels == -1]
    assert class_aucs(labels, scores) == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_a_class_without_a_labelled_negative_is_undefined() -> None:
    labels = np.array([[1, 1], [-1, 0], [1, -1]], np.int8)
    aucs = class_aucs(labels, np.array([[0.1, 0.9], [0.2, 0.1], [0.3, 0.5]], np.float32))
    assert np.isnan(aucs[0])
    assert aucs[1] == 1
