"""Segmentation in the one loop: frozen parts stay, no bit hangs on resuming or caching, averages only watch, it learns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_segmentation import segmentation_data, segmentation_settings, segmentation_task
from tiny_trials import begin, finish, keys_of, outcome, timeless, trajectory, trial_request
from torch import Tensor

from study.store import Store
from tests.studies_for_tests import run_study
from trainables.data.opened import Data
from trainables.requests import CacheRequest, Observer
from trainables.segmentation import Segmentation
from trainables.settings import Settings
from trainables.task import Rows, StagedModel, named_tensors

EPOCHS = 3  # one of the head, then two and four layers of memory attention
RAW = Observer(None, 0.0, None)
AVERAGED = Observer(0.9, 3.0, 2)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return segmentation_data(tmp_path_factory.mktemp("segmentation"))


@pytest.fixture(scope="module")
def settings() -> Settings:
    return segmentation_settings(weighting={"enabled": True, "eta": 2.0})


@pytest.fixture(scope="module")
def task(settings: Settings, drawn: Data) -> Segmentation:
    return segmentation_task(settings, drawn)


@pytest.fixture(scope="module")
def unbroken(settings: Settings, task: Segmentation, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The store of a run that nothing interrupted and no cache served."""
    store = Store(tmp_path_factory.mktemp("unbroken"))
    finish(begin(trial_request(settings, (RAW, AVERAGED)), task, store))
    return store


def results(store: Store) -> list[dict[str, object]]:
    leaf = keys_of("trajectory", EPOCHS)[-1]
    return [outcome(store.load_result(leaf, observer.name)) for observer in (RAW, AVERAGED)]


def without_units(found: list[dict[str, object]]) -> list[dict[str, object]]:
    """Results without what a cache is there to save, and its name."""
    kept = []
    for result in found:
        history = [
            {name: v for name, v in record.items() if name not in ("units", "evaluation_units", "cache")}
            for record in result["history"]  # type: ignore[attr-defined]
        ]
        kept.append({**result, "history": history, "evaluation_units": None})
    return kept


def changed(model: StagedModel, before: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in named_tensors(model) if not torch.equal(tensor, before[name])}


def test_an_epoch_changes_the_decoder_and_the_unfrozen_layers_and_nothing_else(
    settings: Settings, task: Segmentation
) -> None:
    t = trajectory(task, settings)
    unfrozen: list[tuple[int, ...]] = [(), (2, 3), (0, 1, 2, 3)]
    for layers in unfrozen:
        before = {name: tensor.detach().clone() for name, tensor in named_tensors(t.model)}
        record = t.train_epoch()
        moved = changed(t.model, before)
        parts = {name.split(".")[0] for name in moved}
        assert parts == ({"mask_decoder", "memory_blocks"} if layers else {"mask_decoder"})
        assert {int(name.split(".")[1]) for name in moved if name.startswith("memory_blocks")} == set(layers)
        assert record.effective["trainable_blocks"] == list(layers)
        for layer in layers:
            of_layer = {name for name, _ in named_tensors(t.model) if name.startswith(f"memory_blocks.{layer}.")}
            assert of_layer - moved <= {name for name in of_layer if name.endswith("k_proj.bias")}


def test_class_weights_start_from_pixels_and_follow_dice(settings: Settings, task: Segmentation) -> None:
    t = trajectory(task, settings)
    records = [t.train_epoch() for _ in range(EPOCHS)]
    inside, outside = task.class_counts()
    ratios = outside / (inside + 1e-6)
    first = [records[1].metrics[f"class_weight/{name}"] for name in task.classes]
    assert first == pytest.approx(np.clip(ratios / ratios.mean(), 0.5, 5).tolist())
    quality = np.array([records[1].metrics[f"val/raw/dice/{name}"] for name in task.classes])
    u = ratios / ratios.mean() * (1 + 2.0 * np.maximum(0, quality.mean() - quality))
    second = [records[2].metrics[f"class_weight/{name}"] for name in task.classes]
    assert second == pytest.approx(np.clip(u / u.mean(), 0.5, 5).tolist())


@pytest.mark.parametrize("boundary", [1, 2])
def test_a_run_resumed_after_any_epoch_equals_the_unbroken_one(
    boundary: int, settings: Settings, task: Segmentation, unbroken: Store, tmp_path: Path
) -> None:
    request, store = trial_request(settings, (RAW, AVERAGED)), Store(tmp_path)
    trial = begin(request, task, store)
    for _ in range(boundary):
        trial.step()
    del trial
    torch.manual_seed(boundary)
    resumed = begin(request, task, store)
    assert resumed.epoch == boundary
    finish(resumed)
    assert results(store) == results(unbroken)


