"""A data set ready to be read: index, images in place, decoded cache. No torch, so that a driver can do it once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trainables.data.images import ImageCache, Told
from trainables.data.index import DataError, Index
from trainables.data.registry import away_settings, load_away, load_index, prepare
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


def open_data(
    settings: DatasetSettings,
    folders: Folders,
    *,
    workers: int = 1,
    told: Told | None = None,
    labels_learnt: bool = True,
) -> Data:
    """Load the index, draw phantoms if need be, and decode the images once; see `load_index` of `labels_learnt`.

    Raises:
        DataError: anything about the data set that keeps it from being used.
    """
    index = load_index(settings, folders.splits, labels_learnt=labels_learnt)
    return _opened(index, settings, folders, workers, told)


def open_away(settings: DatasetSettings, folders: Folders, *, workers: int = 1, told: Told | None = None) -> Data:
    """The test images of `settings.test_on`, which must be set, as the network sees them.

    Raises:
        DataError: anything about that data set that keeps it from being used.
    """
    return _opened(load_away(settings, folders.splits), away_settings(settings), folders, workers, told)


def refuse_images_in_both(home: Data, away: Data) -> None:
    """Images that are tested elsewhere must not be those that were trained or chosen by.

    Raises:
        DataError: some are, pixel for pixel; how many, and the first one.
    """
    seen = {home.images.hashes[row].tobytes() for split in ("train", "val") for row in home.index.rows(split)}
    both = [name for name, told in zip(away.index.names, away.images.hashes, strict=True) if told.tobytes() in seen]
    if both:
        raise DataError(
            f"dataset.test_on: {len(both)} of {len(away.index)} test images of {away.index.dataset} are images that "
            f"training on {home.index.dataset} looks at, first {both[0]}; test on other patients"
        )


def _opened(index: Index, settings: DatasetSettings, folders: Folders, workers: int, told: Told | None) -> Data:
    root = prepare(settings, index, folders.phantoms)
    images = ImageCache.open(
        index,
        root,
        image_size=settings.image_size,
        fit=settings.fit,
        folder=folders.images,
        most_bytes=None if settings.cache_gb is None else int(settings.cache_gb * 1e9),
        workers=workers,
        told=told,
    )
    return Data(index, images, root, folders.images)
