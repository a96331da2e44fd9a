"""What Ray Tune is told, and when: the searcher without a cluster, its nodes listed as Ray lists them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from small_studies import document, planned

from study.cluster.gpu_shares import GpuShares
from study.cluster.ray_environment import prepare_environment
from study.executors import Attempts
from study.plan import Plan
from study.schedule import Node, Schedule
from study.store import Store
from trainables.requests import Compute

if TYPE_CHECKING:
    from study.cluster.ray_cluster import Room
    from study.ray_executor import StageSearcher

GB = 1_000_000_000
HEAD = {"name": "head", "set": {"strategy.unfreezing": "none"}}
TO_4 = {"name": "K = 4", "set": {"strategy.depth": 4}}
TO_10 = {"name": "K = 10", "set": {"strategy.depth": 10}}
CUDA = Compute("cuda", 1, "bf16")


@pytest.fixture(autouse=True)
def environment(tmp_path: Path) -> None:
    """Ray reads its environment when it is imported."""
    prepare_environment(tmp_path, local=True)


class Heard:
    """A listener that writes down what it hears."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Node, str]] = []

    def started(self, node: Node) -> None:
        self.events.append(("started", node, ""))

    def epoch(self, node: Node, record: Any) -> None:
        self.events.append(("epoch", node, ""))

    def finished(self, node: Node) -> None:
        self.events.append(("finished", node, ""))

    def retried(self, node: Node, reason: str) -> None:
        self.events.append(("retried", node, reason))

    def failed(self, node: Node, error: str) -> None:
        self.events.append(("failed", node, error))


class Driven:
    """A searcher, and the trials that were given out, as Tune would drive it."""

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        nodes: Sequence[dict[str, Any]],
        gpus: Any = None,
        autoscale_to: int | None = None,
    ) -> None:
        from study.ray_executor import StageSearcher

        self.heard = Heard()
        self.schedule = Schedule(plan, plan.chains, lambda chain: False, lambda key: False)
        self.shares = GpuShares(gpus, CUDA if gpus is not None else plan.compute)
        self.searcher: StageSearcher = StageSearcher(
            self.schedule,
            Store(folder / "storage"),
            self.heard,
            1,
            self.shares,
            room_of(nodes, autoscale_to),
            Attempts(self.schedule, self.heard, max_failures=0),
        )
        self.given: dict[str, dict[str, Any]] = {}
        self._count = 0

    def ask(self) -> str | None:
        """Ask for a trial: its id, or None."""
        trial = f"trial {self._count}"
        told = self.searcher.suggest(trial)
        if told is None or told == "FINISHED":
            return told
        assert isinstance(told, dict)
        self._count += 1
        self.given[trial] = told
        return trial

    def ask_all(self) -> list[str]:
        """Ask until nothing more is given out; workers start at once."""
        trials = []
        while (trial := self.ask()) is not None and trial != "FINISHED":
            self.searcher.begun(trial)
            trials.append(trial)
        return trials

    def node(self, trial: str) -> Node:
        return self.searcher.at(trial)[0]

    def end(self, trial: str, place: str = "10.0.0.1", **more: Any) -> Node:
        """The trial's last result."""
        node = self.node(trial)
        result = {"epoch": node.request.last, "done": True, "record": None, "node_ip": place, **more}
        self.searcher.on_trial_complete(trial, result)
        return node


class TuneTrials:
    """As much of Tune's controller as its schedulers ask: trials by status."""

    def __init__(self, statuses: Sequence[str]) -> None:
        self.trials = [SimpleNamespace(status=status) for status in statuses]

    def get_trials(self) -> list[SimpleNamespace]:
        return self.trials


def machine(address: str = "10.0.0.1", cpus: float = 8, gpus: float = 0, alive: bool = True) -> dict[str, Any]:
    """A node as `ray.nodes()` lists it."""
    resources = {"CPU": cpus} | ({"GPU": gpus} if gpus else {})
    return {"NodeID": address, "Alive": alive, "NodeManagerAddress": address, "Resources": resources}


def room_of(nodes: Sequence[dict[str, Any]], autoscale_to: int | None = None) -> Room:
    """Room on nodes that are listed here."""
    from study.cluster.ray_cluster import Room

    class Listed(Room):
        def look(self) -> None:
            self._nodes = list(nodes)
            self._looked = 0.0

    room = Listed(autoscale_to)
    room.look()
    return room


# -------------------------------------------------------------------------------------------------------------- room


