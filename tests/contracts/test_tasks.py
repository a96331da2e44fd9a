"""What every task keeps, so that one loop, one plan and one cache serve them all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

from study.store import Store
from tests.detection_extra import needs_detection
from tests.task_cases import CASES, CPU, IMAGES, Case, opened
from trainables.costs import IMAGES as PIXELS
from trainables.requests import CacheRequest, Observer
from trainables.results import EpochRecord
from trainables.settings import Task as TaskName
from trainables.strategy import total_epochs
from trainables.task import Task, named_tensors, set_phase, weights_sha256
from trainables.tasks import TASKS

EPOCHS = 3  # of the head, then k = 2 and 4 blocks
EMA = {"ema": (0.9, 2.0)}
FLIPS = {"flips": "both"}


# Their rules are those of YOLO, and of ResNet50, which stands for the encoders with batch norms.
SLOW = ("detection by RT-DETR", "classification by densenet121", "classification by inception_v3")


def marks(name: str) -> list[pytest.MarkDecorator]:
    return [*([pytest.mark.slow] if name in SLOW else []), *([needs_detection] if "detection" in name else [])]


@pytest.fixture(scope="module", params=[pytest.param(name, marks=marks(name)) for name in CASES])
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp() / "task_cases"


@pytest.fixture(scope="module")
def task(case: Case, drawn: Path) -> Task:
    return case.open(drawn)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def history(case: Case, task: Task) -> list[EpochRecord]:
    """The trajectory that nothing interrupts, caches or observes, with class weights."""
    t = case.trajectory(task, weighting={"enabled": True, "eta": 2.0})
    return [t.train_epoch() for _ in range(EPOCHS)]


def facts(record: EpochRecord) -> tuple[object, ...]:
    return record.trajectory_sha256, record.metrics, record.units, record.evaluation_units


def test_every_task_by_name_is_registered_and_has_a_case() -> None:
    assert set(TASKS) == set(get_args(TaskName))
    assert {case.task for case in CASES.values()} == set(TASKS)


def test_every_tensor_belongs_to_exactly_one_of_base_blocks_and_head(case: Case, task: Task) -> None:
    model = task.build(0)
    parts = [*model.base(), *model.blocks(), model.head()]
    owners = Counter(id(t) for part in parts for t in (*part.parameters(), *part.buffers()))
    parameters = {name: owners[id(p)] for name, p in model.module().named_parameters()}
    assert {name for name, n in parameters.items() if n != 1} == set()
    assert max(owners.values()) == 1
    assert len(model.blocks()) == len(task.costs.blocks)


def test_the_plan_counts_what_the_task_counts(case: Case, task: Task, drawn: Path) -> None:
    settings = case.settings()
    kind, index = TASKS[settings.task], opened(settings, drawn).index
    classes = kind.classes(settings, index)
    planned = kind.facts(settings, classes, False)
    assert classes == task.classes
    assert planned.costs == task.costs
    assert task.main_metric == kind.main_metric
    assert all(units >= 1 for units in (*planned.costs.blocks, planned.costs.head))


def test_activations_at_every_boundary_lead_to_the_same_features(case: Case, task: Task) -> None:
    model = task.build(0)
    model.module().eval()
    rows = task.rows("train")[:8]
    with torch.no_grad():
        images = task.inputs(rows, CPU)
        whole = model.advance(images, PIXELS, task.costs.features)
        assert whole[0].numel() == task.costs.values(task.costs.features)
        for position in range(len(task.costs.blocks) + 1):
            half_way = model.advance(images, PIXELS, position)
            assert half_way[0].numel() == task.costs.values(position)
            assert torch.equal(model.advance(half_way, position, task.costs.features), whole), position


def test_the_seed_draws_the_head_and_nothing_below_it(case: Case, task: Task) -> None:
    one, other = task.build(1), task.build(2)
    for mine, theirs in zip([*one.base(), *one.blocks()], [*other.base(), *other.blocks()], strict=True):
        for (name, tensor), (_, same) in zip(
            sorted(mine.state_dict().items()), sorted(theirs.state_dict().items()), strict=True
        ):
            assert torch.equal(tensor, same), name
    assert weights_sha256(one) != weights_sha256(other)
    assert weights_sha256(one) == weights_sha256(task.build(1))


def test_frozen_weights_and_buffers_stand_still_and_unfrozen_blocks_move(case: Case, task: Task) -> None:
    t = case.trajectory(task)
    for unfrozen in (0, 2, 4):
        before = {name: tensor.detach().clone() for name, tensor in named_tensors(t.model)}
        t.train_epoch()
        after = dict(named_tensors(t.model))
        moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
        blocks = t.model.blocks()
        k = min(unfrozen, len(blocks))
        trained = [t.model.head(), *blocks[len(blocks) - k :]]
        names = {id(tensor): name for name, tensor in after.items()}
        may_move = {names[id(x)] for part in trained for x in (*part.parameters(), *part.buffers())}
        assert moved <= may_move
        for part in trained:
            assert moved & {names[id(p)] for p in part.parameters()}, "an unfrozen part did not train"
        statistics = {
            names[id(x)]
            for part in trained
            for n, x in part.named_buffers()
            if n.endswith(("running_mean", "running_var"))
        }
        assert statistics <= moved, "a batch norm that trains follows its batches"
        frozen = [p for name, p in t.model.module().named_parameters() if name not in may_move]
        assert all(p.grad is None and not p.requires_grad for p in frozen)


def test_gradients_reach_every_parameter_of_an_unfrozen_block(case: Case, task: Task) -> None:
    t = case.trajectory(task, strategy={"unfreezing": "static", "depth": len(task.costs.blocks)})
    t.train_epoch()
    set_phase(t.model, t.phase())
    rows = task.rows("train")[:8]
    features = t.model.advance(task.inputs(rows, CPU), PIXELS, task.costs.features)
    torch.manual_seed(0)
    outputs = t.model.predict(features, task.side_inputs(rows, CPU, training=True))
    task.loss(outputs, rows, None).backward()
    for block in t.model.blocks():
        for name, parameter in block.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("boundary", range(1, EPOCHS))
def test_a_run_taken_up_after_any_epoch_is_the_unbroken_one(
    boundary: int, case: Case, task: Task, history: list[EpochRecord]
) -> None:
    weighted = {"weighting": {"enabled": True, "eta": 2.0}}
    first = case.trajectory(task, **weighted)
    for _ in range(boundary):
        first.train_epoch()
    second = case.trajectory(task, **weighted)
    second.restore(first.state())
    torch.manual_seed(boundary)
    for expected in history[boundary:]:
        assert facts(second.train_epoch()) == facts(expected)


def test_a_run_begun_anew_after_every_epoch_keeps_weights_averages_and_results_to_the_bit(
    case: Case, task: Task, tmp_path: Path
) -> None:
    """Through files, as after a crash: the state, the class weights and the averaged copies all come back."""
    request = case.request((Observer(None, 0.0, None), Observer(0.9, 2.0, None)), weighting={"enabled": True})
    whole, broken = Store(tmp_path / "whole"), Store(tmp_path / "broken")
    unbroken = case.trial(request, task, whole)
    for epoch in range(EPOCHS):
        unbroken.step()
        trial = case.trial(request, task, broken)
        assert trial.epoch == epoch
        torch.manual_seed(epoch)  # what the process before left in the generator is gone
        trial.step()
    assert unbroken.done and trial.done
    leaf = request.keys[-1]
    ours, theirs = (store.newest([leaf], lambda _: True) for store in (broken, whole))
    assert ours is not None and theirs is not None
    assert ours.state.class_state == theirs.state.class_state is not None
    assert ours.state.averages == theirs.state.averages
    assert ours.state.tensors.keys() == theirs.state.tensors.keys()
    assert all(torch.equal(tensor, theirs.state.tensors[name]) for name, tensor in ours.state.tensors.items())
    for watch in request.watches:
        mine, other = (store.load_result(leaf, watch.observer.name) for store in (broken, whole))
        assert mine is not None and other is not None
        assert mine.metrics == other.metrics
        with (
            np.load(broken.predictions(leaf, watch.observer.name)) as a,
            np.load(whole.predictions(leaf, watch.observer.name)) as b,
        ):
            assert a.files == b.files
            assert all(a[name].tobytes() == b[name].tobytes() for name in a.files)


def test_cached_prefixes_change_no_bit(case: Case, task: Task, history: list[EpochRecord], tmp_path: Path) -> None:
    blocks = len(task.costs.blocks)
    positions = tuple(p for p in (task.costs.features, *range(blocks)) if task.costs.worth_keeping(p))
    always = CacheRequest("identity", positions, when="always")
    t = case.trajectory(task, weighting={"enabled": True, "eta": 2.0}, cache=always, folder=tmp_path)
    for expected in history:
        record = t.train_epoch()
        assert record.events == []
        assert record.cache is not None
        assert record.units < expected.units
        assert (record.trajectory_sha256, record.metrics) == (expected.trajectory_sha256, expected.metrics)


@pytest.fixture(scope="module")
def flipping(case: Case, drawn: Path) -> Task:
    """The same task with training images that are flipped at random."""
    return case.open(drawn, dataset=FLIPS)


def test_views_are_the_same_pixels_turned_and_decoded_no_second_time(
    case: Case, task: Task, flipping: Task, drawn: Path
) -> None:
    opened(case.settings(), drawn)
    assert opened(case.settings(dataset=FLIPS), drawn).images.decoded == 0
    rows = task.rows("train")[:3]
    plain, (mirrored, both) = task.inputs(rows, CPU), (rows + flipping.views.images * v for v in (1, 3))
    assert torch.equal(flipping.inputs(rows, CPU), plain)
    assert torch.equal(flipping.inputs(mirrored, CPU), plain.flip(-1))
    assert torch.equal(flipping.inputs(both, CPU), plain.flip(-1, -2))
    for split in IMAGES:
        assert np.array_equal(flipping.rows(split), task.rows(split)), "validation and test see images as they are"


def test_flips_train_something_else_the_same_again_and_with_cached_prefixes_to_the_bit(
    case: Case, flipping: Task, history: list[EpochRecord], tmp_path: Path
) -> None:
    weighted = {"weighting": {"enabled": True, "eta": 2.0}, "dataset": FLIPS}
    t = case.trajectory(flipping, **weighted)
    expected = [t.train_epoch()]
    broken_off = t.state()
    expected += [t.train_epoch() for _ in range(EPOCHS - 1)]
    assert [r.trajectory_sha256 for r in expected] != [r.trajectory_sha256 for r in history]
    assert "flips" in str(expected[0].effective["transforms"])
    taken_up = case.trajectory(flipping, **weighted)
    taken_up.restore(broken_off)
    assert facts(taken_up.train_epoch()) == facts(expected[1])
    blocks = len(flipping.costs.blocks)
    positions = tuple(p for p in (flipping.costs.features, *range(blocks)) if flipping.costs.worth_keeping(p))
    cached = case.trajectory(
        flipping, **weighted, cache=CacheRequest("flipped", positions, when="always"), folder=tmp_path
    )
    for wanted in expected:
        record = cached.train_epoch()
        assert record.events == []
        assert record.cache is not None
        assert record.units < wanted.units, "no image is computed anew, whatever the view"
        assert (record.trajectory_sha256, record.metrics) == (wanted.trajectory_sha256, wanted.metrics)


def test_averaged_copies_only_look(case: Case, task: Task, history: list[EpochRecord]) -> None:
    t = case.trajectory(task, weighting={"enabled": True, "eta": 2.0}, averages=EMA)
    for expected in history:
        record = t.train_epoch()
        raw = {name: value for name, value in record.metrics.items() if not name.startswith("val/ema/")}
        assert (record.trajectory_sha256, raw) == (expected.trajectory_sha256, expected.metrics)
    averaged, live = t.copy_tensors("ema"), t.copy_tensors("raw")
    assert any(not torch.equal(averaged[name], live[name]) for name in averaged)
    assert all(torch.isfinite(tensor).all() for tensor in averaged.values() if tensor.is_floating_point())


def test_class_weights_act_from_stage_2_on_and_are_refined(case: Case, task: Task, history: list[EpochRecord]) -> None:
    plain = case.trajectory(task)
    assert plain.train_epoch().trajectory_sha256 == history[0].trajectory_sha256
    assert plain.train_epoch().trajectory_sha256 != history[1].trajectory_sha256
    names = [f"class_weight/{name}" for name in task.classes]
    weights = [[record.metrics[name] for name in names] for record in history[1:]]
    assert len(weights[0]) == len(task.classes)
    assert all(w > 0 for epoch in weights for w in epoch)
    positives, negatives = task.class_counts()
    assert positives.shape == negatives.shape == (len(task.classes),)
    assert (positives > 0).all()


def test_predictions_are_finite_one_line_an_image_and_can_be_described(case: Case, task: Task) -> None:
    t = case.trajectory(task)
    for split, images in IMAGES.items():
        rows = task.rows(split)
        predictions = t.predict(rows)
        assert len(predictions) == images
        assert predictions.dtype == np.float32
        assert np.isfinite(predictions).all()
        scores = task.score(predictions, rows)
        assert task.main_metric in scores.metrics
        assert scores.quality.shape == (len(task.classes),)
        described = task.describe(predictions, rows)
        assert {"names", "classes"} <= set(described)
        assert all(isinstance(array, np.ndarray) for array in described.values())


def test_the_strategy_of_the_cases_is_what_the_tests_count_on(case: Case) -> None:
    assert total_epochs(case.settings().strategy) == EPOCHS
