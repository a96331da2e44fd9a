"""What an adapter is: facts about a data set, a reader of its table, and where its images lie."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from trainables.settings import DatasetSettings


@dataclass(frozen=True)
class DatasetInfo:
    """Facts about a data set that do not depend on settings.

    Attributes:
        name: as in `dataset.name`.
        title: as a reader of a table should see it.
        classes: in the order of the labels' columns.
        group_kind: what must not span two splits: 'patient', 'lesion'.
        single_label: exactly one class an image.
        channels: 1 for grey, 3 for RGB.
        synthetic: drawn, not taken.
        licence: terms of the images.
        default_images: how many a phantom draws when `dataset.images` is not set; None for real data: all.
        notes: what a reader of a table must know, one sentence each.
    """

    name: str
    title: str
    classes: tuple[str, ...]
    group_kind: str
    single_label: bool
    channels: int
    synthetic: bool
    licence: str
    default_images: int | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Table:
    """A data set's table as read, before any split.

    Attributes:
        names: (N,) image names, unique, as the table gives them.
        groups: (N,) patient or lesion.
        labels: (N, C) uint8, columns in the order of `DatasetInfo.classes`.
        official: (N,) uint8 positions in `SPLITS` of the distributed split, or None where none was asked for. 'val' is
            never official for the data sets here: it is carved out of the rows marked 'train'.
    """

    names: npt.NDArray[np.str_]
    groups: npt.NDArray[np.str_]
    labels: npt.NDArray[np.uint8]
    official: npt.NDArray[np.uint8] | None = None

    def __len__(self) -> int:
        return len(self.names)

    def take(self, rows: npt.NDArray[np.intp]) -> Table:
        """The table of these rows alone."""
        official = None if self.official is None else self.official[rows]
        return Table(self.names[rows], self.groups[rows], self.labels[rows], official)


@dataclass(frozen=True)
class Adapter:
    """How one data set is read.

    Attributes:
        info: its facts.
        read_table: settings → table; reads no image, and raises DataError for a table that cannot be used.
        image_folders: root → the folders in which images may lie, existing ones only, in order of preference.
        draw: phantoms: (settings, empty folder) → the whole data set in its layout; None for real data.
    """

    info: DatasetInfo
    read_table: Callable[[DatasetSettings], Table]
    image_folders: Callable[[Path], list[Path]]
    draw: Callable[[DatasetSettings, Path], None] | None = None
