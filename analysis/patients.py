"""Noise over test patients: rows compared on the stored predictions of their cells, at the trained seeds.

The interval over seeds says how a difference would vary if training were repeated, this one how it would vary on other
patients. The bootstrap draws whole groups (patients, lesions), for the classes too where boxes or masks are measured;
for areas under the curve a class has DeLong's interval, which takes images as independent and is the narrower one where
patients have several images.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from analysis.drawn_quality import Arrays, Drawable, boxes_of, masks_of
from analysis.records import StudyRecords
from analysis.statistics import (
    Estimate,
    Floats,
    class_auc,
    delong,
    delong_contrast,
    draw_groups,
    macro,
    macro_replicates,
    percentile_estimate,
)
from analysis.tables import Comparison, StudyTable

_WORK = 5_000_000_000  # images × classes × models × draws: about a minute on one core
_BOX_WORK = 50_000_000  # models × classes × images × draws of boxes or masks: about as long
_FEWEST_DRAWS = 200
_AGREEMENT = 1e-4  # stored scores are float32; a larger gap from the ledger's figure is no rounding


# Main metric → the arrays that it follows from, and what makes a quality of them that images can be drawn for.
DRAWABLE: dict[str, tuple[tuple[str, ...], Callable[[Arrays], Drawable]]] = {
    "mean_dice": (("dice",), masks_of),
    "map50_95": (("boxes", "true_image", "true_class", "true_xyxy"), boxes_of),
}


class PredictionsError(ValueError):
    """Stored predictions contradict each other or the ledger; the message names the run and the remedy."""


@dataclass(frozen=True)
class PatientNoise:
    """A comparison over test patients: mean over its seeds of the difference in the main metric, and of each class.

    Attributes:
        macro: difference with the percentile interval over groups.
        classes: class → difference with its interval, DeLong's for areas under the curve, else the percentile one over
            groups; undefined classes are left out.
        images, groups: size of the test split.
        draws: bootstrap draws.
    """

    dataset: str
    row: str
    reference: str
    macro: Estimate
    classes: dict[str, Estimate]
    images: int
    groups: int
    draws: int


@dataclass(frozen=True, eq=False)
class _TestSet:
    """Predictions of a data set's cells on one test split: scores (M, N, C) in the order of `keys` (row, seed).

    Labels (N, C) are 1 present, 0 absent, −1 unlabelled: left out of their class.
    """

    keys: tuple[tuple[str, int], ...]
    classes: tuple[str, ...]
    groups: npt.NDArray[np.str_]
    labels: npt.NDArray[np.int8]
    scores: Floats


def patient_noise(
    records: StudyRecords, table: StudyTable, rng: np.random.Generator, draws: int = 1000
) -> list[PatientNoise]:
    """Compare rows over test patients, wherever the predictions of all cells of a comparison are stored.

    Args:
        records: with `predictions` by MLflow run.
        table: the study's table, whose pairs are compared.
        rng: the generator; all models of a data set are evaluated on the same draws.
        draws: bootstrap draws; fewer (at least 200) where images × models would take minutes.

    Raises:
        PredictionsError: predictions of one data set differ in images or labels, or do not give the ledger's figures.
    """
    metric = table.header.main_metric
    found = []
    for dataset in table.header.datasets:
        comparisons = [c for c in table.comparisons_of(dataset) if c.seeds and _stored(c, table, records)]
        if comparisons and metric == "macro_auc":
            found += _compare_on_patients(_load(dataset, comparisons, table, records), comparisons, rng, draws)
        elif comparisons and metric in DRAWABLE:
            drawn = _load_drawable(dataset, comparisons, table, records)
            found += _compare_drawn(drawn, comparisons, rng, draws)
    return found


@dataclass(frozen=True, eq=False)
class _Drawables:
    """Predictions of boxes or masks of a data set's cells on one test split, in the order of `keys` (row, seed)."""

    keys: tuple[tuple[str, int], ...]
    classes: tuple[str, ...]
    groups: npt.NDArray[np.str_]
    models: tuple[Drawable, ...]


def _load_drawable(dataset: str, comparisons: list[Comparison], table: StudyTable, records: StudyRecords) -> _Drawables:
    """Read every cell's predictions once, and compare their figure with the ledger's."""
    metric = table.header.main_metric
    names, made = DRAWABLE[metric]
    runs = {key: run for comparison in comparisons for key, run in _runs(comparison, table).items()}
    cells = records.cells.set_index("mlflow_run_id")[metric]
    same = [name for name in ("names", "groups", "classes", *names) if name not in ("boxes", "dice")]
    first: dict[str, npt.NDArray[np.generic]] | None = None
    models = []
    for (row, seed), run in runs.items():
        place = f"{dataset} · {row} · seed {seed} (run {run})"
        arrays = _read(records.predictions[run], place, ("names", "groups", "classes", *names))
        first = first or arrays
        _require_same(arrays, first, same, place)
        models.append(made(arrays))
        once = np.ones((len(arrays["names"]), 1), np.int32)
        _require_stated(macro(models[-1].replicates(once)[:, 0]), float(cells[run]), table.header.metric_label, place)
    assert first is not None  # a comparison has at least one seed
    classes = tuple(str(name) for name in first["classes"])
    return _Drawables(tuple(runs), classes, np.asarray(first["groups"], np.str_), tuple(models))


