"""A data set ready to be read: index, images in place, decoded cache. No torch, so that a driver can do it once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trainables.data.images import ImageCache, Told
from trainables.data.index import Index
from trainables.data.registry import load_index, prepare
from trainables.settings import DatasetSettings


@dataclass(frozen=True)
class Folders:
    """Where data sets are drawn to, decoded to, and their splits written."""

    phantoms: Path
    images: Path
    splits: Path


@dataclass(frozen=True)
class Data:
    """A data set, ready to be read.

    Attributes:
        root: folder of its files, drawn or distributed: where boxes and masks lie.
        decoded: folder of everything that is decoded once, images and masks.
    """

    index: Index
    images: ImageCache
    root: Path
    decoded: Path


def open_data(settings: DatasetSettings, folders: Folders, *, workers: int = 1, told: Told | None = None) -> Data:
    """Load the index, draw phantoms if need be, and decode the images once.

    Raises:
        DataError: anything about the data set that keeps it from being used.
    """
    index = load_index(settings, folders.splits)
    root = prepare(settings, index, folders.phantoms)
    images = ImageCache.open(
        index, root, image_size=settings.image_size, fit=settings.fit, folder=folders.images, workers=workers, told=told
    )
    return Data(index, images, root, folders.images)
