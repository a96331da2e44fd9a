"""The report of a study: tables, figures, cells and one self-contained page, written atomically into a folder."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from analysis import layout, wording
from analysis.csv_files import CELLS_FILE, TABLE_FILE, cells_csv, table_csv, verify
from analysis.figures import Drawing, draw_all
from analysis.layout import TextTable
from analysis.patients import PatientNoise, PredictionsError, patient_noise
from analysis.pictures import PixelSource, draw_pictures
from analysis.published import Beside, set_beside
from analysis.records import StudyRecords
from analysis.tables import AbsentCell, StudyTable, build_table
from analysis.terminal import terminal_table
from analysis.tracking import LedgerError
from analysis.writers import to_latex, to_markdown, write_atomically

__all__ = ["ReportPaths", "terminal_table", "verify", "write_report"]

BOOTSTRAP_SEED = 20140601  # fixed, so that the same records give the same report
_TEMPLATES = Path(__file__).parent / "templates"
_MOST_READINGS = 60
_MOST_ERRORS = 20
KINDS = ("per_class", "learning_curves", "differences", "pictures")  # of drawings, by which their files are called


@dataclass(frozen=True)
class ReportPaths:
    """Where a report lies; `figures` are PNG and SVG files."""

    folder: Path
    table_md: Path
    table_tex: Path
    table_csv: Path
    cells_csv: Path
    html: Path
    figures: tuple[Path, ...]


@dataclass(frozen=True)
class Computed:
    """All of a study's report that is computed, before anything is written."""

    table: StudyTable
    noise: tuple[PatientNoise, ...]
    beside: Beside | None
    drawings: tuple[Drawing, ...]
    problems: tuple[str, ...]
    without_images: tuple[str, ...] = ()


def write_report(records: StudyRecords, folder: Path, pixels: PixelSource | None = None) -> ReportPaths:
    """Write table.md, .tex and .csv, cells.csv, figures/*.png and *.svg, and report.html into the folder.

    Every file is replaced as a whole; figures of an earlier report that this one does not have are removed.

    Args:
        records: of the study.
        folder: of the report.
        pixels: gives the images that predicted boxes and masks are drawn on; None: none are drawn.

    Raises:
        RecordsError: the records contradict their header.
        PublishedError: the study names published numbers that are not there.
    """
    study = compute(records, pixels)
    tables, notes = tables_of(study), [*map("Attention: {}".format, study.problems), *wording.table_notes(study.table)]
    paths = ReportPaths(
        folder=folder,
        table_md=write_atomically(folder / "table.md", to_markdown(study.table.header.title, tables, notes)),
        table_tex=write_atomically(folder / "table.tex", to_latex(study.table, notes)),
        table_csv=write_atomically(folder / TABLE_FILE, table_csv(study.table)),
        cells_csv=write_atomically(folder / CELLS_FILE, cells_csv(records)),
        html=folder / "report.html",
        figures=write_figures(study.drawings, folder / "figures"),
    )
    write_atomically(paths.html, _page(study))  # last: a page never speaks of files that are not there yet
    return paths


def compute(records: StudyRecords, pixels: PixelSource | None) -> Computed:
    """Compute a study's tables and figures.

    What stored predictions do not give is told at the head of the report: the tables do not rest on them.
    """
    table = build_table(records)
    problems: list[str] = []
    noise: list[PatientNoise] = []
    try:
        noise = patient_noise(records, table, np.random.default_rng(BOOTSTRAP_SEED))
    except PredictionsError as error:
        problems.append(str(error))
    pictures: list[Drawing] = []
    without_images: list[str] = []
    try:
        pictures, without_images = draw_pictures(records, table, pixels)
    except (PredictionsError, LedgerError) as error:
        problems.append(str(error))
    drawings = (*draw_all(records, table), *pictures)
    return Computed(table, tuple(noise), set_beside(table), drawings, tuple(problems), tuple(without_images))


def tables_of(study: Computed) -> list[TextTable]:
    """The tables of table.md, in the order of the page."""
    table = study.table
    tables: list[TextTable | None] = [layout.main_table(table), layout.other_metrics_table(table)]
    if study.noise:
        tables.append(layout.patient_table(table, study.noise))
    if study.beside is not None:
        tables.append(layout.beside_table(table, study.beside))
    tables += [*layout.class_tables(table), layout.runs_table(table)]
    return [one for one in tables if one is not None]


