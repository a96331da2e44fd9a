"""Segmentation as a task: nothing leaks from an image's masks, losses and Dice by hand, predictions that say it all."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from tiny_segmentation import (
    STRUCTURES,
    all_masks,
    segmentation_data,
    segmentation_settings,
    segmentation_task,
    with_masks,
)
from tiny_trials import CPU, trajectory
from torch import Tensor

from trainables.costs import IMAGES
from trainables.data.index import DataError
from trainables.data.opened import Data
from trainables.mask_arrays import dice, packed, unpacked
from trainables.prompts import PROMPTS, oracle_prompt, training_prompt, whole_image
from trainables.results import TrainingError
from trainables.segmentation import Segmentation, mask_losses, memory_rows
from trainables.settings import SegmentationSettings, Settings
from trainables.tasks import TASKS

SIZE = 64


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return segmentation_data(tmp_path_factory.mktemp("segmentation"))


@pytest.fixture(scope="module")
def settings() -> Settings:
    return segmentation_settings()


@pytest.fixture
def task(settings: Settings, drawn: Data) -> Segmentation:
    return segmentation_task(settings, drawn)


def predicted(task: Segmentation, rows: npt.NDArray[np.intp]) -> npt.NDArray[np.bool_]:
    """(B, C, P, S, S) masks at evaluation, by weights that have learnt nothing."""
    model = task.build(0).eval()
    with torch.no_grad():
        features = model.advance(task.inputs(rows, CPU), IMAGES, task.costs.features)
        logits = model.predict(features, task.side_inputs(rows, CPU, training=False))
    return task._unpacked(task.predictions(logits))


# ------------------------------------------------------------------------------------------------------------- no leak


@pytest.mark.parametrize("split", ["val", "test"])
def test_an_images_own_masks_change_nothing_of_its_prediction(task: Segmentation, split: str) -> None:
    rows = task.rows(split)
    before = predicted(task, rows)
    masks = all_masks(task)
    masks[rows] = np.roll(~masks[rows], 7, axis=-1)
    with_masks(task, masks)
    after = predicted(task, rows)
    assert (after[:, :, 0] == before[:, :, 0]).all()
    assert (after[:, :, 1] != before[:, :, 1]).any(), "the oracle's box does come from the mask"


def test_the_memory_frames_masks_do_change_the_prediction(task: Segmentation) -> None:
    rows = task.rows("test")
    before = predicted(task, rows)
    masks = all_masks(task)
    masks[task._memory[rows]] = np.roll(masks[task._memory[rows]], 20, axis=-1)
    with_masks(task, masks)
    assert (predicted(task, rows)[:, :, 0] != before[:, :, 0]).any()


def test_masks_of_val_and_test_reach_neither_training_nor_any_memory(task: Segmentation) -> None:
    held_out = np.concatenate([task.rows("val"), task.rows("test")])
    everything = np.arange(len(all_masks(task)))
    inputs, counts = task.inputs(everything, CPU), task.class_counts()
    prompts = task.side_inputs(task.rows("train"), CPU, training=True)
    masks = all_masks(task)
    masks[held_out] = ~masks[held_out]
    with_masks(task, masks)
    assert torch.equal(task.inputs(everything, CPU), inputs)
    assert torch.equal(task.side_inputs(task.rows("train"), CPU, training=True), prompts)
    assert all((ours == theirs).all() for ours, theirs in zip(task.class_counts(), counts, strict=True))


def test_an_image_never_enters_with_its_own_masks_not_even_in_training(task: Segmentation) -> None:
    train = task.rows("train")
    before = task.inputs(train, CPU)
    for row in train[:5]:
        masks = all_masks(task)
        masks[row] = ~masks[row]
        fresh = segmentation_like(task)
        with_masks(fresh, masks)
        own = int(np.flatnonzero(train == row)[0])
        assert torch.equal(fresh.inputs(train, CPU)[own], before[own])


def segmentation_like(task: Segmentation) -> Segmentation:
    """Another task over the same data, whose masks can be changed apart."""
    other = object.__new__(Segmentation)
    other.__dict__.update(task.__dict__)
    return other


def test_every_memory_frame_is_a_training_image_of_another_patient(task: Segmentation, drawn: Data) -> None:
    memory, index = task._memory, drawn.index
    assert set(memory.tolist()) <= set(task.rows("train").tolist())
    assert (index.groups[memory] != index.groups).all()
    assert len(set(memory.tolist())) > 15, "not one image for all"


def test_memory_frames_follow_from_names_and_the_splits_seed_alone(task: Segmentation, drawn: Data) -> None:
    again = memory_rows(drawn.index, task._masks, 2026)
    assert (again == task._memory).all()
    assert (memory_rows(drawn.index, task._masks, 2027) != again).any()


def test_an_incomplete_training_image_is_nobodys_memory(task: Segmentation, drawn: Data) -> None:
    used = int(task._memory[0])
    masks = all_masks(task)
    masks[used, 2] = False
    with_masks(task, masks)
    assert used not in memory_rows(drawn.index, task._masks, 2026)


def test_one_patient_alone_has_no_memory(task: Segmentation, drawn: Data) -> None:
    index = dataclasses.replace(drawn.index, groups=np.full(len(drawn.index), "one"))
    with pytest.raises(DataError, match=r"no memory frame for .*: of 38 training images 38 have a mask of every"):
        memory_rows(index, task._masks, 2026)


# ------------------------------------------------------------------------------------------------------------- prompts


def test_prompts_are_the_whole_image_and_a_noisy_or_exact_box(task: Segmentation) -> None:
    rows = task.rows("train")[:6]
    training = task.side_inputs(rows, CPU, training=True).numpy()
    evaluation = task.side_inputs(rows, CPU, training=False).numpy()
    assert training.shape == (6, len(STRUCTURES), len(PROMPTS), 2, 3)
    for both in (training, evaluation):
        assert (both[:, :, 0] == [[0, 0, 2], [63, 63, 3]]).all()
    y, x = np.mgrid[:SIZE, :SIZE]
    for place, masks in enumerate(task._masks.of(rows)):
        for c, mask in enumerate(masks):
            exact = [[x[mask].min(), y[mask].min(), 2], [x[mask].max(), y[mask].max(), 3]]
            assert evaluation[place, c, 1].tolist() == exact
            assert (training[place, c, 1, :, 2] == [2, 3]).all()
            assert (training[place, c, 1, :, :2] >= 0).all()
            assert (training[place, c, 1, :, :2] <= SIZE - 1).all()
            assert (training[place, c, 1, 0, :2] <= training[place, c, 1, 1, :2]).all()
    assert (training[:, :, 1] != evaluation[:, :, 1]).any(axis=(-2, -1)).all()
    assert (task.side_inputs(rows, CPU, training=True).numpy() == training).all(), "the same image, the same prompt"


def test_training_boxes_shift_by_the_noise_that_the_settings_say() -> None:
    mask = np.zeros((100, 100), np.bool_)
    mask[30:71, 20:61] = True  # sides of 40 px between the outer pixels' centres
    given = SegmentationSettings(prompt_noise=0.1)
    boxes = np.array([training_prompt(mask, given, f"i{i}", "heart", 1)[:, :2] for i in range(400)])
    shifts = boxes - [[20, 30], [60, 70]]
    assert np.abs(shifts.mean(axis=0)).max() < 0.8
    assert shifts.std(axis=0) == pytest.approx(4.0, rel=0.15)
    still = training_prompt(mask, SegmentationSettings(prompt_noise=0.0), "i", "heart", 1)
    assert (still == oracle_prompt(mask, given)).all()


def test_point_prompts_lie_inside_and_the_oracles_is_the_deepest() -> None:
    mask = np.zeros((40, 40), np.bool_)
    mask[5:16, 10:31] = True
    mask[5:30, 28:31] = True
    given = SegmentationSettings(prompt="point")
    for number in range(50):
        (x, y, label), (_, _, none) = training_prompt(mask, given, f"i{number}", "heart", 1)
        assert mask[int(y), int(x)]
        assert (label, none) == (1, -1)
    (x, y, _), _ = oracle_prompt(mask, given)
    assert y == 10  # the middle row of the bar, 5 to 15


def test_an_empty_mask_has_the_prompt_that_says_nothing() -> None:
    empty = np.zeros((32, 32), np.bool_)
    for kind in ("box", "point"):
        given = SegmentationSettings.model_validate({"prompt": kind})
        assert (oracle_prompt(empty, given) == whole_image(32)).all()
        assert (training_prompt(empty, given, "i", "heart", 1) == whole_image(32)).all()


# ---------------------------------------------------------------------------------------------------------------- loss


def by_hand(logits: npt.NDArray[np.float64], truth: npt.NDArray[np.bool_]) -> float:
    """20 · focal(α 0.25, γ 2) + 1 · Dice loss of one mask, pixel by pixel."""
    focal = overlap = sizes = 0.0
    for z, inside in zip(logits.flatten().tolist(), truth.flatten().tolist(), strict=True):
        p = 1 / (1 + np.exp(-z))
        p_t, alpha_t = (p, 0.25) if inside else (1 - p, 0.75)
        focal += -alpha_t * (1 - p_t) ** 2 * np.log(p_t)
        overlap += p * inside
        sizes += p + inside
    return 20 * focal / logits.size + 1 - (2 * overlap + 1) / (sizes + 1)


@pytest.fixture
def outputs() -> Tensor:
    """(4, 3, 2, 16, 16) logits of four images."""
    return 3 * torch.randn(4, 3, 2, 16, 16, generator=torch.Generator().manual_seed(4))


def per_mask(task: Segmentation, outputs: Tensor, rows: npt.NDArray[np.intp]) -> npt.NDArray[np.float64]:
    """(B, C) losses by hand, a mean over both prompts."""
    logits = task._full_size(outputs).double().numpy()
    truth = task._masks.of(rows)
    return np.array(
        [
            [np.mean([by_hand(logits[b, c, p], truth[b, c]) for p in range(2)]) for c in range(3)]
            for b in range(len(rows))
        ]
    )


def test_the_loss_is_focal_and_dice_of_every_structure_and_prompt(task: Segmentation, outputs: Tensor) -> None:
    rows = task.rows("train")[:4]
    assert float(task.loss(outputs, rows, None)) == pytest.approx(per_mask(task, outputs, rows).mean(), rel=1e-5)


def test_class_weights_scale_what_their_structure_adds(task: Segmentation, outputs: Tensor) -> None:
    rows = task.rows("train")[:4]
    weights = torch.tensor([0.5, 1.0, 1.5])
    wanted = (per_mask(task, outputs, rows) * weights.numpy()).mean()
    assert float(task.loss(outputs, rows, weights)) == pytest.approx(wanted, rel=1e-5)
    assert float(task.loss(outputs, rows, torch.ones(3))) == pytest.approx(float(task.loss(outputs, rows, None)))


def test_masks_that_are_not_known_add_nothing_and_get_no_gradient(task: Segmentation, outputs: Tensor) -> None:
    rows = task.rows("train")[:4]
    known = task._masks.known.copy()
    known[rows[1], 2] = known[rows[3]] = False
    with_masks(task, all_masks(task), known)
    counted = known[rows]
    wanted = per_mask(task, outputs, rows)[counted].mean()
    outputs.requires_grad_()
    loss = task.loss(outputs, rows, None)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(wanted, rel=1e-5)
    assert ((outputs.grad.abs().sum(dim=(2, 3, 4)) > 0).numpy() == counted).all()
    known[rows] = False
    with_masks(task, all_masks(task), known)
    assert float(task.loss(outputs.detach(), rows, None)) == 0.0


def test_gains_alpha_and_gamma_act_as_the_formula_says() -> None:
    logits, truth = torch.tensor([[[2.0, -1.0]]]), torch.tensor([[[1.0, 1.0]]])
    p = torch.sigmoid(logits)
    plain = SegmentationSettings(focal_gain=1.0, dice_gain=0.0, focal_alpha=1.0, focal_gamma=0.0)
    assert mask_losses(logits, truth, plain) == pytest.approx(float(-p.log().mean()), rel=1e-6)
    sharp = SegmentationSettings(focal_gain=1.0, dice_gain=0.0, focal_alpha=1.0, focal_gamma=3.0)
    assert mask_losses(logits, truth, sharp) == pytest.approx(float((-((1 - p) ** 3) * p.log()).mean()), rel=1e-6)
    overlap = SegmentationSettings(focal_gain=0.0, dice_gain=2.0)
    wanted = 2 * (1 - (2 * float(p.sum()) + 1) / (float(p.sum()) + 2 + 1))
    assert mask_losses(logits, truth, overlap) == pytest.approx(wanted, rel=1e-6)


def test_counts_are_the_pixels_of_the_training_split(task: Segmentation) -> None:
    train = task.rows("train")
    inside, outside = task.class_counts()
    planes = all_masks(task)[train]
    assert inside.tolist() == planes.sum(axis=(0, 2, 3)).tolist()
    assert (inside + outside == len(train) * SIZE * SIZE).all()
    known = task._masks.known.copy()
    known[train[0], 0] = False
    with_masks(task, all_masks(task), known)
    fewer, without = task.class_counts()
    assert fewer[0] == inside[0] - planes[0, 0].sum()
    assert fewer[0] + without[0] == (len(train) - 1) * SIZE * SIZE


# ---------------------------------------------------------------------------------------------------------------- Dice


def test_dice_by_hand() -> None:
    """|A| = 3, |B| = 2, one pixel in both: 2 · 1 / 5; a mask and itself 1; nothing in common 0; two empty 1."""
    a = np.array([[1, 1, 1, 0], [0, 0, 0, 0]], np.bool_)
    b = np.array([[0, 0, 1, 1], [0, 0, 0, 0]], np.bool_)
    empty = np.zeros((2, 4), np.bool_)
    assert dice(a, b) == pytest.approx(0.4)
    assert dice(a, a) == 1
    assert dice(a, ~a) == 0
    assert dice(a, empty) == 0
    assert dice(empty, empty) == 1
    assert dice(np.stack([a, b]), b).tolist() == pytest.approx([0.4, 1.0])


def test_scores_are_means_over_images_then_structures_and_the_oracles_stand_apart(task: Segmentation) -> None:
    rows = task.rows("test")
    rng = np.random.default_rng(1)
    masks = rng.random((len(rows), 3, 2, SIZE, SIZE)) < 0.3
    truth = task._masks.of(rows)
    scores = task.score(packed(masks), rows)
    for p, label in enumerate(("", "_oracle")):
        means = []
        for c, name in enumerate(STRUCTURES):
            values = [
                2 * (masks[i, c, p] & truth[i, c]).sum() / (masks[i, c, p].sum() + truth[i, c].sum())
                for i in range(len(rows))
            ]
            means.append(np.mean(values))
            assert scores.metrics[f"dice{label}/{name}"] == pytest.approx(means[-1])
        assert scores.metrics[f"mean_dice{label}"] == pytest.approx(np.mean(means))
    assert scores.quality.tolist() == [scores.metrics[f"dice/{name}"] for name in STRUCTURES]
    assert scores.undefined == ()


def test_images_without_a_mask_are_left_out_and_a_structure_without_any_is_undefined(task: Segmentation) -> None:
    rows = task.rows("test")
    masks = np.random.default_rng(2).random((len(rows), 3, 2, SIZE, SIZE)) < 0.3
    whole = task.score(packed(masks), rows)
    known = task._masks.known.copy()
    known[rows[0], 0] = False
    known[rows, 1] = False
    with_masks(task, all_masks(task), known)
    scores = task.score(packed(masks), rows)
    kept = dice(masks[1:, 0, 0], task._masks.of(rows)[1:, 0])
    assert scores.metrics["dice/left_lung"] == pytest.approx(kept.mean())
    assert scores.undefined == ("right_lung",)
    assert "dice/right_lung" not in scores.metrics
    assert np.isnan(scores.quality[1])
    assert scores.metrics["mean_dice"] == pytest.approx((kept.mean() + whole.metrics["dice/heart"]) / 2)


@pytest.mark.parametrize("shape", [(1,), (7,), (24,), (25,), (3, 2, 5, 5), (3, 2, 64, 64)])
def test_packed_masks_come_back_and_every_number_is_finite(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(len(shape))
    for share in (0.0, 0.5, 1.0):
        masks = rng.random((5, *shape)) < share
        numbers = packed(masks)
        assert numbers.dtype == np.float32
        assert numbers.shape == (5, math.ceil(np.prod(shape) / 24))
        assert np.isfinite(numbers).all()
        assert (unpacked(numbers, shape) == masks).all()


def test_predictions_are_the_masks_of_positive_logits_at_full_size(task: Segmentation, outputs: Tensor) -> None:
    kept = task._unpacked(task.predictions(outputs))
    full = torch.nn.functional.interpolate(outputs.flatten(1, 2), size=(SIZE, SIZE), mode="bilinear")
    assert (kept.reshape(4, 6, SIZE, SIZE) == (full > 0).numpy()).all()


def test_logits_that_are_no_numbers_end_the_training(settings: Settings, task: Segmentation) -> None:
    t = trajectory(task, settings)
    with torch.no_grad():
        t.model.head().mask_tokens.weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match="predictions are not finite"):
        t.evaluate(task.rows("val"))


def test_metrics_can_be_computed_again_from_what_is_kept(task: Segmentation, tmp_path: Path) -> None:
    rows = task.rows("test")
    predictions = packed(np.random.default_rng(3).random((len(rows), 3, 2, SIZE, SIZE)) < 0.4)
    np.savez_compressed(tmp_path / "predictions.npz", **task.describe(predictions, rows))
    with np.load(tmp_path / "predictions.npz", allow_pickle=False) as kept:
        side = int(kept["size"])
        predicted_masks, truth = (
            np.unpackbits(kept[name], axis=-1, count=side**2).reshape(*kept[name].shape[:-1], side, side)
            for name in ("predicted", "truth")
        )
        both = 2 * (predicted_masks * truth[:, :, None]).sum((-2, -1), dtype=np.int64)
        values = both / (predicted_masks.sum((-2, -1), dtype=np.int64) + truth.sum((-2, -1), dtype=np.int64)[..., None])
        assert values == pytest.approx(kept["dice"])
        means = values.mean(axis=0)
        scores = task.score(predictions, rows).metrics
        assert scores["mean_dice"] == pytest.approx(means[:, list(kept["prompts"]).index("whole_image")].mean())
        assert scores["mean_dice_oracle"] == pytest.approx(means[:, list(kept["prompts"]).index("oracle")].mean())
        assert kept["classes"].tolist() == list(STRUCTURES)
        assert len(set(kept["groups"]) & set(kept["memory"])) == 0
        assert kept["names"].tolist() == task._index.names[rows].tolist()


# ------------------------------------------------------------------------------------------------------------ bad input


def test_a_data_set_without_masks_is_refused_before_anything_is_drawn(settings: Settings, drawn: Data) -> None:
    classes = TASKS["segmentation"].classes
    assert classes(settings, drawn.index) == STRUCTURES
    derm = settings.model_copy(update={"dataset": settings.dataset.model_copy(update={"name": "phantom-derm"})})
    with pytest.raises(DataError, match="phantom-derm: has no masks of left_lung, right_lung, heart; the data set"):
        classes(derm, drawn.index)
    clavicle = segmentation_settings(segmentation={"structures": ["heart", "clavicle"]})
    with pytest.raises(DataError, match="phantom: has no masks of clavicle; it has left_lung, right_lung, heart"):
        classes(clavicle, drawn.index)


def test_a_folder_without_masks_is_refused_by_name(settings: Settings, drawn: Data, tmp_path: Path) -> None:
    (tmp_path / "masks/heart").mkdir(parents=True)
    real = settings.model_copy(
        update={"dataset": settings.dataset.model_copy(update={"name": "chestxray14", "root": str(tmp_path)})}
    )
    index = dataclasses.replace(drawn.index, synthetic=False)
    with pytest.raises(DataError, match=r"no masks of 'left_lung': no folder .*left_lung; .*segmentation\.structures"):
        TASKS["segmentation"].classes(real, index)


def test_a_split_without_a_mask_of_a_structure_is_refused(settings: Settings, task: Segmentation, drawn: Data) -> None:
    known = task._masks.known.copy()
    known[task.rows("val"), 1] = False
    masks = dataclasses.replace(task._masks, known=known)
    with pytest.raises(DataError, match="no usable mask of right_lung in the split 'val'; leave the structure out"):
        Segmentation(settings, drawn.index, drawn.images, masks, task._files, task.costs)


def test_a_structure_given_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="heart given twice"):
        SegmentationSettings(structures=("heart", "left_lung", "heart"))
