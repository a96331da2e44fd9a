"""The report: complete, self-contained, safe against hostile names, deterministic, quick."""

from __future__ import annotations

import ast
import io
import re
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.text import Text
from PIL import Image
from rich.console import Console
from simulated_study import HOSTILE, ROWS, Simulated, names, simulate

import analysis
from analysis import figures, layout, wording
from analysis.figures import draw_all
from analysis.patients import PredictionsError, patient_noise
from analysis.report import verify, write_report
from analysis.tables import build_table
from analysis.terminal import terminal_table

GAPS = (("chestxray14", "+ EMA", 1, "FAILED"), ("ham10000", "MLP head only", 2, "MISSING"))
FULL = Simulated(
    datasets=("chestxray14", "ham10000"),
    failed=GAPS,
    undefined=("Hernia",),
    noop=(("+ class weights", "+ progressive unfreezing"),),
    synthetic=("ham10000",),
    published="ablation",
    extra_metrics=("micro_auc",),
    test_images=120,
)


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("full")
    records = simulate(FULL, folder / "predictions")
    return records, write_report(records, folder / "report")


def test_a_report_holds_every_file_and_every_section(full) -> None:
    _, paths = full
    written = {str(path.relative_to(paths.folder)) for path in paths.folder.rglob("*") if path.is_file()}
    kinds = [f"figures/{kind}-{i}" for kind in ("per_class", "learning_curves", "differences") for i in (0, 1)]
    pictures = {f"{kind}.{ending}" for kind in kinds for ending in ("png", "svg")}
    assert written == {"table.md", "table.tex", "table.csv", "cells.csv", "report.html"} | pictures
    assert {str(path.relative_to(paths.folder)) for path in paths.figures} == pictures
    page = Page(paths.html.read_text())
    ids = [attrs["id"] for tag, attrs in page.tags if tag == "section"]
    expected = ["table", "comparisons", "published", "classes", "curves", "costs", "absent", "notes", "provenance"]
    assert ids == expected
    assert [attrs["href"] for tag, attrs in page.tags if tag == "a"] == [f"#{name}" for name in ids]


def test_the_page_says_what_a_reader_must_know(full) -> None:
    records, paths = full
    text = Page(paths.html.read_text()).text
    for fragment in (
        "SYNTHETIC DATA: the images of ham10000",
        "in trainables/loop.py",
        "RAD-DINO was pretrained",
        "is the best of 3 runs",
        "same trajectory and observer as + progressive unfreezing",
        "2.08×",
        "python study/launch.py ablation",
        "Over test patients, at these very seeds",
        *records.cells["split_digest"].dropna().unique(),
        *records.cells["mlflow_run_id"].dropna(),
    ):
        assert fragment in text, fragment


def test_the_page_is_self_contained_and_runs_no_script(full) -> None:
    text = full[1].html.read_text()
    page = Page(text)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed"}
    sources = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    assert len(sources) == 6
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert all(attrs["alt"] for tag, attrs in page.tags if tag == "img")
    assert "url(" not in text
    assert "@import" not in text


def test_hostile_names_appear_as_text_everywhere(tmp_path: Path) -> None:
    plan = Simulated(rows=HOSTILE, classes=(*HOSTILE, "Edema"), parts=HOSTILE[:2], datasets=HOSTILE[:2])
    records = simulate(replace(plan, failed=((HOSTILE[0], HOSTILE[1], 0, "FAILED"),)))
    paths = write_report(records, tmp_path)
    page = Page(paths.html.read_text())
    assert all(name in page.text for name in HOSTILE)
    assert "script" not in {tag for tag, _ in page.tags}
    assert verify(records, tmp_path) == []
    assert {path.parent for path in paths.figures} == {tmp_path / "figures"}


def test_the_same_records_give_the_same_bytes_and_verify(full, tmp_path: Path) -> None:
    records, paths = full
    again = write_report(records, tmp_path)
    for path in paths.folder.rglob("*.*"):
        assert (again.folder / path.relative_to(paths.folder)).read_bytes() == path.read_bytes(), path.name
    assert verify(records, tmp_path) == []


def test_figures_of_an_earlier_report_do_not_linger(tmp_path: Path) -> None:
    write_report(simulate(Simulated(datasets=("a", "b"))), tmp_path)
    (tmp_path / "figures" / "mine.png").write_bytes(b"kept")
    paths = write_report(simulate(Simulated(datasets=("a",))), tmp_path)
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {p.name for p in paths.figures} | {"mine.png"}


def test_a_study_of_which_nothing_ran_still_has_a_report(tmp_path: Path) -> None:
    plan = Simulated(failed=tuple(("chestxray14", row, seed, "MISSING") for row in ROWS for seed in (0, 1, 2)))
    paths = write_report(simulate(plan), tmp_path)
    assert paths.figures == ()
    assert "no pair of finished cells" in Page(paths.html.read_text()).text


