"""Stabilized Progressive Fine-Tuning as functions of time: (settings, epoch) → what trains, at which rates.

Everything here is pure: no event, no state, no torch. What varies in time is a function of (settings, seed, epoch,
step), so that a run can be forked or resumed at any epoch. Epochs are counted from 0 here; a state 'after epoch e' has
completed e + 1 epochs.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Literal

from trainables.settings import OptimiserSettings, StrategySettings

Segment = Literal["head", "tune"]


@dataclass(frozen=True)
class Phase:
    """What trains in one epoch.

    Attributes:
        segment: 'head' (stage 1) or 'tune' (stage 2); the learning-rate schedule restarts with each, but not in plain
            fine-tuning.
        segment_start: first epoch of the segment.
        segment_epochs: length of the segment, which the schedule spans.
        unfrozen: k, the number of blocks that train, counted from the top.
        base: the embeddings and the final norm train too.
    """

    segment: Segment
    segment_start: int
    segment_epochs: int
    unfrozen: int
    base: bool


def total_epochs(strategy: StrategySettings) -> int:
    """E1 + E2, in every row alike."""
    return strategy.head_epochs + strategy.tune_epochs


def unfreeze_interval(strategy: StrategySettings) -> int:
    """s: epochs between two additions of blocks; max(1, round(E2 / 10)) by default, so that K = 10 comes half-way."""
    if strategy.every is not None:
        return strategy.every
    return max(1, round(strategy.tune_epochs / 10))


def unfrozen_blocks(strategy: StrategySettings, n_blocks: int, epoch: int) -> int:
    """k(e) = min(K, step · (1 + ⌊(e − E1) / s⌋)) in stage 2, 0 before; K = 'all' counts as every block.

    Plain fine-tuning: K in every epoch.
    """
    if strategy.unfreezing == "none" or (epoch < strategy.head_epochs and strategy.unfreezing != "plain"):
        return 0
    depth = n_blocks if strategy.depth == "all" else strategy.depth
    if strategy.unfreezing in ("static", "plain"):
        return depth
    additions = 1 + (epoch - strategy.head_epochs) // unfreeze_interval(strategy)
    return min(depth, strategy.step * additions)


def phase(strategy: StrategySettings, n_blocks: int, epoch: int) -> Phase:
    """The phase of an epoch, 0 ≤ epoch < E1 + E2."""
    if not 0 <= epoch < total_epochs(strategy):
        raise ValueError(f"epoch {epoch} is outside 0 … {total_epochs(strategy) - 1}")
    if strategy.unfreezing == "plain":
        return _plain_phase(strategy, n_blocks, epoch)
    if epoch < strategy.head_epochs:
        return Phase("head", 0, strategy.head_epochs, unfrozen=0, base=False)
    k = unfrozen_blocks(strategy, n_blocks, epoch)
    base = strategy.unfreezing != "none" and strategy.depth == "all" and k == n_blocks
    return Phase("tune", strategy.head_epochs, strategy.tune_epochs, k, base)


def _plain_phase(strategy: StrategySettings, n_blocks: int, epoch: int) -> Phase:
    """Plain fine-tuning: K blocks from the first epoch on, one schedule over all epochs.

    Epochs are counted as in every row: class weights, averages and the choice of an epoch begin with stage 2.
    """
    segment: Segment = "head" if epoch < strategy.head_epochs else "tune"
    return Phase(
        segment, 0, total_epochs(strategy), unfrozen_blocks(strategy, n_blocks, epoch), strategy.depth == "all"
    )


def schedule_factor(kind: Literal["cosine", "linear"], step: int, steps: int) -> float:
    """Share of the peak rate at a step of a segment, 1 at step 0, decaying towards 0 at step `steps`.

    cosine: ½ (1 + cos(π · step / steps)) (Loshchilov & Hutter, SGDR, 2017, without restarts inside a segment);
    linear: 1 − step / steps.
    """
    t = step / steps
    return 0.5 * (1.0 + math.cos(math.pi * t)) if kind == "cosine" else 1.0 - t


@dataclass(frozen=True)
class Rates:
    """Learning rates of the two groups at one optimiser step."""

    encoder: float
    head: float


def rates(optimiser: OptimiserSettings, now: Phase, epoch: int, step: int, steps_per_epoch: int) -> Rates:
    """Rates at optimiser step `step` of `epoch`: both groups follow the schedule of the segment."""
    done = (epoch - now.segment_start) * steps_per_epoch + step
    factor = schedule_factor(optimiser.schedule, done, now.segment_epochs * steps_per_epoch)
    peak = optimiser.head_lr
    if now.segment == "tune" and optimiser.tune_head_lr is not None:
        peak = optimiser.tune_head_lr
    return Rates(encoder=optimiser.encoder_lr * factor if now.unfrozen else 0.0, head=peak * factor)


def stream(purpose: str, *numbers: int) -> int:
    """A 63-bit seed for one purpose ('order', 'dropout', 'head', …): sha256 of its name and numbers.

    Streams of different purposes, seeds, epochs or steps are independent, and none depends on any other setting.
    """
    text = ":".join([purpose, *map(str, numbers)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
