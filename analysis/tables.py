"""From records to tables: everything a table states, computed once, before anything is drawn or written.

A row's figure is mean ± sample standard deviation over its seeds; rows are compared by their differences a seed; a
cell that did not finish removes its pair and is named. What each number means is in `analysis.statistics`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from analysis.records import RowRecord, StudyRecords
from analysis.schema import StudyHeader
from analysis.statistics import ALPHA, Floats, Paired, Summary, holm, paired, summarise

FINISHED = "FINISHED"
MISSING = "MISSING"
UNMEASURED = "NO METRIC"  # the cell says FINISHED, yet the ledger holds no value of the main metric
_IDENTITY = ("study", "dataset", "row", "row_index", "seed", "status", "error")
_DIGESTS = ("weights_sha256", "trajectory_sha256", "split_digest", "config_digest")
FACTS = (*_IDENTITY, "best_epoch", "mlflow_run_id", *_DIGESTS, "noop_of", "undefined_classes")


class RecordsError(ValueError):
    """The records cannot become a table; the message names every place and the remedy."""


@dataclass(frozen=True)
class AbsentCell:
    """A declared cell that is in no mean and in no pair."""

    dataset: str
    row: str
    seed: int
    status: str
    error: str = ""


@dataclass(frozen=True)
class Comparison:
    """A row against its reference row on one data set, paired by seed.

    Attributes:
        seeds: seeds of the pairs, in the study's order; `differences` (n,) belong to them.
        absent: cells whose absence removed a pair.
        p_holm: paired t test after Holm's correction over all comparisons of the table; NaN where untested.
        attainable_holm: the least value a distribution-free test on these pairs could reach after the same correction.
        marked: p_holm ≤ α, and α attainable: the t test alone would rest on normality, which few pairs cannot show.
    """

    dataset: str
    row: str
    reference: str
    seeds: tuple[int, ...]
    differences: tuple[float, ...]
    absent: tuple[AbsentCell, ...]
    paired: Paired
    p_holm: float = math.nan
    attainable_holm: float = math.nan
    marked: bool = False


@dataclass(frozen=True)
class TableLine:
    """A row on one data set. `run_ids`: seed → MLflow run of the cell; `noop_of`: equal row → seeds it equals it at."""

    dataset: str
    row: str
    marks: dict[str, bool]
    summary: Summary
    seeds: tuple[int, ...]
    best_seed: int | None
    absent: tuple[AbsentCell, ...]
    row_run_id: str
    run_ids: dict[int, str]
    noop_of: dict[str, tuple[int, ...]]
    comparisons: tuple[Comparison, ...] = ()


@dataclass(frozen=True, eq=False)
class MetricGrid:
    """Rows × metrics of one data set: mean, sample std and n, each (R, M); NaN and 0 where a metric is undefined.

    `columns` name the metrics in the cells, `labels` say them in the table (class names, for a per-class grid).
    """

    dataset: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    labels: tuple[str, ...]
    mean: Floats
    std: Floats
    n: Floats


@dataclass(frozen=True)
class DatasetFacts:
    """What a reader must know about a data set's classes and split."""

    dataset: str
    classes: tuple[str, ...]
    dropped: tuple[str, ...]
    undefined: tuple[str, ...]
    split_digests: tuple[str, ...]
    synthetic: bool


@dataclass(frozen=True)
class StudyTable:
    """A study's tables. `problems`: why figures may not be comparable, one sentence each; empty when all is well."""

    header: StudyHeader
    lines: tuple[TableLine, ...]
    comparisons: tuple[Comparison, ...]
    per_class: tuple[MetricGrid, ...]
    other_metrics: tuple[MetricGrid, ...]
    facts: tuple[DatasetFacts, ...]
    absent: tuple[AbsentCell, ...]
    problems: tuple[str, ...]

    def lines_of(self, dataset: str) -> tuple[TableLine, ...]:
        """The data set's lines, in table order."""
        return tuple(line for line in self.lines if line.dataset == dataset)

    def comparisons_of(self, dataset: str) -> tuple[Comparison, ...]:
        """The data set's comparisons, in table order."""
        return tuple(comparison for comparison in self.comparisons if comparison.dataset == dataset)