def test_a_thousand_cells_take_seconds(tmp_path: Path) -> None:
    plan = Simulated(rows=tuple(names("Row", 50)), seeds=tuple(range(10)), datasets=("a", "b"), effect=5e-4)
    records = simulate(plan)
    assert len(records.cells) == 1000
    seconds = []
    for attempt in range(3):  # the first one also imports and finds fonts; the machine may be busy
        start = time.process_time()
        paths = write_report(records, tmp_path / str(attempt))
        seconds.append(time.process_time() - start)
        if seconds[-1] <= 10.0:
            break
    # 5 s are promised and measured by the benchmarks; a test machine may be half as fast.
    assert min(seconds) <= 10.0, seconds
    assert "42 rows" in Page(paths.html.read_text()).text


# ---------------------------------------------------------------- figures


def overlaps(figure_texts: list[Text]) -> list[tuple[str, str]]:
    boxes = [(text.get_text(), text.get_window_extent()) for text in figure_texts if text.get_text().strip()]
    pairs = ((a, b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])
    return [(a[0], b[0]) for a, b in pairs if a[1].padded(-1).overlaps(b[1].padded(-1))]


def visible_ticks(axes: Axes) -> list[Text]:
    """Tick labels inside the view; matplotlib also keeps those beyond it, undrawn."""
    low, high = sorted(axes.get_ylim())
    return [label for label in axes.get_yticklabels() if low <= label.get_position()[1] <= high]


@pytest.mark.parametrize("count", [(4, 14), (20, 28), (2, 40)])
def test_no_two_texts_of_a_figure_overlap(count: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    render = figures.render
    monkeypatch.setattr(figures, "render", lambda figure, *rest: (drawn.append(figure), render(figure, *rest))[1])
    classes = tuple(f"A finding with a long name, the {i}th" for i in range(count[1]))
    plan = Simulated(rows=tuple(names("Row", count[0])), classes=classes, effect=1e-3)
    records = simulate(plan)
    draw_all(records, build_table(records))
    assert len(drawn) == 3
    for figure in drawn:
        figure.draw_without_rendering()  # places every text at the dpi that is measured
        labels = [label for axes in figure.axes for label in (*visible_ticks(axes), axes.xaxis.label, axes.yaxis.label)]
        labels += [text for legend in figure.legends for text in legend.get_texts()]
        assert overlaps([*labels, figure._suptitle]) == []
        width, height = figure.bbox.width, figure.bbox.height
        boxes = [label.get_window_extent() for label in labels if label.get_text().strip()]
        assert all(box.x0 >= -1 and box.x1 <= width + 1 and box.y0 >= -1 and box.y1 <= height + 1 for box in boxes)


def test_figures_are_pictures_without_dates_that_say_what_they_leave_out() -> None:
    records = simulate(Simulated(rows=tuple(names("Row", 12)), effect=1e-3, undefined=("Hernia",)))
    drawings = {drawing.kind: drawing for drawing in draw_all(records, build_table(records))}
    for drawing in drawings.values():
        assert Image.open(io.BytesIO(drawing.png)).width == 1120
        assert b"<dc:date>" not in drawing.svg
    assert "4 rows" in drawings["per_class"].left_out
    assert "Hernia" in drawings["per_class"].left_out
    assert "4 rows" in drawings["learning_curves"].left_out


def test_the_mean_curve_stops_where_the_first_seed_stops() -> None:
    axes = figures.Figure().add_subplot()
    values = {0: [0.5, 0.6, 0.7, 0.9], 1: [0.5, 0.6, np.nan, np.nan]}
    figures._draw_curve(axes, figures.pd.DataFrame(values, index=[1, 2, 3, 4]), {0: 4, 1: 2}, 0)
    mean, tail, *chosen = axes.get_lines()
    assert mean.get_xdata().tolist() == [1, 2]
    assert (tail.get_xdata().tolist(), tail.get_ydata().tolist()) == ([2, 3, 4], [0.6, 0.7, 0.9])
    assert [(point.get_xdata()[0], point.get_ydata()[0]) for point in chosen] == [(4, 0.9), (2, 0.6)]


def test_the_stage_boundary_is_read_from_the_unfrozen_blocks() -> None:
    records = simulate()
    assert figures._stage_boundary(figures._curves(records, "chestxray14").blocks) == 10
    frozen = simulate(Simulated(rows=ROWS[:1]))
    assert figures._stage_boundary(figures._curves(frozen, "chestxray14").blocks) is None


# ---------------------------------------------------------------- test patients


def test_intervals_over_patients_need_no_more_than_stored_predictions(full) -> None:
    records, _ = full
    table = build_table(records)
    noise = patient_noise(records, table, np.random.default_rng(0), draws=200)
    assert [(n.dataset, n.row) for n in noise] == [(c.dataset, c.row) for c in table.comparisons if c.paired.n]
    for n, comparison in zip(noise, (c for c in table.comparisons if c.paired.n), strict=True):
        assert n.macro.value == pytest.approx(comparison.paired.delta, abs=1e-6)
        assert n.macro.low <= n.macro.value <= n.macro.high
        assert (n.images, n.groups, n.draws) == (120, 60, 200)
        assert "Hernia" not in n.classes
    twin = next(n for n in noise if n.row == "+ class weights")
    assert (twin.macro.low, twin.macro.high) == pytest.approx((0, 0), abs=1e-12)


def test_predictions_that_contradict_the_ledger_are_told_and_not_used(tmp_path: Path) -> None:
    records = simulate(Simulated(test_images=60), tmp_path / "predictions")
    cells = records.cells.copy()
    cells.loc[0, "macro_auc"] += 0.01
    wrong = replace(records, cells=cells)
    with pytest.raises(PredictionsError, match="the ledger says"):
        patient_noise(wrong, build_table(wrong), np.random.default_rng(0))
    paths = write_report(wrong, tmp_path / "report")
    assert "Attention: predictions of chestxray14 · MLP head only · seed 0" in paths.table_md.read_text().replace(
        "\\", ""
    )
    assert "Attention: predictions of" in Page(paths.html.read_text()).text


def test_broken_predictions_name_their_cell(tmp_path: Path) -> None:
    records = simulate(Simulated(test_images=60), tmp_path)
    next(iter(records.predictions.values())).write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(PredictionsError, match=r"MLP head only · seed 0 .* cannot be read"):
        patient_noise(records, build_table(records), np.random.default_rng(0))


# ---------------------------------------------------------------- words and terminal


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        (Simulated(effect=0.0, pair_noise=0.01), "do not settle the direction"),
        (Simulated(effect=0.02, pair_noise=1e-6), "a lead, not a finding; add seeds"),
        (Simulated(effect=0.02, seeds=tuple(range(10))), "The rows differ (Holm-corrected p = <0.001)"),
        (Simulated(seeds=(0,)), "One pair has no spread"),
        (Simulated(noop=(("+ progressive unfreezing", "MLP head only"),)), "equal at every seed"),
    ],
)
def test_readings_claim_no_more_than_the_pairs_show(plan: Simulated, expected: str) -> None:
    assert expected in wording.reading(build_table(simulate(plan)).comparisons[0], "macro AUC")


