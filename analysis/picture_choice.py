"""Which test images a report shows with their predictions, and what the stored predictions say of them.

The same images are shown for every row, so that rows can be compared: the worst, the median and the best one by the
mean over the shown rows of the image's own quality. The quality of an image is the average precision at IoU 0.5 of all
its boxes together (detection; each box counts for its own class), or the mean Dice of its structures (segmentation).
Images without anything to find have none and are not shown.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from analysis.drawn_quality import iou
from analysis.patients import PredictionsError
from analysis.records import StudyRecords
from analysis.statistics import Floats
from analysis.tables import StudyTable

KINDS = {"detection": "boxes", "segmentation": "predicted"}  # task → the array of its predictions
MOST_COLUMNS = 4  # rows of the study in one figure
MOST_IMAGES = 400  # test images that are looked at: evenly spaced in a larger split
_MATCHED = 0.5  # IoU from which a box has found another

Arrays = Mapping[str, npt.NDArray[np.generic]]


@dataclass(frozen=True)
class Chosen:
    """A test image: why it is shown, its position in the test split, its mean quality over the shown rows."""

    rank: str
    name: str
    position: int
    quality: float


@dataclass(frozen=True)
class Choice:
    """What one figure shows. `runs`: row of the study → MLflow run of its cell at `seed`."""

    dataset: str
    seed: int
    runs: Mapping[str, str]
    images: tuple[Chosen, ...]


def choose(records: StudyRecords, table: StudyTable, dataset: str) -> Choice | None:
    """The images to show of a data set; None where no row has predictions that can be drawn.

    Raises:
        PredictionsError: stored predictions cannot be read, or two rows were tested on different images.
        LedgerError: they are not where the ledger says.
    """
    task = table.header.task
    if task not in KINDS:
        return None
    seed, runs = _seed_and_runs(records, table, dataset)
    if not runs:
        return None
    names: npt.NDArray[np.str_] | None = None
    qualities = []
    for row, run in runs.items():
        place = f"{dataset} · {row} · seed {seed} (run {run})"
        stored = read_small(records.predictions[run], task, place)
        if names is not None and not np.array_equal(names, stored["names"]):
            raise PredictionsError(f"predictions of {place} are of other images than those of the study's first row")
        names = np.asarray(stored["names"], np.str_)
        qualities.append(_qualities(stored, task, _looked_at(len(names))))
    assert names is not None
    return Choice(dataset, seed, runs, _ranked(names, np.array(qualities).mean(axis=0)))


def _seed_and_runs(records: StudyRecords, table: StudyTable, dataset: str) -> tuple[int, dict[str, str]]:
    """The first seed at which most of the shown rows have predictions, and their runs."""
    lines = table.lines_of(dataset)
    shown = lines if len(lines) <= MOST_COLUMNS else (lines[0], lines[-1])
    found = {
        seed: {
            line.row: line.run_ids[seed]
            for line in shown
            if seed in line.seeds and line.run_ids.get(seed, "") in records.predictions
        }
        for seed in table.header.seeds
    }
    best = max(found, key=lambda seed: len(found[seed]))  # of equals the first
    return best, found[best]


def _looked_at(images: int) -> npt.NDArray[np.intp]:
    """Positions of at most `MOST_IMAGES` test images."""
    return np.unique(np.linspace(0, images - 1, min(images, MOST_IMAGES)).round().astype(np.intp))


def _ranked(names: npt.NDArray[np.str_], quality: Floats) -> tuple[Chosen, ...]:
    """Worst, median and best of the images that have a quality; of equals the first by name."""
    defined = [int(i) for i in np.flatnonzero(np.isfinite(quality))]
    order = sorted(defined, key=lambda i: (quality[i], names[i]))
    if not order:
        return ()
    places = {"best": len(order) - 1, "median": (len(order) - 1) // 2, "worst": 0}
    ranks = {order[at]: rank for rank, at in places.items()}  # of few images one may be several
    return tuple(
        Chosen(rank, str(names[i]), i, float(quality[i])) for i, rank in sorted(ranks.items(), key=_worst_first)
    )


def _worst_first(ranked: tuple[int, str]) -> int:
    return ("worst", "median", "best").index(ranked[1])


# ---------------------------------------------------------------- stored predictions


def read_small(path: Path, task: str, place: str) -> Arrays:
    """All arrays of a predictions file but, for segmentation, its masks, which may be larger than memory.

    Raises:
        PredictionsError: the file cannot be read.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            large = ("predicted", "truth") if task == "segmentation" else ()
            return {name: stored[name] for name in stored.files if name not in large}
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise PredictionsError(f"predictions of {place} cannot be read: {error}; run the cell again") from error


