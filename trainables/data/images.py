"""Images decoded once into a memory map that all trials of a machine share.

At every opening all pixels are hashed (1 to 2 GB a second, no more than the first epoch reads anyway): images whose
file changed, or whose pixels do not fit their hash, are decoded again. Decoding that is stopped, by whatever, goes on
from the images that are done.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import UnidentifiedImageError

from trainables.data.decode import UNREADABLE, decode_sized
from trainables.data.image_store import Files, Hashes, ImageStore, Sizes, Stored, hash_of
from trainables.data.index import DataError, Index
from trainables.data.placing import Fit
from trainables.data.registry import locate

_log = logging.getLogger(__name__)

Told = Callable[[int, int], None]  # (images done, images to do)

KEEP_EVERY = 1000  # images between two notes of how far decoding has come


@dataclass(frozen=True)
class ImageCache:
    """The decoded images of an index.

    Attributes:
        pixels: (N, S, S, C) uint8, read-only, in the index's order; C = 1 grey or 3 RGB.
        contents_digest: sha256 over the sha256 of each image's pixels, in the index's order.
        decoded: how many images this opening decoded.
        hashes: (N, 32) sha256 of each image's pixels.
        sizes: (N, 2) width and height of the images themselves, px.
    """

    pixels: npt.NDArray[np.uint8]
    contents_digest: str
    decoded: int
    hashes: Hashes
    sizes: Sizes

    @classmethod
    def open(
        cls,
        index: Index,
        root: Path,
        *,
        image_size: int,
        fit: Fit,
        folder: Path,
        most_bytes: int | None = None,
        workers: int = 1,
        told: Told | None = None,
    ) -> ImageCache:
        """Open the cache under `folder`, decoding what is missing from it.

        Several processes may open one cache at the same time: one decodes, the others wait for it.

        Args:
            index: whose images, in its order.
            root: folder of the data set.
            image_size: S, px.
            fit: 'crop' scales the shorter side to S and takes the centre; 'squash' scales both sides to S;
                'letterbox' the longer side, the rest is grey.
            folder: of all caches.
            most_bytes: that all caches under `folder` may take; None: what is free on the disk.
            workers: threads that decode.
            told: hears after each image how many of those to decode are done.

        Raises:
            DataError: images that are missing or cannot be read, or no room for the decoded ones.
        """
        paths = locate(index, root)
        files = Files.of(paths)
        store = ImageStore.of(index, image_size, fit, folder, most_bytes)
        stored = store.load()
        if stored is None or len(stored.outdated(files)):
            folder.mkdir(parents=True, exist_ok=True)
            with store.lock:
                # Another process may have decoded meanwhile: load again.
                return _complete(store, store.load(), paths, files, workers, told)
        return _opened(stored, 0)


def images_to_decode(index: Index, image_size: int, fit: Fit, folder: Path) -> int:
    """How many images opening the cache will decode, as far as can be told without the image files: all or none."""
    return 0 if ImageStore.of(index, image_size, fit, folder).exists() else len(index)


def decoded_pixels(
    index: Index, rows: Sequence[int], image_size: int, fit: Fit, folder: Path
) -> npt.NDArray[np.uint8] | None:
    """(K, S, S, C) pixels of a few images as they were decoded; None where they are not, or no longer what they were.

    Unlike `ImageCache.open` it decodes nothing and hashes these images alone.
    """
    store = ImageStore.of(index, image_size, fit, folder)
    return store.some(rows) if store.exists() else None


def cache_bytes(index: Index, image_size: int) -> int:
    """Size of the cache's pixels on disk."""
    return len(index) * image_size * image_size * index.channels


