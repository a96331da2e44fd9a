"""Dice of masks, and masks as arrays of numbers: packed so that a split's predictions stay small."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def dice(predicted: npt.NDArray[np.bool_], truth: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """2·|A ∩ B| / (|A| + |B|) over the last two axes (Dice 1945, Sørensen 1948).

    Args:
        predicted, truth: (…, H, W), shapes that broadcast.

    Returns:
        (…) float64; 1 where both masks are empty: that nothing is there was told right.
    """
    both = (predicted & truth).sum(axis=(-2, -1), dtype=np.int64)
    sizes = predicted.sum(axis=(-2, -1), dtype=np.int64) + truth.sum(axis=(-2, -1), dtype=np.int64)
    scores: npt.NDArray[np.float64] = np.divide(2.0 * both, sizes, out=np.ones(np.shape(sizes)), where=sizes > 0)
    return scores


def mean_defined(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """(N, …) → (…) mean over the first axis of what is not NaN; NaN where nothing is."""
    defined = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        means: npt.NDArray[np.float64] = np.divide(np.where(defined, values, 0.0).sum(axis=0), defined.sum(axis=0))
    return means


def packed(masks: npt.NDArray[np.bool_]) -> npt.NDArray[np.float32]:
    """(B, …) masks → (B, ⌈K / 24⌉) float32, K pixels an image, 24 in each number.

    Float32 holds all whole numbers below 2^24.
    """
    octets = np.packbits(masks.reshape(len(masks), -1), axis=1)
    octets = np.pad(octets, ((0, 0), (0, -octets.shape[1] % 3))).reshape(len(masks), -1, 3).astype(np.uint32)
    return (octets[..., 0] << 16 | octets[..., 1] << 8 | octets[..., 2]).astype(np.float32)


def unpacked(numbers: npt.NDArray[np.float32], shape: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    """(B, ⌈K / 24⌉) of `packed` → (B, *shape) masks."""
    values = numbers.astype(np.uint32)
    octets = np.stack([values >> 16, values >> 8 & 255, values & 255], axis=-1).astype(np.uint8)
    pixels = int(np.prod(shape))
    flat = np.unpackbits(octets.reshape(len(numbers), -1), axis=1, count=pixels)
    return flat.view(np.bool_).reshape(len(numbers), *shape)
