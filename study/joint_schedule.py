"""The trials of several studies as one schedule: no slot waits for the end of one study while another has work.

Executors run it as they run any schedule; what happens to a trial is told to the session of its own study.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from study.chains import Chain
from study.plan import Plan
from study.schedule import Node, Schedule, Status

if TYPE_CHECKING:
    from study.executors import Listener
    from trainables.results import EpochRecord


class JointSchedule(Schedule):
    """Trials of studies that have no epoch in common, whichever is longest first."""

    def __init__(self, parts: Sequence[Schedule]) -> None:
        """Take over all trials of schedules over one storage; from now on they are given out here alone."""
        first = parts[0]
        super().__init__(first.plan, (), self._any_has_result, first.has_state)
        self._parts = tuple(parts)
        self._home = {node: part for part in parts for node in part.nodes}
        self._enter(list(self._home))

    @property
    def parts(self) -> Sequence[Schedule]:
        """The schedule of each study."""
        return self._parts

    @property
    def pending_units(self) -> int:
        """Of all studies, see `Schedule`."""
        return sum(part.pending_units for part in self._parts)

    def _any_has_result(self, chain: Chain) -> bool:
        return any(part.has_result(chain) for part in self._parts)

    def _mark(self, node: Node, status: Status) -> None:
        self._home[node].recount(node.status, status)
        super()._mark(node, status)


class JointListener:
    """Tells each study what happens to its own trials."""

    def __init__(self, listeners: Mapping[str, Listener]) -> None:
        """Listeners by the names of their studies."""
        self._of = listeners

    def started(self, node: Node) -> None:
        """See `study.executors.Listener`."""
        self._at(node).started(node)

    def epoch(self, node: Node, record: EpochRecord) -> None:
        """See `study.executors.Listener`."""
        self._at(node).epoch(node, record)

    def finished(self, node: Node) -> None:
        """See `study.executors.Listener`."""
        self._at(node).finished(node)

    def retried(self, node: Node, reason: str) -> None:
        """See `study.executors.Listener`."""
        self._at(node).retried(node, reason)

    def failed(self, node: Node, error: str) -> None:
        """See `study.executors.Listener`."""
        self._at(node).failed(node, error)

    def _at(self, node: Node) -> Listener:
        return self._of[node.plan.study.name]


def lots_of(plans: Sequence[Plan]) -> list[list[Plan]]:
    """Neighbouring studies whose trials may run beside each other.

    They are alike in what a trial is given, and have no epoch in common: each of two studies would train it.
    """
    lots: list[list[Plan]] = []
    taken: set[str] = set()
    for plan in plans:
        keys = {key for chain in plan.chains for key in chain.keys}
        if lots and _given(lots[-1][0]) == _given(plan) and taken.isdisjoint(keys):
            lots[-1].append(plan)
            taken |= keys
        else:
            lots.append([plan])
            taken = keys
    return lots


def _given(plan: Plan) -> tuple[object, ...]:
    execution = plan.study.execution
    return plan.compute, execution.cpus, execution.gpus, execution.autoscale_to, execution.max_failures
