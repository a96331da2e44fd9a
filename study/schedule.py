"""Which trial runs next: a tree of trials, released when their parent is done, longest remaining path first.

Pure bookkeeping without threads or clocks; the in-process executor, the Ray Tune searcher and a simulator use it alike.
Giving out a trial and hearing of its end take the logarithm of the number of ready trials.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from study.chains import Chain
from study.plan import Plan, uncollected
from study.spec import Study
from trainables.requests import CacheRequest, TrialRequest, Watch

if TYPE_CHECKING:
    from study.storage.places import Address

Status = Literal["waiting", "running", "done", "skipped", "failed"]

# Where a place is known: how much shorter than the longest remaining path a trial's may be that is preferred for what
# lies there already, and how many of them are looked at.
NEARLY, LOOKED_AT = 0.05, 16


@dataclass(eq=False)
class Node:
    """A trial: a maximal chain of epochs without a branch among the pending cells.

    Attributes:
        chains: pending cells at or below it.
        first, last: epochs completed before and after it.
        path: training units from its start to the end of its longest branch.
        pruned: its trajectory was ended after it, at a rung of a search.
        place: where it was trained last, if that is known.
    """

    plan: Plan = field(repr=False)
    parent: Node | None
    chains: tuple[Chain, ...]
    first: int
    last: int
    units: int
    path: int = 0
    children: list[Node] = field(default_factory=list)
    status: Status = "waiting"
    pruned: bool = False
    error: str | None = None
    place: str | None = None

    def __post_init__(self) -> None:
        self._users = self.chains  # cells that are added later find what it leaves, and ask nothing more of it

    @cached_property
    def request(self) -> TrialRequest:
        """What its worker is asked for; made when it is needed, which a plan of thousands of trials never does."""
        return _request(self.plan, self._users, self.first, self.last)

    @property
    def keys(self) -> tuple[str, ...]:
        """Of the states after each epoch up to its end."""
        return self._users[0].keys[: self.last]

    @property
    def head_epochs(self) -> int:
        """Length of the head stage of its trajectory."""
        return self._users[0].cell.settings.strategy.head_epochs

    @property
    def name(self) -> str:
        """Shown in dashboards and messages."""
        return self.request.name


class Schedule:
    """Trials of the pending cells of a plan.

    Attributes:
        plan: as it was last known.
        has_result, has_state: whether a cell's result is stored, and the state of a key.
    """

    def __init__(
        self,
        plan: Plan,
        pending: Sequence[Chain],
        has_result: Callable[[Chain], bool],
        has_state: Callable[[str], bool],
    ) -> None:
        """Build the tree; trials whose final state is there and that no observer watches yet are done already."""
        self.nodes: list[Node] = []
        self.plan = plan
        self.has_result = has_result
        self.has_state = has_state
        self._counts: Counter[Status] = Counter()
        self._order: dict[Node, int] = {}  # of the table
        self._ready: list[tuple[float, int, int, Node]] = []  # a heap; see `_offer`
        self._offers = itertools.count()
        self._offered: dict[Node, int] = {}  # a trial's last offer: those before it count no more
        self._lies_at: dict[str, set[str]] = defaultdict(set)  # place → identities of caches that were read there
        nodes = _nodes(plan, pending)
        for node in nodes:
            if node.last <= node.head_epochs and node.children and has_state(node.keys[-1]):
                node.status = "skipped"
        self._enter(nodes)

    @property
    def parts(self) -> Sequence[Schedule]:
        """The schedule of each study whose trials these are."""
        return (self,)

    @property
    def studies(self) -> Sequence[Study]:
        """Whose trials these are."""
        return [part.plan.study for part in self.parts]

    def next(self, place: str | None = None) -> Node | None:
        """The ready trial with the longest remaining path, now running; None if none is ready.

        Args:
            place: node of the cluster that the trial will run on, if it is known: among trials that are nearly as
                long, one whose parent was trained there goes first, then one whose caches lie there.
        """
        node = self._longest() if place is None else self._at_home(place)
        if node is not None:
            self._mark(node, "running")
        return node

    def placed(self, node: Node, place: str) -> None:
        """A trial runs on a node of the cluster: what it reads lies there from now on."""
        node.place = place
        self._lies_at[place].add(node.request.cache.identity)

    def done(self, node: Node) -> None:
        """A trial has ended well; descendants whose cells all have results by now are not needed."""
        self._mark(node, "done")
        for child in node.children:
            self._skip_if_resolved(child)
            self._offer(child)

    def failed(self, node: Node, error: str) -> tuple[Chain, ...]:
        """A trial cannot be finished; its pending cells fail with it, siblings go on."""
        lost = tuple(chain for chain in node.chains if not self.has_result(chain))
        for descendant in _below(node):
            self._mark(descendant, "failed")
            descendant.error = error
        return lost

    def again(self, node: Node) -> None:
        """A trial whose worker died waits for another one."""
        self._mark(node, "waiting")
        self._offer(node)

    @property
    def pending_units(self) -> int:
        """Training units of the trials that have not run yet, and of the caches that they read."""
        units: dict[str, int] = {}
        for node in self.nodes:
            if node.status == "waiting":
                first, last = self._starts(node), node.last
                epochs = self.plan.epoch_units(node.chains[0])[first:last]
                units |= zip(node.keys[first:], epochs, strict=True)
        caches = sum(c.build_units for c in self.plan.caches if not units.keys().isdisjoint(c.users))
        return sum(units.values()) + caches

    @property
    def total_units(self) -> int:
        """Training units of all trials that have to run."""
        return sum(node.units for node in self.nodes if node.status != "skipped")

    @property
    def finished(self) -> bool:
        """No trial waits or runs."""
        return self.count("waiting", "running") == 0

    def count(self, *statuses: Status) -> int:
        """Number of trials in any of the statuses."""
        return sum(self._counts[status] for status in statuses)

    def recount(self, before: Status, after: Status) -> None:
        """A trial has gone from one status to another."""
        self._counts[before] -= 1
        self._counts[after] += 1

    def rank(self, node: Node) -> float:
        """Of ready trials the one with the highest goes first: the longest remaining path, in training units."""
        return node.path

    # -- small parts --------------------------------------------------------------------------------------------------

    def _enter(self, nodes: Sequence[Node]) -> None:
        """Take trials into the schedule, in table order, after those that it has."""
        for node in nodes:
            self._order[node] = len(self.nodes)
            self.nodes.append(node)
            self._counts[node.status] += 1
        for node in nodes:
            self._offer(node)

    def _mark(self, node: Node, status: Status) -> None:
        self.recount(node.status, status)
        node.status = status

    def _offer(self, node: Node) -> None:
        """Let a trial that is ready be given out, at its present rank; equals go in table order."""
        if _is_ready(node):
            self._offered[node] = offer = next(self._offers)
            heapq.heappush(self._ready, (-self.rank(node), self._order[node], offer, node))

    def _longest(self) -> Node | None:
        while self._ready:
            _, _, offer, node = heapq.heappop(self._ready)
            if self._offered[node] == offer and _is_ready(node):
                return node
        return None

    def _at_home(self, place: str) -> Node | None:
        """Of the trials that are nearly as long as the longest one the one that finds most at a place."""
        looked_at: list[Node] = []
        while len(looked_at) < LOOKED_AT and (node := self._longest()) is not None:
            looked_at.append(node)
            if self.rank(node) < (1 - NEARLY) * self.rank(looked_at[0]) or self._finds(node, place) == 2:
                break
        near = [node for node in looked_at if self.rank(node) >= (1 - NEARLY) * self.rank(looked_at[0])]
        chosen = max(near, key=lambda node: self._finds(node, place), default=None)  # max keeps the first of equals
        for node in looked_at:
            if node is not chosen:
                self._offer(node)
        return chosen

    def _finds(self, node: Node, place: str) -> int:
        """2 where a trial's parent was trained at a place, 1 where its caches lie there, else 0."""
        if node.parent is not None and node.parent.place == place:
            return 2
        return int(node.request.cache.identity in self._lies_at[place])

    def _starts(self, node: Node) -> int:
        """Epochs that a trial need not train: those before it, and a stored head stage, which serves any observer."""
        head_epochs = node.head_epochs
        stored = node.last >= head_epochs and self.has_state(node.keys[head_epochs - 1])
        return max(node.first, head_epochs if stored else 0)

    def _skip_if_resolved(self, node: Node) -> None:
        if all(self.has_result(chain) for chain in node.chains):
            self._mark(node, "skipped")
            for child in node.children:
                self._skip_if_resolved(child)


