"""Predictions beside the truth: which images are chosen, what is drawn on them, and what is said where none are."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from simulated_study import Simulated, simulate

from analysis import pictures
from analysis.patients import PredictionsError
from analysis.picture_choice import Choice, choose, image_ap50, read_lines
from analysis.pictures import PREDICTION, TRUTH, draw_pictures
from analysis.records import StudyRecords
from analysis.report import write_report
from analysis.tables import build_table

ROWS = ("plain", "full")
SIDE = 40
NAMES = np.array([f"{i:08d}_000.png" for i in range(5)])
TRUE = np.array([[4, 4, 20, 20]] * 4, np.float64)  # the last image has no box
# By row and image: how far the predicted box is shifted. IoU ≥ 0.5 up to 5 px.
SHIFTS = {"plain": (0, 12, 12, 0, 0), "full": (0, 12, 0, 0, 0)}


def boxes_of(shifts: tuple[int, ...]) -> dict[str, Any]:
    """Predictions of a detector: one good or shifted box an image, and a weak one elsewhere."""
    found = np.zeros((len(NAMES), 3, 6), np.float32)
    found[:, :, 5] = -1
    for image, shift in enumerate(shifts):
        found[image, 0] = (4 + shift, 4, 20 + shift, 20, 0.87, 1)
        found[image, 1] = (25, 25, 35, 35, 0.12, 0)
    return {
        "names": NAMES,
        "classes": np.array(["Mass", "Nodule"]),
        "boxes": found,
        "true_image": np.arange(4),
        "true_class": np.ones(4, np.int64),
        "true_xyxy": TRUE,
        "image_size": np.array(SIDE),
    }


def masks_of(shifts: tuple[int, ...]) -> dict[str, Any]:
    """Predictions of a segmenter: a true square, and predicted ones that are shifted; the first image has no mask."""
    truth = np.zeros((len(NAMES), 1, SIDE, SIDE), np.bool_)
    truth[:, 0, 4:20, 4:20] = True
    predicted = np.stack([np.roll(truth[i, 0], shift, axis=1) for i, shift in enumerate(shifts)])[:, None, None]
    predicted = np.repeat(predicted, 2, axis=2)
    known = np.array([[False]] + [[True]] * 4)
    both = (truth[:, :, None] & predicted).sum(axis=(-2, -1))
    dice = 2 * both / (truth[:, :, None].sum(axis=(-2, -1)) + predicted.sum(axis=(-2, -1)))
    return {
        "names": NAMES,
        "classes": np.array(["heart"]),
        "size": np.array(SIDE),
        "predicted": np.packbits(predicted.reshape(5, 1, 2, -1), axis=-1),
        "truth": np.packbits(truth.reshape(5, 1, -1), axis=-1),
        "known": known,
        "dice": np.where(known[:, :, None], dice, np.nan),
    }


def study(folder: Path, task: str, made: Callable[[tuple[int, ...]], dict[str, Any]]) -> StudyRecords:
    """A simulated study of two rows with predictions of boxes or masks at every seed."""
    records = simulate(Simulated(rows=ROWS, seeds=(0, 1), parts=(), datasets=("jsrt",)))
    stored: dict[str, Path] = {}
    for cell in records.cells.to_dict("records"):
        path = folder / str(cell["mlflow_run_id"]) / "predictions.npz"
        path.parent.mkdir(parents=True)
        np.savez_compressed(path, **made(SHIFTS[str(cell["row"])]))
        stored[str(cell["mlflow_run_id"])] = path
    return replace(records, header=records.header.model_copy(update={"task": task}), predictions=stored)


@pytest.fixture
def detected(tmp_path: Path) -> StudyRecords:
    return study(tmp_path / "predictions", "detection", boxes_of)


@pytest.fixture
def segmented(tmp_path: Path) -> StudyRecords:
    return study(tmp_path / "predictions", "segmentation", masks_of)


def grey(choice: Choice) -> Mapping[tuple[str, str], Any]:
    """An image for everything that is chosen."""
    return {(row, image.name): np.full((SIDE, SIDE, 1), 90, np.uint8) for row in choice.runs for image in choice.images}


def chosen(records: StudyRecords) -> Choice:
    choice = choose(records, build_table(records), "jsrt")
    assert choice is not None
    return choice


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Figures as they were before they became files."""
    figures: list[Figure] = []
    render = pictures.render
    monkeypatch.setattr(pictures, "render", lambda figure, *rest: (figures.append(figure), render(figure, *rest))[1])
    return figures


# ---------------------------------------------------------------- the choice


