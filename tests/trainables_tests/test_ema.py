"""Averaged copies against the recurrence written out, and what must hold to the bit."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainables.ema import Average, decay_at

finite = st.floats(-1e6, 1e6, width=32)


@pytest.mark.parametrize(
    ("decay", "tau", "t", "expected"),
    [
        (0.999, 100.0, 1, 0.0099402161),  # 1 − e^−0.01 = 0.0099501663
        (0.999, 100.0, 100, 0.6314884382),  # 1 − e^−1 = 0.6321205588
        (0.999, 100.0, 1000, 0.9989546454),  # 1 − e^−10 = 0.9999546001
        (0.99, 100.0, 100, 0.6257993532),
        (0.5, 10.0, 5, 0.1967346701),  # 1 − e^−0.5 = 0.3934693403
        (0.9999, 1.0, 10**6, 0.9999),
    ],
)
def test_the_decay_warms_up_by_the_formula(decay: float, tau: float, t: int, expected: float) -> None:
    assert decay_at(decay, tau, t) == pytest.approx(expected, abs=1e-10)


def test_two_usual_decays_differ_after_a_few_hundred_steps() -> None:
    assert decay_at(0.9999, 100, 700) - decay_at(0.999, 100, 700) > 8e-4


def test_the_copy_follows_the_recurrence() -> None:
    average = Average(decay=0.9, tau=4.0)
    live = {"w": torch.tensor([2.0, -1.0], dtype=torch.float64)}
    average.track(live)
    assert average.tensors["w"].tolist() == [2.0, -1.0]
    one, two = 2.0, -1.0
    for t, (x, y) in enumerate([(3.0, 0.5), (5.0, 0.25), (-1.0, 8.0), (4.0, 8.0), (4.0, 8.0)], start=1):
        d = 0.9 * (1 - math.exp(-t / 4.0))
        one, two = d * one + (1 - d) * x, d * two + (1 - d) * y
        live["w"].copy_(torch.tensor([x, y]))
        average.update(live)
        assert average.tensors["w"].tolist() == pytest.approx([one, two], rel=1e-14)
    assert average.t == 5


@given(st.lists(finite, min_size=1, max_size=40), st.floats(0.001, 0.99999), st.floats(0.1, 1e4), st.integers(1, 60))
def test_equal_values_stay_exactly_equal(values: list[float], decay: float, tau: float, steps: int) -> None:
    average = Average(decay, tau)
    live = {"w": torch.tensor(values, dtype=torch.float32)}
    average.track(live)
    for _ in range(steps):
        average.update(live)
    assert torch.equal(average.tensors["w"], live["w"])


@given(st.lists(finite, min_size=3, max_size=3), st.integers(1, 30), st.integers(1, 10), st.integers(0, 10**6))
def test_a_block_that_joins_late_equals_one_averaged_all_along_while_frozen(
    values: list[float], frozen: int, trained: int, seed: int
) -> None:
    head, block = torch.zeros(2), torch.tensor(values, dtype=torch.float32)
    late, always = Average(0.99, 20.0), Average(0.99, 20.0)
    late.track({"head": head})
    always.track({"head": head, "block": block})
    generator = torch.Generator().manual_seed(seed)
    for step in range(frozen + trained):
        head += torch.randn(2, generator=generator)
        if step == frozen:
            late.track({"head": head, "block": block})
        if step >= frozen:
            block += torch.randn(3, generator=generator)
        late.update({"head": head, "block": block})
        always.update({"head": head, "block": block})
    assert torch.equal(late.tensors["block"], always.tensors["block"])
    assert torch.equal(late.tensors["head"], always.tensors["head"])
    assert not torch.equal(late.tensors["block"], block)


def test_tracking_again_does_not_reset_what_is_tracked() -> None:
    average = Average(0.9, 1.0)
    live = {"w": torch.zeros(1)}
    average.track(live)
    live["w"] += 1.0
    average.update(live)
    between = average.tensors["w"].item()
    average.track(live)
    assert average.tensors["w"].item() == between != 1.0


def test_the_copy_shares_no_memory_with_the_live_weights() -> None:
    average = Average(0.9, 1.0)
    live = {"w": torch.zeros(1)}
    average.track(live)
    live["w"] += 1.0
    assert average.tensors["w"].item() == 0.0


def test_floating_buffers_are_averaged_and_counters_are_not() -> None:
    norm = torch.nn.BatchNorm1d(2)
    live = dict([*norm.named_parameters(), *norm.named_buffers()])
    average = Average(0.5, 1.0)
    average.track(live)
    assert set(average.tensors) == {"weight", "bias", "running_mean", "running_var"}
    with torch.no_grad():
        live["running_mean"].fill_(1.0)
        live["num_batches_tracked"].fill_(7)
    average.update(live)
    d = 0.5 * (1 - math.exp(-1))
    assert average.tensors["running_mean"].tolist() == pytest.approx([1 - d] * 2)
    assert average.tensors["running_var"].tolist() == [1.0, 1.0]


def test_averaging_leaves_the_live_tensors_and_their_gradients_alone() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.full((3,), 2.0)
    average = Average(0.9, 1.0)
    average.track({"w": parameter})
    with torch.no_grad():
        parameter += 1.0
    average.update({"w": parameter})
    assert parameter.tolist() == [2.0, 2.0, 2.0]
    assert parameter.grad.tolist() == [2.0, 2.0, 2.0]
    assert not average.tensors["w"].requires_grad
