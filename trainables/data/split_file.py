"""The file that holds a data set's split: written once, verified at every load.

A comment line with the digest and what the split was made from, a header, then a line an image: image, group, split.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt

from trainables.data.adapter import Table
from trainables.data.index import SPLITS, DataError
from trainables.settings import DatasetSettings

Split = npt.NDArray[np.uint8]

# What decides, besides the data set, which rows a table has, or how they are grouped and split.
_ROWS = ("views", "only_tb", "table", "image_column", "group_column", "split_column")


def split_file(settings: DatasetSettings, folder: Path) -> Path:
    """Where the split of these settings is kept; settings that do not influence the split are not in the name."""
    parts = [settings.name, settings.split, f"seed{settings.split_seed}"]
    if settings.name.startswith("phantom"):
        parts.append(f"hospital{settings.hospital}")
    if settings.images is not None:
        parts.append(f"images{settings.images}")
    given = {name: getattr(settings, name) for name in _ROWS if getattr(settings, name)}
    if given.get("views") == "all":
        del given["views"]
    if given:
        told = json.dumps(given, sort_keys=True)
        parts.append("rows" + hashlib.sha256(told.encode()).hexdigest()[:8])
    return folder / ("-".join(parts) + ".csv")


def keep_split(path: Path, settings: DatasetSettings, table: Table, make: Callable[[], Split]) -> Split:
    """Return the split kept at `path`; make and write it if there is none.

    Raises:
        DataError: the file is damaged, holds other images or groups than the table, or contradicts a given split.
    """
    if not path.exists():
        _write(path, settings, table, make())
    split = _read(path, table)
    _refuse_contradiction(path, table, split)
    return split


def _write(path: Path, settings: DatasetSettings, table: Table, split: Split) -> None:
    """Write through a file of this process, then rename: a reader sees all of it or nothing."""
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(["image", "group", "split"])
    writer.writerows(zip(table.names.tolist(), table.groups.tolist(), [SPLITS[s] for s in split.tolist()], strict=True))
    body = lines.getvalue()
    head = f"# digest={_digest(body)} seed={settings.split_seed} dataset={settings.name} split={settings.split}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with partial.open("w", encoding="utf-8", newline="") as file:
        file.write(head + body)
        file.flush()
        os.fsync(file.fileno())  # a power cut must not leave an empty file, which would be refused as damaged
    partial.replace(path)


def _read(path: Path, table: Table) -> Split:
    head, _, body = path.read_text(encoding="utf-8", errors="replace").partition("\n")
    stated = re.match(r"# digest=([0-9a-f]{64}) ", head)
    if stated is None or stated[1] != _digest(body):
        raise DataError(
            f"{path}: the split file is damaged or was edited (its digest does not fit); restore it, or delete it to "
            "split anew (results from the old split are then not comparable)"
        )
    rows = list(csv.reader(io.StringIO(body)))[1:]
    _refuse_other_rows(path, rows, table)
    position = {row[0]: SPLITS.index(row[2]) for row in rows}
    return np.array([position[name] for name in table.names.tolist()], np.uint8)


def _refuse_other_rows(path: Path, rows: list[list[str]], table: Table) -> None:
    kept = {(row[0], row[1]) for row in rows}
    present = cast("set[tuple[str, str]]", set(zip(table.names.tolist(), table.groups.tolist(), strict=True)))
    if kept == present:
        return
    gone, new = sorted(kept - present), sorted(present - kept)
    example = f"image {gone[0][0]} is not in the table" if gone else f"image {new[0][0]} is not in the file"
    raise DataError(
        f"{path}: the split was made for another table: {len(gone)} of its images are gone or changed group, "
        f"{len(new)} are new ({example}); restore the table, choose another storage, or delete the file to split anew"
    )


def _refuse_contradiction(path: Path, table: Table, split: Split) -> None:
    """A split that others gave may have changed since; what was held out of its train part as val is ours."""
    if table.official is None:
        return
    train, val = SPLITS.index("train"), SPLITS.index("val")
    ours = (table.official == train) & (split == val) & (table.official != val).all()
    other = np.flatnonzero((split != table.official) & ~ours)
    if len(other) == 0:
        return
    row = int(other[0])
    raise DataError(
        f"{path}: the data set now says {SPLITS[table.official[row]]} of {table.names[row]}, the split kept here "
        f"{SPLITS[split[row]]} ({len(other)} images differ); restore the data set's split, or delete the file to take "
        "the new one"
    )


def _digest(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()
