"""docs/faults.md names tests that exist, and leaves none out of those that inject faults from end to end."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "faults.md").read_text()
NAMED = set(re.findall(r"`(test_\w+)`", TEXT))
ALL_OF = ("test_kills.py", "test_cluster_faults.py", "test_storage_faults.py")


def names_in(file: Path) -> list[str]:
    tree = ast.parse(file.read_text(), filename=str(file))
    return [node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]


THERE = Counter(name for file in (ROOT / "tests").rglob("test_*.py") for name in names_in(file))


@pytest.mark.parametrize("name", sorted(NAMED))
def test_a_test_that_is_named_is_there_and_the_only_one_of_its_name(name: str) -> None:
    assert THERE[name] == 1


@pytest.mark.parametrize("file", ALL_OF)
def test_every_fault_that_is_injected_from_end_to_end_is_told_of(file: str) -> None:
    missing = set(names_in(ROOT / "tests" / "end_to_end" / file)) - NAMED
    assert not missing


def test_every_row_says_what_happens_and_how_it_is_tested() -> None:
    rows = [
        line.strip("|").split("|") for line in TEXT.splitlines() if line.startswith("| ") and "tested by" not in line
    ]
    assert len(rows) > 20
    for fault, happens, tested in rows:
        assert fault.strip() and happens.strip()
        assert re.search(r"`test_\w+`", tested) or tested.strip() == "the same"
