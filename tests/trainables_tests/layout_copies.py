"""Copies of the true layouts in miniature, with one thing changed in each, and plain csv reading beside ours."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

LAYOUTS = Path(__file__).parent / "layouts"


def copy_with(tmp_path: Path, layout: str, file: str, old: str, new: str) -> Path:
    """A copy of a layout in which the first `old` of a file is `new`."""
    root = tmp_path / layout
    shutil.copytree(LAYOUTS / layout, root)
    text = (root / file).read_text(encoding="utf-8")
    assert old in text
    (root / file).write_text(text.replace(old, new, 1), encoding="utf-8")
    return root


def plain_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a table as csv.DictReader gives them."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
