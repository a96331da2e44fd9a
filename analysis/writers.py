"""Write computed tables as Markdown and LaTeX, atomically: the same records give the same bytes."""

from __future__ import annotations

import html
import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from analysis.layout import TextTable, comparison_table, performance_table
from analysis.tables import StudyTable


def write_atomically(path: Path, content: str | bytes) -> Path:
    """Write beside the target, then rename: a reader sees the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        Path(scratch).chmod(0o644)  # mkstemp's 0600 would hide a report on shared storage
        Path(scratch).replace(path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise
    return path


# ---------------------------------------------------------------- Markdown


def to_markdown(title: str, tables: Sequence[TextTable], notes: Sequence[str]) -> str:
    """A document of pipe tables; the notes follow the first, which they explain."""
    parts = [f"# {_md(title)}", _md_table(tables[0])]
    parts.append("\n".join(f"- {_md(note)}" for note in notes))
    parts += [_md_table(table) for table in tables[1:]]
    return "\n\n".join(part for part in parts if part) + "\n"


def _md_table(table: TextTable) -> str:
    named = any(name for name, _ in table.groups)
    several = len(table.groups) > 1
    blocks = [f"## {_md(table.caption)}"]
    for name, lines in table.groups:
        if several or named:
            blocks.append(f"**{_md(name)}**")
        rule = ["---" if left else "---:" for left in table.left]
        body = [_md_line(map(_md, table.columns)), _md_line(rule), *(_md_line(map(_md, line)) for line in lines)]
        blocks.append("\n".join(body))
    return "\n\n".join(blocks)


def _md_line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _md(text: str) -> str:
    """Text as itself in Markdown: markup characters escaped, HTML as entities, on one line."""
    escaped = re.sub(r"([\\`*_{}\[\]|~#$])", r"\\\1", " ".join(text.split()))
    escaped = re.sub(r"^([+-])(?=\s)", r"\\\1", escaped)  # would open a list inside a note
    return html.escape(escaped, quote=False)


# ---------------------------------------------------------------- LaTeX

_TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': r"\textquotedbl{}", "`": r"\textasciigrave{}", "✓": r"\tablemark{}", "±": r"$\pm$",
    "−": r"$-$", "–": "--", "—": "---", "Δ": r"$\Delta$", "×": r"$\times$", "÷": r"$\div$", "≥": r"$\geq$",
    "≤": r"$\leq$", "∞": r"$\infty$", "·": r"$\cdot$", "…": r"\ldots{}", "η": r"$\eta$", "α": r"$\alpha$",
    "τ": r"$\tau$", "θ": r"$\theta$", "→": r"$\rightarrow$", "[": "{[}", "]": "{]}", "*": r"$^{*}$",
}  # fmt: skip


_TEX_HEAD = ("% Needs \\usepackage{booktabs}. \\input this file.", "\\providecommand{\\tablemark}{$\\surd$}")


def table_to_latex(table: TextTable, study: str, notes: Sequence[str]) -> str:
    """One booktabs table with its notes, to read in with input."""
    return "\n\n".join([*_TEX_HEAD, _tex_table(table, f"tab:{_slug(study)}", notes)]) + "\n"


def to_latex(table: StudyTable, notes: Sequence[str]) -> str:
    """Two booktabs tables to read in with input: the rows' figures with the notes, then their differences."""
    blocks = [
        *_TEX_HEAD,
        _tex_table(performance_table(table), f"tab:{_slug(table.header.study)}", notes),
    ]
    if table.comparisons:
        blocks.append(_tex_table(comparison_table(table), f"tab:{_slug(table.header.study)}-differences", ()))
    return "\n\n".join(blocks) + "\n"


def _tex_table(table: TextTable, label: str, notes: Sequence[str]) -> str:
    width, several = len(table.columns), len(table.groups) > 1
    lines = [_tex_line(table.columns), r"\midrule"]
    for i, (name, body) in enumerate(table.groups):
        if several:
            lines += [r"\addlinespace"] * bool(i) + [rf"\multicolumn{{{width}}}{{l}}{{\emph{{{_tex(name)}}}}} \\"]
        lines += [_tex_line(line) for line in body]
    columns = "".join("l" if left else "r" for left in table.left)
    remarks = [rf"\par\smallskip {{\footnotesize {_tex(note)}\par}}" for note in notes]
    return "\n".join(
        [
            r"\begin{table}[htbp]",
            r"\centering\footnotesize\setlength{\tabcolsep}{4pt}",
            rf"\caption{{{_tex(table.caption)}}}\label{{{label}}}",
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}",
            *remarks,
            r"\end{table}",
        ]
    )


def _tex_line(cells: Iterable[str]) -> str:
    # A brace before the line keeps a first cell in brackets from being read as the argument of the last \\.
    return "{}" + " & ".join(map(_tex, cells)) + r" \\"


def _tex(text: str) -> str:
    return "".join(_TEX.get(character, character) for character in " ".join(text.split()))


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.casefold()).strip("-") or "study"
