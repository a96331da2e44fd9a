"""Detection: metrics against pycocotools, losses against numpy, predictions that can be checked from what is kept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.special import expit

import tests.detection_extra_alone  # noqa: F401
from tests.coco_reference import Predictions, by_pycocotools
from tests.task_cases import CASES, CPU, Case, opened
from trainables.data.box_targets import load_box_targets
from trainables.detection import Detection
from trainables.detection_metrics import Truth, evaluate
from trainables.task import Task
from trainables.ultralytics_models import Outputs, WeightedRTDETRLoss

YOLO, RTDETR = CASES["detection by YOLO"], CASES["detection by RT-DETR"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp() / "task_cases"


def forward(task: Task, case: Case, rows: npt.NDArray[np.intp], *, training: bool) -> Outputs:
    model = task.build(0)
    model.module().train(training)
    torch.manual_seed(3)
    features = model.advance(task.inputs(rows, CPU), -1, task.costs.features)
    outputs: Outputs = model.predict(features, task.side_inputs(rows, CPU, training=training))
    return outputs


# -- metrics ---------------------------------------------------------------------------------------------------------


def random_boxes(rng: np.random.Generator, number: int, size: float = 100.0) -> npt.NDArray[np.float64]:
    corner = rng.uniform(0, 0.7 * size, (number, 2))
    return np.column_stack((corner, corner + rng.uniform(8, 0.3 * size, (number, 2))))


def guesses(rng: np.random.Generator, truth: Truth, classes: int, max_det: int) -> Predictions:
    """Shaken true boxes, some of a wrong class, some twice, and boxes of nothing."""
    kept = np.zeros((truth.images, max_det, 6), np.float32)
    kept[..., 5] = -1
    for image in range(truth.images):
        mine = truth.image == image
        near = truth.xyxy[mine] + rng.normal(0, 1.5, (mine.sum(), 4))
        boxes = np.concatenate((near, near + rng.normal(0, 3, near.shape), random_boxes(rng, 6)))
        boxes = np.concatenate((np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:])), axis=1)
        labels = np.concatenate((truth.label[mine], truth.label[mine], rng.integers(0, classes, 6)))
        labels = np.where(rng.random(len(labels)) < 0.15, rng.integers(0, classes, len(labels)), labels)
        lines = np.column_stack((boxes, rng.uniform(0.01, 1, len(boxes)), labels)).astype(np.float32)
        lines = lines[np.argsort(-lines[:, 4])][:max_det]
        kept[image, : len(lines)] = lines
    return kept


@pytest.mark.parametrize("seed", range(4))
def test_average_precision_is_that_of_pycocotools(seed: int) -> None:
    rng = np.random.default_rng(seed)
    boxes, images, classes, max_det = 60, 25, 5, 12
    image = np.sort(rng.integers(0, images, boxes))
    truth = Truth(images, image, rng.integers(0, classes - 1, boxes), random_boxes(rng, boxes))  # the last class: none
    predictions = guesses(rng, truth, classes, max_det)
    ours = evaluate(predictions, truth, classes, max_det)
    theirs = by_pycocotools(predictions, truth, classes, max_det)
    assert np.isnan(theirs[:, -1]).all()
    assert 0.05 < np.nanmean(theirs[1]) < 0.95
    np.testing.assert_allclose(np.stack((ours.ap50, ours.ap)), theirs, rtol=0, atol=1e-6)


def test_precision_and_recall_are_counted_at_the_best_mean_f1() -> None:
    """One image a box; class 0 has two true boxes, class 1 one. A box counts once, however often it is found."""
    truth = Truth(3, np.arange(3), np.array([0, 0, 1]), np.array([[0, 0, 10, 10]] * 3, float))
    right, wrong = [0, 0, 10, 10], [50, 50, 60, 60]
    none = [0, 0, 0, 0, 0, -1]
    predictions = np.array(
        [
            [[*right, 0.9, 0], [*right, 0.3, 0], none],
            [[*right, 0.6, 0], [*wrong, 0.5, 0], none],
            [[*right, 0.55, 1], [*wrong, 0.8, 1], none],
        ],
        np.float32,
    )
    quality = evaluate(predictions, truth, 2, 3)
    # down to 0.55: class 0 has both boxes and nothing else, class 1 its box and one that is wrong
    assert quality.score == pytest.approx(0.55)
    assert quality.precision.tolist() == [1.0, 0.5]
    assert quality.recall.tolist() == [1.0, 1.0]


def test_no_predictions_are_zero_where_there_is_truth_and_undefined_elsewhere() -> None:
    truth = Truth(2, np.array([0]), np.array([1]), np.array([[0, 0, 5, 5]], float))
    nothing = np.full((2, 4, 6), -1, np.float32)
    quality = evaluate(nothing, truth, 2, 4)
    for values in (quality.ap, quality.ap50, quality.precision, quality.recall):
        assert np.isnan(values[0])
        assert values[1] == 0


@pytest.mark.parametrize("case", [YOLO, RTDETR], ids=["YOLO", "RT-DETR"])
def test_what_is_kept_beside_predictions_gives_the_same_metrics(case: Case, drawn: Path) -> None:
    task = case.open(drawn)
    t = case.trajectory(task)
    for _ in range(2):
        t.train_epoch()
    rows = task.rows("val")
    predictions = t.predict(rows)
    scores, kept = task.score(predictions, rows), task.describe(predictions, rows)
    truth = Truth(len(kept["names"]), kept["true_image"], kept["true_class"], kept["true_xyxy"])  # type: ignore[arg-type]
    theirs = by_pycocotools(kept["boxes"], truth, len(kept["classes"]), int(kept["max_det"]))  # type: ignore[arg-type, call-overload]
    assert scores.metrics["map50_95"] == pytest.approx(np.nanmean(theirs[1]), abs=1e-6)
    assert scores.metrics["map50"] == pytest.approx(np.nanmean(theirs[0]), abs=1e-6)
    np.testing.assert_allclose(scores.quality, theirs[0], atol=1e-6)


# -- predictions -----------------------------------------------------------------------------------------------------


def test_suppression_drops_the_weaker_of_two_boxes_of_a_class_and_keeps_other_classes(drawn: Path) -> None:
    settings = YOLO.settings(detection={"max_det": 4, "min_score": 0.05, "nms_iou": 0.5})
    task: Any = YOLO.open(drawn, detection=settings.detection.model_dump())
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 10, 10], [30, 30, 40, 50], [0, 0, 9, 9]])
    scores = torch.tensor([[0.9, 0.1, 0, 0], [0.8, 0, 0, 0], [0, 0, 0.04, 0], [0, 0, 0, 0.7]])
    chosen = task._chosen(boxes, scores, suppress=True)
    expected = [[0, 0, 10, 10, 0.9, 0], [0, 0, 9, 9, 0.7, 3], [0, 0, 10, 10, 0.1, 1]]
    torch.testing.assert_close(chosen, torch.tensor(expected))
    repeated = task._chosen(boxes, scores, suppress=False)
    assert repeated[:, 4].tolist() == pytest.approx([0.9, 0.8, 0.7, 0.1])


@pytest.mark.parametrize("case", [YOLO, RTDETR], ids=["YOLO", "RT-DETR"])
def test_predictions_are_boxes_inside_the_input_best_first_and_padded(case: Case, drawn: Path) -> None:
    task = case.open(drawn, detection={"max_det": 7})
    with torch.no_grad():
        predictions = task.predictions(forward(task, case, task.rows("val"), training=False))
    assert predictions.shape == (9, 7, 6)
    real = predictions[..., 5] >= 0
    assert real.any()
    boxes = predictions[real]
    assert (boxes[:, :4] >= 0).all() and (boxes[:, :4] <= 64).all()
    assert (np.diff(predictions[..., 4], axis=1) <= 0).all()
    assert (predictions[~real] == [0, 0, 0, 0, 0, -1]).all()


def test_a_model_that_has_broken_is_noticed(drawn: Path) -> None:
    task = YOLO.open(drawn)
    model = task.build(0)
    model.module().eval()
    with torch.no_grad():
        next(iter(model.head().parameters())).fill_(float("nan"))
        outputs = model.predict(model.advance(task.inputs(task.rows("val"), CPU), -1, 11))
        assert not np.isfinite(task.predictions(outputs)).all()


# -- losses ----------------------------------------------------------------------------------------------------------


def bce(logits: npt.NDArray[np.float64], targets: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    p = expit(logits)
    return -(targets * np.log(p) + (1 - targets) * np.log1p(-p))


def test_class_weights_multiply_yolos_classification_loss_as_computed_by_hand(
    drawn: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ultralytics.utils.tal import TaskAlignedAssigner

    task = YOLO.open(drawn)
    rows = task.rows("train")[:8]
    outputs = forward(task, YOLO, rows, training=True)
    assigned: list[torch.Tensor] = []
    assign = TaskAlignedAssigner.forward

    def listening(self: TaskAlignedAssigner, *given: Any, **named: Any) -> Any:
        made = assign(self, *given, **named)
        assigned.append(made[2].detach().clone())
        return made

    monkeypatch.setattr(TaskAlignedAssigner, "forward", listening)
    weights = torch.tensor([0.5, 2.0, 1.0, 3.0])
    difference = float((task.loss(outputs, rows, weights) - task.loss(outputs, rows, None)).detach())
    targets = assigned[0].double().numpy()
    assert targets.sum() > 0.1
    logits = outputs.raw["scores"].detach().permute(0, 2, 1).double().numpy()
    of_class = 0.5 * bce(logits, targets).sum(axis=(0, 1)) / max(targets.sum(), 1)  # the gain of classes is 0.5
    assert difference == pytest.approx(((weights.numpy() - 1) * of_class).sum(), rel=1e-5)
    alike, plain = (float(task.loss(outputs, rows, w).detach()) for w in (torch.ones(4), None))
    assert alike == pytest.approx(plain)


def test_class_weights_multiply_rtdetrs_classification_loss_as_computed_by_hand() -> None:
    """Varifocal loss (Zhang et al. 2021) with α = 0.25, γ = 1.5, over the number of boxes; background is class 4."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 10, 4))
    labels = np.full((2, 10), 4)
    labels[0, [1, 4]], labels[1, [0, 7, 9]] = [2, 0], [1, 1, 3]
    iou = np.where(labels < 4, rng.uniform(0.2, 0.9, (2, 10)), 0)
    hot = labels[..., None] == np.arange(4)
    quality = iou[..., None] * hot
    focus = np.where(hot, quality, 0.25 * expit(logits) ** 1.5)
    weights = np.array([0.5, 2.0, 1.0, 3.0])
    of_class = (focus * bce(logits, quality)).sum(axis=(0, 1)) / 5
    given = (torch.from_numpy(logits).float(), torch.from_numpy(labels), torch.from_numpy(iou).float(), 5)
    for scale, expected in ((weights, (weights * of_class).sum()), (np.ones(4), of_class.sum())):
        criterion = WeightedRTDETRLoss(4, torch.from_numpy(scale).float())
        assert float(criterion._get_loss_class(*given)["loss_class"]) == pytest.approx(expected, rel=1e-5)
    plain = WeightedRTDETRLoss(4, None)._get_loss_class(*given, "_dn")["loss_class_dn"]
    assert float(plain) == pytest.approx(of_class.sum(), rel=1e-5)