def build_table(records: StudyRecords) -> StudyTable:
    """Compute a study's tables.

    Raises:
        RecordsError: columns or rows are missing, unknown or doubled; all of them in one message.
    """
    check_records(records)
    header, cells = records.header, measured(records)
    by_row = _row_cells(header, cells)
    comparisons = _correct(
        [
            _compare(dataset, (row, reference), by_row[dataset, row], by_row[dataset, reference])
            for dataset in header.datasets
            for row, reference in header.comparisons
        ]
    )
    rows = {row.name: row for row in records.rows}
    lines = [_line(key[0], rows[key[1]], row_cells, comparisons) for key, row_cells in by_row.items()]
    facts = tuple(_facts(header, dataset, cells) for dataset in header.datasets)
    return StudyTable(
        header=header,
        lines=tuple(lines),
        comparisons=tuple(comparisons),
        per_class=tuple(_per_class(header, facts, cells)) if header.per_class else (),
        other_metrics=tuple(_other_metrics(header, cells)),
        facts=facts,
        absent=tuple(cell for row_cells in by_row.values() for cell in row_cells.absent),
        problems=tuple(_problems(header, facts, cells)),
    )


def check_records(records: StudyRecords) -> None:
    """Refuse records that contradict their own header, naming every contradiction at once."""
    header, cells = records.header, records.cells
    missing = [name for name in FACTS if name not in cells.columns]
    if missing:
        raise RecordsError(f"cells of {header.study!r} lack the columns {missing}; read them with the ledger's reader")
    errors = []
    for column, known in (("dataset", header.datasets), ("row", header.rows), ("seed", header.seeds)):
        unknown = sorted(set(cells[column]) - set(known), key=str)
        if unknown:
            errors.append(f"column {column!r} holds {unknown}, which the header does not declare")
    doubled = cells[cells.duplicated(["dataset", "row", "seed"])]
    errors += [f"cell {c.dataset} · {c.row} · seed {c.seed} appears twice" for c in doubled.itertuples()]
    described = {row.name for row in records.rows}
    errors += [f"row {row!r} of the header has no row record" for row in header.rows if row not in described]
    compared = {row for pair in header.comparisons for row in pair}
    errors += [f"comparisons name {row!r}, which is no row" for row in sorted(compared - set(header.rows))]
    if errors:
        raise RecordsError(f"the records of {header.study!r} contradict their header: " + "; ".join(errors))


def measured(records: StudyRecords) -> pd.DataFrame:
    """The cells in table order, with the status as the analysis counts it: finished cells have a main metric."""
    header, cells = records.header, records.cells.copy()
    if header.main_metric not in cells:
        cells[header.main_metric] = np.nan
    cells.loc[(cells["status"] == FINISHED) & cells[header.main_metric].isna(), "status"] = UNMEASURED
    order = [cells[column].map({name: i for i, name in enumerate(names)}) for column, names in _keys(header)]
    return cells.iloc[np.lexsort([part.to_numpy() for part in reversed(order)])].reset_index(drop=True)


def metric_columns(records: StudyRecords) -> list[str]:
    """Test metrics of the cells: the main one, the other overall ones by name, then classes in the data sets' order."""
    header = records.header
    metrics = [str(column) for column in records.cells.columns if column not in FACTS]
    classes = list(dict.fromkeys(name for dataset in header.datasets for name in header.classes.get(dataset, ())))
    position = {name: i for i, name in enumerate(classes)}

    def order(metric: str) -> tuple[bool, bool, str, int, str]:
        prefix, slash, name = metric.partition("/")
        return metric != header.main_metric, bool(slash), prefix, position.get(name, len(classes)), name

    return sorted({*metrics, header.main_metric}, key=order)


# ---------------------------------------------------------------- lines and comparisons


def _keys(header: StudyHeader) -> tuple[tuple[str, Sequence[object]], ...]:
    return ("dataset", header.datasets), ("row", header.rows), ("seed", header.seeds)