def test_skipped_and_repeated_work_is_called_out() -> None:
    units = simulate().header.units
    assert not any("Attention" in note for note in wording.cost_notes(units))
    less = wording.cost_notes(units.model_copy(update={"executed": units.executed - 5}))
    more = wording.cost_notes(units.model_copy(update={"executed": units.executed + 5}))
    assert "5 units fewer" in less[-1]
    assert "5 units more" in more[-1]


def test_numbers_have_a_true_minus_and_a_dash_where_undefined() -> None:
    assert layout.signed(-0.00123) == "−0.0012"
    assert layout.signed(0.00123) == "+0.0012"
    assert layout.signed(-0.00001) == "+0.0000"
    assert layout.number(float("nan")) == layout.interval(float("nan"), 0) == "–"
    assert layout.number(float("-inf")) == "−∞"


@pytest.mark.parametrize("plan", [FULL, Simulated(rows=HOSTILE, parts=HOSTILE[:3]), Simulated(seeds=(0,), parts=())])
def test_the_terminal_table_fits_80_columns_and_cuts_no_figure(plan: Simulated) -> None:
    records = simulate(replace(plan, test_images=0))
    stream = io.StringIO()
    Console(file=stream, width=80).print(terminal_table(records))
    text = stream.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    table = build_table(records)
    assert all(layout.mean_std(line.summary) in text for line in table.lines)
    assert all(layout.signed(c.paired.delta) in text for c in table.comparisons)
    assert re.sub(r"\s", "", plan.rows[0])[:12] in re.sub(r"\s", "", text)


def test_the_analysis_imports_no_sibling_and_only_the_reader_imports_mlflow() -> None:
    for path in Path(analysis.__file__).parent.glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        modules |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        roots = {module.partition(".")[0] for module in modules}
        assert not roots & {"study", "trainables", "search_spaces", "torch", "ray", "optuna"}, path.name
        if path.name in (
            "statistics.py",
            "tables.py",
            "layout.py",
            "wording.py",
            "figures.py",
            "report.py",
            "published.py",
        ):
            assert "mlflow" not in roots
