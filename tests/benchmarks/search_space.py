"""The space on which the search and plain Ray Tune are compared: every configuration costs as much to train."""

from __future__ import annotations

from typing import Any

from tests.studies_for_tests import TINY

DECAYS = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)
TIMES = {"optimiser.encoder_lr": (0.1, 10.0), "optimiser.tune_head_lr": (0.1, 3.0)}  # log, relative to the baseline
HEAD_LR_TIMES = (0.5, 1, 2)
ETA = (0.0, 2.0)
FIXED = ("unfreezing", "depth", "step", "tune_epochs", "head_epochs")  # of the strategy: they decide the cost


def search_overrides(trials: int, smallest: bool) -> dict[str, Any]:
    """Overrides of the shipped search: eight decays and no raw weights, nothing pruned, nothing confirmed."""
    left_out = {f"strategy.{name}": None for name in FIXED} | {
        "optimiser.weight_decay": None,
        "weighting.normalise": None,
        "weighting.clip": None,
        "ema.enabled": None,
    }
    chosen: dict[str, Any] = {
        "search.trials": trials,
        "search.pruner": "none",
        "search.confirm": 0,
        "search.parameters": left_out | {"ema.decay": {"choices": list(DECAYS)}},
    }
    return {**TINY, **chosen} if smallest else chosen