def test_activations_that_were_kept_change_no_bit(
    settings: Settings, task: Segmentation, unbroken: Store, tmp_path: Path
) -> None:
    cache = CacheRequest("segmentation", (0, 2, task.costs.features), when="always")
    store = Store(tmp_path)
    trial = begin(trial_request(settings, (RAW, AVERAGED), cache=cache), task, store)
    records = [trial.step() for _ in range(EPOCHS)]
    assert all(record.cache is not None for record in records), [record.events for record in records]
    assert without_units(results(store)) == without_units(results(unbroken))
    images, costs = len(task.rows("train")), task.costs
    positions = [(costs.features, 0), (2, 2), (0, 4)]
    assert [record.units for record in records] == [images * costs.training(p, k, False) for p, k in positions]


def test_averages_change_nothing_of_what_they_watch(settings: Settings, task: Segmentation) -> None:
    alone = trajectory(task, settings)
    watched = trajectory(task, settings, averages={"ema": (0.9, 3.0)})
    for _ in range(EPOCHS):
        plain, seen = timeless(alone.train_epoch()), timeless(watched.train_epoch())
        assert seen["trajectory_sha256"] == plain["trajectory_sha256"]
        assert all(seen["metrics"][name] == value for name, value in plain["metrics"].items())
    assert "val/ema/mean_dice" in seen["metrics"]


def test_seeds_differ_by_order_and_dropout_from_the_same_initial_weights(
    settings: Settings, task: Segmentation
) -> None:
    one, other = trajectory(task, settings, seed=0), trajectory(task, settings, seed=1)
    initial = {name: tensor.detach().clone() for name, tensor in named_tensors(one.model)}
    assert not changed(other.model, initial)
    assert one.train_epoch().trajectory_sha256 != other.train_epoch().trajectory_sha256


class Memorising(Segmentation):
    """Eight phantoms, each shown ten times an epoch, and validated on themselves."""

    def rows(self, split: str) -> Rows:
        """The first eight training rows in every split."""
        eight = super().rows("train")[:8]
        return np.tile(eight, 10) if split == "train" else eight


@pytest.mark.slow
def test_a_segmenter_overfits_eight_phantoms(drawn: Data) -> None:
    """All of the tiny SAM 2, image encoder included, through the one loop: Dice without any hint of at least 0.9."""
    settings = segmentation_settings(
        strategy={"head_epochs": 1, "tune_epochs": 19, "depth": "all", "unfreezing": "static"}
    )
    opened = segmentation_task(settings, drawn)
    task = Memorising(settings, drawn.index, drawn.images, opened._masks, opened._files, opened.costs)
    t = trajectory(task, settings)
    records = [t.train_epoch() for _ in range(20)]
    last = records[-1].metrics
    assert last["val/raw/mean_dice"] >= 0.9
    assert min(last[f"val/raw/dice/{name}"] for name in task.classes) >= 0.85
    assert records[0].metrics["val/raw/mean_dice"] < 0.6
    assert last["train/loss"] < 0.25 * records[0].metrics["train/loss"]


SMALL = {
    "seeds": [0],
    "dataset.images": 120,
    "dataset.drop_classes": list(segmentation_settings().dataset.drop_classes),
    "strategy.head_epochs": 1,
    "strategy.tune_epochs": 2,
    "strategy.step": 2,
}


@pytest.mark.slow
def test_every_cell_of_the_ablation_is_that_of_a_run_without_sharing(tmp_path: Path) -> None:
    shared = run_study(tmp_path / "shared", SMALL, study="segmentation_ablation")
    alone = run_study(tmp_path / "alone", SMALL, study="segmentation_ablation", sharing=False)
    assert shared.complete
    assert alone.complete
    ours, theirs = shared.cells(), alone.cells()
    assert len(ours) == 4
    for column in ("weights_sha256", "trajectory_sha256", "mean_dice", "mean_dice_oracle", "best_epoch"):
        assert ours[column].tolist() == theirs[column].tolist(), column
    assert ours["trajectory_sha256"].nunique() == 3, "EMA observes the trajectory of the row before it"
    units = shared.header.units
    assert units.executed == shared.plan.units.shared
    assert units.executed < alone.header.units.executed / 2
