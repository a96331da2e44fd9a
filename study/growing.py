"""A schedule that grows: when a slot is free and no trial is ready, it asks for another trajectory.

Executors run it as they run any schedule. A trajectory is cut into trials at the end of its head stage, which
trajectories share, and at its rungs, where it may be pruned: then the rest of its trials are never released.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from study.chains import Chain
from study.plan import Plan
from study.schedule import Node, Schedule, make_node

Rungs = Callable[[Chain], Sequence[int]]


class GrowingSchedule(Schedule):
    """Trials of trajectories that become known while others run."""

    def __init__(
        self,
        plan: Plan,
        *,
        has_result: Callable[[Chain], bool],
        has_state: Callable[[str], bool],
        rungs: Rungs,
        grow: Callable[[], bool],
        goes_on: Callable[[Node], bool],
        left: Callable[[], float],
    ) -> None:
        """Begin without trials.

        Args:
            plan: of the search as it was last known.
            rungs: epochs completed at a chain's rungs, ascending.
            grow: add another trajectory by `add`; False if there will be none any more.
            goes_on: whether a trajectory goes on after a trial that ended at a rung.
            left: share of this launch's trajectories that is still to come, for the estimate of what is left.
        """
        super().__init__(plan, [], has_result, has_state)
        self._rungs = rungs
        self._grow = grow
        self._goes_on = goes_on
        self._left = left
        self._heads: dict[str, Node] = {}
        self._complete = False

    def next(self, place: str | None = None) -> Node | None:
        """The ready trial with the longest remaining path, of a new trajectory if need be."""
        while (node := super().next(place)) is None and not self._complete and self._has_few_waiting():
            self._complete = not self._grow()
        return node

    def done(self, node: Node) -> None:
        """A trial has ended well: at a rung its trajectory may end with it."""
        super().done(node)
        if any(child.status == "waiting" for child in node.children) and not self._goes_on(node):
            node.pruned = True
            for child in node.children:
                self._skip(child)

    @property
    def finished(self) -> bool:
        """No trial waits or runs, and no trajectory is to come."""
        return self._complete and super().finished

    @property
    def total_units(self) -> int:
        """Training units of all trials, those that are to come by the mean of those that are known."""
        known = super().total_units
        share = self._left()
        return known if share >= 1 else round(known / (1 - share))

    def add(self, plan: Plan, chains: Sequence[Chain]) -> None:
        """Add trials for cells that see one trajectory, or one each where nothing is shared."""
        self.plan = plan
        by_leaf: dict[str, list[Chain]] = {}
        for chain in chains:
            by_leaf.setdefault(chain.leaf, []).append(chain)
        for users in by_leaf.values():
            self._add_trajectory(plan, users)

    def _has_few_waiting(self) -> bool:
        """Trajectories that wait for a head stage may not pile up: asked for later, they know more."""
        waiting = [node for node in self.nodes if node.status == "waiting"]
        blocked = sum(node.parent is None or node.parent.status != "waiting" for node in waiting)
        return blocked <= self.count("running")

    def _add_trajectory(self, plan: Plan, users: Sequence[Chain]) -> None:
        chain = users[0]
        parent = self._head(plan, users)
        reached = max((epoch for epoch, key in enumerate(chain.keys, start=1) if self.has_state(key)), default=0)
        first = chain.cell.settings.strategy.head_epochs
        added = []
        for last in [*self._rungs(chain), len(chain.keys)]:
            if last >= reached:  # a state beyond it says that the trajectory went on here
                parent = self._stage(plan, users, parent, first, last)
                added.append(parent)
            first = last
        for node in reversed(added):
            _measure(node)
        self._enter(added)
        if (head := added[0].parent) is not None:
            _measure(head)
            self._offer(head)  # at its new rank

    def _stage(self, plan: Plan, users: Sequence[Chain], parent: Node | None, first: int, last: int) -> Node:
        node = make_node(plan, users, parent, first, last)
        if last < len(users[0].keys):
            node.request = replace(node.request, keep=node.request.keep | {node.request.keys[-1]})
        return node

    def _head(self, plan: Plan, users: Sequence[Chain]) -> Node | None:
        """The trial of the head stage, which may serve others already; None where its state is stored."""
        chain = users[0]
        epochs = chain.cell.settings.strategy.head_epochs
        key = chain.keys[epochs - 1]
        if self.has_state(key):
            return None
        node = self._heads.get(key)
        if node is None or node.status == "failed":
            node = make_node(plan, users, None, 0, epochs)
            self._heads[key] = node
            self._enter([node])
        else:
            node.chains += tuple(users)
        return node

    def _skip(self, node: Node) -> None:
        if node.status == "waiting":
            self._mark(node, "skipped")
        for child in node.children:
            self._skip(child)


def _measure(node: Node) -> None:
    node.path = node.units + max((child.path for child in node.children), default=0)
