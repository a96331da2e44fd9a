"""The index: what every adapter turns its data set's layout into."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

SPLITS = ("train", "val", "test")
UNLABELLED = -1  # nothing is known of the class in this image: masked in loss, counts and metrics


class DataError(ValueError):
    """The data set cannot be used as it is; the message names the place and the remedy."""


@dataclass(frozen=True)
class Refused:
    """A row or annotation that cannot be used: where it stands, and why."""

    place: str
    reason: str


@dataclass(frozen=True)
class Claims:
    """What DICOM files of a data set must say of themselves, where they say anything.

    Attributes:
        modalities: allowed values of Modality, such as 'DX'.
        body_parts: allowed values of BodyPartExamined, in capitals.
    """

    modalities: tuple[str, ...]
    body_parts: tuple[str, ...]


CHEST_RADIOGRAPHS = Claims(modalities=("CR", "DX", "DR"), body_parts=("CHEST", "THORAX", "LUNG"))


@dataclass(frozen=True, eq=False)
class Index:
    """A row an image: its name, group, labels and split.

    Attributes:
        dataset: name of the data set.
        classes: class names, in the data set's order, without the dropped ones.
        names: (N,) image names as the table gives them; `locate` turns them into paths.
        groups: (N,) group of each image (patient or lesion); a group never spans two splits.
        labels: (N, C) int8: 1 present, 0 absent, `UNLABELLED` where the data set does not say.
        split: (N,) uint8 positions in `SPLITS`.
        group_kind: what a group is: 'patient', 'lesion', 'image'.
        single_label: exactly one class an image (one-hot labels).
        channels: 1 for grey, 3 for RGB images.
        synthetic: drawn, not taken: every output says so.
        dropped: classes left out by `dataset.drop_classes`.
        notes: what a reader of a table must know about these data (one sentence each).
        claims: what a DICOM file of these images must say of itself; None: anything.
    """

    dataset: str
    classes: tuple[str, ...]
    names: npt.NDArray[np.str_]
    groups: npt.NDArray[np.str_]
    labels: npt.NDArray[np.int8]
    split: npt.NDArray[np.uint8]
    group_kind: str
    single_label: bool
    channels: int
    synthetic: bool
    dropped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    claims: Claims | None = None

    def __len__(self) -> int:
        return len(self.names)

    def rows(self, split: str) -> npt.NDArray[np.intp]:
        """Positions of a split's images, ascending."""
        return np.flatnonzero(self.split == SPLITS.index(split))

    def class_counts(self, split: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """(C,) positives and (C,) negatives of a split, over the images that are labelled for the class."""
        labels = self.labels[self.rows(split)]
        return (labels == 1).sum(0, dtype=np.int64), (labels == 0).sum(0, dtype=np.int64)

    def digest(self) -> str:
        """sha256 over names, groups, labels, classes, split and channels: changes when any of them does."""
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
        h.update(np.ascontiguousarray(index.labels, np.int8).tobytes())
        h.update(bytes([index.channels]))
    return h.hexdigest()


def _feed(h: hashlib._Hash, texts: Sequence[str]) -> None:
    h.update(str(len(texts)).encode())
    h.update("\0".join(texts).encode())
