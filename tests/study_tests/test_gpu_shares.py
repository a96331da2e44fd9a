"""From the memory that trials took to the part of a GPU that the next ones get; numbers by hand."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_studies import chain, document, planned

from study.cluster.gpu_shares import HEAD_ROOM, MOST_ON_A_CARD, GpuShares, Taken, part_of_a_card
from study.plan import Plan
from study.schedule import Node, Schedule
from trainables.device_memory import CARD_KEPT, CONTEXT_BYTES, GPU_MEMORY, allowed_fraction
from trainables.requests import Compute
from trainables.results import CellResult

GB = 1_000_000_000
CUDA = Compute("cuda", 1, "bf16")
HEAD = {"name": "head", "set": {"strategy.unfreezing": "none"}}
TO_4 = {"name": "K = 4", "set": {"strategy.depth": 4}}
TO_10 = {"name": "K = 10", "set": {"strategy.depth": 10}}
AVERAGED = {"name": "EMA", "set": {"strategy.depth": 10, "ema.enabled": True, "ema.decay": 0.9}}


def nodes_of(plan: Plan) -> dict[tuple[str, int], Node]:
    """(row, seed) → its last trial."""
    made = Schedule(plan, plan.chains, lambda chain: False, lambda key: False)
    return {(n.chains[0].cell.row.name, n.request.seed): n for n in made.nodes if not n.children}


def shares(gpus: Any = "auto", compute: Compute = CUDA) -> GpuShares:
    return GpuShares(gpus, compute)


# ---------------------------------------------------------------------------------------------------- the arithmetic


@pytest.mark.parametrize(
    ("peak", "card", "fit"),
    [
        (24 * GB, 24 * GB, 1),
        (13 * GB, 24 * GB, 1),  # 13 × 1.25 = 16.25, of 22.8
        (9.12 * GB, 24 * GB, 2),  # 9.12 × 1.25 = 11.4, twice 22.8
        (9.13 * GB, 24 * GB, 1),
        (5 * GB, 24 * GB, 3),  # 6.25, of 22.8
        (1.5 * GB, 80 * GB, 8),  # 40 would fit
        (90 * GB, 80 * GB, 1),
    ],
)
def test_a_part_is_one_over_the_number_of_trials_that_fit_with_head_room(peak: float, card: float, fit: int) -> None:
    part = part_of_a_card(Taken(int(peak), int(card)))
    assert part == {1: 1.0, 2: 0.5, 3: 0.3333, 8: 0.125}[fit]
    assert int(1 / part + 1e-9) == fit, "Ray gives a card to no more of them"


@given(st.integers(CONTEXT_BYTES, 100 * GB), st.integers(4 * GB, 200 * GB))
def test_trials_that_share_a_card_never_exceed_it_and_have_what_was_measured(peak: int, card: int) -> None:
    """Whatever they then do: each is kept to its part, contexts included, and its part is enough for what was seen."""
    part = part_of_a_card(Taken(peak, card))
    n = int(1 / part + 1e-9)
    assert 1 <= n <= MOST_ON_A_CARD and n * part <= 1
    if n == 1:
        assert allowed_fraction(part, card) == 1.0
        return
    allowed = allowed_fraction(part, card) * card
    assert n * (allowed + CONTEXT_BYTES) <= (1 - CARD_KEPT) * card + 1
    assert allowed + CONTEXT_BYTES >= (1 + HEAD_ROOM) * peak * (1 - 1e-3)


@given(st.lists(st.sampled_from([1.0, 0.5, 0.3333, 0.25, 0.2, 0.1666, 0.1428, 0.125]), min_size=1))
def test_different_parts_that_fit_one_card_fit_its_memory(parts: list[float]) -> None:
    card, given_out = 24 * GB, 0.0
    allowed = 0.0
    for part in parts:
        if given_out + part <= 1:
            given_out += part
            allowed += CONTEXT_BYTES + allowed_fraction(part, card) * card if part < 1 else card
    assert allowed <= card


def test_a_part_that_holds_no_context_is_allowed_nothing() -> None:
    assert allowed_fraction(0.125, 4 * GB) == 0.0
    assert allowed_fraction(2.0, 4 * GB) == 1.0


# ------------------------------------------------------------------------------------------------ what is known of whom


def test_what_is_declared_holds_where_nothing_is_measured(tmp_path: Path) -> None:
    node = nodes_of(planned(tmp_path, document([TO_10], seeds=[0])))["K = 10", 0]
    cpu = Compute("cpu", 1, "fp32")
    assert [shares(gpus, CUDA).of(node) for gpus in (None, "auto", 0.5, 2, 0)] == [1, 1, 0.5, 2, 0]
    assert [shares(gpus, cpu).of(node) for gpus in (None, "auto", 0.5)] == [0, 0, 0.5]


def test_a_trial_has_a_whole_gpu_until_one_like_it_was_measured(tmp_path: Path) -> None:
    trials = nodes_of(planned(tmp_path, document([HEAD, TO_4, TO_10])))
    known = shares()
    first = trials["K = 10", 0]
    assert known.of(first) == 1.0
    known.hear(first, 4, 2 * GB, 24 * GB)  # its epoch 4 trains four blocks and no more
    assert known.of(trials["K = 4", 1]) == 0.125
    assert known.of(trials["K = 10", 1]) == 1.0
    known.hear(first, 6, 5 * GB, 24 * GB)
    assert known.of(trials["K = 10", 1]) == 0.3333
    assert known.of(trials["K = 4", 1]) == 0.125, "the nearest depth that was measured speaks for it"
    assert known.of(trials["head", 1]) == 0.125


def test_set_up_alone_and_workers_without_a_whole_gpu_teach_nothing(tmp_path: Path) -> None:
    trials = nodes_of(planned(tmp_path, document([TO_10])))
    known = shares()
    known.hear(trials["K = 10", 0], 0, 2 * GB, 24 * GB)
    known.hear(trials["K = 10", 0], 6, 0, 0)
    assert known.of(trials["K = 10", 1]) == 1.0


def test_the_most_memory_and_the_smallest_card_count(tmp_path: Path) -> None:
    trials = nodes_of(planned(tmp_path, document([TO_10])))
    known = shares()
    for peak, card in ((5 * GB, 80 * GB), (4 * GB, 24 * GB)):
        known.hear(trials["K = 10", 0], 6, peak, card)
    assert known.of(trials["K = 10", 1]) == 0.3333  # 5 GB of 24


@pytest.mark.parametrize(
    ("change", "alike"),
    [
        ({"optimiser.batch_size": 64}, False),
        ({"model.head_hidden": 999}, False),
        ({"optimiser.encoder_lr": 1e-6}, True),
        ({"weighting.enabled": True}, True),
        ({"stopping.patience": 1}, True),
        ({"ema.enabled": True}, False),
    ],
)
def test_what_makes_trials_alike(tmp_path: Path, change: dict[str, Any], alike: bool) -> None:
    other = {"name": "other", "set": {"strategy.depth": 10, **change}}
    rows = [TO_10, other] if change != {"ema.enabled": True} else [TO_10, AVERAGED | {"name": "other"}]
    plan = planned(tmp_path, document(rows, seeds=[0]), sharing=False)
    trials = nodes_of(plan)
    known = shares()
    known.hear(trials["K = 10", 0], 6, 5 * GB, 24 * GB)
    assert (known.of(trials["other", 0]) < 1) == alike


def test_other_images_are_not_alike(tmp_path: Path) -> None:
    known = shares()
    small = nodes_of(planned(tmp_path, document([TO_10], seeds=[0])))["K = 10", 0]
    known.hear(small, 6, 5 * GB, 24 * GB)
    large = nodes_of(planned(tmp_path, document([TO_10], seeds=[0], dataset={"image_size": 128})))["K = 10", 0]
    assert (known.of(small), known.of(large)) == (0.3333, 1.0)


def test_averaged_copies_are_counted_where_they_are_held(tmp_path: Path) -> None:
    """The head stage has none yet: one that is watched by an averaging row is alike to any other."""
    plan = planned(tmp_path, document([AVERAGED, HEAD], seeds=[0]))
    made = Schedule(plan, plan.chains, lambda chain: False, lambda key: False)
    head = made.nodes[0]
    known = shares()
    known.hear(head, 2, 5 * GB, 24 * GB)
    assert known.of(head) == 0.3333
    assert known.of(nodes_of(plan)["EMA", 0]) == 1.0


def test_memory_that_was_refused_on_a_part_is_given_whole_once_and_for_all_alike(tmp_path: Path) -> None:
    trials = nodes_of(planned(tmp_path, document([TO_4, TO_10])))
    known = shares()
    known.hear(trials["K = 10", 0], 6, 5 * GB, 24 * GB)
    assert known.refused(trials["K = 10", 0])
    assert [known.of(trials["K = 10", seed]) for seed in (0, 1)] == [1.0, 1.0]
    assert not known.refused(trials["K = 10", 0]), "it has a whole one by then: nothing more can be given"
    known.hear(trials["K = 10", 0], 6, 5 * GB, 24 * GB)
    assert known.of(trials["K = 10", 1]) == 1.0


def test_a_declared_part_that_is_refused_becomes_a_whole_one_too(tmp_path: Path) -> None:
    (node,) = nodes_of(planned(tmp_path, document([TO_10], seeds=[0]))).values()
    half, two = shares(0.5), shares(2)
    assert half.refused(node) and half.of(node) == 1.0
    assert not two.refused(node) and two.of(node) == 2.0


def test_results_that_are_stored_are_remembered(tmp_path: Path) -> None:
    plan = planned(tmp_path, document([TO_10, AVERAGED]))
    trials = nodes_of(plan)
    told = json.dumps({"peak_bytes": 5 * GB, "card_bytes": 24 * GB, "averages": 1})
    silent, measured = _result({}), _result({GPU_MEMORY: told})
    known = shares()
    known.recall([(chain(plan, "K = 10"), silent)])
    assert known.of(trials["K = 10", 1]) == 1.0
    known.recall([(chain(plan, "K = 10"), measured)])
    assert known.of(trials["K = 10", 1]) == 0.3333


def _result(provenance: dict[str, str]) -> CellResult:
    blank: dict[str, Any] = {field.name: None for field in dataclasses.fields(CellResult)}
    return CellResult(**blank | {"last_epoch": 6, "provenance": provenance})