@pytest.mark.parametrize(
    ("nodes", "asked", "slots"),
    [
        ([machine(cpus=8)], {"CPU": 1.0}, 8),
        ([machine(cpus=8), machine(cpus=3)], {"CPU": 2.0}, 5),
        ([machine(cpus=8), machine(cpus=8, alive=False)], {"CPU": 2.0}, 4),
        ([machine(cpus=0.3)], {"CPU": 0.1}, 3),
        ([machine(cpus=64, gpus=8)], {"CPU": 1.0, "GPU": 1.0}, 8),
        ([machine(cpus=64, gpus=8)], {"CPU": 1.0, "GPU": 0.3333}, 24),
        ([machine(cpus=4, gpus=8)], {"CPU": 1.0, "GPU": 0.5}, 4),
        ([machine(cpus=64, gpus=2)], {"CPU": 1.0, "GPU": 0.6}, 2),  # not three: a part is of one card
        ([machine(cpus=64, gpus=5)], {"CPU": 1.0, "GPU": 2.0}, 2),
        ([machine(cpus=64)], {"CPU": 1.0, "GPU": 1.0}, 1),  # one waits for a node
        ([], {"CPU": 1.0}, 1),
    ],
)
def test_how_many_trials_are_given_out(nodes: list[dict[str, Any]], asked: dict[str, float], slots: int) -> None:
    room = room_of(nodes)
    assert room.slots(asked) == slots
    assert room.takes_another([asked] * (slots - 1))
    assert not room.takes_another([asked] * slots)


def test_trials_of_different_sizes_take_their_shares_of_the_cluster() -> None:
    room = room_of([machine(cpus=64, gpus=2)])
    whole, quarter = {"CPU": 1.0, "GPU": 1.0}, {"CPU": 1.0, "GPU": 0.25}
    assert room.takes_another([whole, quarter, quarter, quarter])
    assert not room.takes_another([whole, quarter, quarter, quarter, quarter])


def test_an_autoscaler_is_asked_for_as_much_as_is_declared() -> None:
    """Two nodes are there, it may bring six: more than fits is given out, and waits in Ray, where it is seen."""
    room = room_of([machine(cpus=2, gpus=1)], autoscale_to=6)
    assert room.slots({"CPU": 1.0, "GPU": 1.0}) == 6
    assert room.slots({"CPU": 1.0, "GPU": 0.5}) == 12
    assert room_of([machine(cpus=20)], autoscale_to=6).slots({"CPU": 1.0}) == 20
    undeclared = room_of([machine(cpus=2, gpus=1)])
    assert undeclared.slots({"CPU": 1.0, "GPU": 0.25}) == 2, "two CPUs hold two"


def test_what_waits_for_a_node_goes_before_what_is_new(tmp_path: Path) -> None:
    """Of four trials two fit: a worker that is free takes one that waits. On full nodes it takes the new one."""
    from study.ray_executor import _Turns

    plan = planned(tmp_path, document([TO_4, TO_10], seeds=[0, 1, 2, 3]))
    scaled = Driven(tmp_path, plan, [machine(cpus=2)], autoscale_to=4)
    for _ in range(4):
        assert scaled.ask() is not None
    tune = TuneTrials(["TERMINATED", "PENDING", "PENDING"])
    assert scaled.searcher.waits_for_nodes
    assert _Turns(scaled.searcher).choose_trial_to_run(tune) is tune.trials[1]
    full = Driven(tmp_path, plan, [machine(cpus=2)])
    for _ in range(2):
        assert full.ask() is not None
    assert full.ask() is None
    assert _Turns(full.searcher).choose_trial_to_run(tune) is None


# -------------------------------------------------------------------------------------------------- what is given out


def test_a_trial_is_chosen_when_there_is_room_for_it_and_not_before(tmp_path: Path) -> None:
    """K = 10 becomes ready after the head rows were, and still goes before them: nothing was promised too early."""
    driven = Driven(tmp_path, planned(tmp_path, document([HEAD, TO_10])), [machine(cpus=2)])
    heads = driven.ask_all()
    assert [driven.node(trial).parent for trial in heads] == [None, None]
    assert driven.ask() is None
    driven.end(heads[0])
    (child,) = driven.ask_all()
    assert driven.node(child).chains[0].cell.row.name == "K = 10"
    driven.end(heads[1])
    (other,) = driven.ask_all()
    assert driven.node(other).chains[0].cell.row.name == "K = 10"
    assert [event for event, *_ in driven.heard.events] == ["started"] * 2 + ["finished", "started"] * 2


def test_it_is_finished_when_the_last_trial_has_ended(tmp_path: Path) -> None:
    driven = Driven(tmp_path, planned(tmp_path, document([TO_10], seeds=[0])), [machine(cpus=2)])
    (only,) = driven.ask_all()
    assert driven.ask() is None
    driven.end(only)
    assert driven.ask() == "FINISHED"


