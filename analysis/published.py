"""The paper's published numbers: set beside ours, and examined for what does not fit together.

The CSVs under published/ hold facts from the paper's tables. Nothing about their inconsistencies is written here: each
is found from the numbers (a macro that is no mean of its rows, the best of several runs set against single runs).
"""

from __future__ import annotations

import csv
import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from analysis.statistics import Floats, Summary, macro, summarise
from analysis.tables import StudyTable, TableLine

FOLDER = Path(__file__).parent / "published"
METHOD = "spft"  # the row, letters and digits alone, that the paper's own line stands for
_CITATION = re.compile(r"\s*\([^()]*\b\d{4}\)$")
OVERALL = "Macro AUC"  # label of the overall figure in tables that list metrics


@dataclass(frozen=True)
class Source:
    """What one CSV is.

    `metrics` says how our cells call a metric column of a table of models; without it the lines are metrics and the
    columns runs or models. `marks` are columns of 0 and 1 that say which parts of the method are on.
    """

    file: str
    place: str
    dataset: str
    metrics: dict[str, str] = field(default_factory=dict)
    marks: tuple[str, ...] = ()


_DETECTION = {name: name for name in ("map50", "map50_95", "precision", "recall")}
CATALOGUE = (
    Source(
        "ablation.csv", "Table 11", "chestxray14", {"macro_auc": "macro_auc"}, ("unfreezing", "class_weights", "ema")
    ),
    Source("chestxray14_runs.csv", "Table 5", "chestxray14"),
    Source("chestxray14_unfreeze_depth.csv", "Table 7", "chestxray14"),
    Source("ham10000_runs.csv", "Table 2", "ham10000"),
    Source("ham10000_baselines.csv", "Table 4", "ham10000", {"auc": "macro_auc"}),
    Source("chexpert_comparison.csv", "Table 8", "chexpert", {"mean_auc": "macro_auc"}),
    Source("chexpert_validation.csv", "Table 9", "chexpert"),
    Source("detection.csv", "Table 10", "vindr_cxr", _DETECTION),
    Source("segmentation.csv", "section on segmentation", "vindr_cxr"),
)


class PublishedError(ValueError):
    """A published table cannot be read; the message names the file and the remedy."""


@dataclass(frozen=True, eq=False)
class Numbers:
    """A published table: values (L, C) by label and column, NaN where it says N/A; marks by label."""

    source: Source
    labels: tuple[str, ...]
    columns: tuple[str, ...]
    values: Floats
    marks: tuple[tuple[bool, ...], ...]
    decimals: int

    @property
    def rounding(self) -> float:
        """Largest error of a figure printed with this table's decimals."""
        return 0.5 * 10.0**-self.decimals

    @property
    def of_runs(self) -> bool:
        """Whether the columns are repeated runs of one model."""
        return len(self.columns) > 1 and all(re.fullmatch(r"run\d+", column) for column in self.columns)

    def overall(self) -> Floats | None:
        """The line of overall figures (C,) of a table that lists metrics."""
        return self.values[self.labels.index(OVERALL)] if OVERALL in self.labels else None


@dataclass(frozen=True)
class BesideLine:
    """A published figure and ours; `ours` is None where no row or metric of this study corresponds."""

    label: str
    metric: str
    published: Summary
    dataset: str
    row: str
    ours: Summary | None


@dataclass(frozen=True)
class Beside:
    """Published figures beside ours, with what the published ones do not say or do not agree on."""

    source: Source
    lines: tuple[BesideLine, ...]
    remarks: tuple[str, ...]
    inconsistencies: tuple[str, ...]


def set_beside(table: StudyTable) -> Beside | None:
    """The published tables that the study names, beside its own rows; None where it names none.

    Raises:
        PublishedError: the study names a table that is not there.
    """
    named = table.header.published
    if not named:
        return None
    each = [_beside(load(file), table) for file in ((named,) if isinstance(named, str) else named)]
    return Beside(
        source=replace(each[0].source, place=" and ".join(beside.source.place for beside in each)),
        lines=tuple(line for beside in each for line in beside.lines),
        remarks=tuple(dict.fromkeys(remark for beside in each for remark in beside.remarks)),
        inconsistencies=tuple(dict.fromkeys(found for beside in each for found in beside.inconsistencies)),
    )


def _beside(numbers: Numbers, table: StudyTable) -> Beside:
    lines = _beside_models(numbers, table) if numbers.source.metrics else _beside_metrics(numbers, table)
    return Beside(numbers.source, tuple(lines), tuple(_remarks(numbers, table)), tuple(inconsistencies(numbers)))


