"""Areas under ROC curves, over defined classes only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from sklearn.metrics import roc_auc_score


def class_aucs(labels: npt.NDArray[np.integer], scores: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """AUC of each class, over the images that are labelled for it.

    Args:
        labels: (N, C) 0 or 1; anything else is unlabelled and left out of its class.
        scores: (N, C), higher means more likely.

    Returns:
        (C,) float64; NaN where a class has one value only, which is undefined (not 0, not 0.5).
    """
    aucs = np.full(labels.shape[1], np.nan)
    for c in range(labels.shape[1]):
        labelled = np.isin(labels[:, c], (0, 1))
        column = labels[labelled, c]
        if column.size and column.min() != column.max():
            aucs[c] = roc_auc_score(column, scores[labelled, c])
    return aucs


def macro(values: npt.NDArray[np.float64]) -> float:
    """Mean over the defined classes; NaN where none is."""
    defined = values[np.isfinite(values)]
    return float(defined.mean()) if defined.size else float("nan")


def undefined(values: npt.NDArray[np.float64], classes: Sequence[str]) -> tuple[str, ...]:
    """Names of the classes without a value."""
    return tuple(name for name, v in zip(classes, values, strict=True) if not np.isfinite(v))
