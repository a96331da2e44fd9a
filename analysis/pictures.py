"""Figures of predicted boxes and masks beside the true ones: a line an image, a column a row of the study.

True boxes have a column of their own with their classes, since crowded images have no room for two boxes' labels.

What is shown comes from the stored predictions (see `analysis.picture_choice`); the images themselves are handed in by
a `PixelSource`, since no ledger holds them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from analysis.figures import MOST_DATASETS, STYLE, Drawing, render, wrapped
from analysis.layout import dataset_name
from analysis.picture_choice import Choice, choose, read_lines, read_small
from analysis.records import StudyRecords
from analysis.statistics import Floats
from analysis.tables import StudyTable

Pixels = npt.NDArray[np.uint8]
# What a figure shows → (row of the study, image name) → (S, S, C) pixels as the model took them; lacking where they
# are no longer there.
PixelSource = Callable[[Choice], Mapping[tuple[str, str], Pixels]]

TRUTH, PREDICTION = "#56B4E9", "#E69F00"  # told apart under all common kinds of colour blindness, and on grey
MOST_BOXES = 5
_SIDE = 320  # px that an image is shown with at most
_WIDTH = 8.6  # inches
_NAME = 48  # letters of an image's name
_PAD = 0.012  # on both sides of a label, as a share of the side
_LINES = 6  # that a structure's label may be moved by, up or down
_TRUTH_ALONE = ""  # the column of true boxes: no row of a study has an empty name
_LABEL: dict[str, Any] = {
    "fontsize": 6.5,
    "bbox": {"boxstyle": "square,pad=0.15", "facecolor": "#000000", "edgecolor": "none", "alpha": 0.65},
}
_CAPTIONS = {
    "detection": "The first column shows the true boxes with their classes, the others the same boxes with as many "
    f"predicted ones as the image has true ones (at least one, at most {MOST_BOXES}), those with the highest scores, "
    "with class and score. A label that would cover another is left out. AP: of the image alone, at IoU 0.5.",
    "segmentation": "Outlines of the true and the predicted mask of each structure, with its Dice in this image; "
    "the prompt is a box around the whole image.",
}


@dataclass(frozen=True)
class _Boxes:
    """Boxes of one image, in shares of its side: (K, 4) corners, and a label each."""

    corners: Floats
    labels: tuple[str, ...]


@dataclass(frozen=True)
class _Panel:
    """One image under one row's prediction: boxes, or (C, S, S) masks with a label a structure."""

    truth: _Boxes | npt.NDArray[np.bool_]
    predicted: _Boxes | npt.NDArray[np.bool_]
    labels: tuple[str, ...] = ()


def draw_pictures(
    records: StudyRecords, table: StudyTable, pixels: PixelSource | None
) -> tuple[list[Drawing], list[str]]:
    """A figure a data set, and one sentence for each that cannot be drawn because its images are gone.

    Raises:
        PredictionsError: stored predictions cannot be read or contradict each other.
        LedgerError: they are not where the ledger says.
    """
    drawings, missing = [], []
    if pixels is None:
        return [], []
    for number, dataset in enumerate(table.header.datasets[:MOST_DATASETS]):
        choice = choose(records, table, dataset)
        if choice is None or not choice.images:
            continue
        images = pixels(choice)
        if any((row, image.name) not in images for row in choice.runs for image in choice.images):
            names = ", ".join(image.name for image in choice.images)
            missing.append(
                f"{dataset}: predictions beside the truth are not drawn: the images {names} are not kept in this "
                "storage; run the study's command again, on the same data, to have them drawn."
            )
            continue
        with mpl.rc_context(STYLE | {"axes.grid": False}):
            drawings.append(_draw(choice, table, number, images, _panels(choice, records, table.header.task)))
    return drawings, missing


# ---------------------------------------------------------------- what is drawn


def _panels(choice: Choice, records: StudyRecords, task: str) -> dict[tuple[str, str], _Panel]:
    """(row, image name) → its panel."""
    found: dict[tuple[str, str], _Panel] = {}
    for row, run in choice.runs.items():
        place = f"{choice.dataset} · {row} · seed {choice.seed} (run {run})"
        path = records.predictions[run]
        stored = read_small(path, task, place)
        positions = [image.position for image in choice.images]
        if task == "detection":
            panels = [_box_panel(stored, position) for position in positions]
        else:
            masks = [read_lines(path, array, positions, place) for array in ("predicted", "truth")]
            panels = [_mask_panel(stored, *of_one) for of_one in zip(positions, *masks, strict=True)]
        found |= {(row, image.name): panel for image, panel in zip(choice.images, panels, strict=True)}
    return found


