"""Views of images: the same bytes read the other way round, chosen by seed, epoch and step alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainables.settings import Flips
from trainables.views import VIEWS, Views

N = 7
ALL = get_args(Flips)
TURNS: dict[tuple[bool, bool], Callable[[np.ndarray], np.ndarray]] = {
    (False, False): lambda a: a,
    (True, False): np.fliplr,
    (False, True): np.flipud,
    (True, True): lambda a: np.rot90(a, 2),
}
flips = st.sampled_from(ALL)


def cached() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (N, 6, 6, 3), np.uint8)


def test_every_choice_of_the_settings_has_its_views_and_the_image_itself_is_the_first() -> None:
    assert set(VIEWS) == set(ALL)
    assert all(views[0] == (False, False) and len(set(views)) == len(views) for views in VIEWS.values())
    assert {name: len(views) for name, views in VIEWS.items()} == {"none": 1, "horizontal": 2, "vertical": 2, "both": 4}


@given(flips, st.lists(st.integers(0, N - 1), min_size=1, max_size=9), st.integers(0, 99))
def test_pixels_in_a_view_are_the_cached_bytes_turned(kind: Flips, images: list[int], seed: int) -> None:
    views, cache = Views(N, kind), cached()
    rows = views.drawn(np.array(images), seed, 1, 2)
    assert views.image(rows).tolist() == images
    before = cache.copy()
    for row, image, pixels in zip(rows.tolist(), images, views.pixels(cache, rows), strict=True):
        assert np.array_equal(pixels, TURNS[VIEWS[kind][row // N]](cache[image]))
    assert np.array_equal(cache, before), "the cache itself is not turned"


def test_a_cache_that_cannot_be_written_is_read_in_every_view() -> None:
    cache = cached()
    cache.flags.writeable = False
    views = Views(N, "both")
    assert np.array_equal(views.pixels(cache, np.array([3 + 3 * N]))[0], np.rot90(cache[3], 2))


@given(flips, st.integers(0, 10**6))
def test_a_box_turns_with_the_pixels_under_it(kind: Flips, seed: int) -> None:
    """A box is where its pixels are: after turning both, the turned box covers the turned pixels and no others."""
    rng = np.random.default_rng(seed)
    views, size = Views(N, kind), 12
    x, y = np.sort(rng.permutation(size + 1)[:4].reshape(2, 2), axis=1)
    images = rng.integers(0, N, 1)
    for row in views.every(images):
        mask = np.zeros((1, size, size), np.bool_)
        mask[0, y[0] : y[1], x[0] : x[1]] = True
        turned = views.turned(mask, np.array([row]))[0]
        (box,) = views.corners(np.array([[x[0], y[0], x[1], y[1]]], np.float64), np.array([row]), size).astype(int)
        expected = np.zeros((size, size), np.bool_)
        expected[box[1] : box[3], box[0] : box[2]] = True
        assert np.array_equal(turned, expected)


def test_views_are_drawn_by_seed_epoch_and_step_and_by_nothing_else() -> None:
    views, rows = Views(1000, "horizontal"), np.arange(200)
    drawn = views.drawn(rows, 1, 2, 3)
    assert np.array_equal(drawn, Views(1000, "horizontal").drawn(rows, 1, 2, 3))
    assert np.array_equal(drawn // 1000, views.drawn(rows[::-1], 1, 2, 3) // 1000), "not by the images"
    others = [views.drawn(rows, *at) for at in ((2, 2, 3), (1, 3, 3), (1, 2, 4))]
    assert all(not np.array_equal(drawn, other) for other in others)
    state = np.random.get_state()[1]
    views.drawn(rows, 1, 2, 3)
    assert np.array_equal(state, np.random.get_state()[1])


def test_every_view_is_as_likely_as_any_other() -> None:
    rows = Views(1000, "both").drawn(np.zeros(8000, np.intp), 0, 0, 0)
    counts = np.bincount(rows // 1000, minlength=4)
    assert abs(counts - 2000).max() < 200  # 5 standard deviations of a binomial count


def test_without_flips_rows_are_images() -> None:
    views, rows = Views(N), np.arange(N)
    assert views.drawn(rows, 0, 0, 0) is rows
    assert np.array_equal(views.every(rows), rows)
    assert views.told() == "none"


@pytest.mark.parametrize("kind", ALL)
def test_every_view_of_rows_is_there_once_and_others_are_seen_alike(kind: Flips) -> None:
    views, rows = Views(N, kind), np.array([2, 5])
    every = views.every(rows)
    assert len(set(every.tolist())) == len(every) == 2 * len(VIEWS[kind])
    assert np.array_equal(np.sort(every), np.sort([row + N * v for row in (2, 5) for v in range(views.count)]))
    alike = views.alike(np.zeros(len(every), np.intp), every)
    assert np.array_equal(alike // N, every // N)
    assert not (alike % N).any()