@dataclass(frozen=True)
class _RowCells:
    """A row's cells on one data set, by seed in the study's order; `values` holds the finished ones."""

    values: dict[int, float]
    absent: tuple[AbsentCell, ...]
    run_ids: dict[int, str]
    noop_of: dict[str, tuple[int, ...]]


def _row_cells(header: StudyHeader, cells: pd.DataFrame) -> dict[tuple[str, str], _RowCells]:
    cells = cells[["dataset", "row", "seed", "status", "error", "noop_of", "mlflow_run_id", header.main_metric]]
    parts = {(str(dataset), str(row)): part for (dataset, row), part in cells.groupby(["dataset", "row"], sort=False)}
    keys = [(dataset, row) for dataset in header.datasets for row in header.rows]
    return {key: _of_row(header, key, parts.get(key, cells.iloc[:0])) for key in keys}


def _of_row(header: StudyHeader, key: tuple[str, str], cells: pd.DataFrame) -> _RowCells:
    by_seed = {int(cell["seed"]): cell for cell in cells.to_dict("records")}
    absent = []
    noops: dict[str, tuple[int, ...]] = {}
    for seed in header.seeds:
        cell = by_seed.get(seed, {"status": MISSING})
        if cell["status"] != FINISHED:
            absent.append(AbsentCell(*key, seed, str(cell["status"]), _text(cell.get("error"))))
        elif twin := _text(cell["noop_of"]):
            noops[twin] = (*noops.get(twin, ()), seed)
    finished = {seed: cell for seed, cell in by_seed.items() if cell["status"] == FINISHED}
    return _RowCells(
        values={seed: float(cell[header.main_metric]) for seed, cell in finished.items()},
        absent=tuple(absent),
        run_ids={seed: run for seed, cell in by_seed.items() if (run := _text(cell["mlflow_run_id"]))},
        noop_of=noops,
    )


def _compare(dataset: str, names: tuple[str, str], row: _RowCells, reference: _RowCells) -> Comparison:
    seeds = tuple(seed for seed in row.values if seed in reference.values)
    ours, theirs = [row.values[seed] for seed in seeds], [reference.values[seed] for seed in seeds]
    return Comparison(
        dataset=dataset,
        row=names[0],
        reference=names[1],
        seeds=seeds,
        differences=tuple(x - y for x, y in zip(ours, theirs, strict=True)),
        absent=row.absent + reference.absent,
        paired=paired(ours, theirs),
    )


def _correct(comparisons: list[Comparison]) -> list[Comparison]:
    """Holm's correction over one table. It rises with every p, so corrected least p values bound what is attainable."""
    p = np.array([c.paired.p for c in comparisons], dtype=np.float64)
    least = np.array([c.paired.smallest_attainable_p for c in comparisons], dtype=np.float64)
    corrected = zip(comparisons, holm(p), holm(np.where(np.isnan(p), np.nan, least)), strict=True)
    return [
        replace(c, p_holm=float(q), attainable_holm=float(bound), marked=bool(q <= ALPHA and bound <= ALPHA))
        for c, q, bound in corrected
    ]


def _line(dataset: str, record: RowRecord, row: _RowCells, comparisons: list[Comparison]) -> TableLine:
    return TableLine(
        dataset=dataset,
        row=record.name,
        marks=record.marks,
        summary=summarise(list(row.values.values())),
        seeds=tuple(row.values),
        best_seed=max(row.values, key=lambda seed: row.values[seed]) if row.values else None,
        absent=row.absent,
        row_run_id=record.run_ids.get(dataset, ""),
        run_ids=row.run_ids,
        noop_of=row.noop_of,
        comparisons=tuple(c for c in comparisons if (c.dataset, c.row) == (dataset, record.name)),
    )


# ---------------------------------------------------------------- grids of metrics