def _box_panel(stored: Mapping[str, npt.NDArray[np.generic]], position: int) -> _Panel:
    side = float(np.asarray(stored["image_size"], np.float64))
    classes = [str(name) for name in stored["classes"]]
    mine = stored["true_image"] == position
    labels = [classes[c] for c in np.asarray(stored["true_class"])[mine].tolist()]
    truth = _Boxes(np.asarray(stored["true_xyxy"], np.float64)[mine] / side, tuple(labels))
    boxes = np.asarray(stored["boxes"][position], np.float64)
    boxes = boxes[boxes[:, 5] >= 0]
    boxes = boxes[np.argsort(-boxes[:, 4], kind="stable")][: min(max(1, len(labels)), MOST_BOXES)]
    named = [f"{classes[int(c)]} {score:.2f}" for score, c in boxes[:, 4:].tolist()]
    return _Panel(truth, _Boxes(boxes[:, :4] / side, tuple(named)))


def _mask_panel(
    stored: Mapping[str, npt.NDArray[np.generic]],
    position: int,
    predicted: npt.NDArray[np.generic],
    truth: npt.NDArray[np.generic],
) -> _Panel:
    side = int(np.asarray(stored["size"]))
    known = np.asarray(stored["known"], np.bool_)[position]
    dice = np.asarray(stored["dice"], np.float64)[position, :, 0]

    def masks(bits: npt.NDArray[np.generic]) -> npt.NDArray[np.bool_]:
        flat = np.unpackbits(np.asarray(bits, np.uint8), axis=-1, count=side**2)
        return flat.view(np.bool_).reshape(-1, side, side)

    labels = [
        f"{name} {score:.2f}" if np.isfinite(score) else f"{name} –"
        for name, score in zip(map(str, stored["classes"]), dice.tolist(), strict=True)
    ]
    return _Panel(masks(truth) & known[:, None, None], masks(predicted[:, 0]), tuple(labels))


# ---------------------------------------------------------------- drawing


