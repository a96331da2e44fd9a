"""Several studies in one schedule: the longest path of all first, each study told its own, nothing trained twice."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from small_studies import document, planned

from analysis.records import load
from study.driver import RunOptions, run_plans
from study.joint_schedule import JointListener, JointSchedule, lots_of
from study.plan import Plan
from study.schedule import Node, Schedule
from tests.studies_for_tests import TINY, run_study
from tests.studies_for_tests import planned as planned_shipped

HEAD = {"name": "head", "set": {"strategy.unfreezing": "none"}}
TO_10 = {"name": "K = 10", "set": {"strategy.depth": 10}}


def nothing(*_: object) -> bool:
    return False


def study(folder: Path, name: str, seeds: list[int], **groups: Any) -> Plan:
    (folder / name).mkdir(exist_ok=True)
    return planned(folder / name, document([HEAD, TO_10], seeds=seeds, **groups) | {"study": name})


def of(plan: Plan, has_result: Callable[..., bool] = nothing) -> Schedule:
    return Schedule(plan, plan.chains, has_result, nothing)


def test_the_longest_path_of_all_studies_goes_first_and_each_study_counts_its_own(tmp_path: Path) -> None:
    short = study(tmp_path, "short", [0], strategy={"head_epochs": 1, "tune_epochs": 1})
    long = study(tmp_path, "long", [7])
    first, second = of(short), of(long)
    joint = JointSchedule([first, second])
    assert [s.name for s in joint.studies] == ["short", "long"]
    assert joint.total_units == first.total_units + second.total_units
    assert joint.pending_units == of(short).pending_units + of(long).pending_units
    given: list[Node] = []
    while (node := joint.next()) is not None:
        given.append(node)
        joint.done(node)
    assert given[0].plan is long, "its path is longer, though it is named second"
    assert sorted(map(id, given)) == sorted(map(id, [*first.nodes, *second.nodes])), "each trial once"
    seen: set[Node] = set()
    for node in given:
        assert node.parent is None or node.parent in seen
        seen.add(node)
    assert joint.finished
    for part in (first, second):
        assert part.count("done") == len(part.nodes), "as a dashboard shows it"
        assert part.finished


def test_a_slot_takes_another_study_s_trial_where_one_study_has_none_that_is_ready(tmp_path: Path) -> None:
    plans = [study(tmp_path, "one", [0]), study(tmp_path, "two", [7])]
    joint = JointSchedule([of(plan) for plan in plans])
    both = [joint.next(), joint.next()]
    assert [node.plan.study.name for node in both if node is not None] == ["one", "two"]
    assert joint.next() is None, "all others wait for the head stages of these"


def test_what_fails_or_is_there_already_concerns_its_own_study_alone(tmp_path: Path) -> None:
    one, two = study(tmp_path, "one", [0]), study(tmp_path, "two", [7])
    stored = {chain.key for chain in two.chains}
    joint = JointSchedule([of(one), of(two, lambda chain: chain.key in stored)])
    head = joint.next()
    assert head is not None and head.plan is one
    joint.failed(head, "it does not train")
    other = joint.next()
    assert other is not None and other.plan is two
    joint.done(other)
    assert joint.finished
    assert [(n.plan.study.name, n.status) for n in joint.nodes] == [
        *[("one", "failed")] * 3,
        ("two", "done"),
        *[("two", "skipped")] * 2,
    ]


def test_each_study_hears_of_its_own_trials(tmp_path: Path) -> None:
    class Ear:
        def __init__(self) -> None:
            self.heard: dict[str, list[Node]] = defaultdict(list)

        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda node, *_: self.heard[name].append(node)

    plans = [study(tmp_path, "one", [0]), study(tmp_path, "two", [7])]
    ears = {plan.study.name: Ear() for plan in plans}
    listener = JointListener(ears)
    nodes = [node for plan in plans for node in of(plan).nodes]
    for node in nodes:
        listener.started(node)
        listener.epoch(node, None)  # type: ignore[arg-type]
        listener.finished(node)
        listener.retried(node, "why")
        listener.failed(node, "why")
    for plan in plans:
        ours = [node for node in nodes if node.plan is plan]
        assert ears[plan.study.name].heard == dict.fromkeys(("started", "epoch", "finished", "retried", "failed"), ours)


def test_studies_that_begin_alike_or_give_trials_something_else_run_one_after_another(tmp_path: Path) -> None:
    one, other, again = study(tmp_path, "one", [0]), study(tmp_path, "other", [7]), study(tmp_path, "again", [0, 1])
    wider = study(tmp_path, "wider", [8], execution={"cpus": 2})
    assert lots_of([one, other]) == [[one, other]]
    assert lots_of([one, other, again]) == [[one, other], [again]], "its seed 0 is trained once, by the first"
    assert lots_of([one, again, other]) == [[one], [again, other]]
    assert lots_of([other, wider]) == [[other], [wider]]
    assert lots_of([one]) == [[one]]


def test_two_studies_run_together_end_as_they_do_alone(tmp_path: Path) -> None:
    storage = tmp_path / "together"
    small = {**TINY, "seeds": [0], "strategy.tune_epochs": 1}
    depth = {**TINY, "seeds": [1], "strategy.tune_epochs": 1}
    plans = [
        planned_shipped(storage, small),
        planned_shipped(storage, {**depth, "rows": {"list": [TO_10 | {"name": "10"}]}}, study="depth"),
    ]
    assert len(lots_of(plans)) == 1
    options = RunOptions(storage, "a test", executor="local")
    launched = run_plans(plans, options, Console(quiet=True))
    assert [(end.header.study, end.complete) for end in launched] == [("ablation", True), ("depth", True)]
    assert all(end.header.units.executed == end.header.units.shared for end in launched)
    alone = run_study(tmp_path / "alone", small)
    ours, theirs = (
        load(f"sqlite:///{folder.resolve() / 'mlflow.db'}", "ablation").cells for folder in (storage, alone.storage)
    )
    hashes = ["row", "seed", "status", "weights_sha256", "trajectory_sha256"]
    pd.testing.assert_frame_equal(ours[hashes], theirs[hashes])
    depths = load(f"sqlite:///{storage.resolve() / 'mlflow.db'}", "depth").cells
    assert depths["status"].tolist() == ["FINISHED"]
