"""Reading a data set's CSV files: one clear error for a missing file, a missing column or a broken row."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from trainables.data.index import DataError


def root_of(dataset: str, root: str | None) -> Path:
    """The folder of a real data set.

    Raises:
        DataError: none was given, or there is none.
    """
    if root is None:
        raise DataError(
            f"{dataset}: no folder given; say where the data set lies: --data-root {dataset}=DIR or dataset.root"
        )
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise DataError(f"{dataset}: {folder} is not a folder; expected the data set in its distributed layout there")
    return folder


def find_file(dataset: str, root: Path, candidates: Sequence[str]) -> Path:
    """The first of the candidates that exists under root.

    Raises:
        DataError: none does.
    """
    for name in candidates:
        if (root / name).is_file():
            return root / name
    raise DataError(f"{dataset}: no table in {root}: expected {' or '.join(candidates)}")


def read_rows(path: Path, columns: Mapping[str, Sequence[str]]) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, values) for every row; blank lines are skipped, spaces and a byte-order mark stripped.

    Args:
        path: the CSV file, UTF-8.
        columns: what is wanted → names it may have in the header; the values come in this order.

    Raises:
        DataError: unreadable file, missing or repeated column, a row with fewer fields than the header or with more, no
            rows at all.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            yield from _rows(path, csv.reader(file), columns)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as CSV in UTF-8: {error}") from error


def _rows(
    path: Path, reader: Iterator[list[str]], columns: Mapping[str, Sequence[str]]
) -> Iterator[tuple[int, list[str]]]:
    header = [name.strip() for name in next(reader, [])]
    wanted = [_position(path, header, names) for names in columns.values()]
    # Older tables end header and rows with a comma: a column without a name needs no value.
    named = max(position for position, name in enumerate(header) if name) + 1
    empty = True
    for fields in reader:
        line = reader.line_num  # type: ignore[attr-defined]
        if not any(fields):
            continue
        if len(fields) < named or any(fields[len(header) :]):
            raise DataError(f"{path}, line {line}: {len(fields)} fields; expected {named} as in the header")
        empty = False
        yield line, [fields[position].strip() for position in wanted]
    if empty:
        raise DataError(f"{path}: holds no rows; expected one line an image below the header")


def _position(path: Path, header: list[str], names: Sequence[str]) -> int:
    found = [position for position, column in enumerate(header) if column in names]
    if len(found) == 1:
        return found[0]
    problem = "no column" if not found else f"{len(found)} columns"
    raise DataError(f"{path}: {problem} {' or '.join(map(repr, names))}; its header is {', '.join(header)[:300]}")


def one_hot(path_of_row: Sequence[str], classes: Sequence[str]) -> npt.NDArray[np.uint8]:
    """(N, C) labels of single-label data; every value must be a class."""
    position = {name: column for column, name in enumerate(classes)}
    labels = np.zeros((len(path_of_row), len(classes)), np.uint8)
    labels[np.arange(len(path_of_row)), [position[value] for value in path_of_row]] = 1
    return labels


def refuse_repeats(path: Path, names: Sequence[str], lines: Sequence[int]) -> None:
    """Raise DataError if an image is listed twice."""
    if len(set(names)) == len(names):
        return
    first: dict[str, int] = {}
    for name, line in zip(names, lines, strict=True):
        if name in first:
            raise DataError(f"{path}, line {line}: image {name} is listed already in line {first[name]}; remove one")
        first[name] = line
