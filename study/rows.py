"""Rows of a study: the four forms in which a file declares them, brought to one list."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from study.documents import Path_, flatten
from trainables.settings import Frozen

Name = Annotated[str, Field(min_length=1, max_length=120)]


class RowDocument(Frozen):
    """One row: what it changes, by dotted keys such as `strategy.depth`."""

    name: Name
    set: dict[str, Any] = Field(default_factory=dict, description="dotted key → value")
    part: Name | None = Field(None, description="cumulative rows: the part that this row adds, a column of marks")

    @field_validator("set")
    @classmethod
    def _keys_agree(cls, changes: dict[str, Any]) -> dict[str, Any]:
        flatten(changes)
        return changes


class LeaveOneOut(Frozen):
    """A full row, and one row a part with that part switched off."""

    full: RowDocument
    parts: Annotated[dict[Name, dict[str, Any]], Field(min_length=1, description="part → what switches it off")]

    @field_validator("parts")
    @classmethod
    def _keys_agree(cls, parts: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for changes in parts.values():
            flatten(changes)
        return parts


class RowsDocument(Frozen):
    """Rows in exactly one of four forms."""

    list: tuple[RowDocument, ...] | None = Field(None, description="rows as they are, each against the baseline")
    cumulative: tuple[RowDocument, ...] | None = Field(None, description="each row keeps what those above it set")
    leave_one_out: LeaveOneOut | None = None
    factorial: dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]] | None = Field(
        None, description="dotted key → values: every combination"
    )

    def count(self) -> int:
        """Number of rows, without making them."""
        if self.factorial:
            return math.prod(len(values) for values in self.factorial.values())
        if self.leave_one_out is not None:
            return 1 + len(self.leave_one_out.parts)
        return len(self.list or self.cumulative or ())

    @model_validator(mode="after")
    def _one_form(self) -> RowsDocument:
        given = [name for name, value in self if value]
        if len(given) != 1:
            forms = "list, cumulative, leave_one_out, factorial"
            raise ValueError(f"expected exactly one of {forms}; found {', '.join(given) or 'none with rows'}")
        return self


@dataclass(frozen=True)
class RowDraft:
    """A row before its settings are complete.

    Attributes:
        changes: dotted key → value, against the baseline.
        marks: part → whether the row has it.
        at: where the file declares it.
        inherited: keys of `changes` that another row declares.
    """

    name: str
    changes: dict[str, Any]
    marks: dict[str, bool]
    at: Path_
    inherited: frozenset[str] = frozenset()


def expand(rows: RowsDocument) -> tuple[RowDraft, ...]:
    """The rows of whichever form was given, in table order."""
    if rows.list:
        return tuple(_plain(row, ("rows", "list", i)) for i, row in enumerate(rows.list))
    if rows.cumulative:
        return _cumulative(rows.cumulative)
    if rows.leave_one_out is not None:
        return _leave_one_out(rows.leave_one_out)
    return _factorial(rows.factorial or {})


def _plain(row: RowDocument, at: Path_) -> RowDraft:
    return RowDraft(row.name, flatten(row.set), {}, (*at, "set"))


def _cumulative(rows: Sequence[RowDocument]) -> tuple[RowDraft, ...]:
    """Row i has everything that rows 0 … i set, and the marks of their parts."""
    parts = [row.part for row in rows if row.part is not None]
    drafts: list[RowDraft] = []
    changes: dict[str, Any] = {}
    on: set[str] = set()
    for i, row in enumerate(rows):
        own = flatten(row.set)
        inherited = frozenset(changes.keys() - own.keys())
        changes = changes | own
        if row.part is not None:
            on.add(row.part)
        marks = {part: part in on for part in parts}
        drafts.append(RowDraft(row.name, dict(changes), marks, ("rows", "cumulative", i, "set"), inherited))
    return tuple(drafts)


def _leave_one_out(rows: LeaveOneOut) -> tuple[RowDraft, ...]:
    full = flatten(rows.full.set)
    at: Path_ = ("rows", "leave_one_out")
    drafts = [RowDraft(rows.full.name, full, dict.fromkeys(rows.parts, True), (*at, "full", "set"))]
    for part, off in rows.parts.items():
        marks = {other: other != part for other in rows.parts}
        without = flatten(off)
        inherited = frozenset(full.keys() - without.keys())
        drafts.append(RowDraft(f"− {part}", full | without, marks, (*at, "parts", part), inherited))
    return tuple(drafts)


def _factorial(axes: dict[str, tuple[Any, ...]]) -> tuple[RowDraft, ...]:
    """Every combination, the last axis varying fastest; a row is named by the last words of its keys."""
    drafts = []
    for values in itertools.product(*axes.values()):
        changes = dict(zip(axes, values, strict=True))
        name = ", ".join(f"{_short(key, axes)} = {_shown(value)}" for key, value in changes.items())
        drafts.append(RowDraft(name, changes, {}, ("rows", "factorial")))
    return tuple(drafts)


def _short(key: str, axes: Sequence[str] | dict[str, Any]) -> str:
    last = key.rsplit(".", 1)[-1]
    alone = sum(other.rsplit(".", 1)[-1] == last for other in axes) == 1
    return last if alone else key


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value is None else re.sub(r"\s+", " ", str(value))