@uncollected()
def pending_schedule(plan: Plan, storage: Address | Path) -> Schedule:
    """What a launch over a storage would run; nothing is written, and a folder need not exist."""
    from study.store import kept_in, result_name, state_name

    kept = kept_in(storage)

    def has_result(chain: Chain) -> bool:
        return kept(result_name(chain.leaf, chain.observer.name))

    pending = [chain for chain in plan.chains if not has_result(chain)]
    return Schedule(plan, pending, has_result, lambda key: kept(state_name(key)))


def _is_ready(node: Node) -> bool:
    return node.status == "waiting" and (node.parent is None or node.parent.status in ("done", "skipped"))


def _below(node: Node) -> Iterable[Node]:
    yield node
    for child in node.children:
        yield from _below(child)


def _nodes(plan: Plan, pending: Sequence[Chain]) -> list[Node]:
    """Trials in table order, parents before children."""
    through: dict[str, list[Chain]] = defaultdict(list)
    for chain in pending:
        for key in chain.keys:
            through[key].append(chain)
    nodes: dict[str, Node] = {}
    for chain in pending:
        parent, first = None, 0
        users = [through[key] for key in chain.keys]
        for epoch, (key, here) in enumerate(zip(chain.keys, users, strict=True), start=1):
            if epoch < len(users) and (len(here) == len(users[epoch]) or _go_on_alike(here, epoch)):
                continue
            if key not in nodes:
                nodes[key] = make_node(plan, here, parent, first, epoch)
            parent, first = nodes[key], epoch
    for node in reversed(nodes.values()):
        node.path = node.units + max((child.path for child in node.children), default=0)
    return list(nodes.values())


def _go_on_alike(chains: Sequence[Chain], epoch: int) -> bool:
    """Whether those that go on after an epoch have the next one in common."""
    return len({chain.keys[epoch] for chain in chains if len(chain.keys) > epoch}) == 1


def make_node(plan: Plan, users: Sequence[Chain], parent: Node | None, first: int, last: int) -> Node:
    """A trial of epochs `first` + 1 to `last`, for cells whose keys are equal up to there; its parent gets a child."""
    chain = users[0]
    node = Node(plan, parent, tuple(users), first, last, sum(plan.epoch_units(chain)[first:last]))
    if parent is not None:
        parent.children.append(node)
    return node


def _request(plan: Plan, users: Sequence[Chain], first: int, last: int) -> TrialRequest:
    chain = users[0]
    keys = chain.keys[:last]
    return TrialRequest(
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
        index=chain.material.index.digest(),
    )


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