def test_class_weights_reach_every_layer_of_rtdetrs_loss(drawn: Path) -> None:
    """The loss is affine in the weights: twice the weights add once more what the weights of one add to zero."""
    task = RTDETR.open(drawn)
    rows = task.rows("train")[:8]
    outputs = forward(task, RTDETR, rows, training=True)
    none, one, two = (float(task.loss(outputs, rows, torch.full((4,), w)).detach()) for w in (0.0, 1.0, 2.0))
    assert one == pytest.approx(float(task.loss(outputs, rows, None).detach()), rel=1e-5)
    assert two - one == pytest.approx(one - none, rel=1e-4)
    assert one > none


@pytest.mark.parametrize("case", [YOLO, RTDETR], ids=["YOLO", "RT-DETR"])
def test_images_without_a_box_are_learnt_from(case: Case, drawn: Path) -> None:
    task = case.open(drawn)
    settings = case.settings()
    data = opened(settings, drawn)
    boxes = load_box_targets(settings, data.index, data.root)
    empty = np.setdiff1d(data.index.rows("train"), boxes.rows)[:4]
    assert len(empty) == 4
    outputs = forward(task, case, empty, training=True)
    loss = task.loss(outputs, empty, None)
    loss.backward()
    assert torch.isfinite(loss) and loss.item() > 0


