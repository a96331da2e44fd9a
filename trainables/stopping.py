"""Best epoch and early stopping as a function of a row's own validation history."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Followed:
    """Where an observer stands.

    Attributes:
        best: position of the best value, None while no value is defined; the earliest of equals.
        stopped: position at which patience ran out, None while it has not.
    """

    best: int | None
    stopped: int | None


def follow(values: Sequence[float], patience: int | None) -> Followed:
    """Follow one observer's metric, higher is better, from stage 2's first epoch.

    Stops at the first position that lies `patience` positions after the best one so far; an undefined value (NaN) never
    improves on anything. What comes after the stop is not looked at.
    """
    best: int | None = None
    for position, value in enumerate(values):
        if not math.isnan(value) and (best is None or value > values[best]):
            best = position
        since = position - (-1 if best is None else best)
        if patience is not None and since >= patience:
            return Followed(best, position)
    return Followed(best, None)
