"""Any table: a CSV file of the user's, described by settings instead of code.

    --dataset csv --data-root DIR -o dataset.table=labels.csv -o dataset.image_column=file
    -o dataset.label_columns=[Mass,Nodule]                    a column of 0 and 1 a class: multi-label
    -o dataset.label_column=findings -o 'dataset.label_separator="|"'   several classes a cell: multi-label
    -o dataset.label_column=diagnosis                         one class a cell: single-label

Without `dataset.group_column` every image is its own group; without `dataset.split_column` the split is our own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from trainables.data.adapter import Adapter, DatasetInfo, Table
from trainables.data.index import SPLITS, DataError
from trainables.data.tables import (
    RowError,
    Rows,
    multi_hot,
    one_hot,
    read_header,
    read_rows,
    root_of,
    shown_header,
    texts,
)
from trainables.settings import DatasetSettings

OPTIONS = frozenset(
    {
        "table",
        "image_column",
        "group_column",
        "split_column",
        "label_columns",
        "label_column",
        "label_separator",
        "encoding",
        "channels",
    }
)
_SPLIT_WORDS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_BINARY = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}
_IMAGE, _GROUP, _SPLIT, _LABEL = "image_column", "group_column", "split_column", "label_column"


@dataclass(frozen=True)
class _Image:
    """A row: what it says of its image."""

    name: str
    group: str
    split: str
    classes: tuple[str, ...]


def read_table(settings: DatasetSettings) -> Table:
    """Read the table that the settings describe.

    Raises:
        DataError: settings that contradict each other, or columns that the table does not have, all at once.
    """
    root = root_of(INFO.name, settings.root)
    path = _table_file(root, settings)
    _refuse_incomplete(settings, path)
    rows = _read(path, settings)
    names = [row.name for row in rows.rows]
    classes, labels = _labels(settings, [row.classes for row in rows.rows])
    info = replace(
        INFO,
        classes=classes,
        group_kind="group" if settings.group_column else "image",
        single_label=_single_label(settings),
        channels=settings.channels or INFO.channels,
        notes=_notes(settings, path),
    )
    groups = [row.group for row in rows.rows] if settings.group_column else names
    official = None
    if settings.split_column:
        splits = [row.split for row in rows.rows]
        if not rows.refused:
            _refuse_partial_split(path, settings, splits)
        official = np.array([SPLITS.index(split) for split in splits], np.uint8)
    warnings = _warnings(settings, labels)
    return Table(texts(names), texts(groups), labels, official, None, info, tuple(rows.refused), warnings)


def _table_file(root: Path, settings: DatasetSettings) -> Path:
    if settings.table is None:
        there = ", ".join(sorted(path.name for path in root.glob("*.csv"))[:5]) or "no .csv file"
        raise DataError(f"dataset.table: name the table, relative to {root} or absolute; {there} lies there")
    path = root / Path(settings.table).expanduser()  # an absolute path stays itself
    if not path.is_file():
        raise DataError(f"dataset.table: {path} is not a file; name the table relative to {root}, or absolute")
    return path


def _refuse_incomplete(settings: DatasetSettings, path: Path) -> None:
    """Everything that is wrong with the settings, and columns that there are not."""
    header = read_header(path, settings.encoding)
    there = f"the columns of {path.name} are {shown_header(header)}"
    problems = []
    if settings.image_column is None:
        problems.append(f"dataset.{_IMAGE}: name the column that holds the images' names; {there}")
    if bool(settings.label_columns) == bool(settings.label_column):
        found = "both are" if settings.label_column else "neither is"
        problems.append(f"dataset.label_columns, dataset.{_LABEL}: {found} given; expected one of them; {there}")
    if settings.label_separator is not None and settings.label_column is None:
        problems.append(f"dataset.label_separator: separates the classes of dataset.{_LABEL}, which is not given")
    if settings.split == "official" and settings.split_column is None:
        problems.append("dataset.split=official: name the column that holds the split by dataset.split_column")
    twice = sorted({column for column in settings.label_columns if settings.label_columns.count(column) > 1})
    if twice:
        problems.append(f"dataset.label_columns: {', '.join(map(repr, twice))} given twice; name each class once")
    for key, columns in _named_columns(settings).items():
        for column in dict.fromkeys(columns):
            if header.count(column) != 1:
                times = f"{header.count(column)} columns" if column in header else "no column"
                problems.append(f"dataset.{key}: {path.name} has {times} {column!r}; {there}")
    if problems:
        raise DataError("\n".join(problems))


def _named_columns(settings: DatasetSettings) -> dict[str, tuple[str, ...]]:
    """Setting → the columns that it names."""
    one = {key: getattr(settings, key) for key in (_IMAGE, _GROUP, _SPLIT, _LABEL)}
    return {key: (column,) for key, column in one.items() if column} | {"label_columns": settings.label_columns}


def _read(path: Path, settings: DatasetSettings) -> Rows[_Image]:
    named = _named_columns(settings)
    keys = [key for key, columns in named.items() for _ in columns]
    wanted = {f"{key} {column}": [column] for key, columns in named.items() for column in columns}

    def parse(values: list[str]) -> _Image:
        found: dict[str, list[str]] = {}
        for key, value in zip(keys, values, strict=True):
            found.setdefault(key, []).append(value)
        for key in (_IMAGE, _GROUP, _SPLIT):
            if key in found and not found[key][0]:
                raise RowError(f"column {getattr(settings, key)!r} is empty; expected a value in every row")
        split = found.get(_SPLIT, ["train"])[0]
        if split.lower() not in _SPLIT_WORDS:
            raise RowError(f"{settings.split_column} {split!r}; expected one of {', '.join(_SPLIT_WORDS)}")
        return _Image(
            name=found[_IMAGE][0].replace("\\", "/").removeprefix("./"),
            group=found.get(_GROUP, [""])[0],
            split=_SPLIT_WORDS[split.lower()],
            classes=_classes(settings, found),
        )

    return read_rows(path, wanted, parse, encoding=settings.encoding).without_repeats(lambda row: row.name)


def _classes(settings: DatasetSettings, found: dict[str, list[str]]) -> tuple[str, ...]:
    """The classes that a row names."""
    if settings.label_column is None:
        values = dict(zip(settings.label_columns, found["label_columns"], strict=True))
        wrong = [f"{name} {value!r}" for name, value in values.items() if value.lower() not in _BINARY]
        if wrong:
            raise RowError(f"{', '.join(wrong)}; expected 0 or 1")
        return tuple(name for name, value in values.items() if _BINARY[value.lower()])
    text = found[_LABEL][0]
    if settings.label_separator is None:
        if not text:
            raise RowError(f"column {settings.label_column!r} is empty; expected the image's class")
        return (text,)
    parts = tuple(part.strip() for part in text.split(settings.label_separator)) if text else ()
    if "" in parts:
        raise RowError(f"{settings.label_column} {text!r} names an empty class between separators")
    return parts


def _single_label(settings: DatasetSettings) -> bool:
    return settings.label_column is not None and settings.label_separator is None


def _labels(
    settings: DatasetSettings, named: Sequence[tuple[str, ...]]
) -> tuple[tuple[str, ...], npt.NDArray[np.int8]]:
    """The classes, in the order of the settings or of the alphabet, and (N, C) labels."""
    if settings.label_columns:
        return settings.label_columns, multi_hot(named, settings.label_columns)
    classes = tuple(sorted({name for names in named for name in names}))
    if _single_label(settings):
        return classes, one_hot([names[0] for names in named], classes)
    return classes, multi_hot(named, classes)


def _refuse_partial_split(path: Path, settings: DatasetSettings, splits: Sequence[str]) -> None:
    """Without val, it is held out of train; without train or test there is nothing to do."""
    absent = [name for name in ("train", "test") if name not in splits]
    if absent:
        raise DataError(
            f"{path}: column {settings.split_column!r} marks no image as {' or '.join(absent)}; mark some, or leave "
            "dataset.split_column out to split anew"
        )


def _notes(settings: DatasetSettings, path: Path) -> tuple[str, ...]:
    notes = [f"Read from {path.name}."]
    if settings.group_column is None:
        notes.append("Without a group column every image is its own group: one patient's may be in two splits.")
    if settings.split_column is not None:
        notes.append(f"The split is the table's own, by its column {settings.split_column}.")
    return tuple(notes)


def _warnings(settings: DatasetSettings, labels: npt.NDArray[np.int8]) -> tuple[str, ...]:
    found = []
    if settings.group_column is None:
        found.append("no dataset.group_column: every image is its own group, so leaks between splits cannot be seen")
    none = int((labels.sum(1) == 0).sum())
    if none and settings.label_separator is not None:
        found.append(f"{none} images have no value in {settings.label_column!r}: read as none of the classes")
    return tuple(found)


def image_folders(root: Path) -> list[Path]:
    """The root, and its folder `images`."""
    return [folder for folder in (root, root / "images") if folder.is_dir()]


INFO = DatasetInfo(
    name="csv",
    title="any table of yours, described by settings",
    classes=(),
    group_kind="group",
    single_label=False,
    channels=3,
    synthetic=False,
    licence="yours",
)
ADAPTER = Adapter(INFO, read_table, image_folders, options=OPTIONS)
