"""Figures of a study: by class, learning curves, paired differences. Computed tables in, PNG and SVG bytes out.

The same records give the same bytes: no dates, a fixed salt for SVG ids, text as paths. Names are drawn as they are
(no mathematics in them), wrapped and, at last, cut. What does not fit is left out and said under the figure.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from analysis.layout import dataset_name, metric_name, signed
from analysis.records import StudyRecords
from analysis.schema import VAL
from analysis.tables import FINISHED, MetricGrid, StudyTable, measured

# Okabe & Ito's palette without its yellow and black: told apart under all common kinds of colour blindness.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5F5F5F", "#882255")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")
STYLES = ("-", "--", "-.", ":", "-", "--", "-.", ":")
MOST_ROWS = len(PALETTE)
MOST_CLASSES = 40
MOST_COMPARISONS = 20
MOST_DATASETS = 4
_WIDTH = 7.0  # inches: the text width of a page
_PAGE = 6.6  # inches of classes in one column before they are set in two
_CLASS_NAME = (26, 2)  # characters a line, lines
_DPI = 160
_INK = "#222222"
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "text.parse_math": False,
    "svg.hashsalt": "spft-studies",
    "svg.fonttype": "path",
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Drawing:
    """A drawn figure.

    `name` is its file's stem: its kind and the data set's number. `alt` says in words what it shows, `left_out` what
    it does not, `caption` how it is read.
    """

    kind: str
    name: str
    title: str
    alt: str
    png: bytes
    svg: bytes
    left_out: str = ""
    caption: str = ""


def draw_all(records: StudyRecords, table: StudyTable) -> list[Drawing]:
    """Every figure that the records have numbers for, at most four data sets of each kind."""
    drawings = []
    with mpl.rc_context(STYLE):
        for i, dataset in enumerate(table.header.datasets[:MOST_DATASETS]):
            for draw in (_per_class, _learning_curves, _differences):
                drawing = draw(records, table, dataset, i)
                if drawing is not None:
                    drawings.append(drawing)
    return drawings


# ---------------------------------------------------------------- by class


def _per_class(records: StudyRecords, table: StudyTable, dataset: str, position: int) -> Drawing | None:
    grid = next((grid for grid in table.per_class if grid.dataset == dataset), None)
    if grid is None or not (grid.n > 0).any():
        return None
    rows = _drawn_rows(grid.rows, [bool(n.any()) for n in grid.n])
    classes = [j for j in range(len(grid.labels)) if (grid.n[:, j] > 0).any()]
    shown = classes[:MOST_CLASSES]
    legend = _Legend([_legend_name(grid.rows[i], int(grid.n[i].max())) for i in rows], lines=False)
    lines = max(wrapped(grid.labels[j], *_CLASS_NAME).count("\n") + 1 for j in shown)
    pitch = max(0.14 * lines + 0.1, 0.075 * len(rows) + 0.06)
    halves = 2 if len(shown) * pitch > _PAGE else 1
    per_panel = -(-len(shown) // halves)
    figure = Figure(figsize=(_WIDTH, 0.85 + per_panel * pitch + legend.height), layout="constrained")
    metric = metric_name(grid)
    panels = figure.subplots(1, halves, sharex=True, squeeze=False)[0]
    for panel, start in zip(panels, range(0, len(shown), per_panel), strict=True):
        _class_points(panel, grid, rows, shown[start : start + per_panel])
        panel.set_xlabel(f"{metric}: mean ± sample std over seeds")
    title = f"By class on {dataset_name(table, dataset)}"
    _title(figure, title)
    legend.draw(figure)
    undefined = [grid.labels[j] for j in range(len(grid.labels)) if j not in classes]
    left_out = _left_out(
        ("rows", len(grid.rows) - len(rows)), ("classes", len(classes) - len(shown)), undefined=undefined
    )
    alt = f"{title}: a point with an error bar for each of {len(rows)} rows in each of {len(shown)} classes."
    return render(figure, ("per_class", position), title, alt, left_out)


def _class_points(axes: Axes, grid: MetricGrid, rows: Sequence[int], shown: Sequence[int]) -> None:
    places = np.arange(len(shown), dtype=np.float64)
    offsets = np.linspace(-0.34, 0.34, len(rows)) if len(rows) > 1 else [0.0]
    for k, (i, offset) in enumerate(zip(rows, offsets, strict=True)):
        mean, std = grid.mean[i, shown], grid.std[i, shown]
        spread = np.where(np.isnan(std), 0.0, std)
        style: dict[str, Any] = {
            "color": PALETTE[k],
            "marker": MARKERS[k],
            "markersize": 3.6,
            "elinewidth": 1.1,
            "capsize": 1.8,
        }
        axes.errorbar(mean, places + offset, xerr=spread, linestyle="none", **style)
    axes.set_yticks(places, [wrapped(grid.labels[j], *_CLASS_NAME) for j in shown])
    axes.set_ylim(len(shown) - 0.45, -0.55)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.grid(axis="y", visible=False)
    for edge in places[:-1] + 0.5:
        axes.axhline(edge, color="#E4E4E4", linewidth=0.6)


# ---------------------------------------------------------------- learning curves


@dataclass(frozen=True, eq=False)
class _Curves:
    """What one figure of learning curves shows: row → epochs × seeds of its finished cells, chosen epochs by seed."""

    rows: tuple[str, ...]
    metric: dict[str, pd.DataFrame]
    blocks: dict[str, pd.DataFrame]
    chosen: dict[str, dict[int, int]]
    omitted: int


def _learning_curves(records: StudyRecords, table: StudyTable, dataset: str, position: int) -> Drawing | None:
    header, curves = table.header, _curves(records, dataset)
    if not curves.rows:
        return None
    names = [_legend_name(row, curves.metric[row].shape[1]) for row in curves.rows]
    legend = _Legend(names, extra="markers: the chosen epoch of each seed")
    figure = Figure(figsize=(_WIDTH, (4.2 if curves.blocks else 3.2) + legend.height), layout="constrained")
    axes, lower = _panels(figure, with_blocks=bool(curves.blocks))
    for k, row in enumerate(curves.rows):
        _draw_curve(axes, curves.metric[row], curves.chosen.get(row, {}), k)
    _frame_curves(axes, [curves.metric[row] for row in curves.rows])
    axes.set_ylabel(f"validation {header.metric_label}")
    if lower is not None:
        _draw_blocks(lower, [(k, curves.blocks[row]) for k, row in enumerate(curves.rows) if row in curves.blocks])
    boundary = _stage_boundary(curves.blocks)
    for part in (axes, lower):
        if part is not None and boundary is not None:
            part.axvline(boundary + 0.5, color="#888888", linewidth=0.9, linestyle=(0, (4, 3)))
    (lower or axes).set_xlabel("epochs completed" + (" (dashed line: stage 2 begins)" if boundary is not None else ""))
    title = f"Learning curves on {dataset_name(table, dataset)}"
    _title(figure, title)
    legend.draw(figure)
    alt = (
        f"{title}: mean validation {header.metric_label} by epoch of {len(curves.rows)} rows, with a band of one "
        "sample std over seeds; thin lines are single seeds after others have stopped."
    )
    return render(figure, ("learning_curves", position), title, alt, _left_out(("rows", curves.omitted)))


def _curves(records: StudyRecords, dataset: str) -> _Curves:
    header, history, cells = records.header, records.history, measured(records)
    cells = cells[(cells["status"] == FINISHED) & (cells["dataset"] == dataset)]
    part = history[history["dataset"] == dataset].merge(cells[["row", "seed"]], on=["row", "seed"])
    metric = part[part["metric"] == VAL + header.main_metric]
    there = set(metric["row"])
    rows = tuple(header.rows[i] for i in _drawn_rows(header.rows, [row in there for row in header.rows]))
    blocks = part[part["metric"] == "unfrozen_blocks"]
    return _Curves(rows, _by_row(metric, rows), _by_row(blocks, rows), _chosen_epochs(cells), len(there) - len(rows))


def _by_row(history: pd.DataFrame, rows: Sequence[str]) -> dict[str, pd.DataFrame]:
    return {
        str(row): group.pivot_table(index="epoch", columns="seed", values="value", aggfunc="last")
        for row, group in history[history["row"].isin(rows)].groupby("row", sort=False)
    }


def _chosen_epochs(cells: pd.DataFrame) -> dict[str, dict[int, int]]:
    part = cells[cells["best_epoch"].notna()]
    chosen: dict[str, dict[int, int]] = {}
    for row, seed, epoch in zip(part["row"], part["seed"], part["best_epoch"], strict=True):
        chosen.setdefault(str(row), {})[int(seed)] = int(epoch)
    return chosen


def _draw_curve(axes: Axes, curve: pd.DataFrame, chosen: dict[int, int], k: int) -> None:
    """Mean and band where every seed still trains: a mean over those left would shift as seeds stop."""
    complete = curve.dropna()
    epochs, values = complete.index.to_numpy(np.float64), complete.to_numpy(np.float64)
    if values.shape[1] > 1 and len(values):
        mean, std = values.mean(axis=1), values.std(axis=1, ddof=1)
        axes.fill_between(epochs, mean - std, mean + std, color=PALETTE[k], alpha=0.16, linewidth=0)
    if len(values):
        axes.plot(epochs, values.mean(axis=1), color=PALETTE[k], linestyle=STYLES[k], linewidth=1.5)
    last = epochs[-1] if len(epochs) else 0
    for seed in curve.columns:
        tail = curve[seed].loc[last:].dropna()
        if len(tail) > 1:
            axes.plot(tail.index, tail.to_numpy(), color=PALETTE[k], linewidth=0.6, alpha=0.55)
        epoch = chosen.get(int(seed))
        if epoch is not None and epoch in curve.index:
            style: dict[str, Any] = {
                "marker": MARKERS[k],
                "markersize": 4.2,
                "markeredgecolor": "white",
                "markeredgewidth": 0.5,
            }
            axes.plot([epoch], [curve[seed].loc[epoch]], color=PALETTE[k], linestyle="none", zorder=5, **style)


def _frame_curves(axes: Axes, curves: Sequence[pd.DataFrame]) -> None:
    """Let a collapse at the start run off the frame when it would flatten all that follows."""
    values = np.concatenate([curve.to_numpy(np.float64).ravel() for curve in curves])
    low, bulk, high = np.nanquantile(values, [0, 0.02, 1])
    floor = bulk if high > bulk and bulk - low > 0.5 * (high - bulk) else low
    margin = 0.05 * (high - floor) or 0.01
    axes.set_ylim(floor - margin, high + margin)


def _stage_boundary(blocks: dict[str, pd.DataFrame]) -> int | None:
    """Last epoch of stage 1: the last one without unfrozen blocks, in any row that unfreezes some."""
    starts = [int(curve.index[(curve > 0).any(axis=1)][0]) for curve in blocks.values() if (curve > 0).any(axis=None)]
    return min(starts) - 1 if starts and min(starts) > 1 else None


def _draw_blocks(axes: Axes, curves: Sequence[tuple[int, pd.DataFrame]]) -> None:
    for k, curve in curves:
        steps = curve.max(axis=1)
        lift = 0.12 * (k - (len(curves) - 1) / 2)  # rows with equal steps stay visible
        style: dict[str, Any] = {"color": PALETTE[k], "linestyle": STYLES[k], "linewidth": 1.3}
        axes.step(steps.index.to_numpy(np.float64), steps.to_numpy(np.float64) + lift, where="mid", **style)
    axes.set_ylabel("unfrozen\nblocks")
    axes.margins(y=0.12)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))


def _panels(figure: Figure, *, with_blocks: bool) -> tuple[Axes, Axes | None]:
    if not with_blocks:
        return figure.add_subplot(), None
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3.2, 1])
    return upper, lower


# ---------------------------------------------------------------- paired differences


def _differences(records: StudyRecords, table: StudyTable, dataset: str, position: int) -> Drawing | None:
    comparisons = [c for c in table.comparisons_of(dataset) if c.paired.n]
    if not comparisons:
        return None
    shown = comparisons[:MOST_COMPARISONS]
    labels = [f"{wrapped(c.row, 34, 2)}\nagainst {wrapped(c.reference, 28, 2)}" for c in shown]
    height = 1.05 + sum(0.16 + 0.155 * (label.count("\n") + 1) for label in labels)
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    axes.axvline(0, color="#888888", linewidth=0.9)
    for y, c in enumerate(shown):
        paired = c.paired
        if paired.n > 1:
            axes.plot([paired.low, paired.high], [y, y], color=PALETTE[0], linewidth=2.0, solid_capstyle="butt")
        spots = y + 0.2 + np.linspace(-0.05, 0.05, paired.n) * (paired.n > 1)
        axes.plot(c.differences, spots, "o", color=PALETTE[1], markersize=3.2, alpha=0.85, markeredgewidth=0)
        axes.plot([paired.delta], [y], "D", color=PALETTE[0], markersize=5, markeredgecolor="white")
        note = f"{signed(paired.delta)}, n = {paired.n}" + (" *" if c.marked else "")
        axes.annotate(note, (1.01, y), xycoords=("axes fraction", "data"), va="center", fontsize=8, color=_INK)
    axes.set_yticks(range(len(shown)), labels)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(f"difference in {table.header.metric_label} \n(diamond and bar: mean, 95 % paired t; dots: seeds)")
    title = f"Paired differences on {dataset_name(table, dataset)}"
    _title(figure, title)
    alt = title + ": " + "; ".join(f"{c.row} against {c.reference} {signed(c.paired.delta)}" for c in shown[:8]) + "."
    without = len(table.comparisons_of(dataset)) - len(comparisons)
    left_out = _left_out(("comparisons", len(comparisons) - len(shown)), ("comparisons without a pair", without))
    return render(figure, ("differences", position), title, alt, left_out)


# ---------------------------------------------------------------- parts


def _drawn_rows(rows: Sequence[str], has_numbers: Sequence[bool]) -> list[int]:
    """The first rows that have numbers, as many as there are colours, and the last one, often the full method."""
    present = [i for i in range(len(rows)) if has_numbers[i]]
    return present if len(present) <= MOST_ROWS else [*present[: MOST_ROWS - 1], present[-1]]


def _left_out(*counts: tuple[str, int], undefined: Sequence[str] = ()) -> str:
    parts = [f"{n} {what}" for what, n in counts if n > 0]
    sentence = f"Left out for space or want of numbers: {', '.join(parts)}; the tables hold them." if parts else ""
    named = f"Undefined or without a result: {', '.join(undefined)}." if undefined else ""
    return " ".join(text for text in (sentence, named) if text)


def _legend_name(row: str, n: int) -> str:
    name = f"{wrapped(row, 40, 2)} (n = {n})"
    return f" {name}" if name.startswith("_") else name  # matplotlib hides names that begin with an underscore


def wrapped(text: str, width: int, most: int) -> str:
    """At most so many lines; the last one says by an ellipsis that it was cut."""
    return "\n".join(textwrap.wrap(text, width, max_lines=most, placeholder="…") or [""])


@dataclass(frozen=True)
class _Legend:
    """A legend below the axes, in as many columns as its names leave room for."""

    names: Sequence[str]
    lines: bool = True
    extra: str = ""

    @property
    def columns(self) -> int:
        longest = max(len(part) for name in (*self.names, self.extra) for part in name.split("\n"))
        return max(1, min(4, int(_WIDTH * 14 / (longest + 8))))

    @property
    def height(self) -> float:
        """Inches; the figure is made taller by it, so that names never squeeze the axes."""
        labels = [*self.names, *([self.extra] if self.extra else [])]
        tallest = max(name.count("\n") + 1 for name in labels)
        return -(-len(labels) // self.columns) * (0.145 * tallest + 0.05) + 0.15

    def draw(self, figure: Figure) -> None:
        style: dict[str, Any] = {"markersize": 4.5, "linewidth": 1.3}
        handles = [
            Line2D([], [], color=PALETTE[k], marker=MARKERS[k], linestyle=STYLES[k] if self.lines else "none", **style)
            for k in range(len(self.names))
        ]
        labels = list(self.names)
        if self.extra:
            handles.append(Line2D([], [], linestyle="none"))
            labels.append(self.extra)
        figure.legend(handles, labels, loc="outside lower center", ncols=self.columns, fontsize=8)


def _title(figure: Figure, title: str) -> None:
    figure.suptitle(wrapped(title, 90, 2), fontsize=9.5, color=_INK)


def render(figure: Figure, place: tuple[str, int], title: str, alt: str, left_out: str) -> Drawing:
    """A figure as PNG and SVG; `place`: its kind, and the data set's number. The figure has a layout engine."""
    png, svg = io.BytesIO(), io.BytesIO()
    _lay_out(figure)
    figure.savefig(png, format="png", dpi=_DPI, metadata={"Software": None})
    figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    return Drawing(place[0], f"{place[0]}-{place[1]}", title, alt, png.getvalue(), svg.getvalue(), left_out)


def _lay_out(figure: Figure) -> None:
    """Find the layout once, for both files: with an engine in place, saving draws everything twice to find it."""
    before, engine = figure.dpi, figure.get_layout_engine()
    assert engine is not None, "figures are made with a layout engine"
    figure.dpi = _DPI  # the layout is that of the PNG
    engine.execute(figure)
    figure.dpi = before
    figure.set_layout_engine(None)
