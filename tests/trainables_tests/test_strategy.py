"""The schedule of unfreezing and of the rates, by hand; and that everything in it is a function of time alone."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from trainables.settings import OptimiserSettings, StrategySettings
from trainables.strategy import (
    Phase,
    phase,
    rates,
    schedule_factor,
    stream,
    total_epochs,
    unfreeze_interval,
    unfrozen_blocks,
)

PAPER = StrategySettings(head_epochs=10, tune_epochs=20, unfreezing="progressive", depth=10, step=2)

strategies = st.builds(
    StrategySettings,
    head_epochs=st.integers(1, 5),
    tune_epochs=st.integers(1, 40),
    step=st.integers(1, 4),
    every=st.none() | st.integers(1, 6),
)


def depths(strategy: StrategySettings, depth: int | str) -> list[int]:
    s = strategy.model_copy(update={"depth": depth})
    return [unfrozen_blocks(s, 12, e) for e in range(total_epochs(s))]


def test_ten_blocks_thaw_two_at_a_time_in_the_first_half_of_stage_2() -> None:
    head, growing, full = [0] * 10, [2, 2, 4, 4, 6, 6, 8, 8], [10] * 12
    assert depths(PAPER, 10) == head + growing + full


def test_the_mean_number_of_unfrozen_blocks_of_the_default_is_eight() -> None:
    assert sum(depths(PAPER, 10)[10:]) / 20 == 8.0


@pytest.mark.parametrize(("tune_epochs", "interval"), [(1, 1), (5, 1), (14, 1), (16, 2), (20, 2), (30, 3), (40, 4)])
def test_blocks_are_added_every_tenth_of_stage_2_but_at_least_every_epoch(tune_epochs: int, interval: int) -> None:
    assert unfreeze_interval(StrategySettings(tune_epochs=tune_epochs)) == interval


def test_an_interval_that_is_given_is_taken() -> None:
    assert depths(PAPER.model_copy(update={"every": 5}), 10)[10:] == [2] * 5 + [4] * 5 + [6] * 5 + [8] * 5


@given(strategies, st.integers(1, 12), st.integers(1, 12))
def test_every_depth_shares_its_prefix_with_every_larger_one(s: StrategySettings, one: int, other: int) -> None:
    small, large = sorted((one, other))
    shallow, deep = (s.model_copy(update={"depth": d}) for d in (small, large))
    for epoch in range(total_epochs(s)):
        wanted = phase(deep, 12, epoch)
        assert (phase(shallow, 12, epoch) == wanted) is (wanted.unfrozen <= small)
        assert phase(shallow, 12, epoch).unfrozen == min(small, wanted.unfrozen)


@given(strategies, st.integers(1, 12))
def test_all_layers_share_their_prefix_with_every_depth_below(s: StrategySettings, depth: int) -> None:
    everything, some = (s.model_copy(update={"depth": d}) for d in ("all", depth))
    for epoch in range(total_epochs(s)):
        wanted = phase(everything, 12, epoch)
        if wanted.unfrozen <= depth and not wanted.base:
            assert phase(some, 12, epoch) == wanted


@given(strategies, st.integers(1, 12))
def test_unfreezing_never_takes_a_block_back(s: StrategySettings, depth: int) -> None:
    taken = depths(s, depth)
    assert taken == sorted(taken)
    assert max(taken) <= depth


def test_without_unfreezing_the_head_trains_alone_in_both_segments() -> None:
    s = PAPER.model_copy(update={"unfreezing": "none"})
    assert [phase(s, 12, e) for e in (0, 9)] == [Phase("head", 0, 10, 0, False)] * 2
    assert [phase(s, 12, e) for e in (10, 29)] == [Phase("tune", 10, 20, 0, False)] * 2


def test_without_unfreezing_even_depth_all_leaves_the_base_frozen() -> None:
    s = PAPER.model_copy(update={"unfreezing": "none", "depth": "all"})
    assert not any(phase(s, 12, e).base or phase(s, 12, e).unfrozen for e in range(30))


def test_static_unfreezing_takes_its_whole_depth_from_the_first_epoch_of_stage_2() -> None:
    s = PAPER.model_copy(update={"unfreezing": "static"})
    assert [phase(s, 12, e).unfrozen for e in range(30)] == [0] * 10 + [10] * 20
    assert not any(phase(s, 12, e).base for e in range(30))
    everything = s.model_copy(update={"depth": "all"})
    assert phase(everything, 12, 10) == Phase("tune", 10, 20, 12, True)
    assert phase(everything, 12, 9) == Phase("head", 0, 10, 0, False)


def test_all_frees_the_base_only_once_every_block_is_free() -> None:
    s = PAPER.model_copy(update={"depth": "all"})
    assert [phase(s, 12, e).unfrozen for e in range(10, 30)] == [2, 2, 4, 4, 6, 6, 8, 8, 10, 10] + [12] * 10
    assert [phase(s, 12, e).base for e in range(30)] == [False] * 20 + [True] * 10


def test_a_depth_that_names_every_block_still_leaves_the_base_frozen() -> None:
    s = PAPER.model_copy(update={"depth": 12})
    assert phase(s, 12, 29) == Phase("tune", 10, 20, 12, False)


@pytest.mark.parametrize("epoch", [-1, 30, 31])
def test_there_is_no_phase_outside_the_trajectory(epoch: int) -> None:
    with pytest.raises(ValueError, match=rf"epoch {epoch} is outside 0 … 29"):
        phase(PAPER, 12, epoch)


@pytest.mark.parametrize(
    ("kind", "step", "factor"),
    [
        ("cosine", 0, 1.0),
        ("cosine", 20, 0.75),  # cos 60° = ½
        ("cosine", 30, 0.5),  # cos 90° = 0
        ("cosine", 40, 0.25),  # cos 120° = −½
        ("cosine", 60, 0.0),
        ("linear", 0, 1.0),
        ("linear", 15, 0.75),
        ("linear", 45, 0.25),
        ("linear", 60, 0.0),
    ],
)
def test_the_factors_are_those_of_the_formula(kind: str, step: int, factor: float) -> None:
    assert schedule_factor(kind, step, 60) == pytest.approx(factor, abs=1e-15)  # type: ignore[arg-type]


def test_the_schedule_restarts_with_each_segment_for_both_groups() -> None:
    optimiser = OptimiserSettings(encoder_lr=3e-6, head_lr=5e-5, tune_head_lr=2e-5, schedule="linear")

    def at(epoch: int, step: int) -> tuple[float, float]:
        r = rates(optimiser, phase(PAPER, 12, epoch), epoch, step, steps_per_epoch=4)
        return r.encoder, r.head

    assert at(0, 0) == (0.0, 5e-5)
    assert at(5, 0) == (0.0, pytest.approx(2.5e-5))  # 20 of 40 steps
    assert at(9, 3) == (0.0, pytest.approx(5e-5 / 40))  # the last of 40 steps
    assert at(10, 0) == (3e-6, 2e-5)
    assert at(15, 0) == (pytest.approx(2.25e-6), pytest.approx(1.5e-5))  # 20 of 80 steps
    assert at(29, 3) == (pytest.approx(3e-6 / 80), pytest.approx(2e-5 / 80))


def test_the_head_keeps_its_peak_in_stage_2_unless_told_otherwise() -> None:
    r = rates(OptimiserSettings(head_lr=5e-5), phase(PAPER, 12, 10), 10, 0, 4)
    assert r.head == 5e-5


def test_a_frozen_encoder_has_rate_zero_in_stage_2_too() -> None:
    s = PAPER.model_copy(update={"unfreezing": "none"})
    assert rates(OptimiserSettings(), phase(s, 12, 20), 20, 0, 4).encoder == 0.0


@given(strategies, st.integers(1, 12), st.integers(1, 12), st.integers(1, 9))
def test_rates_do_not_depend_on_the_depth(s: StrategySettings, one: int, other: int, steps: int) -> None:
    optimiser = OptimiserSettings()
    for epoch in range(total_epochs(s)):
        first, second = (
            rates(optimiser, phase(s.model_copy(update={"depth": d}), 12, epoch), epoch, steps - 1, steps)
            for d in (one, other)
        )
        assert first == second


def test_a_stream_is_the_digest_of_its_purpose_and_numbers_alone() -> None:
    expected = int(hashlib.sha256(b"dropout:3:14:15").hexdigest()[:16], 16) // 2
    assert stream("dropout", 3, 14, 15) == expected


places = st.tuples(st.sampled_from(["order", "dropout", "head"]), st.lists(st.integers(0, 10**6), max_size=3))


@given(places, places)
def test_streams_differ_by_purpose_seed_epoch_and_step(
    one: tuple[str, list[int]], other: tuple[str, list[int]]
) -> None:
    assume(one != other)
    assert stream(one[0], *one[1]) != stream(other[0], *other[1])


@given(places)
def test_both_generators_take_every_stream(place: tuple[str, list[int]]) -> None:
    seed = stream(place[0], *place[1])
    assert 0 <= seed < 2**63
    assert torch.Generator().manual_seed(seed).initial_seed() == seed
    np.random.default_rng(seed)
