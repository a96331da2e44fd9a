"""The file that holds a data set's split: written once, verified at every load.

A comment line with the digest and what the split was made from, a header, then a line an image: image, group, split.
"""

from __future__ import annotations

import csv
import hashlib
import io
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


def split_file(settings: DatasetSettings, folder: Path) -> Path:
    """Where the split of these settings is kept; settings that do not influence the split are not in the name."""
    parts = [settings.name, settings.split, f"seed{settings.split_seed}"]
    if settings.name.startswith("phantom"):
        parts.append(f"hospital{settings.hospital}")
    if settings.images is not None:
        parts.append(f"images{settings.images}")
    return folder / ("-".join(parts) + ".csv")


def keep_split(path: Path, settings: DatasetSettings, table: Table, make: Callable[[], Split]) -> Split:
    """Return the split kept at `path`; make and write it if there is none.

    Raises:
        DataError: the file is damaged, or holds other images or groups than the table.
    """
    if not path.exists():
        _write(path, settings, table, make())
    return _read(path, table)


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
    partial.write_text(head + body, encoding="utf-8", newline="")
    partial.replace(path)


def _read(path: Path, table: Table) -> Split:
    head, _, body = path.read_text(encoding="utf-8").partition("\n")
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


def _digest(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()