def test_average_precision_of_one_image_is_what_one_works_out_by_hand() -> None:
    corners, labels = np.array([[0, 0, 10, 10], [20, 20, 30, 30.0]]), np.array([0, 1])
    right, left = [0, 0, 10, 10], [20, 20, 30, 30]
    other = [50, 50, 60, 60]

    def ap(*found: tuple[list[int], float, int]) -> float:
        return image_ap50(np.array([[*box, score, c] for box, score, c in found], float), corners, labels)

    assert ap((right, 0.9, 0), (left, 0.8, 1)) == 1
    assert ap((right, 0.9, 0)) == 0.5
    assert ap((right, 0.9, 1), (left, 0.8, 0)) == 0, "the boxes are right, their classes are not"
    assert ap((other, 0.9, 0), (right, 0.8, 0), (left, 0.7, 1)) == pytest.approx((2 / 3 + 2 / 3) / 2)
    assert ap((right, 0.9, 0), (right, 0.8, 0), (left, 0.7, 1)) == pytest.approx((1 + 2 / 3) / 2), "found twice"
    assert ap(([0, 0, 10, 5], 0.9, 0)) == 0.5, "an IoU of one half is enough"
    assert ap((right, 0.0, -1)) == 0, "class −1 is no box"
    assert np.isnan(image_ap50(np.zeros((0, 6)), np.zeros((0, 4)), np.zeros(0)))


def test_worst_median_and_best_image_are_the_same_for_every_row(detected: StudyRecords) -> None:
    choice = chosen(detected)
    assert tuple(choice.runs) == ROWS
    assert choice.seed == 0
    # AP of the rows: 1 and 1, 0 and 0, 0 and 1, 1 and 1; the fifth image has no box.
    assert [(c.rank, c.name, c.quality) for c in choice.images] == [
        ("worst", NAMES[1], 0.0),
        ("median", NAMES[2], 0.5),
        ("best", NAMES[3], 1.0),
    ]
    assert chosen(detected) == choice


def test_images_without_a_mask_are_not_chosen(segmented: StudyRecords) -> None:
    choice = chosen(segmented)
    assert NAMES[0] not in [image.name for image in choice.images]
    assert choice.images[0].name == NAMES[1]
    assert choice.images[0].quality == pytest.approx(0.25), "four of sixteen columns overlap"


def test_of_many_rows_the_first_and_the_last_are_shown_and_failed_cells_are_not(detected: StudyRecords) -> None:
    many = tuple(f"row {i}" for i in range(6))
    records = simulate(
        Simulated(rows=many, seeds=(0, 1), parts=(), datasets=("jsrt",), failed=(("jsrt", "row 5", 0, "FAILED"),))
    )
    path = next(iter(detected.predictions.values()))
    runs = {str(run): path for run in records.cells["mlflow_run_id"]}
    header = records.header.model_copy(update={"task": "detection"})
    choice = chosen(replace(records, header=header, predictions=runs))
    assert tuple(choice.runs) == ("row 0", "row 5")
    assert choice.seed == 1, "at seed 0 the last row has no result"


def test_predictions_of_other_images_are_refused_with_the_run(detected: StudyRecords) -> None:
    run = next(run for run in chosen(detected).runs.values() if run != next(iter(chosen(detected).runs.values())))
    np.savez_compressed(detected.predictions[run], **boxes_of(SHIFTS["full"]) | {"names": NAMES[::-1]})
    with pytest.raises(PredictionsError, match=f"run {run}.* of other images"):
        chosen(detected)


def test_lines_of_a_large_array_are_read_without_the_others(segmented: StudyRecords) -> None:
    path = next(iter(segmented.predictions.values()))
    whole = np.load(path)["predicted"]
    for one, position in zip(read_lines(path, "predicted", [3, 0, 3], "here"), (3, 0, 3), strict=True):
        np.testing.assert_array_equal(one, whole[position])
    with pytest.raises(PredictionsError, match="here cannot be read: no line 5"):
        read_lines(path, "predicted", [5], "here")


# ---------------------------------------------------------------- the figure


def test_boxes_are_drawn_where_they_are_with_class_and_score(detected: StudyRecords, drawn: list[Figure]) -> None:
    (drawing,), missing = draw_pictures(detected, build_table(detected), grey)
    assert missing == []
    panels = [axes for axes in drawn[0].axes if axes.get_images()]
    assert len(panels) == (1 + len(ROWS)) * 3
    truth, worst = panels[:2]  # the true boxes alone, then the row `plain`
    assert [text.get_text() for text in truth.texts][:1] == ["Nodule"]
    assert [to_hex(patch.get_edgecolor()).upper() for patch in truth.patches] == [TRUTH]
    patches = [patch for patch in worst.patches if isinstance(patch, Rectangle)]
    at = {to_hex(patch.get_edgecolor()).upper(): patch.get_bbox().extents for patch in patches}
    np.testing.assert_allclose(at[TRUTH], np.array([4, 4, 20, 20]) / SIDE)
    np.testing.assert_allclose(at[PREDICTION], np.array([16, 4, 32, 20]) / SIDE)
    assert [text.get_text() for text in worst.texts] == ["Nodule 0.87"]
    assert f"worst image {NAMES[1]}, mean AP 0.00, truth Nodule; plain: Nodule 0.87; full: Nodule 0.87" in drawing.alt
    assert "AP: of the image alone" in drawing.caption