def load(name: str, folder: Path = FOLDER) -> Numbers:
    """Read a published table by its file name, with or without `.csv`."""
    file = name if name.endswith(".csv") else f"{name}.csv"
    source = next((source for source in CATALOGUE if source.file == file), None)
    if source is None:
        known = ", ".join(source.file for source in CATALOGUE)
        raise PublishedError(f"no published table {name!r}; known: {known}")
    with (folder / file).open(encoding="utf-8", newline="") as stream:
        lines = list(csv.reader(stream))
    if len(lines) < 2 or any(len(line) != len(lines[0]) for line in lines):
        raise PublishedError(f"{file}: expected a header and lines of {len(lines[0]) if lines else 0} fields")
    return _parse(source, lines)


def load_all() -> list[Numbers]:
    """Every published table."""
    return [load(source.file) for source in CATALOGUE]


def _parse(source: Source, lines: list[list[str]]) -> Numbers:
    header, body = lines[0], lines[1:]
    wanted = [c for c in header[1:] if c in source.metrics] if source.metrics else header[1:]
    texts = [[line[header.index(column)] for column in wanted] for line in body]
    marks = tuple(tuple(line[header.index(mark)] == "1" for mark in source.marks) for line in body)
    try:
        values = np.array([[math.nan if text == "N/A" else float(text) for text in line] for line in texts])
    except ValueError as error:
        raise PublishedError(f"{source.file}: {error}; expected a number or N/A") from error
    decimals = max(len(text.partition(".")[2]) for line in texts for text in line if text != "N/A")
    return Numbers(source, tuple(line[0] for line in body), tuple(wanted), values, marks, decimals)


# ---------------------------------------------------------------- what does not fit together


def inconsistencies(numbers: Numbers, others: list[Numbers] | None = None) -> list[str]:
    """What does not fit together in a published table, by itself and with the paper's other tables of its data set."""
    everything = load_all() if others is None else others
    related = [other for other in everything if other.source.dataset == numbers.source.dataset]
    found = [wrong.sentence for wrong in _wrong_macros(numbers)]
    if numbers.source.metrics:
        found += [sentence for other in related for sentence in _repeated_wrong_macros(numbers, other)]
    if not numbers.of_runs:
        found += [sentence for runs in related if runs.of_runs for sentence in _best_beside_single(numbers, runs)]
    return found


@dataclass(frozen=True)
class _WrongMacro:
    """An overall figure that is no mean of the rows under it, beyond what rounding explains."""

    claim: float
    sentence: str


def _wrong_macros(numbers: Numbers) -> list[_WrongMacro]:
    stated = numbers.overall()
    if stated is None:
        return []
    body = np.delete(numbers.values, numbers.labels.index(OVERALL), axis=0)
    found = []
    for column, claim, values in zip(numbers.columns, stated, body.T, strict=True):
        mean, n = macro(values), int((~np.isnan(values)).sum())
        if abs(mean - claim) > 2 * numbers.rounding + 1e-9:
            where = f"{numbers.source.place}, column '{column}'"
            sentence = f"{where}: {OVERALL} is given as {claim:.4f}; the mean of its {n} defined rows is {mean:.4f}."
            found.append(_WrongMacro(float(claim), sentence))
    return found


def _repeated_wrong_macros(numbers: Numbers, other: Numbers) -> list[str]:
    """Figures of a table of models that repeat a wrong overall figure of another table."""
    tolerance = numbers.rounding + other.rounding
    return [
        f"'{label}', {value:.4f}, repeats a doubtful figure. {wrong.sentence}"
        for wrong in _wrong_macros(other)
        for label, value in _overall_figures(numbers)
        if abs(value - wrong.claim) < tolerance
    ]


def _best_beside_single(numbers: Numbers, runs: Numbers) -> list[str]:
    """Figures that are the best of the paper's repeated runs, in a table whose other figures are single runs."""
    repeated, figures = runs.overall(), _overall_figures(numbers)
    if repeated is None:
        return []
    summary, tolerance, found = summarise(repeated), numbers.rounding + runs.rounding, []
    for label, value in figures:
        others = [(name, other) for name, other in figures if name != label]
        is_best = abs(value - summary.best) < tolerance and abs(value - summary.mean) > tolerance
        if not (is_best and others):
            continue
        nearest, other = min(others, key=lambda pair: abs(pair[1] - value))
        found.append(
            f"'{label}', {value:.4f}, is the best of {summary.n} runs ({runs.source.place}: mean {summary.mean:.4f}, "
            f"sample std {summary.std:.4f}), set against single figures: the step from '{nearest}' is "
            f"{value - other:+.4f} from the best run and {summary.mean - other:+.4f} from the mean."
        )
    return found