def test_class_counts_are_images_with_and_without_a_box_of_the_class(drawn: Path) -> None:
    settings = YOLO.settings()
    data = opened(settings, drawn)
    task: Any = YOLO.open(drawn)
    assert isinstance(task._task, Detection)
    positives, negatives = task.class_counts()
    train = data.index.rows("train")
    kept = [data.index.classes.index(name) for name in task.classes]
    assert positives.tolist() == data.index.labels[train][:, kept].sum(0).tolist()
    assert (positives + negatives == len(train)).all()


def test_class_weights_start_from_training_images_with_and_without_a_box(drawn: Path) -> None:
    """They follow AP50 from then on: what `score` gives as quality is compared with pycocotools above."""
    weighted = {"weighting": {"enabled": True}}
    task = YOLO.open(drawn)
    t = YOLO.trajectory(task, **weighted)
    t.train_epoch()
    record = t.train_epoch()
    with_box, without = task.class_counts()
    ratios = without / (with_box + 1e-6)
    weights = [record.metrics[f"class_weight/{name}"] for name in task.classes]
    assert weights == pytest.approx(np.clip(ratios / ratios.mean(), 0.5, 5).tolist())


# -- it learns -------------------------------------------------------------------------------------------------------

BOXED = {"images": 600, "drop_classes": ()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "size", "steps", "rate", "clip"),
    [(YOLO, 128, 300, 5e-3, 10.0), (RTDETR, 96, 320, 1e-3, 1.0)],
    ids=["YOLO", "RT-DETR"],
)
def test_a_detector_can_learn_eight_phantoms_by_heart(
    case: Case, size: int, steps: int, rate: float, clip: float, drawn: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From drawn weights, the whole of it trains from the second step on; one step an epoch, until it has learnt.

    YOLO has one box a cell of 8 px, so that 96 px are too few for a nodule in the midst of another finding.
    """
    monkeypatch.setattr("trainables.detectors._shipped_weights", lambda name: None)
    changes: dict[str, Any] = {
        "dataset": {**BOXED, "image_size": size},
        "optimiser": {"encoder_lr": rate, "head_lr": rate, "schedule": "linear", "clip_norm": clip},
        "strategy": {"head_epochs": 1, "tune_epochs": steps - 1, "unfreezing": "static", "depth": "all"},
    }
    task = case.open(drawn, **changes)
    rows = task._task._boxes.rows  # type: ignore[attr-defined]
    eight = np.unique(rows)[:8]
    monkeypatch.setattr(type(task), "rows", lambda self, split: eight)
    t = case.trajectory(task, **changes)
    monkeypatch.setattr(t, "_validate", lambda now: {})
    found = 0.0
    while found < 0.9 and t.epoch < steps:
        t.train_epoch()
        if t.epoch % 20 == 0:
            found = t.evaluate(eight).metrics["map50"]
    assert found >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["yolov8s", "rtdetr-l"])
def test_published_detectors_train_layer_by_layer_in_our_loop(backbone: str, drawn: Path) -> None:
    """Of the size that studies of real data use: the head alone, then all ten layers of the backbone as well."""
    case = Case(f"detection by {backbone}", "detection", {**YOLO.changes, "model": {"backbone": backbone}})
    changes = {"strategy": {"tune_epochs": 1, "depth": "all", "step": 10}, "weighting": {"enabled": True}}
    task = case.open(drawn, **changes)
    t = case.trajectory(task, **changes)
    for k in (0, 10):
        before = [[p.detach().clone() for p in block.parameters()] for block in t.model.blocks()]
        record = t.train_epoch()
        assert record.metrics["unfrozen_blocks"] == k
        assert np.isfinite(record.metrics["train/loss"])
        moved = [
            any(not torch.equal(a, b) for a, b in zip(old, block.parameters(), strict=True))
            for old, block in zip(before, t.model.blocks(), strict=True)
        ]
        assert moved == [k > 0] * 10
