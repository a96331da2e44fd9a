"""The scheduling policy on a cluster that is simulated: 1,000 cells on 64 GPUs, no Ray.

The trials are those of a real plan, the policy is `study.schedule.Schedule` itself, which executors run too; only time
is made up. The policy knows training units; what a trial really takes is spread around them: by a factor for its data
set (decoding, image rates) and one for each trial (its node's speed, what else runs there, patience that ends it
sooner), both log-normal, and each machine that reads a data set's cache for the first time builds it. All random
numbers come from the seed that is passed in.

`python -m tests.benchmarks.simulator FILE.png` draws how many GPUs are busy over time.
"""

from __future__ import annotations

import heapq
import itertools
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from study.documents import apply
from study.plan import Plan, make_plan
from study.schedule import Node, Schedule
from study.spec import Choices, find_study, load_study
from tests.benchmarks.measuring import Effort, Figure, Measured
from tests.benchmarks.processes import fresh_storage

MOST_OVER_BOUND = 1.1
MEAN_SECONDS = 1_200.0  # of a trial
DATASET_SPREAD, TRIAL_SPREAD = 0.7, 0.3  # σ of the logarithm
START_SECONDS = 10.0  # of a trial: its state is read, its model built
GPUS_A_MACHINE = 8


class Ran(NamedTuple):
    """A trial, or an attempt at one, on a GPU: seconds since the beginning."""

    gpu: int
    start: float
    end: float


@dataclass
class Timeline:
    """What a cluster did.

    Attributes:
        bound: seconds that no schedule could beat: the longest path, or all work shared out evenly.
        builds: caches that were built on some machine.
    """

    gpus: int
    bound: float
    runs: list[Ran] = field(default_factory=list)
    builds: int = 0

    @property
    def makespan(self) -> float:
        """Seconds until the last trial has ended."""
        return max(run.end for run in self.runs)

    @property
    def over_bound(self) -> float:
        """Makespan / bound."""
        return self.makespan / self.bound

    def busy(self, start: float = 0.0, end: float = 1.0) -> float:
        """Share of the GPUs that are busy in a part of the makespan, given by its ends as shares of it."""
        begin, until = start * self.makespan, end * self.makespan
        worked = sum(max(0.0, min(run.end, until) - max(run.start, begin)) for run in self.runs)
        return worked / (self.gpus * (until - begin))


@dataclass(frozen=True)
class Cluster:
    """GPUs, and what trials take on them.

    Attributes:
        seconds: of each trial, its start included.
        builds: identity of a cache → seconds to build it on a machine.
        deaths: share of the attempts whose worker dies, at a random moment; all but the last epoch is kept.
    """

    gpus: int
    seconds: Mapping[Node, float]
    builds: Mapping[str, float]
    deaths: float = 0.0

    def machine(self, gpu: int) -> str:
        """The machine that a GPU is in."""
        return f"machine {gpu // GPUS_A_MACHINE}"

    def bound(self, nodes: Sequence[Node]) -> float:
        """Seconds that no schedule of these trials can beat: critical path or total work, whichever is longer."""
        ends: dict[Node, float] = {}
        for node in nodes:  # parents come before children
            build = self.builds.get(node.request.cache.identity, 0.0) if node.parent is None else 0.0
            ends[node] = (build if node.parent is None else ends[node.parent]) + self.seconds[node]
        once = sum(self.builds[identity] for identity in {n.request.cache.identity for n in nodes} & set(self.builds))
        shared_out = (once + sum(self.seconds[node] for node in nodes)) / self.gpus
        return max(shared_out, *ends.values())