def write_figures(drawings: Sequence[Drawing], folder: Path) -> tuple[Path, ...]:
    written = []
    for drawing in drawings:
        written.append(write_atomically(folder / f"{drawing.name}.png", drawing.png))
        written.append(write_atomically(folder / f"{drawing.name}.svg", drawing.svg))
    for stale in {path for kind in KINDS for path in folder.glob(f"{kind}-*")} - set(written):
        stale.unlink()
    return tuple(written)


# ---------------------------------------------------------------- the page


@lru_cache(maxsize=8)
def template(name: str) -> Template:
    """A template of the report's folder; everything that it is given is escaped."""
    environment = Environment(loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined)
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    return environment.get_template(name)


def _page(study: Computed) -> str:
    context = _context(study)
    return template("report.html.j2").render(context, prefix="", sections=_sections(study)) + "\n"


def sections_of(study: Computed, prefix: str) -> str:
    """A study's sections, to stand in a page with others'; `prefix` keeps their anchors apart."""
    return template("sections.html.j2").render(_context(study), prefix=prefix)


def _context(study: Computed) -> dict[str, object]:
    table, header = study.table, study.table.header
    readings = _readings(study)
    return {
        "header": header,
        "problems": (*study.problems, *table.problems),
        "main": layout.main_table(table),
        "main_notes": wording.figure_notes(table),
        "other": layout.other_metrics_table(table),
        "readings": readings,
        "more_readings": max(0, len(table.comparisons) - _MOST_READINGS),
        "patients": layout.patient_table(table, study.noise) if study.noise else None,
        "patient_notes": wording.patient_notes(study.noise, table.header.main_metric),
        "class_differences": layout.class_difference_tables(table, study.noise),
        "beside": study.beside,
        "beside_table": layout.beside_table(table, study.beside) if study.beside else None,
        "classes": layout.class_tables(table),
        "drawings": _by_kind(study.drawings),
        "without_images": study.without_images,
        "costs": layout.cost_table(header.units),
        "cost_notes": wording.cost_notes(header.units),
        "absent": layout.absent_table(table),
        "long_errors": _long_errors(table.absent),
        "data_notes": wording.data_notes(table),
        "provenance": _provenance(table),
        "runs": layout.runs_table(table),
    }


def _readings(study: Computed) -> list[tuple[str, list[str]]]:
    """Data set → its comparisons in plain language, as many as one would read."""
    noise = {(n.dataset, n.row, n.reference): n for n in study.noise}
    shown = study.table.comparisons[:_MOST_READINGS]
    label = study.table.header.metric_label
    readings = [
        (
            layout.dataset_name(study.table, dataset),
            [
                wording.reading(c, label, noise.get((c.dataset, c.row, c.reference)))
                for c in shown
                if c.dataset == dataset
            ],
        )
        for dataset in study.table.header.datasets
    ]
    return [(name, sentences) for name, sentences in readings if sentences]


def _by_kind(drawings: Sequence[Drawing]) -> dict[str, list[Drawing]]:
    kinds: dict[str, list[Drawing]] = {kind: [] for kind in KINDS}
    for drawing in drawings:
        kinds[drawing.kind].append(drawing)
    return kinds


def _long_errors(absent: Sequence[AbsentCell]) -> list[AbsentCell]:
    """Cells whose error says more than its line in the table."""
    return [cell for cell in absent if layout.one_line(cell.error) != cell.error][:_MOST_ERRORS]


def _provenance(table: StudyTable) -> list[tuple[str, str]]:
    facts = [(name, value) for name, value in table.header.provenance.items()]
    facts += [(f"split of {fact.dataset}", ", ".join(fact.split_digests) or "no finished cell") for fact in table.facts]
    return facts


def _sections(study: Computed) -> list[tuple[str, str]]:
    kinds = _by_kind(study.drawings)
    sections = [
        ("table", "Table", True),
        ("comparisons", "Comparisons", bool(_readings(study))),
        ("published", "Published numbers", study.beside is not None),
        ("classes", "By class", bool(study.table.per_class or kinds["per_class"])),
        ("pictures", "Predictions beside the truth", bool(kinds["pictures"] or study.without_images)),
        ("curves", "Learning curves", bool(kinds["learning_curves"])),
        ("costs", "Costs", True),
        ("absent", "Failed or missing cells", bool(study.table.absent)),
        ("notes", "Notes", True),
        ("provenance", "Provenance", True),
    ]
    return [(name, title) for name, title, there in sections if there]
