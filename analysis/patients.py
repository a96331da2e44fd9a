"""Noise over test patients: rows compared on the stored predictions of their cells, at the trained seeds.

The interval over seeds says how a difference would vary if training were repeated, this one how it would vary on other
patients. The bootstrap draws whole groups (patients, lesions); DeLong's interval by class takes images as independent
and is the narrower one where patients have several images.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from analysis.records import StudyRecords
from analysis.statistics import (
    Estimate,
    Floats,
    class_auc,
    delong,
    delong_contrast,
    macro,
    macro_replicates,
    percentile_estimate,
)
from analysis.tables import Comparison, StudyTable

_WORK = 5_000_000_000  # images × classes × models × draws: about a minute on one core
_FEWEST_DRAWS = 200
_AGREEMENT = 1e-4  # stored scores are float32; a larger gap from the ledger's figure is no rounding


class PredictionsError(ValueError):
    """Stored predictions contradict each other or the ledger; the message names the run and the remedy."""


@dataclass(frozen=True)
class PatientNoise:
    """A comparison seen over test patients: mean over its seeds of the difference in macro AUC and in each class's AUC.

    Attributes:
        macro: difference with the percentile interval over groups.
        classes: class → difference with DeLong's interval; undefined classes are left out.
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
    if table.header.main_metric != "macro_auc":
        return []
    found = []
    for dataset in table.header.datasets:
        comparisons = [c for c in table.comparisons_of(dataset) if c.seeds and _stored(c, table, records)]
        if comparisons:
            found += _compare_on_patients(_load(dataset, comparisons, table, records), comparisons, rng, draws)
    return found


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
        arrays = _read(records.predictions[run], place)
        first = first or arrays
        for name in ("names", "groups", "labels", "classes"):
            if not np.array_equal(arrays[name], first[name]):
                raise PredictionsError(
                    f"predictions of {place} differ in {name!r} from those of the study's other cells"
                )
        recomputed, stated = macro(class_auc(arrays["labels"], arrays["scores"])), float(cells[run])
        if not abs(recomputed - stated) <= _AGREEMENT:
            raise PredictionsError(
                f"predictions of {place} give a macro AUC of {recomputed:.6f}, the ledger says {stated:.6f}; "
                "one of them is not of this cell: run the cell again"
            )
        scores.append(np.asarray(arrays["scores"], dtype=np.float64))
    assert first is not None  # a comparison has at least one seed
    classes = tuple(str(name) for name in first["classes"])
    labels = np.asarray(first["labels"], dtype=np.int8)
    return _TestSet(tuple(runs), classes, np.asarray(first["groups"], dtype=np.str_), labels, np.stack(scores))


def _read(path: Path, place: str) -> dict[str, npt.NDArray[np.generic]]:
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in ("names", "groups", "labels", "scores", "classes")}
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise PredictionsError(f"predictions of {place} cannot be read: {error}; run the cell again") from error
