"""The schedule: every trial once, after its parent, the longest remaining path first, and nothing done twice."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_studies import chain, document, planned

from study.chains import Chain
from study.documents import StudyError
from study.plan import Plan
from study.schedule import Node, Schedule, pending_schedule
from study.store import RESULT, STATE, result_folder, state_folder

HEAD = {"name": "head", "set": {"strategy.unfreezing": "none"}}
TO_4 = {"name": "K = 4", "set": {"strategy.depth": 4}}
TO_10 = {"name": "K = 10", "set": {"strategy.depth": 10}}
IMPATIENT = {"name": "impatient", "set": {"strategy.depth": 10, "stopping.patience": 1}}


def nothing(*_: object) -> bool:
    return False


def schedule(
    plan: Plan,
    pending: Sequence[Chain] | None = None,
    has_result: Callable[[Chain], bool] = nothing,
    has_state: Callable[[str], bool] = nothing,
) -> Schedule:
    return Schedule(plan, plan.chains if pending is None else pending, has_result, has_state)


def tree(made: Schedule) -> list[tuple[tuple[str, ...], int, int, int]]:
    """(rows, seed, epochs before, epochs after) of every trial, in table order."""
    return [
        (tuple(c.cell.row.name for c in n.chains), n.request.seed, n.request.first, n.request.last) for n in made.nodes
    ]


def rows_of(node: Node) -> tuple[str, ...]:
    return tuple(c.cell.row.name for c in node.chains)


# ------------------------------------------------------------------------------------------------------- the tree


def test_trials_are_the_runs_of_epochs_between_branches(tmp_path: Path) -> None:
    """K = 4 and K = 10 part after epoch 4; a change of what is unfrozen alone makes no new trial."""
    made = schedule(planned(tmp_path, document([HEAD, TO_4, TO_10], seeds=[0])))
    assert tree(made) == [
        (("head", "K = 4", "K = 10"), 0, 0, 2),
        (("head",), 0, 2, 6),
        (("K = 4", "K = 10"), 0, 2, 4),
        (("K = 4",), 0, 4, 6),
        (("K = 10",), 0, 4, 6),
    ]
    head, alone, both, four, ten = made.nodes
    assert [n.parent for n in made.nodes] == [None, head, head, both, both]
    assert (head.children, both.children, alone.children) == ([alone, both], [four, ten], [])
    assert four.path == four.units
    assert both.path == both.units + ten.units
    assert head.path == head.units + both.units + ten.units
    assert ten.units > four.units


def test_a_cell_alone_is_one_trial(tmp_path: Path) -> None:
    assert tree(schedule(planned(tmp_path, document([TO_10], seeds=[0])))) == [(("K = 10",), 0, 0, 6)]


def test_observers_of_one_trajectory_watch_one_trial(tmp_path: Path) -> None:
    rows = [TO_10, IMPATIENT, {"name": "EMA", "set": {"strategy.depth": 10, "ema.enabled": True, "ema.decay": 0.9}}]
    plan = planned(tmp_path, document(rows, seeds=[0]))
    (node,) = schedule(plan).nodes
    leaf = plan.chains[0].leaf
    assert [(w.observer.copy, w.observer.patience, w.leaves) for w in node.request.watches] == [
        ("raw", 7, (leaf,)),
        ("raw", 1, (leaf,)),
        ("ema 0.9 tau 20", 7, (leaf,)),
    ]


def test_an_observer_that_follows_two_branches_is_watched_to_both_leaves(tmp_path: Path) -> None:
    plan = planned(tmp_path, document([TO_4, TO_10], seeds=[0]))
    trunk = schedule(plan).nodes[0]
    (watch,) = trunk.request.watches
    assert watch.leaves == (chain(plan, "K = 4").leaf, chain(plan, "K = 10").leaf)


def test_states_are_kept_at_branches_and_at_the_end_of_the_head_stage_alone(tmp_path: Path) -> None:
    plan = planned(tmp_path, document([TO_4, TO_10], seeds=[0]))
    keys = chain(plan, "K = 10").keys
    kept = {key for node in schedule(plan).nodes for key in node.request.keep}
    assert kept == {keys[1], keys[3]}  # E1 = 2 epochs, and where K = 4 and K = 10 part


def test_a_branch_that_is_done_still_keeps_its_state_for_rows_that_are_not(tmp_path: Path) -> None:
    plan = planned(tmp_path, document([TO_4, TO_10], seeds=[0]))
    (node,) = schedule(plan, [chain(plan, "K = 10")]).nodes
    assert (node.request.first, node.request.last) == (0, 6)
    assert node.request.keep == {chain(plan, "K = 10").keys[1], chain(plan, "K = 10").keys[3]}


# ------------------------------------------------------------------------------------------------------- the order


def test_the_longest_remaining_path_goes_first_and_equals_go_in_table_order(tmp_path: Path) -> None:
    made = schedule(planned(tmp_path, document([HEAD, TO_4, TO_10])))
    order = []
    while (node := made.next()) is not None:
        order.append((*rows_of(node)[:1], node.request.seed, node.request.last))
        made.done(node)
    # Seeds 0 and 1 are equal until one is ahead: the path that is still whole is then the longer one.
    assert order == [
        ("head", 0, 2),
        ("head", 1, 2),
        ("K = 4", 0, 4),
        ("K = 4", 1, 4),
        ("K = 10", 0, 6),
        ("K = 10", 1, 6),
        ("K = 4", 0, 6),
        ("K = 4", 1, 6),
        ("head", 0, 6),
        ("head", 1, 6),
    ]
    assert made.finished
    assert made.count("done") == 10


def test_a_child_waits_for_its_parent_and_a_running_trial_is_not_given_twice(tmp_path: Path) -> None:
    made = schedule(planned(tmp_path, document([TO_4, TO_10], seeds=[0])))
    trunk = made.next()
    assert trunk is not None
    assert made.next() is None
    assert not made.finished
    made.done(trunk)
    first, second = made.next(), made.next()
    assert [rows_of(n) for n in (first, second) if n is not None] == [("K = 10",), ("K = 4",)]
    assert made.next() is None


def test_a_trial_whose_worker_died_is_given_again(tmp_path: Path) -> None:
    made = schedule(planned(tmp_path, document([TO_10], seeds=[0])))
    node = made.next()
    assert node is not None
    made.again(node)
    assert not made.finished
    assert made.next() is node


def test_a_failed_trial_takes_its_descendants_with_it_and_nothing_else(tmp_path: Path) -> None:
    plan = planned(tmp_path, document([HEAD, TO_4, TO_10]))
    made = schedule(plan)
    while (node := made.next()) is not None:
        if rows_of(node) == ("K = 4", "K = 10") and node.request.seed == 0:
            lost = made.failed(node, "the loss is not finite")
            assert [(c.cell.row.name, c.cell.seed) for c in lost] == [("K = 4", 0), ("K = 10", 0)]
        else:
            made.done(node)
    assert made.finished
    failed = [(rows_of(n), n.request.seed, n.error) for n in made.nodes if n.status == "failed"]
    assert failed == [
        (("K = 4", "K = 10"), 0, "the loss is not finite"),
        (("K = 4",), 0, "the loss is not finite"),
        (("K = 10",), 0, "the loss is not finite"),
    ]
    assert made.count("done") == len(made.nodes) - 3


def test_cells_that_have_their_result_are_not_lost_with_a_failed_trial(tmp_path: Path) -> None:
    """Patience of one epoch may be over in the trunk that fails later: that cell is finished."""
    rows = [TO_4, TO_10, IMPATIENT]
    made = schedule(planned(tmp_path, document(rows, seeds=[0])), has_result=lambda c: c.cell.row.name == "impatient")
    trunk = made.next()
    assert trunk is not None
    assert [c.cell.row.name for c in made.failed(trunk, "out of memory")] == ["K = 4", "K = 10"]


def test_children_whose_cells_have_all_stopped_early_are_skipped(tmp_path: Path) -> None:
    """K = 4 and K = 10 part after epoch 4: when K = 10's patience ends before, only K = 4 goes on."""
    stopped: set[str] = set()
    made = schedule(
        planned(tmp_path, document([TO_4, TO_10], seeds=[0])), has_result=lambda c: c.cell.row.name in stopped
    )
    trunk = made.next()
    assert trunk is not None
    stopped.add("K = 10")
    made.done(trunk)
    rest = made.next()
    assert rest is not None
    assert rows_of(rest) == ("K = 4",)
    made.done(rest)
    assert made.next() is None
    assert made.finished
    assert [n.status for n in made.nodes] == ["done", "done", "skipped"]


