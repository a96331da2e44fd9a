"""Computed tables as plain text cells: what every writer (Markdown, LaTeX, HTML, terminal) shows, decided once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from analysis.patients import PatientNoise
from analysis.published import Beside
from analysis.schema import Units
from analysis.statistics import Summary
from analysis.tables import Comparison, MetricGrid, StudyTable, TableLine

NOTHING = "–"
MINUS = "−"
_CLASS_COLUMNS = 6  # rows of the study set side by side in one per-class table; more continue in the next one


@dataclass(frozen=True)
class TextTable:
    """A table of unescaped text. `lines` come in named groups (data sets); `left` says which columns hold words."""

    caption: str
    columns: tuple[str, ...]
    groups: tuple[tuple[str, tuple[tuple[str, ...], ...]], ...]
    left: tuple[bool, ...]

    @property
    def lines(self) -> tuple[tuple[str, ...], ...]:
        """All lines, without their groups' names."""
        return tuple(line for _, lines in self.groups for line in lines)


# ---------------------------------------------------------------- numbers


def number(value: float, decimals: int = 4) -> str:
    """A figure with fixed decimals; an en dash where it is not defined."""
    if math.isnan(value):
        return NOTHING
    if math.isinf(value):
        return "∞" if value > 0 else f"{MINUS}∞"
    return f"{value:z.{decimals}f}".replace("-", MINUS)  # z: what rounds to zero bears no minus


def signed(value: float, decimals: int = 4) -> str:
    """A difference, always with its sign."""
    text = number(value, decimals)
    return text if text == NOTHING or text.startswith(MINUS) else f"+{text}"


def mean_std(summary: Summary) -> str:
    """Mean ± sample standard deviation; one value has no deviation and says none."""
    if math.isnan(summary.std):
        return number(summary.mean)
    return f"{number(summary.mean)} ± {number(summary.std)}"


def interval(low: float, high: float) -> str:
    """A 95 % interval of a difference."""
    return NOTHING if math.isnan(low) else f"{signed(low)} to {signed(high)}"


def p_value(p: float) -> str:
    """A p value to three decimals."""
    return NOTHING if math.isnan(p) else "<0.001" if p < 0.001 else f"{p:.3f}"


def one_line(text: str, limit: int = 160) -> str:
    """A message on one line, cut to the limit."""
    flat = " ".join(text.split())
    return flat if len(flat) <= limit else flat[: limit - 1] + "…"


# ---------------------------------------------------------------- the tables


def main_table(table: StudyTable) -> TextTable:
    """A line a row and data set: marks, mean ± std, n, best run apart, and the difference from the reference row."""
    header = table.header
    columns = ("Row", *header.parts, f"{header.metric_label}, mean ± std", "n", "Best run")
    compared = _COMPARED if table.comparisons else ()
    groups = [
        (dataset_name(table, dataset), tuple(_main_lines(table, dataset, bool(compared))))
        for dataset in header.datasets
    ]
    left = (True, *[False] * (len(columns) - 1), *[True] * bool(compared), *[False] * max(0, len(compared) - 1))
    return TextTable(caption(table), columns + compared, tuple(groups), left)


def performance_table(table: StudyTable) -> TextTable:
    """The main table without its comparisons, for narrow pages."""
    whole = main_table(table)
    keep = len(table.header.parts) + 4
    groups = tuple((name, tuple(line[:keep] for line in lines if line[0])) for name, lines in whole.groups)
    return TextTable(whole.caption, whole.columns[:keep], groups, whole.left[:keep])


def comparison_table(table: StudyTable) -> TextTable:
    """A line a comparison, in the words of the main table."""
    groups = tuple(
        (dataset_name(table, dataset), tuple((c.row, *_compared(c)) for c in table.comparisons_of(dataset)))
        for dataset in table.header.datasets
    )
    left = (True, True, *[False] * (len(_COMPARED) - 1))
    return TextTable("Differences between rows, paired by seed", ("Row", *_COMPARED), groups, left)


def class_tables(table: StudyTable) -> list[TextTable]:
    """Class × row, mean ± std over seeds; wide studies continue in further tables."""
    tables = []
    for grid in table.per_class:
        for start in range(0, len(grid.rows), _CLASS_COLUMNS):
            chosen = range(start, min(start + _CLASS_COLUMNS, len(grid.rows)))
            lines = tuple((label, *(_grid_cell(grid, row, j) for row in chosen)) for j, label in enumerate(grid.labels))
            what = f"{metric_name(grid)} by class on {dataset_name(table, grid.dataset)}, mean ± std over seeds"
            columns = ("Class", *(grid.rows[row] for row in chosen))
            tables.append(TextTable(what, columns, (("", lines),), (True, *[False] * len(chosen))))
    return tables


