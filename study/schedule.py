"""Which trial runs next: a tree of trials, released when their parent is done, longest remaining path first.

Pure bookkeeping without threads or clocks; the in-process executor, the Ray Tune searcher and a simulator use it alike.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from study.chains import Chain
from study.plan import Plan
from study.spec import Study
from trainables.requests import CacheRequest, TrialRequest, Watch

Status = Literal["waiting", "running", "done", "skipped", "failed"]


@dataclass(eq=False)
class Node:
    """A trial: a maximal chain of epochs without a branch among the pending cells.

    Attributes:
        chains: pending cells at or below it.
        path: training units from its start to the end of its longest branch.
        pruned: its trajectory was ended after it, at a rung of a search.
    """

    request: TrialRequest
    parent: Node | None
    chains: tuple[Chain, ...]
    units: int
    path: int = 0
    children: list[Node] = field(default_factory=list)
    status: Status = "waiting"
    pruned: bool = False
    error: str | None = None

    @property
    def name(self) -> str:
        """Shown in dashboards and messages."""
        return self.request.name


class Schedule:
    """Trials of the pending cells of a plan."""

    def __init__(
        self,
        plan: Plan,
        pending: Sequence[Chain],
        has_result: Callable[[Chain], bool],
        has_state: Callable[[str], bool],
    ) -> None:
        """Build the tree; trials whose final state is there and that no observer watches yet are done already."""
        self.nodes = _nodes(plan, pending)
        self._plan = plan
        self._has_result = has_result
        self._has_state = has_state
        for node in self.nodes:
            head_epochs = node.request.settings.strategy.head_epochs
            if node.request.last <= head_epochs and has_state(node.request.keys[-1]) and node.children:
                node.status = "skipped"

    @property
    def study(self) -> Study:
        """Whose trials these are."""
        return self._plan.study

    def next(self) -> Node | None:
        """The ready trial with the longest remaining path, now running; None if none is ready."""
        ready = [n for n in self.nodes if n.status == "waiting" and _released(n)]
        if not ready:
            return None
        node = max(ready, key=lambda n: n.path)  # max keeps the first of equals: table order
        node.status = "running"
        return node

    def done(self, node: Node) -> None:
        """A trial has ended well; descendants whose cells all have results by now are not needed."""
        node.status = "done"
        for child in node.children:
            self._skip_if_resolved(child)

    def failed(self, node: Node, error: str) -> tuple[Chain, ...]:
        """A trial cannot be finished; its pending cells fail with it, siblings go on."""
        lost = tuple(chain for chain in node.chains if not self._has_result(chain))
        for descendant in _below(node):
            descendant.status, descendant.error = "failed", error
        return lost

    def again(self, node: Node) -> None:
        """A trial whose worker died waits for another one."""
        node.status = "waiting"

    @property
    def pending_units(self) -> int:
        """Training units of the trials that have not run yet, and of the caches that they read."""
        units: dict[str, int] = {}
        for node in self.nodes:
            if node.status == "waiting":
                first, last = self._starts(node), node.request.last
                epochs = self._plan.epoch_units(node.chains[0])[first:last]
                units |= zip(node.request.keys[first:], epochs, strict=True)
        caches = sum(c.build_units for c in self._plan.caches if not units.keys().isdisjoint(c.users))
        return sum(units.values()) + caches

    @property
    def total_units(self) -> int:
        """Training units of all trials that have to run."""
        return sum(node.units for node in self.nodes if node.status != "skipped")

    @property
    def finished(self) -> bool:
        """No trial waits or runs."""
        return all(n.status not in ("waiting", "running") for n in self.nodes)

    def count(self, *statuses: Status) -> int:
        """Number of trials in any of the statuses."""
        return sum(n.status in statuses for n in self.nodes)

    def _starts(self, node: Node) -> int:
        """Epochs that a trial need not train: those before it, and a stored head stage, which serves any observer."""
        request = node.request
        head_epochs = request.settings.strategy.head_epochs
        stored = request.last >= head_epochs and self._has_state(request.keys[head_epochs - 1])
        return max(request.first, head_epochs if stored else 0)

    def _skip_if_resolved(self, node: Node) -> None:
        if all(self._has_result(chain) for chain in node.chains):
            node.status = "skipped"
            for child in node.children:
                self._skip_if_resolved(child)


def pending_schedule(plan: Plan, folder: Path) -> Schedule:
    """What a launch over a storage folder would run; nothing is written, and the folder need not exist."""
    from study.store import result_folder, state_folder

    def has_result(chain: Chain) -> bool:
        return result_folder(folder, chain.leaf, chain.observer.name).is_dir()

    pending = [chain for chain in plan.chains if not has_result(chain)]
    return Schedule(plan, pending, has_result, lambda key: state_folder(folder, key).is_dir())


def _released(node: Node) -> bool:
    return node.parent is None or node.parent.status in ("done", "skipped")


def _below(node: Node) -> Iterable[Node]:
    yield node
    for child in node.children:
        yield from _below(child)


def _nodes(plan: Plan, pending: Sequence[Chain]) -> list[Node]:
    """Trials in table order, parents before children."""
    followers: dict[str, set[str]] = defaultdict(set)
    through: dict[str, list[Chain]] = defaultdict(list)
    for chain in pending:
        for before, key in zip(("", *chain.keys), chain.keys, strict=False):
            followers[before].add(key)
            through[key].append(chain)
    nodes: dict[str, Node] = {}
    for chain in pending:
        parent, first = None, 0
        for epoch, key in enumerate(chain.keys, start=1):
            if len(followers.get(key, ())) == 1 and epoch < len(chain.keys):
                continue
            if key not in nodes:
                nodes[key] = make_node(plan, chain, through[key], parent, first, epoch)
            parent, first = nodes[key], epoch
    for node in reversed(nodes.values()):
        node.path = node.units + max((child.path for child in node.children), default=0)
    return list(nodes.values())


def make_node(plan: Plan, chain: Chain, users: Sequence[Chain], parent: Node | None, first: int, last: int) -> Node:
    """A trial of epochs `first` + 1 to `last` of a chain, for the cells `users`; its parent gets it as a child."""
    keys = chain.keys[:last]
    request = TrialRequest(
        name=_name(plan, chain, users, first, last),
        settings=chain.cell.settings,
        seed=chain.cell.seed,
        keys=keys,
        first=first,
        watches=_watches(users),
        keep=frozenset(key for i, key in enumerate(keys, 1) if _kept(plan, chain, key, i)),
        cache=CacheRequest(
            identity=chain.cache_identity,
            positions=plan.cache_positions(chain.cache_identity),
            dtype=plan.study.execution.cache_dtype,
            when="always" if plan.study.execution.token_cache == "always" else "auto",
        ),
        compute=plan.compute,
        mixed=plan.study.execution.allow_mixed,
    )
    node = Node(request, parent, tuple(users), sum(plan.epoch_units(chain)[first:last]))
    if parent is not None:
        parent.children.append(node)
    return node


def _kept(plan: Plan, chain: Chain, key: str, epochs: int) -> bool:
    """States others may start from: branches of the tree, and the end of the head stage, where observers begin."""
    return len(plan.children.get(key, ())) > 1 or epochs == chain.cell.settings.strategy.head_epochs


def _watches(users: Sequence[Chain]) -> tuple[Watch, ...]:
    leaves: dict[object, list[str]] = defaultdict(list)
    for chain in users:
        if chain.leaf not in leaves[chain.observer]:
            leaves[chain.observer].append(chain.leaf)
    return tuple(Watch(observer, tuple(keys)) for observer, keys in leaves.items())  # type: ignore[arg-type]


def _name(plan: Plan, chain: Chain, users: Sequence[Chain], first: int, last: int) -> str:
    rows = list(dict.fromkeys(c.cell.row.name for c in users))
    rest = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
    cell = chain.cell
    return f"{plan.study.name}: {rows[0]}{rest} · {cell.dataset} · seed {cell.seed} · epochs {first + 1}–{last}"