def read_lines(path: Path, array: str, positions: Sequence[int], place: str) -> list[npt.NDArray[np.generic]]:
    """A few lines of one array of a predictions file, without holding the others in memory.

    Raises:
        PredictionsError: the file cannot be read, or has no such array or line.
    """
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{array}.npy") as member:
            version = np.lib.format.read_magic(member)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, columns_first, dtype = read(member)
            start, size = member.tell(), int(np.prod(shape[1:])) * dtype.itemsize
            if columns_first or max(positions) >= shape[0]:
                raise ValueError(f"no line {max(positions)} in {array}")
            lines = {}
            for position in sorted(set(positions)):
                member.seek(start + position * size)
                lines[position] = np.frombuffer(member.read(size), dtype).reshape(shape[1:])
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise PredictionsError(f"predictions of {place} cannot be read: {error}; run the cell again") from error
    return [lines[position] for position in positions]


# ---------------------------------------------------------------- quality of one image


def _qualities(stored: Arrays, task: str, positions: npt.NDArray[np.intp]) -> Floats:
    """(N,) quality of each test image; NaN where it has none or was not looked at."""
    quality = np.full(len(stored["names"]), np.nan)
    if task == "segmentation":
        dice = np.asarray(stored["dice"], np.float64)[positions, :, 0]  # of the prompt that says nothing
        defined = np.isfinite(dice)
        with np.errstate(invalid="ignore"):
            quality[positions] = np.where(defined, dice, 0).sum(axis=1) / defined.sum(axis=1)
        return quality
    for position in positions.tolist():
        true = stored["true_image"] == position
        corners, labels = np.asarray(stored["true_xyxy"], np.float64)[true], np.asarray(stored["true_class"])[true]
        quality[position] = image_ap50(np.asarray(stored["boxes"][position], np.float64), corners, labels)
    return quality


def image_ap50(found: Floats, corners: Floats, labels: npt.NDArray[np.generic]) -> float:
    """Average precision at IoU 0.5 of one image's boxes, all classes together; NaN without a true box.

    Boxes are taken in the order of their scores; each is matched to the best free true box of its class. Area under
    the precision-recall curve with precision made to fall (Everingham et al., IJCV 2010, all points).

    Args:
        found: (D, 6) x1, y1, x2, y2, score, class; class −1 where there is none.
        corners: (M, 4) true boxes, in the same unit. labels: (M,) their classes.
    """
    if not len(corners):
        return float("nan")
    found = found[found[:, 5] >= 0]
    found = found[np.argsort(-found[:, 4], kind="stable")]
    overlap = np.where(found[:, 5:6] == labels[None, :], iou(found[:, :4], corners), 0.0)
    free = np.ones(len(corners), np.bool_)
    hits = np.zeros(len(found), np.bool_)
    for d in np.flatnonzero((overlap >= _MATCHED).any(axis=1)).tolist():
        candidate = np.where(free, overlap[d], 0.0)
        best = int(candidate.argmax())
        if candidate[best] >= _MATCHED:
            hits[d], free[best] = True, False
    precision = np.cumsum(hits) / np.arange(1, len(found) + 1)
    falling = np.maximum.accumulate(precision[::-1])[::-1]
    return float(falling[hits].sum() / len(corners))
