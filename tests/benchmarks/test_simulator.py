"""The simulator keeps time as a hand would, and the policy that executors run keeps its promise in it."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from study.plan import Plan
from study.schedule import Node, Schedule
from tests.benchmarks.measuring import Effort
from tests.benchmarks.registry import MEASUREMENTS
from tests.benchmarks.simulator import (
    MOST_OVER_BOUND,
    POLICIES,
    Cluster,
    FirstReleased,
    Shuffled,
    big_plan,
    busy_over_time,
    cluster_for,
    run_policy,
    schedule_of,
    simulate,
)
from tests.studies_for_tests import TINY, planned


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="module")
def thousand(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return big_plan(tmp_path_factory.mktemp("storage"))


@pytest.fixture
def small(tmp_path: Path) -> Plan:
    """Two seeds, each a head stage and three branches after it: without unfreezing, with it, and with class weights."""
    return planned(tmp_path, dict(TINY))


def seconds_of(nodes: list[Node], head: float, child: float) -> dict[Node, float]:
    return {node: head if node.parent is None else child for node in nodes}


def given_out(schedule: Schedule) -> list[Node]:
    """Trials in the order in which one slot would run them."""
    order = []
    while (node := schedule.next()) is not None:
        order.append(node)
        schedule.done(node)
    return order


def test_a_tree_takes_the_time_that_it_takes_by_hand(small: Plan) -> None:
    """Heads of 1 h, three children of 2 h each, two of each: 1 + 3 × 2 on two GPUs, and 1 + 2 on six."""
    for gpus, makespan, bound in ((1, 14.0, 14.0), (2, 7.0, 7.0), (6, 3.0, 3.0)):
        schedule = schedule_of(small)
        assert len(schedule.nodes) == 8
        cluster = Cluster(gpus, seconds_of(schedule.nodes, 1.0, 2.0), {})
        timeline = simulate(schedule, cluster, rng())
        assert (timeline.makespan, timeline.bound) == (makespan, bound)
        assert timeline.busy() == pytest.approx(14.0 / (gpus * makespan))
        assert len(timeline.runs) == 8


def test_caches_are_built_once_a_machine(small: Plan) -> None:
    """A build takes 10 h. Six trials are ready at a time: nine GPUs are two machines, of which one has all the work."""
    for gpus, builds in ((1, 1), (9, 1)):
        schedule = schedule_of(small)
        identity = schedule.nodes[0].request.cache.identity
        cluster = Cluster(gpus, seconds_of(schedule.nodes, 1.0, 2.0), {identity: 10.0})
        timeline = simulate(schedule, cluster, rng())
        assert timeline.builds == builds
    assert timeline.makespan == timeline.bound == 13.0, "a path of a build, a head and a child"


def test_no_gpu_runs_two_trials_and_no_trial_runs_before_its_parent(thousand: Plan) -> None:
    schedule = schedule_of(thousand)
    cluster = cluster_for(thousand, schedule, 64, np.random.default_rng(1), deaths=0.1)
    timeline = simulate(schedule, cluster, rng())
    assert schedule.count("done") == len(schedule.nodes) < len(timeline.runs), "some were started again"
    for gpu in range(64):
        runs = sorted(run for run in timeline.runs if run.gpu == gpu)
        assert all(a.end <= b.start for a, b in itertools.pairwise(runs))
    _, counts = busy_over_time(timeline)
    assert max(counts) == 64 and counts[-1] == 0 and min(counts) >= 0


def test_what_dies_costs_no_more_than_an_epoch_and_a_start(small: Plan) -> None:
    schedule = schedule_of(small)
    node = schedule.nodes[0]
    cluster = Cluster(1, dict.fromkeys(schedule.nodes, 1000.0), {}, deaths=0.5)
    timeline = simulate(schedule, cluster, rng())
    lost = timeline.makespan - 8000.0
    again = len(timeline.runs) - 8
    assert again > 0
    longest = 1000.0 / min(n.request.last - n.request.first for n in schedule.nodes)
    assert 0 < lost <= again * (longest + 10.0)
    assert node.status == "done"


@pytest.mark.parametrize("seed", [0, 1])
def test_a_thousand_cells_on_64_gpus_end_within_a_tenth_of_the_lower_bound(thousand: Plan, seed: int) -> None:
    assert len(thousand.chains) == 1000
    timeline = run_policy(thousand, "longest remaining path", 64, seed)
    assert 1 <= timeline.over_bound <= MOST_OVER_BOUND
    assert timeline.busy(0, 0.9) > 0.98
    for other in ("as released", "random order"):
        assert timeline.makespan < run_policy(thousand, other, 64, seed).makespan


def test_a_seed_decides_everything(thousand: Plan) -> None:
    one, same, other = (run_policy(thousand, "longest remaining path", 64, seed).makespan for seed in (3, 3, 4))
    assert one == same != other


def test_other_policies_are_others(small: Plan) -> None:
    """First released: both heads, then their children, those of the head that ended first before the others'."""
    schedule = schedule_of(small, FirstReleased)
    order = given_out(schedule)
    heads = [n for n in schedule.nodes if n.parent is None]
    assert order == [*heads, *heads[0].children, *heads[1].children]
    ours = schedule_of(small)
    assert [schedule.nodes.index(node) for node in order] != [ours.nodes.index(node) for node in given_out(ours)]
    shuffled = []
    for seed in range(5):
        drawn = schedule_of(small, Shuffled, seed)
        first = drawn.next()
        assert first is not None
        shuffled.append(drawn.nodes.index(first))
    assert len(set(shuffled)) > 1


def test_the_measurement_runs_every_policy() -> None:
    measured = MEASUREMENTS["simulator"].run(Effort(1, smallest=True))
    assert measured.facts["cells"] == 40
    assert all(f"{name}: GPUs busy" in measured.figures for name in POLICIES)
    assert measured.figures["longest remaining path: makespan / bound, worst"].at_most == MOST_OVER_BOUND
    assert all(0 < measured.figures[f"{name}: GPUs busy"].value <= 1 for name in POLICIES)
