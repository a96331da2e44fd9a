"""What an adapter is: facts about a data set, a reader of its table, and where its images lie."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from trainables.data.boxes import Boxes
from trainables.data.index import Claims, DataError, Refused
from trainables.data.masks import Masks
from trainables.settings import DatasetSettings

_NAMED = 4  # refused rows whose place an error names, beside the first


@dataclass(frozen=True)
class DatasetInfo:
    """Facts about a data set that do not depend on settings.

    Attributes:
        name: as in `dataset.name`.
        title: as a reader of a table should see it.
        classes: in the order of the labels' columns; empty where only the table tells.
        group_kind: what must not span two splits: 'patient', 'lesion'.
        single_label: exactly one class an image.
        channels: 1 for grey, 3 for RGB.
        synthetic: drawn, not taken.
        licence: terms of the images.
        default_images: how many a phantom draws when `dataset.images` is not set; None for real data: all.
        notes: what a reader of a table must know, one sentence each.
        claims: what a DICOM file of the data set must say of itself.
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
    claims: Claims | None = None


@dataclass(frozen=True, eq=False)
class Table:
    """A data set's table as read, before any split.

    Attributes:
        names: (N,) image names, unique, as the table gives them.
        groups: (N,) patient or lesion.
        labels: (N, C) int8 (see `Index.labels`), columns in the order of the classes.
        official: (N,) uint8 positions in `SPLITS` of the distributed split, or None where none was asked for. Without a
            row marked 'val', it is carved out of the rows marked 'train'.
        strata: (N, S) what our own split is balanced by, 1 where present; None: the labels. It must not depend on
            settings that rows of one study may vary, since rows are compared on one split.
        info: the data set's facts where the table tells more than the adapter knows; None: the adapter's.
        refused: rows that cannot be used; a study does not begin with any.
        warnings: what a person should know, and a study need not.
    """

    names: npt.NDArray[np.str_]
    groups: npt.NDArray[np.str_]
    labels: npt.NDArray[np.int8]
    official: npt.NDArray[np.uint8] | None = None
    strata: npt.NDArray[np.int8] | None = None
    info: DatasetInfo | None = None
    refused: tuple[Refused, ...] = ()
    warnings: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    def take(self, rows: npt.NDArray[np.intp]) -> Table:
        """The table of these rows alone."""
        return replace(
            self,
            names=self.names[rows],
            groups=self.groups[rows],
            labels=self.labels[rows],
            official=None if self.official is None else self.official[rows],
            strata=None if self.strata is None else self.strata[rows],
        )

    def usable(self) -> Table:
        """The table itself, if every row of the file can be used.

        Raises:
            DataError: the first row that cannot, how many there are, and where the next ones stand.
        """
        if self.refused:
            raise DataError(_refusal(self.refused))
        return self


def _refusal(refused: Sequence[Refused]) -> str:
    first, *others = refused
    message = f"{first.place}: {first.reason}"
    if not others:
        return message
    places = "; ".join(other.place.rpartition("/")[2] for other in others[:_NAMED])
    more = "; …" if len(others) > _NAMED else ""
    return f"{message}. {len(others)} more cannot be used ({places}{more}): the command `check` lists all"


@dataclass(frozen=True)
class Adapter:
    """How one data set is read.

    Attributes:
        info: its facts.
        read_table: settings → table; reads no image. A row that cannot be used is among the table's `refused`; what
            keeps the whole table from being used raises DataError.
        image_folders: root → the folders in which images may lie, existing ones only, in order of preference.
        draw: phantoms: (settings, empty folder) → the whole data set in its layout; None for real data.
        options: settings beyond those that every data set has (`settings.READING`) which this one reads.
        read_boxes, read_masks: settings → boxes or masks of its images, read when a task asks for them; None where it
            has none. They themselves give None for a copy without the file of boxes or masks.
    """

    info: DatasetInfo
    read_table: Callable[[DatasetSettings], Table]
    image_folders: Callable[[Path], list[Path]]
    draw: Callable[[DatasetSettings, Path], None] | None = None
    options: frozenset[str] = frozenset()
    read_boxes: Callable[[DatasetSettings], Boxes | None] | None = None
    read_masks: Callable[[DatasetSettings], Masks | None] | None = None
