"""Unlabelled classes: out of the loss, its gradient, the class counts and the scores; without any, nothing changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from trainables.backbone_files import find_backbone
from trainables.classification import Classification
from trainables.data.images import ImageCache
from trainables.data.index import Index
from trainables.settings import Settings

LABELS = np.array([[1, -1, 0], [0, 1, -1], [-1, -1, -1], [1, 0, 1], [0, -1, 1], [1, 1, 0]], np.int8)
ROWS = np.arange(6)


def task(labels: np.ndarray, encoder: Path) -> Classification:
    count, classes = labels.shape
    index = Index(
        dataset="chexpert",
        classes=tuple("abc"[:classes]),
        names=np.array([f"n{i}" for i in range(count)]),
        groups=np.array([f"p{i}" for i in range(count)]),
        labels=labels,
        split=np.zeros(count, np.uint8),
        group_kind="patient",
        single_label=False,
        channels=1,
        synthetic=False,
    )
    images = ImageCache(
        np.zeros((count, 32, 32, 1), np.uint8), "", 0, np.zeros((count, 32), np.uint8), np.full((count, 2), 32)
    )
    return Classification(Settings(), index, images, find_backbone(str(encoder), download=False))


def by_definition(logits: torch.Tensor, labels: np.ndarray, weights: torch.Tensor | None) -> float:
    """-(1/M) sum over labelled pairs of w y log s(z) + (1 - y) log(1 - s(z)), one pair after the other."""
    total, pairs = 0.0, 0
    for (b, c), y in np.ndenumerate(labels):
        if y < 0:
            continue
        s = 1 / (1 + np.exp(-float(logits[b, c])))
        w = 1.0 if weights is None else float(weights[c])
        total -= w * y * np.log(s) + (1 - y) * np.log(1 - s)
        pairs += 1
    return total / pairs


@pytest.mark.parametrize("weights", [None, torch.tensor([0.5, 2.0, 3.0])])
def test_the_loss_is_averaged_over_what_is_labelled(encoder: Path, weights: torch.Tensor | None) -> None:
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    loss = task(LABELS, encoder).loss(logits, ROWS, weights)
    assert float(loss.detach()) == pytest.approx(by_definition(logits.detach(), LABELS, weights), rel=1e-5)
    loss.backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad != 0, torch.from_numpy(LABELS >= 0))


def test_a_batch_without_any_label_has_loss_0_and_no_gradient(encoder: Path) -> None:
    logits = torch.randn(1, 3, requires_grad=True)
    loss = task(LABELS, encoder).loss(logits, np.array([2]), None)
    loss.backward()
    assert float(loss.detach()) == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_where_all_is_labelled_the_loss_has_the_bits_of_the_plain_one(encoder: Path) -> None:
    labels = np.abs(LABELS)
    logits, weights = torch.randn(6, 3), torch.tensor([0.5, 2.0, 3.0])
    plain = functional.binary_cross_entropy_with_logits(logits, torch.from_numpy(labels).float(), pos_weight=weights)
    assert torch.equal(task(labels, encoder).loss(logits, ROWS, weights), plain)


def test_class_counts_are_over_labelled_images(encoder: Path) -> None:
    positives, negatives = task(LABELS, encoder).class_counts()
    assert positives.tolist() == [3, 2, 2]
    assert negatives.tolist() == [2, 1, 2]


def test_the_kept_predictions_say_what_was_unlabelled(encoder: Path) -> None:
    made = task(LABELS, encoder)
    scores = np.random.default_rng(0).random((6, 3)).astype(np.float32)
    kept = made.describe(scores, ROWS)
    assert np.array_equal(kept["labels"], LABELS)
    assert made.score(scores, ROWS).undefined == ()