def _compare_drawn(
    test: _Drawables, comparisons: list[Comparison], rng: np.random.Generator, draws: int
) -> list[PatientNoise]:
    codes = np.unique(test.groups, return_inverse=True)[1]
    once = np.ones((len(codes), 1), np.int32)
    values = np.array([model.replicates(once)[:, 0] for model in test.models])  # (M, C)
    draws = min(draws, max(_FEWEST_DRAWS, int(_BOX_WORK / (values.size * len(codes)))))
    chunks = [
        np.array([model.replicates(counts) for model in test.models]) for counts in draw_groups(codes, rng, draws)
    ]
    replicates = np.concatenate(chunks, axis=2)  # (M, C, D)
    defined = np.isfinite(values[0])  # the truth is the same for all models
    incomplete = int(np.isnan(replicates[0, defined]).any(axis=0).sum())
    means, overall = _means(values[:, defined, None])[:, 0], _means(replicates[:, defined])
    noise = []
    for comparison in comparisons:
        weights = _weights(comparison, test.keys)
        classes = {
            test.classes[c]: percentile_estimate(float(weights @ values[:, c]), weights @ replicates[:, c])
            for c in np.flatnonzero(defined).tolist()
        }
        estimate = percentile_estimate(float(weights @ means), weights @ overall, incomplete)
        size = (len(codes), int(codes.max()) + 1, draws)
        noise.append(PatientNoise(comparison.dataset, comparison.row, comparison.reference, estimate, classes, *size))
    return noise


def _means(values: Floats) -> Floats:
    """(M, C, D) → (M, D) mean over the classes that are defined; NaN where none is."""
    defined = np.isfinite(values)
    n = defined.sum(axis=1)
    means: Floats = np.where(defined, values, 0.0).sum(axis=1) / np.where(n, n, np.nan)
    return means


def _compare_on_patients(
    test: _TestSet, comparisons: list[Comparison], rng: np.random.Generator, draws: int
) -> list[PatientNoise]:
    n_groups = len(np.unique(test.groups))
    draws = min(draws, max(_FEWEST_DRAWS, int(_WORK / test.scores.size)))
    replicates, incomplete = macro_replicates(test.labels, test.scores, test.groups, rng=rng, draws=draws)
    macros = np.array([macro(class_auc(test.labels, model)) for model in test.scores])
    fits = {}
    for c, name in enumerate(test.classes):
        labelled = test.labels[:, c] >= 0
        column = test.labels[labelled, c]
        if len(np.unique(column)) == 2:
            fits[name] = delong(column, test.scores[:, labelled, c])
    noise = []
    for comparison in comparisons:
        weights = _weights(comparison, test.keys)
        overall = percentile_estimate(float(weights @ macros), weights @ replicates, incomplete)
        classes = {name: delong_contrast(fit, weights) for name, fit in fits.items()}
        size = (len(test.groups), n_groups, draws)
        noise.append(PatientNoise(comparison.dataset, comparison.row, comparison.reference, overall, classes, *size))
    return noise


def _weights(comparison: Comparison, keys: tuple[tuple[str, int], ...]) -> Floats:
    """Contrast (M,) of the models: the row's seeds at 1/n, the reference row's at −1/n."""
    share = 1 / len(comparison.seeds)
    signs = {comparison.row: share, comparison.reference: -share}
    return np.array([signs.get(row, 0.0) if seed in comparison.seeds else 0.0 for row, seed in keys])


def _runs(comparison: Comparison, table: StudyTable) -> dict[tuple[str, int], str]:
    lines = {line.row: line for line in table.lines_of(comparison.dataset)}
    pairs = ((row, seed) for row in (comparison.row, comparison.reference) for seed in comparison.seeds)
    return {(row, seed): lines[row].run_ids.get(seed, "") for row, seed in pairs}


def _stored(comparison: Comparison, table: StudyTable, records: StudyRecords) -> bool:
    return all(run in records.predictions for run in _runs(comparison, table).values())


def _load(dataset: str, comparisons: list[Comparison], table: StudyTable, records: StudyRecords) -> _TestSet:
    runs = {key: run for comparison in comparisons for key, run in _runs(comparison, table).items()}
    cells = records.cells.set_index("mlflow_run_id")[table.header.main_metric]
    first: dict[str, npt.NDArray[np.generic]] | None = None
    scores = []
    for (row, seed), run in runs.items():
        place = f"{dataset} · {row} · seed {seed} (run {run})"
        arrays = _read(records.predictions[run], place, ("names", "groups", "labels", "scores", "classes"))
        first = first or arrays
        _require_same(arrays, first, ("names", "groups", "labels", "classes"), place)
        recomputed = macro(class_auc(arrays["labels"], arrays["scores"]))
        _require_stated(recomputed, float(cells[run]), "macro AUC", place)
        scores.append(np.asarray(arrays["scores"], dtype=np.float64))
    assert first is not None  # a comparison has at least one seed
    classes = tuple(str(name) for name in first["classes"])
    labels = np.asarray(first["labels"], dtype=np.int8)
    return _TestSet(tuple(runs), classes, np.asarray(first["groups"], dtype=np.str_), labels, np.stack(scores))


def _require_same(
    arrays: Mapping[str, npt.NDArray[np.generic]],
    first: Mapping[str, npt.NDArray[np.generic]],
    names: Sequence[str],
    place: str,
) -> None:
    for name in names:
        if not np.array_equal(arrays[name], first[name]):
            raise PredictionsError(f"predictions of {place} differ in {name!r} from those of the study's other cells")


def _require_stated(recomputed: float, stated: float, metric: str, place: str) -> None:
    if not abs(recomputed - stated) <= _AGREEMENT:
        raise PredictionsError(
            f"predictions of {place} give a {metric} of {recomputed:.6f}, the ledger says {stated:.6f}; one of them is "
            "not of this cell: run the cell again"
        )


def _read(path: Path, place: str, names: Sequence[str]) -> dict[str, npt.NDArray[np.generic]]:
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in names}
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise PredictionsError(f"predictions of {place} cannot be read: {error}; run the cell again") from error
