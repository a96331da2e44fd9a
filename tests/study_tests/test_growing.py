"""The schedule of a search: it asks when a slot is free, trains a head stage once, and ends pruned trajectories."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from small_studies import document, planned

from study.chains import Chain
from study.growing import GrowingSchedule
from study.plan import Plan
from study.schedule import Node

HEAD, TUNE = 2, 4  # epochs of the small study
RUNGS = (3, 4)


def row(name: str, **changes: Any) -> dict[str, Any]:
    return {"name": name, "set": {key.replace("__", "."): value for key, value in changes.items()}}


# Three trajectories on one head stage, one on another; the first is looked at in two ways.
ROWS = [
    row("a", optimiser__encoder_lr=1e-5),
    row("a averaged", optimiser__encoder_lr=1e-5, ema__enabled=True),
    row("b", optimiser__encoder_lr=2e-5),
    row("c", optimiser__encoder_lr=3e-5),
    row("other head", optimiser__head_lr=1e-2),
]


class Proposals:
    """Stands for Optuna and the store: proposes the trajectories of a plan, remembers what it was asked."""

    def __init__(self, folder: Path, prunes: Callable[[Node], bool] = lambda node: False) -> None:
        self.plan: Plan = planned(folder, document(ROWS, seeds=[0]))
        self.waiting: list[list[Chain]] = []
        for chain in self.plan.chains:
            if self.waiting and self.waiting[-1][0].leaf == chain.leaf:
                self.waiting[-1].append(chain)
            else:
                self.waiting.append([chain])
        self.results: set[str] = set()
        self.states: set[str] = set()
        self.asked_at_rungs: list[tuple[tuple[str, ...], int]] = []
        self._prunes = prunes
        self.schedule = GrowingSchedule(
            self.plan,
            has_result=lambda chain: chain.key in self.results,
            has_state=lambda key: key in self.states,
            rungs=lambda chain: RUNGS,
            grow=self._grow,
            goes_on=self._goes_on,
            left=lambda: len(self.waiting) / 4,
        )

    def _grow(self) -> bool:
        if not self.waiting:
            return False
        self.schedule.add(self.plan, self.waiting.pop(0))
        return True

    def _goes_on(self, node: Node) -> bool:
        if node.request.last in RUNGS:
            self.asked_at_rungs.append((names(node), node.request.last))
            return not self._prunes(node)
        return True

    def end(self, node: Node) -> None:
        """The trial has ended: its last state is kept where it asks for that, its cells have results at the leaf."""
        if node.request.keys[-1] in node.request.keep:
            self.states.add(node.request.keys[-1])
        self.results |= {c.key for c in node.chains if c.leaf == node.request.keys[-1]}
        self.schedule.done(node)


def names(node: Node) -> tuple[str, ...]:
    return tuple(chain.cell.row.name for chain in node.chains)


def epochs(node: Node) -> tuple[int, int]:
    return node.request.first, node.request.last


def one_slot(search: Proposals) -> list[tuple[tuple[str, ...], tuple[int, int]]]:
    """What an executor with one slot trains, in order."""
    trained = []
    while (node := search.schedule.next()) is not None:
        trained.append((names(node), epochs(node)))
        search.end(node)
    return trained


def test_a_head_stage_is_trained_once_and_a_trajectory_is_cut_at_its_rungs(tmp_path: Path) -> None:
    search = Proposals(tmp_path)
    trained = one_slot(search)
    assert trained[:4] == [
        (("a", "a averaged"), (0, 2)),
        (("a", "a averaged"), (2, 3)),
        (("a", "a averaged"), (3, 4)),
        (("a", "a averaged"), (4, 6)),
    ]
    assert [of for of, (first, _) in trained if first == 0] == [("a", "a averaged"), ("other head",)]
    assert search.schedule.finished
    assert len(search.results) == len(ROWS)


def test_nothing_is_asked_for_while_a_trial_is_ready(tmp_path: Path) -> None:
    search = Proposals(tmp_path)
    node = search.schedule.next()
    assert node is not None
    assert len(search.waiting) == 3
    search.end(node)
    rest = search.schedule.next()
    assert rest is not None
    assert names(rest) == ("a", "a averaged")
    assert len(search.waiting) == 3, "the trajectory goes on before another one is begun"


def test_a_free_slot_gets_another_trajectory_that_may_wait_for_the_same_head_stage(tmp_path: Path) -> None:
    search = Proposals(tmp_path)
    first = search.schedule.next()
    assert first is not None
    assert search.schedule.next() is None, "b waits for the head stage that runs"
    assert len(search.waiting) == 2, "and no further one is asked for before that is clear"
    assert set(names(first)) == {"a", "a averaged", "b"}, "the head stage is that of both now"
    search.end(first)
    ready = [search.schedule.next(), search.schedule.next()]
    assert sorted(names(node) for node in ready if node is not None) == [("a", "a averaged"), ("b",)]


def test_slots_stay_busy(tmp_path: Path) -> None:
    """With two slots no slot is empty while trajectories are left, once the first head stage is trained."""
    search = Proposals(tmp_path)
    head = search.schedule.next()
    assert head is not None
    search.end(head)
    running: list[Node] = []
    while True:
        while len(running) < 2 and (node := search.schedule.next()) is not None:
            running.append(node)
        if not running:
            break
        if search.waiting:
            assert len(running) == 2
        search.end(running.pop(0))
    assert len(search.results) == len(ROWS)


def test_a_pruned_trajectory_ends_at_its_rung_and_others_go_on(tmp_path: Path) -> None:
    search = Proposals(tmp_path, prunes=lambda node: names(node) == ("b",) and node.request.last == 4)
    trained = one_slot(search)
    assert [span for of, span in trained if of == ("b",)] == [(2, 3), (3, 4)]
    assert [span for of, span in trained if of == ("c",)] == [(2, 3), (3, 4), (4, 6)]
    assert (("b",), 3) in search.asked_at_rungs
    assert search.schedule.finished
    assert [(names(n), n.request.last) for n in search.schedule.nodes if n.pruned] == [(("b",), 4)]


def test_the_state_of_a_rung_is_kept_until_the_trajectory_has_left_it(tmp_path: Path) -> None:
    search = Proposals(tmp_path)
    nodes = []
    while (node := search.schedule.next()) is not None:
        nodes.append(node)
        search.end(node)
    for node in nodes:
        keys, keep = node.request.keys, node.request.keep
        assert keys[HEAD - 1] in keep
        assert {key for key in keys[HEAD:] if key in keep} == ({keys[-1]} if node.request.last in RUNGS else set())


def test_a_trajectory_that_was_interrupted_goes_on_at_its_deepest_state(tmp_path: Path) -> None:
    search = Proposals(tmp_path)
    chain = search.waiting[0][0]
    search.states = {chain.keys[HEAD - 1], chain.keys[4]}  # in the middle of what follows the second rung
    trained = one_slot(search)
    assert [span for of, span in trained if "a" in of] == [(4, 6)]


def test_a_rung_that_was_reached_but_not_judged_is_judged(tmp_path: Path) -> None:
    search = Proposals(tmp_path, prunes=lambda node: names(node) == ("a", "a averaged"))
    chain = search.waiting[0][0]
    search.states = {chain.keys[HEAD - 1], chain.keys[RUNGS[0] - 1]}
    trained = one_slot(search)
    assert [span for of, span in trained if "a" in of] == [(2, 3)]
    assert search.asked_at_rungs[0] == (("a", "a averaged"), 3)


def test_a_failed_head_stage_takes_the_trajectories_on_it_and_nothing_else(tmp_path: Path) -> None:
    search = Proposals(tmp_path)
    head = search.schedule.next()
    assert head is not None
    assert search.schedule.next() is None
    search.schedule.failed(head, "diverged")
    trained = one_slot(search)
    assert {of for of, _ in trained} == {("c",), ("other head",)}, "c tries the head stage again"
    assert search.schedule.finished


def test_cells_that_all_stopped_early_need_no_further_stage_and_no_judgement(tmp_path: Path) -> None:
    search = Proposals(tmp_path)
    head = search.schedule.next()
    assert head is not None
    search.end(head)
    rung = search.schedule.next()
    assert rung is not None
    search.results |= {chain.key for chain in rung.chains}
    search.end(rung)
    assert search.asked_at_rungs == []
    following = search.schedule.next()
    assert following is not None
    assert "a" not in names(following)


def test_what_is_to_come_counts_in_the_estimate(tmp_path: Path) -> None:
    search = Proposals(tmp_path)
    search.schedule.next()
    known: Sequence[Node] = search.schedule.nodes
    units = sum(node.units for node in known)
    assert search.schedule.total_units == round(units / (1 - 3 / 4))
