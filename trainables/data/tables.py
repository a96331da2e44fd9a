"""Reading a data set's CSV files: one clear error for a missing file or column; every broken row kept with its line."""

from __future__ import annotations

import codecs
import csv
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from trainables.data.index import DataError, Refused

_Row = TypeVar("_Row")
_LONGEST = 1000  # characters of a value: arrays of names are as wide as the longest


class RowError(ValueError):
    """A row cannot be used; the message says which value, and what was expected."""


@dataclass(frozen=True)
class Rows(Generic[_Row]):
    """The rows of a table that could be parsed, with their lines, and those that could not."""

    path: Path
    rows: list[_Row]
    lines: list[int]
    refused: list[Refused]

    def without_repeats(self, name: Callable[[_Row], str]) -> Rows[_Row]:
        """Without the rows of an image that is listed already, which are refused."""
        first: dict[str, int] = {}
        kept: list[int] = []
        refused = list(self.refused)
        for position, (row, line) in enumerate(zip(self.rows, self.lines, strict=True)):
            image = name(row)
            if image in first:
                reason = f"image {image} is listed already in line {first[image]}; remove one"
                refused.append(Refused(f"{self.path}, line {line}", reason))
            else:
                first[image] = line
                kept.append(position)
        return Rows(self.path, [self.rows[k] for k in kept], [self.lines[k] for k in kept], refused)


def root_of(dataset: str, root: str | None) -> Path:
    """The folder of a real data set.

    Raises:
        DataError: none was given, or there is none.
    """
    if root is None:
        raise DataError(
            f"{dataset}: no folder given; say where the data set lies: --data-root {dataset}=DIR or dataset.root"
        )
    folder = Path(os.path.expanduser(root))  # noqa: PTH111 (Path raises for a user that is none)
    if not os.path.isdir(folder):  # noqa: PTH112 (and for a name too long to be one)
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


def read_header(path: Path, encoding: str = "utf-8") -> list[str]:
    """Column names, stripped.

    Raises:
        DataError: as `read_rows`.
    """
    with _opened(path, encoding) as reader:
        return [name.strip() for name in next(reader, [])]


def read_rows(
    path: Path,
    columns: Mapping[str, Sequence[str]],
    parse: Callable[[list[str]], _Row],
    *,
    encoding: str = "utf-8",
) -> Rows[_Row]:
    """Parse every row; blank lines are skipped, spaces and a byte-order mark stripped.

    Args:
        path: the CSV file.
        columns: what is wanted → names it may have in the header; `parse` gets the values in this order.
        parse: values → row; raises RowError for values that cannot be used.
        encoding: of the file.

    Raises:
        DataError: unreadable file, missing or repeated column, no rows at all.
    """
    with _opened(path, encoding) as reader:
        return _parsed(path, reader, columns, parse)


@contextmanager
def _opened(path: Path, encoding: str) -> Iterator[Iterator[list[str]]]:
    """A CSV reader over the file; whatever is wrong with the file inside the block is one clear DataError."""
    codec = _codec(encoding)
    try:
        with path.open(newline="", encoding=codec) as file:
            yield csv.reader(file)
    except UnicodeError as error:
        raise DataError(
            f"{path}{_undecodable_line(path, codec)}: cannot be read as CSV in {codec.removesuffix('-sig').upper()}; "
            "save the table in that encoding, or with `csv` name its own by dataset.encoding, such as cp1252"
        ) from error
    except (OSError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as CSV: {error}") from error


def _undecodable_line(path: Path, codec: str) -> str:
    """Where the first byte stands that cannot be decoded; nothing for what is no text at all."""
    raw = path.read_bytes()
    try:
        raw.decode(codec)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        one_byte = b"\0" not in raw and not codec.startswith(("utf-16", "utf-32"))
        return f", line {line}" if one_byte else ""
    return ""


def _codec(encoding: str) -> str:
    try:
        name = codecs.lookup(encoding).name
        "a,b".encode(name)  # codecs from bytes to bytes, such as hex, cannot
    except (LookupError, UnicodeError, ValueError) as error:
        raise DataError(
            f"dataset.encoding: {encoding!r} is no text encoding; such as utf-8, cp1252, latin-1"
        ) from error
    return "utf-8-sig" if name == "utf-8" else name


def _parsed(
    path: Path,
    reader: Iterator[list[str]],
    columns: Mapping[str, Sequence[str]],
    parse: Callable[[list[str]], _Row],
) -> Rows[_Row]:
    header = [name.strip() for name in next(reader, [])]
    wanted = [_position(path, header, names) for names in columns.values()]
    # Older tables end header and rows with a comma: a column without a name needs no value.
    named = max((position for position, name in enumerate(header) if name), default=-1) + 1
    found: Rows[_Row] = Rows(path, [], [], [])
    for fields in reader:
        if not any(fields):
            continue
        line = reader.line_num  # type: ignore[attr-defined]
        try:
            if len(fields) < named or any(fields[len(header) :]):
                raise RowError(f"{len(fields)} fields; expected {named} as in the header")
            found.rows.append(parse([_sound(fields[position].strip()) for position in wanted]))
            found.lines.append(line)
        except RowError as error:
            found.refused.append(Refused(f"{path}, line {line}", str(error)))
    if not (found.rows or found.refused):
        raise DataError(f"{path}: holds no rows; expected one line an image below the header")
    return found


def _sound(value: str) -> str:
    """The value, unless it is none that a name, label or number could have."""
    if len(value) > _LONGEST or "\0" in value:
        raise RowError(f"a value of {len(value)} characters{' with a NUL among them' if chr(0) in value else ''}")
    return value


def _position(path: Path, header: list[str], names: Sequence[str]) -> int:
    found = [position for position, column in enumerate(header) if column in names]
    if len(found) == 1:
        return found[0]
    problem = "no column" if not found else f"{len(found)} columns"
    raise DataError(f"{path}: {problem} {' or '.join(map(repr, names))}; its header is {shown_header(header)}")


def shown_header(header: Sequence[str]) -> str:
    """The columns that there are, as a message shows them."""
    text = ", ".join(header)
    return text if len(text) <= 600 else f"{text[:600]}… ({len(header)} columns)"


def texts(values: Sequence[str]) -> npt.NDArray[np.str_]:
    """(N,) array of strings, of strings also where there are none."""
    return np.array(values, np.str_) if len(values) else np.empty(0, np.str_)


def one_hot(values: Sequence[str], classes: Sequence[str]) -> npt.NDArray[np.int8]:
    """(N, C) labels of single-label data; every value must be a class."""
    position = {name: column for column, name in enumerate(classes)}
    labels = np.zeros((len(values), len(classes)), np.int8)
    labels[np.arange(len(values)), [position[value] for value in values]] = 1
    return labels


def multi_hot(values: Sequence[Sequence[str]], classes: Sequence[str]) -> npt.NDArray[np.int8]:
    """(N, C) labels of multi-label data; every value must be a class."""
    column = {name: position for position, name in enumerate(classes)}
    labels = np.zeros((len(values), len(classes)), np.int8)
    places = [(row, column[name]) for row, names in enumerate(values) for name in names]
    if places:
        labels[tuple(np.array(places).T)] = 1
    return labels
