"""How much of a GPU a trial is given: a whole one until the memory of trials like it is known, then what fits.

Plain bookkeeping in the driver: no torch, no ray. What a trial takes is measured by its worker on a whole GPU (see
`trainables.device`), which also keeps a trial on a part of one from taking more: so that of trials that share a card,
each has its part of the memory, whatever was expected of it.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from study.chains import TASK_GROUPS, Chain
from study.schedule import Node
from trainables.device_memory import CARD_KEPT, GPU_MEMORY
from trainables.requests import RAW, Compute
from trainables.results import CellResult
from trainables.settings import Settings

HEAD_ROOM = 0.25  # more than was measured: allocators fragment, and batches of boxes and masks differ
MOST_ON_A_CARD = 8  # beyond that processes wait for each other and gain nothing
SIZES = {"name", "image_size", "fit", "drop_classes", "merge_classes", "only_tb"}  # of a data set's batches
SMALLEST = 10_000  # Ray counts parts of a GPU in ten thousandths


class Alike(NamedTuple):
    """What the memory of an epoch depends on, apart from how deep it trains.

    Attributes:
        settings: of task, model, batch and images, as JSON.
        averages: number of averaged copies.
    """

    settings: str
    averages: int


@dataclass(frozen=True)
class Taken:
    """The most memory of a GPU that was taken so far by trials that are alike; `card`: all that the GPU has, bytes."""

    peak: int
    card: int


class GpuShares:
    """GPUs of each trial, from what is known of the memory of others.

    A measured epoch speaks for epochs that are alike and train as deep, or less deep. What was refused memory on a
    part of a GPU is given a whole one from then on.
    """

    def __init__(self, gpus: float | Literal["auto"] | None, compute: Compute) -> None:
        """`gpus`: as declared, see `study.spec.Execution`."""
        self._measured = gpus == "auto" and compute.device == "cuda"
        if gpus is None or gpus == "auto":
            self._whole = 1.0 if compute.device == "cuda" else 0.0
        else:
            self._whole = float(gpus)
        self._precision = compute.precision
        self._taken: dict[Alike, dict[int, Taken]] = defaultdict(dict)  # by depth
        self._refused: set[tuple[Alike, int]] = set()

    @property
    def most(self) -> float:
        """GPUs of a trial of which nothing is known."""
        return self._whole

    def of(self, node: Node) -> float:
        """GPUs of a trial."""
        alike, depth = self._at(node.chains[0], node.request.last, _averages(node))
        if (alike, depth) in self._refused:
            return max(1.0, self._whole)
        if not self._measured:
            return self._whole
        known = [d for d in self._taken[alike] if d >= depth]
        return part_of_a_card(self._taken[alike][min(known)]) if known else 1.0

    def learn(self, chain: Chain, epoch: int, averages: int, taken: Taken) -> None:
        """Memory that a trial took on a whole GPU up to the end of an epoch, its set-up included."""
        alike, depth = self._at(chain, epoch, averages)
        before = self._taken[alike].get(depth, taken)
        self._taken[alike][depth] = Taken(max(before.peak, taken.peak), min(before.card, taken.card))

    def hear(self, node: Node, epoch: int, peak: int, card: int) -> None:
        """What a worker says of its GPU after a step of a trial; nothing where it was not measured."""
        if card and epoch:
            head = epoch <= node.request.settings.strategy.head_epochs
            self.learn(node.chains[0], epoch, 0 if head else _averages(node), Taken(peak, card))

    def recall(self, results: Iterable[tuple[Chain, CellResult]]) -> None:
        """Learn from results that are stored."""
        for chain, result in results:
            if (told := result.provenance.get(GPU_MEMORY)) is not None:
                known = json.loads(told)
                taken = Taken(known["peak_bytes"], known["card_bytes"])
                self.learn(chain, result.last_epoch, known["averages"], taken)

    def refused(self, node: Node) -> bool:
        """Memory was refused to a trial; whether it had a part of a GPU, and will be given a whole one."""
        if not 0 < self.of(node) < 1:
            return False
        self._refused.add(self._at(node.chains[0], node.request.last, _averages(node)))
        return True

    def _at(self, chain: Chain, epoch: int, averages: int) -> tuple[Alike, int]:
        """What an epoch, or a trial that ends with it, is alike to; and how deep it trains."""
        phases = chain.phases[:epoch]
        depth = max(now.unfrozen + int(now.base) for now in phases)
        return Alike(_memory_settings(chain.cell.settings, self._precision), averages), depth


def part_of_a_card(taken: Taken) -> float:
    """The part of a GPU that leaves room for what was taken: 1/n, n trials of this kind and no more fit together."""
    wanted = taken.peak * (1 + HEAD_ROOM)
    fit = int(taken.card * (1 - CARD_KEPT) / wanted)
    n = min(max(fit, 1), MOST_ON_A_CARD)
    return (SMALLEST // n) / SMALLEST  # rounded down, so that n of them are no more than one


def _averages(node: Node) -> int:
    """Averaged copies that a trial holds at its end."""
    if node.request.last <= node.request.settings.strategy.head_epochs:
        return 0
    return len({watch.observer.copy for watch in node.request.watches} - {RAW})


def _memory_settings(settings: Settings, precision: str) -> str:
    """Whatever decides how large weights, activations and batches are; rates, seeds and schedules do not."""
    parts = (
        settings.task,
        settings.model.model_dump(mode="json"),
        settings.dataset.model_dump(mode="json", include=SIZES),
        settings.optimiser.batch_size,
        settings.model_dump(mode="json", include=TASK_GROUPS),
        precision,
    )
    return json.dumps(parts, sort_keys=True)
