"""What sharing gains: a study with it and with `--no-sharing`, one trial after another in one process."""

from __future__ import annotations

import statistics
from typing import Any

from transformers import Dinov2Config, Dinov2Model

from tests.benchmarks.measuring import Effort, Figure, Measured, median_ratio, pairs_in_turn
from tests.benchmarks.processes import TimedRun, fresh_storage, launch_timed, overrides, same_bits
from tests.studies_for_tests import TINY
from trainables.data.chestxray14 import CLASSES

LEAST_SHARE = 0.9  # of the gain in units that must show in wall time
# The embedded ablation with one seed and stages of half length: training still takes ten times as long as setting up.
FULL: dict[str, Any] = {"seeds": [0], "strategy.head_epochs": 3, "strategy.tune_epochs": 6}


# An encoder of the size that is fine-tuned in earnest (DINOv2's ViT-S/14, drawn), on few images: products of matrices
# take the time there, and not what a step costs besides.
ENCODER: dict[str, Any] = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "image_size": 112}
KEPT = ("Atelectasis", "Effusion", "Infiltration", "Nodule")
VIT_S: dict[str, Any] = {
    "seeds": [0],
    "dataset.images": 160,
    "dataset.image_size": 112,
    "dataset.drop_classes": [name for name in CLASSES if name not in KEPT],
    "strategy.head_epochs": 2,
    "strategy.tune_epochs": 4,
}


def sharing(effort: Effort) -> Measured:
    """Wall time of every cell alone over shared, against the ratio of their units."""
    chosen = {**TINY, "seeds": [0]} if effort.smallest else FULL
    pairs = pairs_in_turn(lambda: _run(chosen), lambda: _run(chosen, "--no-sharing"), effort.repeats)
    return compared(pairs) | Measured({}, {"overrides": chosen})


def sharing_in_full(effort: Effort) -> Measured:
    """The same with the whole embedded ablation, 12 cells of full length: above all, whether all bits agree."""
    chosen: dict[str, Any] = dict(TINY) if effort.smallest else {}
    pairs = pairs_in_turn(lambda: _run(chosen), lambda: _run(chosen, "--no-sharing"), effort.repeats)
    return compared(pairs) | Measured({}, {"overrides": chosen})


def sharing_vit_s(effort: Effort) -> Measured:
    """The same with an encoder whose products of matrices take the time."""
    with fresh_storage() as folder:
        shape = ENCODER | ({"hidden_size": 24, "num_attention_heads": 2} if effort.smallest else {})
        encoder = Dinov2Model(Dinov2Config(patch_size=14, **shape))
        encoder.save_pretrained(folder)
        chosen = VIT_S | {"model.backbone": str(folder)}
        pairs = pairs_in_turn(lambda: _run(chosen), lambda: _run(chosen, "--no-sharing"), effort.repeats)
    return compared(pairs) | Measured({}, {"overrides": VIT_S, "encoder": shape})


def compared(pairs: list[tuple[TimedRun, TimedRun]]) -> Measured:
    """Gain in training time and of the whole command, each over the gain in units; (shared, alone) pairs."""
    units = pairs[0][0].units
    expected = units["alone"] / units["shared"]
    training = median_ratio([(shared.executor_seconds, alone.executor_seconds) for shared, alone in pairs])
    whole = median_ratio([(shared.seconds, alone.seconds) for shared, alone in pairs])
    equal = all(same_bits(shared.cells, alone.cells) for shared, alone in pairs)
    return Measured(
        {
            "gain in units, alone / shared": Figure(expected, "×"),
            "gain in training time": Figure(training, "×"),
            "share of the gain in units, training": Figure(training / expected, "", at_least=LEAST_SHARE),
            "gain of the whole command": Figure(whole, "×"),
            "share of the gain in units, whole command": Figure(whole / expected, ""),
            "cells with equal bits, share": Figure(float(equal), "", at_least=1.0),
        },
        {
            "cells": len(pairs[0][0].cells),
            "units": units,
            "shared_training_seconds": statistics.median(shared.executor_seconds for shared, _ in pairs),
            "alone_training_seconds": statistics.median(alone.executor_seconds for _, alone in pairs),
            "pairs_training_seconds": [[s.executor_seconds, a.executor_seconds] for s, a in pairs],
            "pairs_whole_seconds": [[s.seconds, a.seconds] for s, a in pairs],
        },
    )


def _run(chosen: dict[str, Any], *more: str) -> TimedRun:
    with fresh_storage() as storage:
        return launch_timed(storage, "ablation", "--executor", "local", *overrides(chosen), *more)
