"""Prompts of a segmenter: where it is told to look. Deterministic: the same image always has the same ones.

Every structure has two. The first is a box around the whole image, which says nothing; the second is drawn from a mask:
in training from the image's own, shifted at random as a user's would be; at evaluation exactly, and what it gives is
reported as the oracle's, apart from everything that epochs or rows are chosen by.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from trainables.settings import SegmentationSettings
from trainables.strategy import stream

PROMPTS = ("whole_image", "oracle")

_POINT, _CORNER_A, _CORNER_B, _NO_POINT = 1.0, 2.0, 3.0, -1.0  # labels of SAM's prompt encoder

Prompt = npt.NDArray[np.float32]


def whole_image(size: int) -> Prompt:
    """(2, 3) box around an image of side `size` px: x, y and label of its corners."""
    return _box(0, 0, size - 1, size - 1)


def oracle_prompt(mask: npt.NDArray[np.bool_], settings: SegmentationSettings) -> Prompt:
    """(2, 3) prompt of a mask: the tightest box, or the point inside that is farthest from the outside.

    Args:
        mask: (S, S); an empty one gives the whole image.
        settings: kind of prompt.
    """
    if not mask.any():
        return whole_image(len(mask))
    if settings.prompt == "point":
        from scipy.ndimage import distance_transform_edt

        depth = distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
        y, x = np.unravel_index(int(np.argmax(depth)), depth.shape)
        return _point(float(x), float(y))
    return _box(*_extent(mask))


def training_prompt(
    mask: npt.NDArray[np.bool_], settings: SegmentationSettings, name: str, structure: str, split_seed: int
) -> Prompt:
    """(2, 3) prompt of a mask for training: a box whose sides are shifted, or any point inside.

    Args:
        mask: (S, S); an empty one gives the whole image.
        settings: kind of prompt, and how far sides are shifted.
        name, structure, split_seed: what the random shift follows from.
    """
    if not mask.any():
        return whole_image(len(mask))
    rng = np.random.default_rng(stream(f"prompt {structure} {name}", split_seed))
    if settings.prompt == "point":
        ys, xs = np.nonzero(mask)
        chosen = int(rng.integers(len(ys)))
        return _point(float(xs[chosen]), float(ys[chosen]))
    left, top, right, bottom = _extent(mask)
    sides = np.array([right - left, bottom - top] * 2)
    shifted = np.array([left, top, right, bottom]) + rng.normal(0, settings.prompt_noise, 4) * sides
    left, top, right, bottom = np.clip(shifted, 0, len(mask) - 1).tolist()
    return _box(min(left, right), min(top, bottom), max(left, right), max(top, bottom))


def _extent(mask: npt.NDArray[np.bool_]) -> tuple[float, float, float, float]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return float(columns[0]), float(rows[0]), float(columns[-1]), float(rows[-1])


def _box(left: float, top: float, right: float, bottom: float) -> Prompt:
    return np.array([[left, top, _CORNER_A], [right, bottom, _CORNER_B]], np.float32)


def _point(x: float, y: float) -> Prompt:
    return np.array([[x, y, _POINT], [0, 0, _NO_POINT]], np.float32)