def other_metrics_table(table: StudyTable) -> TextTable | None:
    """Rows × overall metrics besides the main one."""
    if not table.other_metrics:
        return None
    columns = ("Row", *table.other_metrics[0].labels)
    groups = tuple(
        (
            dataset_name(table, grid.dataset),
            tuple((row, *(_grid_cell(grid, i, j) for j in range(len(grid.labels)))) for i, row in enumerate(grid.rows)),
        )
        for grid in table.other_metrics
    )
    return TextTable("Other metrics, mean ± std over seeds", columns, groups, (True, *[False] * (len(columns) - 1)))


def beside_table(table: StudyTable, beside: Beside) -> TextTable:
    """Published figures beside ours."""
    columns = ("Published as", "Published", "n", "Our row", f"Ours ({table.header.metric_label} or as named)", "n")
    groups = []
    for dataset in table.header.datasets:
        lines = tuple(
            (
                line.label if line.metric in (line.label, table.header.main_metric) else f"{line.label}, {line.metric}",
                mean_std(line.published),
                str(line.published.n) if line.published.n else NOTHING,
                line.row or NOTHING,
                mean_std(line.ours) if line.ours else NOTHING,
                str(line.ours.n) if line.ours else NOTHING,
            )
            for line in beside.lines
            if line.dataset == dataset
        )
        groups.append((dataset_name(table, dataset), lines))
    left = (True, False, False, True, False, False)
    return TextTable(f"The paper's {beside.source.place} beside this study", columns, tuple(groups), left)


def patient_table(table: StudyTable, noise: Sequence[PatientNoise]) -> TextTable:
    """Differences with their intervals over test patients: the other source of noise."""
    columns = ("Row", "Reference", "Δ", "95 % over patients", "Images", "Groups", "Draws")
    groups = tuple(
        (
            dataset_name(table, dataset),
            tuple(
                (n.row, n.reference, signed(n.macro.value), interval(n.macro.low, n.macro.high), *_size(n))
                for n in noise
                if n.dataset == dataset
            ),
        )
        for dataset in table.header.datasets
    )
    what = f"Differences in {table.header.metric_label}: bootstrap over test patients, at the trained seeds"
    return TextTable(what, columns, groups, (True, True, *[False] * 5))


_OF_CLASS = {"mean_dice": "Dice", "map50_95": "AP@50-95"}  # main metric → its name for one class


def class_difference_tables(table: StudyTable, noise: Sequence[PatientNoise]) -> list[TextTable]:
    """Differences by class with their 95 % interval over patients, a column a comparison."""
    tables = []
    auc = table.header.main_metric == "macro_auc"
    what, how = ("AUC", "DeLong") if auc else (_OF_CLASS.get(table.header.main_metric, "quality"), "bootstrap")
    for dataset in table.header.datasets:
        shown = [n for n in noise if n.dataset == dataset][:_CLASS_COLUMNS]
        if shown:
            lines = tuple(
                (
                    name,
                    *(
                        f"{signed(n.classes[name].value)} ({interval(n.classes[name].low, n.classes[name].high)})"
                        for n in shown
                    ),
                )
                for name in shown[0].classes
            )
            columns = ("Class", *(f"{n.row} against {n.reference}" for n in shown))
            title = f"Δ {what} by class on {dataset_name(table, dataset)}, mean over seeds ({how} 95 %), uncorrected"
            tables.append(TextTable(title, columns, (("", lines),), (True, *[False] * len(shown))))
    return tables


def runs_table(table: StudyTable) -> TextTable:
    """The MLflow runs behind every line: the row's own and its cells'."""
    groups = tuple(
        (
            dataset_name(table, dataset),
            tuple(
                (
                    line.row,
                    line.row_run_id or NOTHING,
                    ", ".join(f"{s}: {run}" for s, run in line.run_ids.items()) or NOTHING,
                )
                for line in table.lines_of(dataset)
            ),
        )
        for dataset in table.header.datasets
    )
    return TextTable("MLflow runs", ("Row", "Run of the row", "Runs of its cells, by seed"), groups, (True, True, True))