def test_whole_subtrees_are_skipped_when_all_below_has_stopped(tmp_path: Path) -> None:
    stopped: set[str] = set()
    made = schedule(
        planned(tmp_path, document([HEAD, TO_4, TO_10], seeds=[0])), has_result=lambda c: c.cell.row.name in stopped
    )
    head = made.next()
    assert head is not None
    stopped |= {"K = 4", "K = 10"}
    made.done(head)
    assert [(rows_of(n), n.status) for n in made.nodes[2:]] == [
        (("K = 4", "K = 10"), "skipped"),
        (("K = 4",), "skipped"),
        (("K = 10",), "skipped"),
    ]
    last = made.next()
    assert last is not None
    assert rows_of(last) == ("head",)


# --------------------------------------------------------------------------------------------------------- resuming


def test_a_head_stage_that_is_stored_is_not_trained_again(tmp_path: Path) -> None:
    plan = planned(tmp_path, document([HEAD, TO_4], seeds=[0]))
    stored = {chain(plan, "head").keys[1]}
    made = schedule(plan, has_state=stored.__contains__)
    assert [n.status for n in made.nodes] == ["skipped", "waiting", "waiting"]
    node = made.next()
    assert node is not None
    assert node.request.first == 2


def test_a_stored_trunk_of_stage_2_is_visited_since_its_observers_may_need_it(tmp_path: Path) -> None:
    plan = planned(tmp_path, document([TO_4, TO_10], seeds=[0]))
    stored = {chain(plan, "K = 4").keys[3]}
    assert [n.status for n in schedule(plan, has_state=stored.__contains__).nodes] == ["waiting"] * 3