def _draw(
    choice: Choice,
    table: StudyTable,
    number: int,
    images: Mapping[tuple[str, str], Pixels],
    panels: Mapping[tuple[str, str], _Panel],
) -> Drawing:
    task = table.header.task
    rows = [*([_TRUTH_ALONE] if task == "detection" else []), *choice.runs]
    columns = max(2, len(rows))
    side = _WIDTH / columns
    room = ConstrainedLayoutEngine(h_pad=0.11, hspace=0, w_pad=0.04, wspace=0)  # inches: a line of text
    figure = Figure(figsize=(_WIDTH, len(choice.images) * (side + 0.2) + 0.7), layout=room)
    grid = figure.subplots(len(choice.images), columns, squeeze=False)
    quality = "AP" if task == "detection" else "Dice"
    for i, image in enumerate(choice.images):
        for j, axes in enumerate(grid[i]):
            axes.set_axis_off()
            if j < len(rows):
                alone = rows[j] == _TRUTH_ALONE
                at = next(iter(choice.runs)) if alone else rows[j], image.name
                _draw_panel(axes, images[at], panels[at], side, alone=alone)
                title = wrapped("truth" if alone else rows[j], 30 if columns < 5 else 22, 2) if i == 0 else ""
                axes.set_title(title, fontsize=8)
        name = image.name if len(image.name) <= _NAME else f"{image.name[:_NAME]}…"
        line = f"{image.rank}: {name} (mean {quality} {image.quality:.2f})"
        style: dict[str, Any] = {"va": "top", "fontsize": 7, "color": "#222222", "clip_on": False}
        written = grid[i][0].text(0, -0.02, line, transform=grid[i][0].transAxes, **style)
        written.set_in_layout(False)  # it runs on below the other columns, and must not push them aside
    handles = [
        Line2D([], [], color=TRUTH, linewidth=2, label="truth"),
        Line2D([], [], color=PREDICTION, linewidth=2, linestyle="--", label="prediction"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8)
    title = f"Predictions beside the truth on {dataset_name(table, choice.dataset)}, seed {choice.seed}"
    figure.suptitle(wrapped(title, 90, 2), fontsize=9.5, color="#222222")
    left_out = len(table.header.rows) - len(choice.runs)
    omitted = f"Left out: {left_out} row{'s' * (left_out != 1)}." if left_out else ""
    drawing = render(figure, ("pictures", number), title, _alt(title, choice, panels, quality), omitted)
    return replace(drawing, caption=_CAPTIONS[task])


def _alt(title: str, choice: Choice, panels: Mapping[tuple[str, str], _Panel], quality: str) -> str:
    """In words, image by image: the truth, and what each row predicts."""
    lines = []
    for image in choice.images:
        said = [f"{row}: {_in_words(panels[row, image.name])}" for row in choice.runs]
        first = panels[next(iter(choice.runs)), image.name].truth
        true = f", truth {', '.join(first.labels)}" if isinstance(first, _Boxes) else ""
        lines.append(f"{image.rank} image {image.name}, mean {quality} {image.quality:.2f}{true}; {'; '.join(said)}")
    return f"{title}: {'. '.join(lines)}."


def _in_words(panel: _Panel) -> str:
    labels = panel.predicted.labels if isinstance(panel.predicted, _Boxes) else panel.labels
    return ", ".join(labels) or "nothing"


def _draw_panel(axes: Axes, pixels: Pixels, panel: _Panel, side: float, *, alone: bool) -> None:
    """`alone`: the true boxes with their classes, and no prediction."""
    shown = _reduced(pixels)
    axes.imshow(shown if shown.shape[2] == 3 else shown[:, :, 0], cmap="gray", vmin=0, vmax=255, extent=(0, 1, 1, 0))
    labels = _Labels(axes, side)
    if isinstance(panel.truth, _Boxes) and isinstance(panel.predicted, _Boxes):
        _draw_boxes(labels, panel.truth, TRUTH, "-", named=alone)
        if not alone:
            _draw_boxes(labels, panel.predicted, PREDICTION, "--", named=True)
    elif not isinstance(panel.truth, _Boxes) and not isinstance(panel.predicted, _Boxes):
        for truth, predicted, label in zip(panel.truth, panel.predicted, panel.labels, strict=True):
            _draw_outlines(labels, truth, predicted, label)
    axes.set_xlim(0, 1)
    axes.set_ylim(1, 0)


class _Labels:
    """Labels of one panel, of which none covers another: the first one that comes has the place."""

    def __init__(self, axes: Axes, side: float) -> None:
        """`side`: of the panel, inches."""
        self.axes = axes
        self._letter = 0.62 * _LABEL["fontsize"] / 72 / side  # width of a letter, and
        self._line = 1.5 * _LABEL["fontsize"] / 72 / side  # height of a line, as shares of the side
        self._taken: list[tuple[float, float, float, float]] = []

    def write_above(self, x: float, y: float, label: str, colour: str) -> None:
        """Write with the lower left corner at (x, y), shifted into the panel, unless that would cover a label."""
        self._write(x, y - self._line, label, colour)

    def write_near(self, x: float, y: float, label: str, colour: str) -> None:
        """Write with the middle at (x, y), or as few lines above or below as leave every label free."""
        left, top = x - self._letter * len(label) / 2 - _PAD, y - self._line / 2
        lines = sorted(range(-_LINES, _LINES + 1), key=abs)
        any(self._write(left, top + line * self._line, label, colour, centred=True) for line in lines)

    def _write(self, x: float, y: float, label: str, colour: str, *, centred: bool = False) -> bool:
        """Write with the upper left corner at (x, y); False where that would cover a label."""
        width = self._letter * len(label) + 2 * _PAD
        x, y = min(max(x, 0.0), max(0.0, 1 - width)), min(max(y, 0.0), 1 - self._line)
        at = x, y, x + width, y + self._line
        free = all(at[2] <= o[0] or o[2] <= at[0] or at[3] <= o[1] or o[3] <= at[1] for o in self._taken)
        if free:
            self._taken.append(at)
            at_x, ha = (x + width / 2, "center") if centred else (x + _PAD, "left")
            self.axes.text(at_x, y + self._line / 2, label, color=colour, va="center", ha=ha, clip_on=True, **_LABEL)
        return free


def _draw_boxes(labels: _Labels, boxes: _Boxes, colour: str, style: str, *, named: bool) -> None:
    """Boxes, with their labels above them if they are to be named."""
    for (left, top, right, bottom), label in zip(boxes.corners.tolist(), boxes.labels, strict=True):
        edge: dict[str, Any] = {"fill": False, "edgecolor": colour, "linewidth": 1.2, "linestyle": style}
        labels.axes.add_patch(Rectangle((left, top), right - left, bottom - top, **edge))
        if named:
            labels.write_above(left, top, label, colour)


def _draw_outlines(labels: _Labels, truth: npt.NDArray[np.bool_], predicted: npt.NDArray[np.bool_], label: str) -> None:
    for mask, colour, style in ((truth, TRUTH, "-"), (predicted, PREDICTION, "--")):
        small = mask[:: _stride(len(mask)), :: _stride(len(mask))].astype(np.float64)
        if small.any() and not small.all():
            centres = (np.arange(len(small)) + 0.5) / len(small)
            labels.axes.contour(
                centres, centres, small, levels=[0.5], colors=[colour], linewidths=1.3, linestyles=[style]
            )
    seen = truth if truth.any() else predicted
    rows, columns = np.nonzero(seen) if seen.any() else (np.array([0.5]), np.array([0.5]))
    x, y = float(np.mean(columns)) / len(seen), float(np.mean(rows)) / len(seen)
    labels.write_near(x, y, label, PREDICTION)


def _reduced(pixels: Pixels) -> Pixels:
    step = _stride(len(pixels))
    return pixels[::step, ::step]


def _stride(side: int) -> int:
    return max(1, -(-side // _SIDE))