def simulate(schedule: Schedule, cluster: Cluster, rng: np.random.Generator, *, places: bool = True) -> Timeline:
    """Run a schedule: whenever a GPU is free, it gets what the schedule gives.

    Args:
        rng: decides which workers die, and when.
        places: tell the schedule which machine the free GPU is in.
    """
    timeline = Timeline(cluster.gpus, cluster.bound(schedule.nodes))
    left = dict(cluster.seconds)  # seconds of training that are not saved yet
    built: set[tuple[str, str]] = set()
    free, events, turn = list(range(cluster.gpus)), [], itertools.count()
    now = 0.0
    while not schedule.finished:
        while free:
            machine = cluster.machine(free[0])
            node = schedule.next(machine if places else None)
            if node is None:
                break
            gpu = heapq.heappop(free)
            schedule.placed(node, machine)
            identity = node.request.cache.identity
            needed = 0.0 if (machine, identity) in built else cluster.builds.get(identity, 0.0)
            timeline.builds += needed > 0
            built.add((machine, identity))
            dies = rng.random() < cluster.deaths
            took = needed + left[node] * (rng.random() if dies else 1.0)
            timeline.runs.append(Ran(gpu, now, now + took))
            heapq.heappush(events, (now + took, next(turn), gpu, node, dies))
        now, _, gpu, node, died = heapq.heappop(events)
        heapq.heappush(free, gpu)
        if died:
            left[node] = _left_after_death(node, left[node], now - timeline_start(timeline, gpu))
            schedule.again(node)
        else:
            schedule.done(node)
    return timeline


def timeline_start(timeline: Timeline, gpu: int) -> float:
    """When the last run on a GPU began."""
    return next(run.start for run in reversed(timeline.runs) if run.gpu == gpu)


def _left_after_death(node: Node, left: float, worked: float) -> float:
    """Whole epochs that were finished are saved; another worker starts with what is left."""
    epochs = node.request.last - node.request.first
    epoch = (left - START_SECONDS) / epochs
    saved = max(0, int((worked - START_SECONDS) / epoch)) * epoch if epoch > 0 else 0.0
    return left - min(saved, left - START_SECONDS)


# -- other policies, to compare with ---------------------------------------------------------------------------------


class FirstReleased(Schedule):
    """Trials in the order in which they became ready."""

    def rank(self, node: Node) -> float:
        """Higher for what was ready earlier."""
        released: dict[Node, int] = self.__dict__.setdefault("_released", {})
        return -float(released.setdefault(node, len(released)))


class Shuffled(Schedule):
    """Trials in random order."""

    rng: np.random.Generator

    def rank(self, node: Node) -> float:
        """Any."""
        drawn: dict[Node, float] = self.__dict__.setdefault("_drawn", {})
        if node not in drawn:
            drawn[node] = float(self.rng.random())
        return drawn[node]


def schedule_of(plan: Plan, policy: type[Schedule] = Schedule, seed: int = 0) -> Schedule:
    """All trials of a plan, none of them trained."""
    if policy is Shuffled:
        policy = type("Shuffled", (Shuffled,), {"rng": np.random.default_rng(seed)})
    return policy(plan, plan.chains, lambda chain: False, lambda key: False)


# -- the study -------------------------------------------------------------------------------------------------------


def big_plan(storage: Path, seeds: int = 25) -> Plan:
    """A sweep of the depth with and without class weights, on two data sets: 20 rows, 40 cells a seed."""
    rows: list[dict[str, Any]] = []
    for depth in (1, 2, 3, 4, 5, 6, 7, 8, 10, 12):
        for weighted in (False, True):
            name = f"K = {depth}{', weighted' if weighted else ''}"
            rows.append({"name": name, "set": {"strategy.depth": depth, "weighting.enabled": weighted}})
    chosen = {
        "seeds": list(range(seeds)),
        "datasets": ["phantom", "phantom-derm"],
        "rows": {"list": rows},
        "strategy.head_epochs": 10,
        "strategy.tune_epochs": 20,
        "execution.token_cache": "never",
    }
    return make_plan(load_study(find_study("ablation"), Choices(apply({}, chosen))), storage=storage)


def cluster_for(plan: Plan, schedule: Schedule, gpus: int, rng: np.random.Generator, deaths: float = 0.0) -> Cluster:
    """A cluster on which trials take the time of their units, spread."""
    per_unit = MEAN_SECONDS / statistics.mean(node.units for node in schedule.nodes)
    by_dataset: dict[str, float] = defaultdict(lambda: float(rng.lognormal(0.0, DATASET_SPREAD)))
    seconds = {}
    for node in schedule.nodes:
        spread = by_dataset[node.chains[0].cell.dataset] * rng.lognormal(0.0, TRIAL_SPREAD)
        seconds[node] = START_SECONDS + node.units * per_unit * float(spread)
    builds: dict[str, float] = defaultdict(float)
    dataset_of = {chain.cache_identity: chain.cell.dataset for chain in plan.chains}
    for cache in plan.caches:
        builds[cache.identity] += cache.build_units * per_unit * by_dataset[dataset_of[cache.identity]]
    return Cluster(gpus, seconds, dict(builds), deaths)


