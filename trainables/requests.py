"""What a worker is asked to run: plain data without torch, so that a plan can be made and sent anywhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trainables.settings import EmaSettings, Settings, StoppingSettings

RAW = "raw"  # name of the weights that are not averaged


@dataclass(frozen=True)
class Compute:
    """Device kind, number of threads and precision of a trial; all three are part of every stage's key."""

    device: Literal["cpu", "cuda"]
    threads: int
    precision: Literal["fp32", "bf16"]


def copy_name(decay: float | None, tau: float) -> str:
    """Name of the weights an observer evaluates: 'raw', or the decay and τ of the averaged copy."""
    return RAW if decay is None else f"ema {_short(decay)} tau {_short(tau)}"


def _short(value: float) -> str:
    """Six digits where they say it all, else as many as it takes: different values have different names."""
    text = f"{value:g}"
    return text if float(text) == value else repr(value)


@dataclass(frozen=True)
class Observer:
    """A row's way of looking at a trajectory: which weights it evaluates and when it stops.

    Attributes:
        decay, tau: the averaged copy; decay None evaluates the raw weights.
        patience: epochs without improvement before it stops; None never stops.
        away: where it tests, if not on the data set's own test split: name and digest of the other one.
    """

    decay: float | None
    tau: float
    patience: int | None
    away: str = ""

    @classmethod
    def of(cls, ema: EmaSettings, stopping: StoppingSettings, away: str = "") -> Observer:
        """The observer that a row's settings describe."""
        if not ema.enabled:
            return cls(None, 0.0, stopping.patience, away)
        return cls(ema.decay, ema.tau, stopping.patience, away)

    @property
    def copy(self) -> str:
        """Name of the weights it evaluates."""
        return copy_name(self.decay, self.tau)

    @property
    def name(self) -> str:
        """Unique name, also of its result."""
        return f"{self.copy} patience {self.patience}" + (f" on {self.away}" if self.away else "")


@dataclass(frozen=True)
class Watch:
    """An observer with the leaves it is followed to.

    Attributes:
        leaves: keys of the last epochs of the cells that see the trajectory through this observer.
    """

    observer: Observer
    leaves: tuple[str, ...]


@dataclass(frozen=True)
class CacheRequest:
    """Which frozen prefixes may be cached.

    Attributes:
        identity: digest of what activations depend on besides the image contents: initial weights, transforms, compute.
        positions: positions that the plan found worth caching; none turns caches off.
        dtype: float32 for bit-identity, float16 as a labelled tolerance mode.
        when: 'auto' uses a cache only where measured reading beats recomputing; 'always' skips the measurement.
    """

    identity: str
    positions: tuple[int, ...]
    dtype: Literal["float32", "float16"] = "float32"
    when: Literal["auto", "always"] = "auto"


@dataclass(frozen=True)
class TrialRequest:
    """A chain of epochs of one trajectory, and everything a worker needs to train it.

    Attributes:
        name: shown in dashboards and messages: row, data set, seed, epochs.
        settings: of any of its cells; what influences the trajectory is equal in all of them.
        keys: key of the state after each epoch, from the trajectory's first to this trial's last.
        first: epochs completed where its parent ends.
        watches: observers of all cells at or below this trial.
        keep: keys whose states stay after the trial, because others start there.
        cache: which frozen prefixes may be cached.
        compute: device kind, threads and precision.
        mixed: go on from states of other hardware or library versions.
        index: digest of the data set's table and split as they were planned with; empty: not compared.
        gpu_share: part of a GPU that the worker was given; 1 and more: it has all of it.
    """

    name: str
    settings: Settings
    seed: int
    keys: tuple[str, ...]
    first: int
    watches: tuple[Watch, ...]
    keep: frozenset[str]
    cache: CacheRequest
    compute: Compute
    mixed: bool = False
    index: str = ""
    gpu_share: float = 1.0

    @property
    def last(self) -> int:
        """Epochs completed at the trial's end."""
        return len(self.keys)