def test_labels_of_crowded_boxes_do_not_cover_each_other(detected: StudyRecords, drawn: list[Figure]) -> None:
    crowd = boxes_of(SHIFTS["plain"])
    crowd |= {
        "true_image": np.repeat(np.arange(4), 9),
        "true_class": np.tile(np.arange(9) % 2, 4),
        "true_xyxy": np.tile(np.array([[4 + i, 4 + i, 20 + i, 20 + i] for i in range(9)], float), (4, 1)),
    }
    for path in detected.predictions.values():
        np.savez_compressed(path, **crowd)
    draw_pictures(detected, build_table(detected), grey)
    figure = drawn[0]
    figure.draw_without_rendering()
    for axes in (a for a in figure.axes if a.get_images()):
        frames = [t.get_window_extent() for t in axes.texts if re.match("Mass|Nodule", t.get_text())]
        assert frames
        overlapping = [(a, b) for i, a in enumerate(frames) for b in frames[:i] if a.overlaps(b)]
        assert overlapping == []


def test_masks_are_outlined_and_named_with_their_dice(segmented: StudyRecords, drawn: list[Figure]) -> None:
    (drawing,), _ = draw_pictures(segmented, build_table(segmented), grey)
    worst = next(axes for axes in drawn[0].axes if axes.get_images())
    assert "heart 0.25" in [text.get_text() for text in worst.texts]
    outlines = {to_hex(c.get_edgecolor()[0]).upper(): c.get_paths()[0].get_extents().extents for c in worst.collections}
    np.testing.assert_allclose(outlines[TRUTH], np.array([4, 4, 20, 20]) / SIDE, atol=0.5 / SIDE + 1e-9)
    np.testing.assert_allclose(outlines[PREDICTION], np.array([16, 4, 32, 20]) / SIDE, atol=0.5 / SIDE + 1e-9)
    assert "plain: heart 0.25" in drawing.alt
    assert "a box around the whole image" in drawing.caption


def test_structures_in_one_place_all_keep_their_dice(segmented: StudyRecords, drawn: list[Figure]) -> None:
    """Four structures with the same mask, as clavicles lie on lungs."""
    for path in segmented.predictions.values():
        with np.load(path) as stored:
            one = dict(stored)
        several = {name: np.repeat(one[name], 4, axis=1) for name in ("predicted", "truth", "known", "dice")}
        np.savez_compressed(path, **one | several | {"classes": np.array(["lung", "heart", "clavicle", "apex"])})
    draw_pictures(segmented, build_table(segmented), grey)
    figure = drawn[0]
    figure.draw_without_rendering()
    for axes in (a for a in figure.axes if a.get_images()):
        labels = [t for t in axes.texts if re.match("lung|heart|clavicle|apex", t.get_text())]
        assert len(labels) == 4
        frames = [t.get_window_extent() for t in labels]
        assert not any(a.overlaps(b) for i, a in enumerate(frames) for b in frames[:i])


@pytest.mark.parametrize("records", ["detected", "segmented"])
def test_the_same_records_and_images_give_the_same_bytes(records: str, request: pytest.FixtureRequest) -> None:
    given: StudyRecords = request.getfixturevalue(records)
    one, other = (draw_pictures(given, build_table(given), grey)[0][0] for _ in range(2))
    assert (one.png, one.svg) == (other.png, other.svg)


def test_the_report_holds_the_figure_with_its_text_and_drops_it_when_it_is_gone(
    detected: StudyRecords, tmp_path: Path
) -> None:
    paths = write_report(detected, tmp_path / "report", grey)
    page = paths.html.read_text()
    assert '<section id="pictures">' in page
    assert "truth Nodule; plain: Nodule 0.87" in page
    assert (tmp_path / "report/figures/pictures-0.png").read_bytes()[:4] == b"\x89PNG"
    page = write_report(detected, tmp_path / "report", lambda _choice: {}).html.read_text()
    assert f"the images {', '.join(NAMES[[1, 2, 3]])} are not kept in this storage" in page
    assert not list((tmp_path / "report/figures").glob("pictures-*"))


def test_damaged_predictions_are_told_at_the_head_and_the_tables_stand(detected: StudyRecords, tmp_path: Path) -> None:
    path = detected.predictions[chosen(detected).runs["full"]]
    path.write_bytes(path.read_bytes()[:200])
    page = write_report(detected, tmp_path / "report", grey).html.read_text()
    assert re.search(r"Attention: predictions of jsrt · full · seed 0 .* cannot be read", page)
    assert '<section id="table">' in page


def test_classification_has_no_such_figure(tmp_path: Path) -> None:
    records = simulate(Simulated(test_images=50), tmp_path)
    assert draw_pictures(records, build_table(records), grey) == ([], [])
