"""What every measurement shares: figures with their targets, pairs in turn, and how busy the machine was."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import psutil

T = TypeVar("T")
U = TypeVar("U")

IDLE = 0.1  # share of its cores that may be busy with other work before a figure is doubted


class Effort(NamedTuple):
    """How much to measure: `smallest` runs every line of a measurement once, for tests; its figures mean nothing."""

    repeats: int
    smallest: bool = False


@dataclass(frozen=True)
class Figure:
    """A measured number, and the bound that the design promises for it."""

    value: float
    unit: str
    at_most: float | None = None
    at_least: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the bound holds; None where there is none."""
        if self.at_most is not None:
            return self.value <= self.at_most
        return None if self.at_least is None else self.value >= self.at_least

    def as_json(self) -> dict[str, Any]:
        """Value and unit, and where there is a bound, the bound and whether it is met."""
        bounds = {"at_most": self.at_most, "at_least": self.at_least, "met": self.met}
        return {"value": self.value, "unit": self.unit} | {k: v for k, v in bounds.items() if v is not None}


@dataclass(frozen=True)
class Measured:
    """Figures by name; `facts`: the sizes and samples that they come from."""

    figures: dict[str, Figure]
    facts: dict[str, Any] = field(default_factory=dict)

    def __or__(self, other: Measured) -> Measured:
        """Both together."""
        return Measured(self.figures | other.figures, self.facts | other.facts)


@dataclass(frozen=True)
class Measurement:
    """An entry of the registry.

    Attributes:
        title: what is measured, in a line.
        run: does it.
        repeats: runs, or pairs of runs, unless asked otherwise.
        minutes: what it takes with these repeats on two idle cores.
    """

    title: str
    run: Callable[[Effort], Measured]
    repeats: int
    minutes: float


def pairs_in_turn(first: Callable[[], T], second: Callable[[], U], repeats: int) -> list[tuple[T, U]]:
    """Run A B A B …, so that a drift of the machine's speed meets both."""
    return [(first(), second()) for _ in range(repeats)]


def median_ratio(pairs: Sequence[tuple[float, float]]) -> float:
    """Median over pairs of second / first."""
    return statistics.median(second / first for first, second in pairs)


def median_difference(pairs: Sequence[tuple[float, float]]) -> float:
    """Median over pairs of second − first."""
    return statistics.median(second - first for first, second in pairs)


class Load(NamedTuple):
    """How busy the cores are that a measurement may use: their share now, and the system's average of the last minute.

    A measurement that is pinned to some cores (`taskset`) is disturbed by what runs there, and far less by the others.
    """

    busy: float
    average: float

    @property
    def idle(self) -> bool:
        """Whether a figure that is measured now can be trusted. The average would still hold our own last run."""
        return self.busy <= IDLE


def load_now(seconds: float = 2.0) -> Load:
    """Watch the cores that this process may use for some seconds, doing nothing."""
    each = psutil.cpu_percent(seconds, percpu=True)
    ours = [each[core] for core in os.sched_getaffinity(0)]
    return Load(statistics.mean(ours) / 100, os.getloadavg()[0])


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "cores": os.cpu_count(),
        "cores_used": len(os.sched_getaffinity(0)),
        "memory_gigabytes": round(psutil.virtual_memory().total / 1e9, 1),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }
