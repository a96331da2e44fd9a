"""The index: what every adapter turns its data set's layout into."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

SPLITS = ("train", "val", "test")


class DataError(ValueError):
    """The data set cannot be used as it is; the message names the place and the remedy."""


@dataclass(frozen=True, eq=False)
class Index:
    """A row an image: its name, group, labels and split.

    Attributes:
        dataset: name of the data set.
        classes: class names, in the data set's order, without the dropped ones.
        names: (N,) image names as the table gives them; `locate` turns them into paths.
        groups: (N,) group of each image (patient or lesion); a group never spans two splits.
        labels: (N, C) uint8, 1 where the class is present.
        split: (N,) uint8 positions in `SPLITS`.
        group_kind: what a group is: 'patient', 'lesion', 'image'.
        single_label: exactly one class an image (one-hot labels).
        channels: 1 for grey, 3 for RGB images.
        synthetic: drawn, not taken: every output says so.
        dropped: classes left out by `dataset.drop_classes`.
        notes: what a reader of a table must know about these data (one sentence each).
    """

    dataset: str
    classes: tuple[str, ...]
    names: npt.NDArray[np.str_]
    groups: npt.NDArray[np.str_]
    labels: npt.NDArray[np.uint8]
    split: npt.NDArray[np.uint8]
    group_kind: str
    single_label: bool
    channels: int
    synthetic: bool
    dropped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    def rows(self, split: str) -> npt.NDArray[np.intp]:
        """Positions of a split's images, ascending."""
        return np.flatnonzero(self.split == SPLITS.index(split))

    def digest(self) -> str:
        """sha256 over names, groups, labels, classes and split: changes when any of them does."""
        return _digest(self, with_labels=True)

    def split_digest(self) -> str:
        """sha256 over names, groups and split alone."""
        return _digest(self, with_labels=False)


@lru_cache(maxsize=32)
def _digest(index: Index, *, with_labels: bool) -> str:
    h = hashlib.sha256()
    _feed(h, index.names.tolist())
    _feed(h, index.groups.tolist())
    h.update(np.ascontiguousarray(index.split).tobytes())
    if with_labels:
        _feed(h, index.classes)
        h.update(np.ascontiguousarray(index.labels).tobytes())
    return h.hexdigest()


def _feed(h: hashlib._Hash, texts: Sequence[str]) -> None:
    h.update(str(len(texts)).encode())
    h.update("\0".join(texts).encode())