# -- the measurement -------------------------------------------------------------------------------------------------

POLICIES: dict[str, tuple[type[Schedule], bool, float]] = {  # name → policy, whether places are told, deaths
    "longest remaining path": (Schedule, True, 0.0),
    "the same, places untold": (Schedule, False, 0.0),
    "the same, 5 % of workers die": (Schedule, True, 0.05),
    "as released": (FirstReleased, False, 0.0),
    "random order": (Shuffled, False, 0.0),
}


def simulator(effort: Effort) -> Measured:
    """1,000 cells on 64 GPUs under each policy; a repeat is another seed of all that is random."""
    seeds, gpus = (1, 4) if effort.smallest else (25, 64)
    with fresh_storage() as storage:
        plan = big_plan(storage, seeds)
    runs = {name: [run_policy(plan, name, gpus, seed) for seed in range(effort.repeats)] for name in POLICIES}
    figures: dict[str, Figure] = {}
    for name, timelines in runs.items():
        ratios = [timeline.over_bound for timeline in timelines]
        limit = MOST_OVER_BOUND if POLICIES[name][0] is Schedule else None
        figures[f"{name}: makespan / bound, worst"] = Figure(max(ratios), "×", at_most=limit)
        figures[f"{name}: makespan / bound, median"] = Figure(statistics.median(ratios), "×")
        figures[f"{name}: GPUs busy"] = Figure(statistics.median(timeline.busy() for timeline in timelines), "")
    ours = runs["longest remaining path"]
    for tenth in range(10):
        share = statistics.median(timeline.busy(tenth / 10, (tenth + 1) / 10) for timeline in ours)
        figures[f"GPUs busy in tenth {tenth + 1} of the time"] = Figure(share, "")
    facts = {"cells": len(plan.chains), "trials": len(schedule_of(plan).nodes), "gpus": gpus}
    told: dict[str, Any] = {name: [t.over_bound for t in timelines] for name, timelines in runs.items()}
    hours = {name: [round(t.makespan / 3600, 2) for t in timelines] for name, timelines in runs.items()}
    builds = {name: [t.builds for t in timelines] for name, timelines in runs.items()}
    return Measured(figures, facts | {"over_bound": told, "makespan_hours": hours, "caches_built": builds})


def run_policy(plan: Plan, name: str, gpus: int, seed: int) -> Timeline:
    """Simulate one policy; the same seed gives the same cluster to every policy."""
    policy, places, deaths = POLICIES[name]
    schedule = schedule_of(plan, policy, seed)
    cluster = cluster_for(plan, schedule, gpus, np.random.default_rng([seed, 1]), deaths)
    return simulate(schedule, cluster, np.random.default_rng([seed, 2]), places=places)


def draw(path: Path, seed: int = 0) -> None:
    """GPUs that are busy over time, under each policy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with fresh_storage() as storage:
        plan = big_plan(storage)
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    for name in ("longest remaining path", "as released", "random order"):
        timeline = run_policy(plan, name, 64, seed)
        times, counts = busy_over_time(timeline)
        axes.step(np.array(times) / timeline.bound, counts, where="post", label=f"{name}: {timeline.over_bound:.3f} ×")
    axes.axvline(1.0, color="black", linewidth=0.8, linestyle=":", label="lower bound")
    axes.set(xlabel="time / lower bound", ylabel="GPUs busy, of 64", ylim=(0, 68), xlim=(0, None))
    axes.legend(loc="lower left", frameon=False)
    figure.savefig(path, dpi=110)


def busy_over_time(timeline: Timeline) -> tuple[list[float], list[int]]:
    """Moments at which GPUs begin or end, and how many are busy from then on."""
    changes: dict[float, int] = defaultdict(int)
    for run in timeline.runs:
        changes[run.start] += 1
        changes[run.end] -= 1
    times = sorted(changes)
    return times, list(itertools.accumulate(changes[time] for time in times))


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