def test_what_has_a_result_is_no_longer_in_the_schedule(tmp_path: Path) -> None:
    plan = planned(tmp_path, document([HEAD, TO_4, TO_10], seeds=[0]))
    assert tree(schedule(plan, [chain(plan, "head"), chain(plan, "K = 4")])) == [
        (("head", "K = 4"), 0, 0, 2),
        (("head",), 0, 2, 6),
        (("K = 4",), 0, 2, 6),
    ]
    assert schedule(plan, []).nodes == []
    assert schedule(plan, []).finished


def test_what_is_still_to_train_is_counted_from_the_storage_and_nothing_is_written(tmp_path: Path) -> None:
    plan = planned(tmp_path, document([HEAD, TO_4, TO_10], seeds=[0]))
    storage = tmp_path / "outputs"
    assert pending_schedule(plan, storage).pending_units == plan.units.shared
    assert not storage.exists()
    done = chain(plan, "head")
    for folder, name in (
        (result_folder(storage, done.leaf, done.observer.name), RESULT),
        (state_folder(storage, done.keys[1]), STATE),
    ):
        folder.mkdir(parents=True)
        (folder / name).write_text("{}", encoding="utf-8")
    units = plan.epoch_units(chain(plan, "K = 10"))
    four = plan.epoch_units(chain(plan, "K = 4"))
    assert pending_schedule(plan, storage).pending_units == sum(units[2:]) + sum(four[4:])


# ---------------------------------------------------------------------------------------------------------- places