def _overall_figures(numbers: Numbers) -> list[tuple[str, float]]:
    stated = numbers.overall()
    if stated is not None:
        return list(zip(numbers.columns, stated.tolist(), strict=True))
    auc = [i for i, column in enumerate(numbers.columns) if numbers.source.metrics.get(column) == "macro_auc"]
    return [(label, float(line[i])) for label, line in zip(numbers.labels, numbers.values, strict=True) for i in auc]


def _remarks(numbers: Numbers, table: StudyTable) -> list[str]:
    source, undefined = (
        numbers.source,
        [label for label, line in zip(numbers.labels, numbers.values, strict=True) if np.isnan(line).all()],
    )
    remarks = [] if numbers.of_runs else ["Published figures are single: no spread is given, so no test compares them."]
    if undefined:
        remarks.append(f"Published as undefined: {', '.join(undefined)}.")
    others = [dataset for dataset in table.header.datasets if dataset != source.dataset]
    if others:
        remarks.append(
            f"Published on {source.dataset}; figures on {', '.join(others)} are of other data and no replication."
        )
    return remarks


# ---------------------------------------------------------------- beside ours


def _beside_models(numbers: Numbers, table: StudyTable) -> list[BesideLine]:
    """A table of models: its lines are rows of ours where marks or names agree."""
    lines = []
    for dataset in table.header.datasets:
        for i, label in enumerate(numbers.labels):
            row = _row_by_marks(numbers, i, table.lines_of(dataset)) or _row_by_name(label, table.header.rows)
            for column, value in zip(numbers.columns, numbers.values[i], strict=True):
                metric = numbers.source.metrics[column]
                ours = _ours(table, dataset, row, metric) if row else None
                lines.append(BesideLine(label, metric, _single(value), dataset, row or "", ours))
    return lines


def _beside_metrics(numbers: Numbers, table: StudyTable) -> list[BesideLine]:
    """A table of metrics: its columns are repeated runs of one row, or rows of ours where names agree."""
    groups = (
        [("mean of runs", numbers.values)]
        if numbers.of_runs
        else [(column, numbers.values[:, i : i + 1]) for i, column in enumerate(numbers.columns)]
    )
    lines = []
    for dataset in table.header.datasets:
        for column, values in groups:
            named = _row_by_name(column, table.header.rows)
            row = _complete_row(table.lines_of(dataset)) if named is None and len(groups) == 1 else named
            for label, line in zip(numbers.labels, values, strict=True):
                metric = table.header.main_metric if label == OVERALL else label
                ours = _ours(table, dataset, row, metric) if row else None
                published = _single(math.nan) if np.isnan(line).any() else summarise(line)
                name = label if len(groups) == 1 else f"{label}, {column}"
                lines.append(BesideLine(name, metric, published, dataset, row or "", ours))
    return lines


def _row_by_marks(numbers: Numbers, position: int, lines: tuple[TableLine, ...]) -> str | None:
    if not numbers.source.marks:
        return None
    wanted = dict(zip(map(_plain, numbers.source.marks), numbers.marks[position], strict=True))
    same = [line.row for line in lines if {_plain(part): on for part, on in line.marks.items()} == wanted]
    return same[0] if len(same) == 1 else None


def _row_by_name(label: str, rows: tuple[str, ...]) -> str | None:
    """The one row whose name, letters and digits alone, is or begins with the label's.

    A label's citation is no part of its name, and what the paper calls ours is the row of its method.
    """
    plain = METHOD if label.startswith("Ours") else _plain(_CITATION.sub("", label))
    exact = [row for row in rows if _plain(row) == plain]
    begins = exact or [row for row in rows if _plain(row).startswith(plain)]
    return begins[0] if len(begins) == 1 else None


def _complete_row(lines: tuple[TableLine, ...]) -> str | None:
    """The only row, or the only one with every part on."""
    complete = lines if len(lines) == 1 else [line for line in lines if line.marks and all(line.marks.values())]
    return complete[0].row if len(complete) == 1 else None


def _ours(table: StudyTable, dataset: str, row: str, metric: str) -> Summary | None:
    if metric == table.header.main_metric:
        return next(line.summary for line in table.lines_of(dataset) if line.row == row)
    for grid in (grid for grid in (*table.other_metrics, *table.per_class) if grid.dataset == dataset):
        aliases = {_plain(label): j for j, label in enumerate(grid.labels)}
        short = re.search(r"\(([^)]*)\)$", metric)  # 'Melanoma (mel)' is our 'mel'
        j = aliases.get(_plain(metric), aliases.get(_plain(short.group(1))) if short else None)
        if j is not None:
            i = grid.rows.index(row)
            return Summary(float(grid.mean[i, j]), float(grid.std[i, j]), int(grid.n[i, j]), math.nan)
    return None


def _single(value: float) -> Summary:
    return summarise([] if math.isnan(value) else [value])


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.casefold())
