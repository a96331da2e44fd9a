"""Boxes and masks over test patients: COCO's own code on images that really are there twice, intervals by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from simulated_study import Simulated, simulate

from analysis.drawn_quality import boxes_of, masks_of
from analysis.patients import PredictionsError, patient_noise
from analysis.records import StudyRecords
from analysis.report import write_report
from analysis.tables import build_table
from tests.coco_reference import by_pycocotools

CLASSES, MOST, IMAGES = 3, 12, 14
ROWS = ("plain", "full")


def drawn_boxes(seed: int, shake: float) -> dict[str, Any]:
    """True boxes of two classes in 14 images of 7 patients; predictions near them, and at wrong places or of others."""
    rng = np.random.default_rng(5)
    image = np.sort(rng.integers(0, IMAGES, 30))
    corner = rng.uniform(0, 70, (30, 2))
    true = np.column_stack((corner, corner + rng.uniform(8, 30, (30, 2))))
    label = rng.integers(0, CLASSES - 1, 30)  # the last class has none
    rng = np.random.default_rng(seed)
    boxes = np.zeros((IMAGES, MOST, 6), np.float32)
    boxes[..., 5] = -1
    for i in range(IMAGES):
        mine = true[image == i]
        near = np.concatenate((mine, mine[:2], rng.uniform(0, 50, (2, 4)))) + rng.normal(
            0, shake, (len(mine[:2]) + len(mine) + 2, 4)
        )
        near = np.concatenate((np.minimum(near[:, :2], near[:, 2:]), np.maximum(near[:, :2], near[:, 2:]) + 1), axis=1)
        labels = np.concatenate((label[image == i], label[image == i][:2], rng.integers(0, CLASSES, 2)))
        lines = np.column_stack((near, rng.uniform(0.01, 1, len(near)), labels)).astype(np.float32)[:MOST]
        boxes[i, : len(lines)] = lines[np.argsort(-lines[:, 4])]
    return {
        "names": np.array([f"i{i}" for i in range(IMAGES)]),
        "groups": np.array([f"p{i // 2}" for i in range(IMAGES)]),
        "classes": np.array(["Mass", "Nodule", "Edema"]),
        "boxes": boxes,
        "true_image": image,
        "true_class": label,
        "true_xyxy": true,
        "image_size": np.array(100),
    }


def drawn_masks(seed: int, quality: float) -> dict[str, Any]:
    """Dice of two structures; the first image has no mask of the second."""
    rng = np.random.default_rng(seed)
    dice = np.clip(rng.normal(quality, 0.1, (IMAGES, 2, 2)), 0, 1)
    dice[0, 1] = np.nan
    return {
        **{k: v for k, v in drawn_boxes(0, 1).items() if k in ("names", "groups")},
        "dice": dice,
        "classes": np.array(["heart", "lung"]),
    }


def coco_on(stored: dict[str, Any], counts: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
    """(C,) AP by pycocotools where each image is there as often as it is drawn."""
    drawn = np.repeat(np.arange(IMAGES), counts)
    parts = [np.flatnonzero(stored["true_image"] == i) for i in drawn]
    chosen = np.concatenate(parts)
    at = np.repeat(np.arange(len(drawn)), [len(part) for part in parts])
    truth: Any = SimpleNamespace(
        images=len(drawn), image=at, label=stored["true_class"][chosen], xyxy=stored["true_xyxy"][chosen]
    )
    return by_pycocotools(stored["boxes"][drawn], truth, CLASSES, MOST)[1]


@pytest.mark.parametrize("seed", range(3))
def test_average_precision_of_a_draw_is_cocos_on_images_that_are_there_as_often(seed: int) -> None:
    stored = drawn_boxes(seed, 2.0)
    rng = np.random.default_rng(seed)
    counts = np.stack([np.ones(IMAGES, int), *rng.multinomial(IMAGES, [1 / IMAGES] * IMAGES, 5)], axis=1).astype(
        np.int32
    )
    ours = boxes_of(stored).replicates(counts)
    theirs = np.stack([coco_on(stored, draw) for draw in counts.T], axis=1)
    assert 0.1 < np.nanmean(theirs) < 0.95
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9)
    assert np.isnan(ours[2]).all()


def test_dice_of_a_draw_is_the_mean_over_its_images_that_have_a_mask() -> None:
    dice = np.zeros((3, 2, 2))
    dice[:, :, 0] = [[0.5, np.nan], [0.8, 0.2], [0.2, 0.6]]
    counts = np.array([[1, 2, 3], [1, 1, 0], [1, 0, 0]], np.int32)
    found = masks_of({"dice": dice}).replicates(counts)
    assert found[0].tolist() == pytest.approx([0.5, (2 * 0.5 + 0.8) / 3, 0.5])
    assert found[1, :2].tolist() == pytest.approx([0.4, 0.2])
    assert np.isnan(found[1, 2])


def study(
    folder: Path, metric: str, made: Callable[[int, float], dict[str, Any]], by_row: dict[str, float]
) -> StudyRecords:
    """A study of two rows whose ledger says what the stored predictions give."""
    records = simulate(Simulated(rows=ROWS, seeds=(0, 1), parts=(), datasets=("jsrt",)))
    cells, stored = records.cells.rename(columns={"macro_auc": metric}), {}
    for at, cell in cells.iterrows():
        arrays = made(int(cell["seed"]), by_row[str(cell["row"])])
        path = folder / str(cell["mlflow_run_id"]) / "predictions.npz"
        path.parent.mkdir(parents=True)
        np.savez_compressed(path, **arrays)
        stored[str(cell["mlflow_run_id"])] = path
        if metric == "mean_dice":
            figure = np.nanmean(np.nanmean(arrays["dice"][:, :, 0], axis=0))
        else:
            figure = np.nanmean(coco_on(arrays, np.ones(IMAGES, np.int32)))
        cells.loc[at, metric] = figure
    header = records.header.model_copy(update={"main_metric": metric, "metric_label": metric})
    return replace(records, header=header, cells=cells, predictions=stored)


@pytest.fixture(params=["map50_95", "mean_dice"])
def records(request: pytest.FixtureRequest, tmp_path: Path) -> StudyRecords:
    if request.param == "map50_95":
        return study(tmp_path / "kept", request.param, drawn_boxes, {"plain": 4.0, "full": 1.0})
    return study(tmp_path / "kept", request.param, drawn_masks, {"plain": 0.5, "full": 0.7})


def test_rows_are_compared_over_whole_patients(records: StudyRecords) -> None:
    (noise,) = patient_noise(records, build_table(records), np.random.default_rng(0), draws=300)
    (comparison,) = build_table(records).comparisons
    assert noise.macro.value == pytest.approx(comparison.paired.delta, abs=1e-6)
    assert noise.macro.low < noise.macro.value < noise.macro.high
    assert noise.macro.low > 0, "the rows do differ"
    assert (noise.images, noise.groups, noise.draws) == (IMAGES, 7, 300)
    assert set(noise.classes) == ({"Mass", "Nodule"} if "map50_95" in records.cells else {"heart", "lung"})
    assert np.mean([e.value for e in noise.classes.values()]) == pytest.approx(noise.macro.value)
    again = patient_noise(records, build_table(records), np.random.default_rng(0), draws=300)
    assert again == [noise]


def test_the_report_has_the_intervals_and_says_that_seven_patients_are_few(
    records: StudyRecords, tmp_path: Path
) -> None:
    paths = write_report(records, tmp_path / "report")
    page = paths.html.read_text()
    assert "Over test patients" in page
    assert "7 groups are too few" in page
    what = "AP@50-95" if "map50_95" in records.cells else "Dice"
    assert f"Δ {what} by class on" in page and "(bootstrap 95 %)" in page
    assert "bootstrap over test patients" in paths.table_md.read_text()


def test_predictions_that_contradict_the_ledger_are_told(records: StudyRecords) -> None:
    metric = records.header.main_metric
    cells = records.cells.copy()
    cells.loc[cells.index[0], metric] += 0.01
    wrong = replace(records, cells=cells)
    with pytest.raises(PredictionsError, match=f"give a {metric} of .*, the ledger says"):
        patient_noise(wrong, build_table(wrong), np.random.default_rng(0))
