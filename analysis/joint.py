"""The report of several studies of one strategy: their table side by side, then each study's tables and figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from analysis.csv_files import JOINT_FILE, joint_csv, verify_joint
from analysis.joint_table import JointHeader, joint_notes, joint_table, joint_terminal_table
from analysis.pictures import PixelSource
from analysis.records import StudyRecords
from analysis.report import Computed, compute, sections_of, tables_of, template
from analysis.writers import table_to_latex, to_markdown, write_atomically

__all__ = ["JointHeader", "joint_terminal_table", "verify_joint", "write_joint_report"]


def write_joint_report(
    header: JointHeader,
    studies: Sequence[StudyRecords],
    folder: Path,
    pixels: Sequence[PixelSource | None],
) -> Path:
    """Write table.md, table.tex, joint.csv and report.html into the folder; each file is replaced as a whole.

    Args:
        header: of the joint study.
        studies: records of its studies, in order.
        folder: of the report.
        pixels: for each study, what gives the images that predictions are drawn on.

    Returns:
        the page.

    Raises:
        RecordsError: records contradict their header, or the studies' rows are not the same steps.
        PublishedError: a study names published numbers that are not there.
    """
    computed = [compute(records, source) for records, source in zip(studies, pixels, strict=True)]
    tables = [study.table for study in computed]
    joint, notes = joint_table(header, tables), joint_notes(tables)
    every = [joint, *(table for study in computed for table in tables_of(study))]
    write_atomically(folder / "table.md", to_markdown(header.title, every, notes))
    write_atomically(folder / "table.tex", table_to_latex(joint, header.study, notes))
    write_atomically(folder / JOINT_FILE, joint_csv(tables))
    page = template("joint.html.j2").render(
        header=header,
        table=joint,
        table_notes=notes,
        synthetic=tuple(dict.fromkeys(name for table in tables for name in table.header.synthetic)),
        parts=[_part(study, number) for number, study in enumerate(computed)],
    )
    return write_atomically(folder / "report.html", page + "\n")


def _part(study: Computed, number: int) -> dict[str, object]:
    header, prefix = study.table.header, f"s{number}-"
    body = Markup(sections_of(study, prefix))  # escaped where it was rendered
    return {
        "study": header.study,
        "task": header.task,
        "title": header.title,
        "description": header.description,
        "problems": (*study.problems, *study.table.problems),
        "prefix": prefix,
        "body": body,
    }