def _complete(
    store: ImageStore,
    stored: Stored | None,
    paths: Sequence[Path],
    files: Files,
    workers: int,
    told: Told | None,
) -> ImageCache:
    """Decode what is missing or outdated into a new pixel file, or on into one begun; the caller holds the lock."""
    if stored is not None and len(stored.outdated(files)) == 0:
        return _opened(stored, 0)
    store.folder.mkdir(exist_ok=True)
    begun, todo = _begin(store, stored, files)

    def keep() -> None:
        store.keep(begun.path, files, begun.sizes, begun.stated)

    try:
        _decode_into(begun, paths, todo, store, workers, told, keep)
    except BaseException:  # Ctrl-C and images that cannot be read included: what is done is done
        try:
            keep()
        except OSError as error:  # it would only have spared time, and must not hide why decoding has ended
            _log.warning("%s: %s; images that are decoded already will be decoded again", store.folder, error)
        raise
    begun.pixels.flush()  # type: ignore[attr-defined]
    store.save(begun.path, files, begun.sizes, begun.stated)
    read_only = np.memmap(begun.path, np.uint8, "r", shape=store.shape)
    return _opened(replace(begun, pixels=read_only), len(todo))


def _begin(store: ImageStore, stored: Stored | None, files: Files) -> tuple[Stored, npt.NDArray[np.intp]]:
    """A cache whose pixels may be written, with hash and size 0 where nothing is decoded, and what is to do."""
    begun = store.begun()
    kept = [cache.path for cache in (stored, begun) if cache is not None]
    store.sweep(*kept, keep_begun=begun is not None)
    if stored is not None and stored.broken().any():
        _log.warning("%s: %d images do not fit their digest; decoding them anew", stored.path, stored.broken().sum())
    source = begun or stored
    images = len(files.stamps)
    hashes, sizes, todo = np.zeros((images, 32), np.uint8), np.zeros((images, 2), np.int64), np.arange(images)
    if source is not None:
        todo = source.outdated(files)
        done = np.setdiff1d(np.arange(images), todo)
        hashes[done], sizes[done] = source.stated[done], source.sizes[done]
    if begun is not None:
        path, pixels = begun.path, begun.pixels
    else:
        path, pixels = store.create()
        if stored is not None:
            pixels[:] = stored.pixels
    return Stored(path, pixels, files, sizes, hashes, hashes), todo


def _decode_into(
    cache: Stored,
    paths: Sequence[Path],
    todo: npt.NDArray[np.intp],
    store: ImageStore,
    workers: int,
    told: Told | None,
    keep: Callable[[], None],
) -> None:
    """Decode the images `todo` into their places; Pillow decodes outside of the interpreter's lock, so threads do.

    Raises:
        DataError: after all have been tried, how many cannot be read, and the first three.
    """
    _, size, _, channels = cache.pixels.shape

    def decode_one(position: int) -> str | None:
        try:
            image, own_size = decode_sized(paths[position], size, store.fit, channels, store.claims)
        except DataError:
            raise  # of no single image: a library is missing
        except UNREADABLE as error:
            return f"{paths[position]} ({_reason(error)})"
        cache.pixels[position] = image
        cache.sizes[position] = own_size
        cache.stated[position] = hash_of(image)
        return None

    pool = ThreadPoolExecutor(max(1, workers))
    failures: list[str] = []
    try:
        for done, failure in enumerate(pool.map(decode_one, todo.tolist()), start=1):
            failures += [] if failure is None else [failure]
            if told is not None:
                told(done, len(todo))
            if done % KEEP_EVERY == 0:
                keep()
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C what is left of a large data set must not be decoded first
    if failures:
        raise DataError(
            f"{len(failures)} of {len(todo)} images cannot be read: {'; '.join(failures[:3])}"
            f"{'; …' if len(failures) > 3 else ''}. Replace the files, or remove their rows from the table"
        )


def _reason(error: Exception) -> str:
    """Why an image cannot be decoded; Pillow repeats its path."""
    return "not an image" if isinstance(error, UnidentifiedImageError) else f"{type(error).__name__}: {error}"


def _opened(stored: Stored, decoded: int) -> ImageCache:
    return ImageCache(
        stored.pixels, hashlib.sha256(stored.stated.tobytes()).hexdigest(), decoded, stored.stated, stored.sizes
    )
