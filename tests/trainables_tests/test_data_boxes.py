"""Fusion of readers' boxes, against what weighted boxes fusion is by definition."""

from __future__ import annotations

import builtins

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainables.data.boxes import Boxes, box_fault, fuse_readers, fused
from trainables.data.index import DataError


def of(*rows: tuple[float, ...]) -> np.ndarray:
    return np.array(rows, np.float64).reshape(-1, 4)


def classes(*labels: int) -> np.ndarray:
    return np.array(labels, np.int64)


def test_overlapping_boxes_of_one_class_become_their_mean_with_the_share_of_readers() -> None:
    a, b = (100, 200, 300, 400), (110, 200, 310, 420)
    corners, labels, shares = fuse_readers([of(a), of(b), of()], [classes(3), classes(3), classes()])
    assert corners == pytest.approx(np.mean([a, b], 0)[None], rel=1e-6)
    assert labels.tolist() == [3]
    assert shares == pytest.approx([2 / 3])


def test_boxes_of_two_classes_or_apart_stay_two() -> None:
    box, far = (100, 200, 300, 400), (500, 600, 700, 900)
    corners, labels, shares = fuse_readers([of(box, far), of(box)], [classes(1, 1), classes(2)])
    assert labels.tolist() == [1, 1, 2]
    assert corners == pytest.approx(of(box, far, box), rel=1e-6)
    assert shares == pytest.approx([0.5, 0.5, 0.5])


def test_an_overlap_of_just_less_than_the_threshold_fuses_nothing() -> None:
    """Two boxes of width 100 shifted by d overlap by (100 − d) / (100 + d): 0.55 at d = 29.03."""
    for shift, count in ((28, 1), (30, 2)):
        corners, _, _ = fuse_readers([of((0, 0, 100, 50)), of((shift, 0, 100 + shift, 50))], [classes(0), classes(0)])
        assert len(corners) == count


def test_no_boxes_are_no_boxes() -> None:
    corners, labels, shares = fuse_readers([of(), of()], [classes(), classes()])
    assert (corners.shape, labels.shape, shares.shape) == ((0, 4), (0,), (0,))


@given(st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_the_order_of_a_readers_boxes_makes_no_difference(seed: int) -> None:
    rng = np.random.default_rng(seed)
    low = rng.uniform(0, 400, (3, 6, 2))
    corners = np.concatenate([low, low + rng.uniform(20, 200, (3, 6, 2))], 2)
    labels = rng.integers(0, 2, (3, 6))
    one = fuse_readers(list(corners), list(labels))
    order = rng.permutation(6)
    other = fuse_readers([c[order] for c in corners], [found[order] for found in labels])
    assert all(np.array_equal(x, y) for x, y in zip(one, other, strict=True))
    assert one[2].max() <= 1


def test_images_are_fused_one_by_one_and_agreed_boxes_stay() -> None:
    boxes = Boxes(
        classes=("a",),
        names=np.array(["x", "y", "x", "z"]),
        labels=classes(0, 0, 0, 0),
        corners=of((0, 0, 10, 10), (0, 0, 10, 10), (0, 0, 10, 12), (1, 2, 3, 4)),
        readers=np.array(["R1", "R1", "R2", ""]),
        readers_of={"x": frozenset({"R1", "R2", "R3"}), "y": frozenset({"R1", "R2"})},
        shares=np.ones(4),
        sizes={},
    )
    one = fused(boxes)
    assert one.names.tolist() == ["x", "y", "z"]
    assert one.corners == pytest.approx(of((0, 0, 10, 11), (0, 0, 10, 10), (1, 2, 3, 4)), rel=1e-6)
    assert one.shares == pytest.approx([2 / 3, 1 / 2, 1])
    assert [rows.tolist() for rows in one.of(["z", "none", "x"])] == [[2], [], [0]]


def test_without_the_library_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: object) -> object:
        if name == "ensemble_boxes":
            raise ImportError(name)
        return real(name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=r"needs ensemble-boxes: .*pip install 'spft-studies\[detection\]'"):
        fuse_readers([of((0, 0, 1, 1))], [classes(0)])


def test_one_pixel_beyond_the_edge_is_rounding_and_two_are_not() -> None:
    assert box_fault((0, 0, 513, 512), (512, 512)) is None
    assert box_fault((0, 0, 514, 512), (512, 512)) == "box 0, 0, 514, 512 reaches out of the image of 512 × 512 px"
    assert box_fault((0, 0, 9999, 9999)) is None