def two_heads(tmp_path: Path) -> tuple[Schedule, list[Node]]:
    """Two seeds of equal rows; both head stages are done, seed 0's on node a and seed 1's on node b."""
    made = schedule(planned(tmp_path, document([TO_4, TO_10])))
    heads = []
    for place in ("a", "b"):
        head = made.next()
        assert head is not None
        made.placed(head, place)
        heads.append(head)
    for head in heads:
        made.done(head)
    return made, heads


def test_of_equal_trials_the_child_of_what_a_node_trained_goes_there_first(tmp_path: Path) -> None:
    made, heads = two_heads(tmp_path)
    other = made.next("b")
    assert other is not None and other.parent is heads[1]
    first = made.next("a")
    assert first is not None and first.parent is heads[0]


def test_without_a_place_equal_trials_go_in_table_order(tmp_path: Path) -> None:
    made, heads = two_heads(tmp_path)
    order = [node.parent for _ in range(2) if (node := made.next()) is not None]
    assert order == heads


def test_a_place_that_knows_nothing_gets_the_longest(tmp_path: Path) -> None:
    made, heads = two_heads(tmp_path)
    first = made.next("c")
    assert first is not None and first.parent is heads[0]


def test_a_longer_path_is_worth_more_than_what_lies_at_a_place(tmp_path: Path) -> None:
    """Of K = 1 and K = 10, no node gets the short one first for having trained its parent."""
    rows = [{"name": "K = 1", "set": {"strategy.depth": 1}}, {"name": "static", "set": {"strategy.depth": "all"}}]
    rows[1]["set"] |= {"strategy.unfreezing": "static"}
    made = schedule(planned(tmp_path, document(rows, seeds=[0, 1])))
    heads = [made.next(), made.next()]
    for place, head in zip("ab", heads, strict=True):
        assert head is not None
        made.placed(head, place)
        made.done(head)
    order = [node for _ in range(4) if (node := made.next("b")) is not None]
    assert [(rows_of(n), n.request.seed) for n in order] == [
        (("static",), 1),
        (("static",), 0),
        (("K = 1",), 1),
        (("K = 1",), 0),
    ]


def test_where_caches_lie_is_better_than_where_nothing_does(tmp_path: Path) -> None:
    """Two sizes of images make two caches: a node that has read one of them goes on with it."""
    plan = planned(tmp_path, document([TO_10], seeds=[0, 1, 2, 3]))
    made = schedule(plan)
    first = made.next()
    assert first is not None
    made.placed(first, "a")
    assert made._lies_at == {"a": {plan.chains[0].cache_identity}}
    third = made.nodes[2]
    third.request = dataclasses.replace(
        third.request, cache=dataclasses.replace(third.request.cache, identity="another size")
    )
    made.placed(third, "b")
    assert made.next("b") is third
    assert made.next("a") is made.nodes[1]


# ------------------------------------------------------------------------------------------------------- properties


def longest(made: Schedule) -> Node | None:
    """The policy as simply as it can be said: of all ready trials the longest path, equals in table order."""
    ready = [
        n for n in made.nodes if n.status == "waiting" and (n.parent is None or n.parent.status in ("done", "skipped"))
    ]
    return max(ready, key=lambda n: n.path, default=None)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**32), st.integers(1, 8))
def test_with_places_the_longest_path_is_missed_by_a_twentieth_at_most(tmp_path: Path, seed: int, slots: int) -> None:
    """Whatever lies where: a slot is never idle while a trial is ready, and what it gets is nearly the longest."""
    chance = random.Random(seed)
    made = schedule(planned(tmp_path, document([HEAD, TO_4, TO_10], seeds=[0, 1, 2, 3])))
    running: list[Node] = []
    while not made.finished:
        while len(running) < slots:
            before = longest(made)
            place = chance.choice("abc")
            node = made.next(place)
            assert (node is None) == (before is None)
            if node is None or before is None:
                break
            assert node.path >= 0.95 * before.path
            if node.path < before.path:
                assert made._finds(node, place) > made._finds(before, place)
            made.placed(node, place)
            running.append(node)
        made.done(running.pop(chance.randrange(len(running))))
    assert made.count("done") == len(made.nodes)


