"""Plain fine-tuning in the one loop: everything trains from the first epoch, under one schedule, and can be resumed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.task_cases import CASES, CPU, NO_CACHE, STRATEGY
from trainables.activations import Activations
from trainables.loop import Trajectory
from trainables.requests import Compute
from trainables.task import Task, named_tensors, weights_sha256

CASE = CASES["classification by resnet50"]
PLAIN = {"strategy": {"unfreezing": "plain", "depth": "all"}, "weighting": {"enabled": True}}
EPOCHS = STRATEGY["head_epochs"] + STRATEGY["tune_epochs"]
EMA = {"ema": (0.9, 2.0)}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return CASE.open(tmp_path_factory.getbasetemp() / "task_cases")


def begun(task: Task) -> Trajectory:
    return CASE.trajectory(task, averages=EMA, **PLAIN)


def test_every_parameter_moves_in_the_first_epoch_and_batch_norms_go_by_the_batch(task: Task) -> None:
    t = begun(task)
    before = {name: tensor.detach().clone() for name, tensor in named_tensors(t.model)}
    record = t.train_epoch()
    still = {name for name, tensor in named_tensors(t.model) if torch.equal(tensor, before[name])}
    assert still == set()
    assert record.effective["trainable_blocks"] == list(range(16))
    assert record.effective["trainable_base"] is True


def test_rates_follow_one_cosine_over_all_epochs(task: Task) -> None:
    t = begun(task)
    records = [t.train_epoch() for _ in range(EPOCHS)]
    for epoch, record in enumerate(records):
        factor = 0.5 * (1 + math.cos(math.pi * epoch / EPOCHS))
        assert record.metrics["lr/encoder"] == pytest.approx(1e-3 * factor)
        assert record.metrics["lr/head"] == pytest.approx(2e-3 * factor)


@pytest.mark.parametrize("boundary", [1, 2])
def test_a_run_taken_up_after_an_epoch_is_the_unbroken_one(boundary: int, task: Task) -> None:
    whole, first, second = begun(task), begun(task), begun(task)
    expected = [whole.train_epoch() for _ in range(EPOCHS)]
    for _ in range(boundary):
        first.train_epoch()
    second.restore(first.state())
    for record in expected[boundary:]:
        again = second.train_epoch()
        assert (again.trajectory_sha256, again.metrics) == (record.trajectory_sha256, record.metrics)


def test_a_look_at_other_images_leaves_the_trajectory_as_it_was(task: Task, tmp_path: Path) -> None:
    """Predictions elsewhere are those of the same weights on the other images; training goes on as if nothing was."""
    elsewhere = CASE.open(tmp_path, dataset={"hospital": 7})
    t, undisturbed = begun(task), begun(task)
    t.train_epoch()
    undisturbed.train_epoch()
    served = Activations(elsewhere, Compute("cpu", 1, "fp32"), CPU, NO_CACHE, None, "contents", 8)
    before, kept = weights_sha256(t.model), t.copy_tensors("raw")
    home = t.predict(task.rows("test"))
    with t.visiting(elsewhere, served), t.holding(kept, 1):
        there = t.predict(elsewhere.rows("test"))
    assert weights_sha256(t.model) == before
    t.model.module().eval()
    with torch.no_grad():
        images = elsewhere.inputs(elsewhere.rows("test"), CPU)
        features = t.model.advance(images, -1, elsewhere.costs.features)
        expected = torch.sigmoid(t.model.predict(features)).numpy()
    np.testing.assert_allclose(there, expected, rtol=1e-4, atol=1e-6)
    assert not np.allclose(there[: len(home)], home[: len(there)])
    assert t.train_epoch().trajectory_sha256 == undisturbed.train_epoch().trajectory_sha256