def _per_class(header: StudyHeader, facts: Sequence[DatasetFacts], cells: pd.DataFrame) -> list[MetricGrid]:
    grids = []
    for fact in facts:
        prefix = _class_prefix(header, fact, cells)
        classes = [name for name in fact.classes if f"{prefix}/{name}" in cells.columns]
        if prefix and classes:
            grids.append(_grid(header, fact.dataset, cells, [f"{prefix}/{name}" for name in classes], classes))
    return grids


def _class_prefix(header: StudyHeader, fact: DatasetFacts, cells: pd.DataFrame) -> str | None:
    """Which per-class metric belongs to the main one: macro_auc → auc, map50 → ap50; else the first there is."""
    split = (str(column).partition("/") for column in cells.columns)
    prefixes = sorted({prefix for prefix, slash, name in split if slash and name in fact.classes})
    wanted = re.sub(r"^(macro_|mean_|m(?=ap))", "", header.main_metric)
    return wanted if wanted in prefixes else next(iter(prefixes), None)


def _other_metrics(header: StudyHeader, cells: pd.DataFrame) -> list[MetricGrid]:
    """Overall metrics besides the main one, a grid a data set."""
    known = {*FACTS, header.main_metric}
    names = sorted(str(c) for c in cells.columns if c not in known and "/" not in str(c))
    names = [name for name in names if cells[name].notna().any()]
    return [_grid(header, dataset, cells, names, names) for dataset in header.datasets] if names else []


def _grid(
    header: StudyHeader, dataset: str, cells: pd.DataFrame, columns: Sequence[str], labels: Sequence[str]
) -> MetricGrid:
    finished = cells[(cells["dataset"] == dataset) & (cells["status"] == FINISHED)]
    grouped = finished.groupby("row", sort=False)[list(columns)]
    rows = list(header.rows)
    return MetricGrid(
        dataset=dataset,
        rows=header.rows,
        columns=tuple(columns),
        labels=tuple(labels),
        mean=grouped.mean().reindex(rows).to_numpy(np.float64),
        std=grouped.std(ddof=1).reindex(rows).to_numpy(np.float64),
        n=grouped.count().reindex(rows, fill_value=0).to_numpy(np.float64),
    )


# ---------------------------------------------------------------- facts and problems


def _facts(header: StudyHeader, dataset: str, cells: pd.DataFrame) -> DatasetFacts:
    finished = cells[(cells["dataset"] == dataset) & (cells["status"] == FINISHED)]
    named = {str(name) for names in finished["undefined_classes"] for name in _names(names)}
    classes = header.classes.get(dataset, ())
    return DatasetFacts(
        dataset=dataset,
        classes=classes,
        dropped=header.dropped.get(dataset, ()),
        undefined=tuple(name for name in classes if name in named) + tuple(sorted(named - set(classes))),
        split_digests=tuple(sorted({_text(digest) for digest in finished["split_digest"]} - {""})),
        synthetic=dataset in header.synthetic,
    )


def _problems(header: StudyHeader, facts: Sequence[DatasetFacts], cells: pd.DataFrame) -> list[str]:
    problems = []
    for fact in facts:
        finished = cells[(cells["dataset"] == fact.dataset) & (cells["status"] == FINISHED)]
        if len(fact.split_digests) > 1:
            problems.append(
                f"{fact.dataset}: cells were evaluated on {len(fact.split_digests)} different splits "
                f"({', '.join(digest[:12] for digest in fact.split_digests)}); their figures are not comparable."
            )
        if len({frozenset(_names(names)) for names in finished["undefined_classes"]}) > 1:
            problems.append(
                f"{fact.dataset}: the undefined classes differ between cells, so their {header.metric_label} is a mean "
                "over different classes."
            )
    unmeasured = int((cells["status"] == UNMEASURED).sum())
    if unmeasured:
        problems.append(
            f"{unmeasured} finished cells hold no test value of {header.main_metric}; they count as absent."
        )
    return problems


def _names(names: object) -> tuple[str, ...]:
    return tuple(str(name) for name in names) if isinstance(names, tuple | list) else ()


def _text(value: object) -> str:
    """A cell's text; the ledger's gaps (None, NaN, NA) are empty."""
    return "" if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)) else str(value)