SETTINGS = st.fixed_dictionaries(
    {
        "strategy.unfreezing": st.sampled_from(["none", "progressive", "progressive", "static"]),
        "strategy.depth": st.sampled_from([1, 3, 4, 6, 10, "all"]),
        "strategy.step": st.integers(1, 3),
        "weighting.enabled": st.booleans(),
        "ema.enabled": st.booleans(),
        "stopping.patience": st.sampled_from([None, 1, 7]),
    }
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(st.lists(SETTINGS, min_size=1, max_size=6), st.integers(1, 5), st.integers(0, 2**32), st.booleans())
def test_every_epoch_of_every_pending_cell_is_trained_once_and_after_the_one_before(
    tmp_path: Path, rows: list[dict[str, Any]], tune: int, seed: int, sharing: bool
) -> None:
    """Random studies, of which random cells are pending, run by two workers of random speed; some trials fail."""
    named = [{"name": str(i), "set": row} for i, row in enumerate(rows)]
    try:
        plan = planned(tmp_path, document(named, strategy={"head_epochs": 2, "tune_epochs": tune}), sharing=sharing)
    except StudyError as error:
        assert all("changes nothing" in problem for problem in error.problems)
        return
    chance = random.Random(seed)
    pending = [c for c in plan.chains if chance.random() < 0.8]
    made = schedule(plan, pending)
    trained = Counter(key for n in made.nodes for key in n.request.keys[n.request.first :])
    assert set(trained) == {key for c in pending for key in c.keys}
    assert set(trained.values()) <= {1}

    started: list[Node] = []
    running: list[Node] = []
    broken = 0.1 if chance.random() < 0.5 else 0.0
    lost: list[Chain] = []
    while not made.finished:
        while len(running) < 2:
            before = longest(made)
            if (node := made.next()) is None:
                assert before is None
                break
            assert node.parent is None or node.parent.status == "done"
            assert node is before
            started.append(node)
            running.append(node)
        assert running, "a schedule that is not finished always has something to do"
        ended = running.pop(chance.randrange(len(running)))
        if chance.random() < broken:
            lost += made.failed(ended, "broken")
        elif chance.random() < broken:
            made.again(ended)
            started.remove(ended)
        else:
            made.done(ended)
    assert len(started) == len(set(map(id, started)))
    for status in ("waiting", "running", "done", "skipped", "failed"):
        assert made.count(status) == sum(n.status == status for n in made.nodes)
    unfinished = {id(n) for n in made.nodes} - {id(n) for n in started}
    assert all(n.status == "failed" for n in made.nodes if id(n) in unfinished)
    reached = {n.request.keys[-1] for n in made.nodes if n.status == "done"}
    assert {c.key for c in lost} == {c.key for c in pending if c.leaf not in reached}


def test_a_wide_study_is_scheduled_quickly(tmp_path: Path) -> None:
    import time

    def seconds(seeds: int) -> float:
        made = schedule(planned(tmp_path, document([HEAD, TO_4, TO_10], seeds=list(range(seeds)))))
        started, given_out = time.process_time(), 0
        while (node := made.next()) is not None:
            made.done(node)
            given_out += 1
            assert not made.finished or given_out == 5 * seeds
        assert given_out == 5 * seeds
        return time.process_time() - started

    assert seconds(200) < 0.5
    assert seconds(2000) < 30 * seconds(200) + 0.2, "ten times the trials take ten times as long, and little more"


@pytest.mark.parametrize("sharing", [True, False])
def test_without_sharing_every_cell_is_a_trial_of_its_own(tmp_path: Path, sharing: bool) -> None:
    made = schedule(planned(tmp_path, document([HEAD, TO_4, TO_10]), sharing=sharing))
    assert len(made.nodes) == (10 if sharing else 6)
    if not sharing:
        assert [(n.request.first, n.request.last, len(n.chains)) for n in made.nodes] == [(0, 6, 1)] * 6
        assert all(n.request.cache.positions == () for n in made.nodes)
