"""Studies small enough to plan by hand: written as files, loaded and planned as a user's study is."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from study.chains import Chain
from study.plan import Plan, make_plan
from study.spec import Choices, Study, load_study

# What the phantom needs: 600 images, so that all 14 classes can be measured in each split.
SMALL: dict[str, Any] = {
    "study": "small",
    "title": "A small study",
    "seeds": [0, 1],
    "dataset": {"images": 600, "image_size": 64},
    "strategy": {"head_epochs": 2, "tune_epochs": 4},
    "execution": {"token_cache": "never"},
    "rows": {"list": [{"name": "only row"}]},
}


def document(rows: Mapping[str, Any] | list[dict[str, Any]] | None = None, **groups: Any) -> dict[str, Any]:
    """`SMALL` with other rows (a list, or one of the four forms) and with groups of keys merged in."""
    made = copy.deepcopy(SMALL)
    if rows is not None:
        made["rows"] = {"list": rows} if isinstance(rows, list) else dict(rows)
    for name, value in groups.items():
        made[name] = {**made.get(name, {}), **value} if isinstance(value, Mapping) else value
    return made


def write(folder: Path, content: str | bytes | Mapping[str, Any], name: str = "study.yaml") -> Path:
    """A study file: YAML as it stands, or a document as JSON, which is YAML too."""
    path = folder / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def loaded(folder: Path, content: str | Mapping[str, Any], choices: Choices | None = None) -> Study:
    return load_study(write(folder, content), choices)


def planned(folder: Path, content: str | Mapping[str, Any], *, sharing: bool = True) -> Plan:
    return make_plan(loaded(folder, content), storage=folder / "outputs", sharing=sharing)


def chain(plan: Plan, row: str, seed: int = 0) -> Chain:
    """A cell's chain, by the names a table uses."""
    (found,) = [c for c in plan.chains if c.cell.row.name == row and c.cell.seed == seed]
    return found
