"""The page of a search: self-contained HTML from plain data."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from analysis.figures import Drawing
from analysis.layout import TextTable
from analysis.schema import StudyHeader

_TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class SearchPage:
    """What the page shows.

    Attributes:
        facts: name and value, for the summary.
        best: the best trials, or the Pareto front.
    """

    header: StudyHeader
    facts: tuple[tuple[str, str], ...]
    best: TextTable
    trials: TextTable
    drawings: tuple[Drawing, ...]
    notes: tuple[str, ...]


def render(page: SearchPage) -> str:
    """HTML without anything that has to be loaded."""
    environment = Environment(loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined)
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    return environment.get_template("search.html.j2").render(page=page, header=page.header) + "\n"
