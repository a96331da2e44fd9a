"""Areas under ROC curves, over defined classes only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata


def class_aucs(labels: npt.NDArray[np.integer], scores: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """AUC of each class, over the images that are labelled for it.

    As the Mann–Whitney statistic: (sum of the positives' ranks − n₁(n₁ + 1)/2) / (n₁ n₀), ties at their mean rank
    (Hanley & McNeil 1982).

    Args:
        labels: (N, C) 0 or 1; anything else is unlabelled and left out of its class.
        scores: (N, C), higher means more likely.

    Returns:
        (C,) float64; NaN where a class has one value only, which is undefined (not 0, not 0.5).
    """
    known = np.isin(labels, (0, 1))
    positive = labels == 1
    # Unlabelled images get no rank, so that ranks count labelled images alone.
    ranks = rankdata(np.where(known, scores, np.nan), axis=0, nan_policy="omit")
    n1 = positive.sum(axis=0, dtype=np.float64)
    n0 = known.sum(axis=0) - n1
    with np.errstate(invalid="ignore", divide="ignore"):
        aucs: npt.NDArray[np.float64] = (np.where(positive, ranks, 0.0).sum(axis=0) - n1 * (n1 + 1) / 2) / (n1 * n0)
    return aucs


def macro(values: npt.NDArray[np.float64]) -> float:
    """Mean over the defined classes; NaN where none is."""
    defined = values[np.isfinite(values)]
    return float(defined.mean()) if defined.size else float("nan")


def undefined(values: npt.NDArray[np.float64], classes: Sequence[str]) -> tuple[str, ...]:
    """Names of the classes without a value."""
    return tuple(name for name, v in zip(classes, values, strict=True) if not np.isfinite(v))