def absent_table(table: StudyTable) -> TextTable:
    """Cells that are in no mean and in no pair."""
    groups = tuple(
        (
            dataset_name(table, dataset),
            tuple(
                (c.row, str(c.seed), c.status, one_line(c.error) or NOTHING)
                for c in table.absent
                if c.dataset == dataset
            ),
        )
        for dataset in table.header.datasets
    )
    return TextTable("Cells without a result", ("Row", "Seed", "Status", "Error"), groups, (True, False, True, True))


def cost_table(units: Units) -> TextTable:
    """Training cost in units, and what sharing saves."""

    def line(name: str, value: int | None, meaning: str) -> tuple[str, ...]:
        if value is None:
            return name, NOTHING, NOTHING, meaning
        return name, f"{value:,}", f"{units.alone / value:.2f}×" if value else NOTHING, meaning

    lines = (
        line("alone", units.alone, "every cell trained by itself"),
        line("shared", units.shared, "planned: shared stages, observers and activations"),
        line("floor", units.floor, "the least that gives the same bits"),
        line("executed", units.executed, "counted while it ran, over all launches"),
    )
    columns = ("Cost", "Units", "Alone ÷ this", "Meaning")
    return TextTable("Training cost", columns, (("", lines),), (True, False, False, True))


# ---------------------------------------------------------------- parts

_COMPARED = ("Against", "Δ", "95 % interval", "d_z", "Detectable Δ", "p (Holm)")


def caption(table: StudyTable) -> str:
    """The main table's caption: title, metric, seeds, and that drawn data are drawn."""
    header = table.header
    seeds = f"{len(header.seeds)} seed{'s' * (len(header.seeds) != 1)}"
    synthetic = " SYNTHETIC DATA." if header.synthetic else ""
    return f"{header.title}: {header.metric_label} on the test split, {seeds}.{synthetic}"


def dataset_name(table: StudyTable, dataset: str) -> str:
    """A data set's name, with a warning where it is drawn."""
    return f"{dataset} (synthetic)" if dataset in table.header.synthetic else dataset


def metric_name(grid: MetricGrid) -> str:
    """What a per-class grid measures, as it is read: `auc/Hernia` → AUC."""
    prefix = grid.columns[0].partition("/")[0]
    average_precision = {"ap50": "AP@50", "ap50_95": "AP@50-95"}
    return average_precision.get(prefix, prefix.upper() if prefix in ("auc", "ap") else prefix)


def row_name(line: TableLine) -> str:
    """A row's name, flagged where it equals another row; the notes say which one, and at which seeds."""
    return f"{line.row} [no-op]" if line.noop_of else line.row


def _main_lines(table: StudyTable, dataset: str, compared: bool) -> Iterable[tuple[str, ...]]:
    parts = table.header.parts
    for line in table.lines_of(dataset):
        marks = tuple("✓" if line.marks.get(part) else NOTHING for part in parts)
        figures = (mean_std(line.summary), _count(line, table), _best(line))
        own = (row_name(line), *marks, *figures)
        rest = [_compared(comparison) for comparison in line.comparisons] or [(NOTHING,) * len(_COMPARED)]
        if not compared:
            yield own
            continue
        yield own + rest[0]
        yield from (("",) * len(own) + further for further in rest[1:])


def _count(line: TableLine, table: StudyTable) -> str:
    declared = len(table.header.seeds)
    return str(line.summary.n) if line.summary.n == declared else f"{line.summary.n} of {declared}"


def _best(line: TableLine) -> str:
    return NOTHING if line.best_seed is None else f"{number(line.summary.best)} (seed {line.best_seed})"


def _compared(comparison: Comparison) -> tuple[str, ...]:
    paired = comparison.paired
    against = comparison.reference
    if comparison.absent:
        against += f" ({paired.n} pair{'s' * (paired.n != 1)})"
    mark = " *" if comparison.marked else ""
    return (
        against,
        signed(paired.delta),
        interval(paired.low, paired.high),
        number(paired.dz, 2),
        number(paired.detectable_delta) if paired.std > 0 else NOTHING,  # no spread, nothing to scale d_z by
        p_value(comparison.p_holm) + mark,
    )


def _size(noise: PatientNoise) -> tuple[str, str, str]:
    return f"{noise.images:,}", f"{noise.groups:,}", f"{noise.draws:,}"


def _grid_cell(grid: MetricGrid, row: int, column: int) -> str:
    n = int(grid.n[row, column])
    summary = Summary(float(grid.mean[row, column]), float(grid.std[row, column]), n, math.nan)
    return mean_std(summary) if n == grid.n[row].max() else f"{mean_std(summary)} (n = {n})"
