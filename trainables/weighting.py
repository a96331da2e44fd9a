"""Hybrid class weights: frequency first, refined by validation quality (method.md, part 3).

The unclipped state u belongs to the trajectory: it is the one thing that varies in time and is not a function of
(settings, seed, epoch), so it is saved with every checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from trainables.settings import WeightingSettings

Weights = npt.NDArray[np.float64]


def initial_state(
    positives: npt.NDArray[np.integer], negatives: npt.NDArray[np.integer], classes: Sequence[str], s: WeightingSettings
) -> Weights:
    """u_c = boost_c · N_neg,c / (N_pos,c + 1e-6), normalised to mean 1 unless `normalise` is off.

    Where every class is in every image, as in data sets of boxes of one class, frequency tells none from another, and
    u_c = boost_c.

    Args:
        positives, negatives: (C,) counts in the training split alone.
        classes: C names; a boost of a class that is not among them is ignored here and refused by the study file.
        s: weighting settings.

    Returns:
        (C,) float64 state.
    """
    frequency = negatives / (positives + 1e-6) if np.any(negatives) else np.ones(len(classes))
    return _normalised(frequency * np.array([s.boosts.get(name, 1.0) for name in classes]), s)


def refine(u: Weights, quality: npt.NDArray[np.float64], s: WeightingSettings) -> Weights:
    """u_c ← u_c · (1 + η · max(0, mean − quality_c)), then mean 1: classes below the mean gain weight.

    Args:
        u: (C,) state.
        quality: (C,) validation quality of the raw weights (AUC, AP50 or Dice), NaN where undefined; an undefined
            class keeps its weight before normalisation and is left out of the mean.
        s: weighting settings; η = 0 changes nothing.
    """
    defined = np.isfinite(quality)
    if s.eta == 0.0 or not defined.any():
        return u.copy()
    gap = np.where(defined, np.maximum(0.0, quality[defined].mean() - np.where(defined, quality, 0.0)), 0.0)
    return _normalised(u * (1.0 + s.eta * gap), s)


def training_weights(u: Weights, s: WeightingSettings) -> Weights:
    """The weights the loss uses: clip(u), of the unclipped state."""
    return u.copy() if s.clip is None else np.clip(u, *s.clip)


def _normalised(u: Weights, s: WeightingSettings) -> Weights:
    """Mean 1; where every class is in every image, and so all are 0, all are alike."""
    if not s.normalise:
        return u
    return u / u.mean() if u.any() else np.ones_like(u)