def test_nodes_that_come_are_used_and_those_that_go_are_not(tmp_path: Path) -> None:
    nodes = [machine("a", cpus=1)]
    driven = Driven(tmp_path, planned(tmp_path, document([TO_4, TO_10], seeds=[0, 1, 2])), nodes)
    assert len(driven.ask_all()) == 1
    nodes.append(machine("b", cpus=2))
    assert len(driven.ask_all()) == 2  # looked at again, since the last look was long ago
    first = next(iter(driven.given))
    nodes.pop(0)
    from study.cluster.worker_faults import Fault

    driven.searcher.lost(first, Fault("its node died", again=True))
    assert driven.ask() is None, "the two that are left have their trials"


def test_a_worker_that_is_free_goes_on_with_what_its_node_trained(tmp_path: Path) -> None:
    """Seeds 0 and 1 are equal after their head stages; the node of seed 1 is free and gets seed 1."""
    nodes = [machine("10.0.0.1", cpus=1), machine("10.0.0.2", cpus=1)]
    driven = Driven(tmp_path, planned(tmp_path, document([TO_4, TO_10], seeds=[0, 1, 2])), nodes)
    first, second = driven.ask_all()
    driven.end(first, "10.0.0.1")
    (third,) = driven.ask_all()
    assert driven.node(third).parent is None, "a whole path is longer than one that has begun"
    head = driven.end(second, "10.0.0.2")
    (child,) = driven.ask_all()
    assert driven.node(child).parent is head


def test_on_one_node_trials_go_in_the_order_of_every_executor(tmp_path: Path) -> None:
    driven = Driven(tmp_path, planned(tmp_path, document([TO_4, TO_10], seeds=[0, 1, 2])), [machine(cpus=2)])
    first, second = driven.ask_all()
    head = driven.end(first)
    driven.ask_all()
    driven.end(second)
    (child,) = driven.ask_all()
    assert driven.node(child).parent is head


# --------------------------------------------------------------------------------------------------- parts of a GPU


def test_a_whole_gpu_then_the_part_that_fits(tmp_path: Path) -> None:
    plan = planned(tmp_path, document([TO_10], seeds=[0, 1, 2, 3, 4, 5]))
    driven = Driven(tmp_path, plan, [machine(cpus=64, gpus=2)], gpus="auto")
    whole = driven.ask_all()
    assert [driven.given[t]["resources"] for t in whole] == [{"CPU": 1.0, "GPU": 1.0}] * 2
    driven.end(whole[0], gpu_peak=9 * GB, gpu_card=24 * GB)
    halves = driven.ask_all()
    assert [driven.given[t]["resources"]["GPU"] for t in halves] == [0.5, 0.5]
    assert [_request(driven.given[t]).gpu_share for t in (*whole, *halves)] == [1.0, 1.0, 0.5, 0.5]


def test_memory_that_is_refused_on_a_part_is_tried_once_on_a_whole_gpu_and_said(tmp_path: Path) -> None:
    driven = Driven(tmp_path, planned(tmp_path, document([TO_10], seeds=[0])), [machine(cpus=8, gpus=1)], gpus=0.5)
    (half,) = driven.ask_all()
    driven.end(half, failure="out of memory in epoch 3", refused=True)
    assert driven.heard.events[-1][0] == "retried"
    assert driven.heard.events[-1][2] == "on a part of a GPU out of memory in epoch 3; it is given a whole one"
    (whole,) = driven.ask_all()
    assert driven.given[whole]["resources"]["GPU"] == 1.0
    driven.end(whole, failure="out of memory in epoch 3", refused=True)
    assert driven.heard.events[-1][0] == "failed"
    assert driven.ask() == "FINISHED"


def test_another_failure_on_a_part_is_not_tried_again(tmp_path: Path) -> None:
    driven = Driven(tmp_path, planned(tmp_path, document([TO_10], seeds=[0])), [machine(cpus=8, gpus=1)], gpus=0.5)
    (half,) = driven.ask_all()
    driven.end(half, failure="the loss is not finite", refused=False)
    assert driven.heard.events[-1][0] == "failed"


def test_small_trials_do_not_keep_a_large_one_waiting(tmp_path: Path) -> None:
    """A trial that was refused memory waits for a whole card: until it has one, no further halves are given out."""
    plan = planned(tmp_path, document([TO_10, {"name": "large", "set": {"optimiser.batch_size": 64}}], seeds=[0, 1, 2]))
    driven = Driven(tmp_path, plan, [machine(cpus=64, gpus=2)], gpus=0.5)
    first, *others = driven.ask_all()
    assert len(others) == 3
    driven.end(first, failure="out of memory", refused=True)
    large = driven.ask()
    assert large is not None and driven.given[large]["resources"]["GPU"] == 1.0
    driven.end(others[0])
    driven.end(others[1])
    assert driven.ask() is None, "there is room by the count, but it may be half of each card"
    driven.searcher.begun(large)
    assert driven.ask() is not None


def _request(told: dict[str, Any]) -> Any:
    from ray import cloudpickle

    return cloudpickle.loads(told["request"].data)
