"""Images decoded once into a memory map that all trials of a machine share.

`pixels.u8` holds (N, S, S, C) bytes; `state.npz` the size and time of change of each file and the sha256 of each
decoded image. At every opening all pixels are hashed (1 to 2 GB a second, no more than the first epoch reads anyway):
images whose file changed, or whose pixels do not fit their hash, are decoded again.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import numpy as np
import numpy.typing as npt
from filelock import FileLock
from PIL import UnidentifiedImageError

from trainables.cache_files import claim_blocks
from trainables.data.decode import UNREADABLE, decode
from trainables.data.index import Claims, DataError, Index
from trainables.data.placing import Fit
from trainables.data.registry import locate

_log = logging.getLogger(__name__)

Hashes = npt.NDArray[np.uint8]  # (N, 32) sha256 of each image's pixels
Stamps = npt.NDArray[np.int64]  # (N, 2) size in bytes, time of change in ns


@dataclass(frozen=True)
class ImageCache:
    """The decoded images of an index.

    Attributes:
        pixels: (N, S, S, C) uint8, read-only, in the index's order; C = 1 grey or 3 RGB.
        contents_digest: sha256 over the sha256 of each image's pixels, in the index's order.
        decoded: how many images this opening decoded.
    """

    pixels: npt.NDArray[np.uint8]
    contents_digest: str
    decoded: int

    @classmethod
    def open(cls, index: Index, root: Path, *, image_size: int, fit: Fit, folder: Path, workers: int = 1) -> ImageCache:
        """Open the cache under `folder`, decoding what is missing from it.

        Several processes may open one cache at the same time: one decodes, the others wait for it.

        Args:
            index: whose images, in its order.
            root: folder of the data set.
            image_size: S, px.
            fit: 'crop' scales the shorter side to S and takes the centre; 'squash' scales both sides to S;
                'letterbox' the longer side, the rest is grey.
            folder: of all caches.
            workers: threads that decode.

        Raises:
            DataError: images that are missing or cannot be read.
        """
        paths = locate(index, root)
        stamps = _stamps(paths)
        store = _Store.of(index, image_size, fit, folder)
        stored = store.load()
        if stored is None or len(stored.outdated(stamps)):
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(store.folder.with_suffix(".lock")):
                # Another process may have decoded meanwhile: load again.
                return _complete(store, store.load(), paths, stamps, workers)
        return _opened(stored, 0)


def images_to_decode(index: Index, image_size: int, fit: Fit, folder: Path) -> int:
    """How many images opening the cache will decode, as far as can be told without the image files: all or none."""
    return 0 if _Store.of(index, image_size, fit, folder).exists() else len(index)


def cache_bytes(index: Index, image_size: int) -> int:
    """Size of the cache's pixels on disk."""
    return len(index) * image_size * image_size * index.channels


@dataclass(frozen=True)
class _Stored:
    """A cache as it lies on disk, pixels already hashed."""

    path: Path
    pixels: npt.NDArray[np.uint8]
    stamps: Stamps
    stated: Hashes
    actual: Hashes

    def outdated(self, stamps: Stamps) -> npt.NDArray[np.intp]:
        """Images to decode again."""
        return np.flatnonzero((self.stamps != stamps).any(1) | self.broken())

    def broken(self) -> npt.NDArray[np.bool_]:
        """(N,) whether the pixels differ from what was decoded."""
        broken: npt.NDArray[np.bool_] = (self.stated != self.actual).any(1)
        return broken


@dataclass(frozen=True)
class _Store:
    """The files of one cache. `state.npz` is renamed into place last and names its pixel file."""

    folder: Path
    shape: tuple[int, int, int, int]
    fit: Fit
    claims: Claims | None

    @classmethod
    def of(cls, index: Index, image_size: int, fit: Fit, folder: Path) -> _Store:
        h = hashlib.sha256(f"{image_size} {fit} {index.channels} {len(index)}\0".encode())
        h.update("\0".join(index.names.tolist()).encode())
        name = f"{index.dataset}-{image_size}-{fit}-{h.hexdigest()[:16]}"
        return cls(folder / name, (len(index), image_size, image_size, index.channels), fit, index.claims)

    def exists(self) -> bool:
        """Whether a cache lies there, its pixel file of the right size."""
        state = self._state()
        return state is not None and _size(self.folder / str(state["pixels"])) == self._bytes()

    def load(self) -> _Stored | None:
        """Map and hash the stored pixels; None if there are none, or if they cannot be used."""
        state = self._state()
        if state is None:
            return None
        path = self.folder / str(state["pixels"])
        if _size(path) != self._bytes():
            _log.warning("%s: %d bytes instead of %d; decoding anew", path, _size(path), self._bytes())
            return None
        pixels = np.memmap(path, np.uint8, "r", shape=self.shape)
        return _Stored(
            path, pixels, state["stamps"].astype(np.int64), state["hashes"].astype(np.uint8), _hashes(pixels)
        )

    def create(self) -> tuple[Path, npt.NDArray[np.uint8]]:
        """A new, writable pixel file.

        Raises:
            DataError: the disk is too full for them.
            OSError: it has become so meanwhile.
        """
        free = shutil.disk_usage(self.folder).free
        if free < self._bytes():
            raise DataError(
                f"{self.folder}: decoded images need {self._bytes() / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; make "
                "room, choose another --storage, or a smaller dataset.image_size"
            )
        path = self.folder / f"pixels-{uuid4().hex}.u8"
        pixels = np.memmap(path, np.uint8, "w+", shape=self.shape)
        claim_blocks(path)
        return path, pixels

    def save(self, path: Path, stamps: Stamps, hashes: Hashes) -> None:
        """Commit a written pixel file, then remove what no state names any more."""
        partial = self.folder / f"state-{uuid4().hex}.partial"
        with partial.open("wb") as file:
            np.savez(file, pixels=np.array(path.name), stamps=stamps, hashes=hashes)
        partial.replace(self.folder / "state.npz")
        self.sweep(keep=path)

    def sweep(self, keep: Path | None = None) -> None:
        """Remove files of killed processes and former pixels; the caller holds the lock."""
        for path in self.folder.iterdir():
            if path != keep and path.name != "state.npz":
                path.unlink()

    def _state(self) -> dict[str, npt.NDArray[np.generic]] | None:
        path = self.folder / "state.npz"
        if not path.exists():
            return None
        try:
            with np.load(path) as stored:
                state = {name: stored[name] for name in ("pixels", "stamps", "hashes")}
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            _log.warning("%s: damaged (%s); decoding anew", path, error)
            return None
        return state

    def _bytes(self) -> int:
        return int(np.prod(self.shape))


def _complete(store: _Store, stored: _Stored | None, paths: Sequence[Path], stamps: Stamps, workers: int) -> ImageCache:
    """Decode what is missing or outdated into a new pixel file; the caller holds the lock."""
    todo = np.arange(len(paths)) if stored is None else stored.outdated(stamps)
    if stored is not None and len(todo) == 0:
        return _opened(stored, 0)
    store.folder.mkdir(exist_ok=True)
    store.sweep(keep=None if stored is None else stored.path)
    path, pixels = store.create()
    hashes = np.zeros((len(paths), 32), np.uint8)
    if stored is not None:
        if stored.broken().any():
            _log.warning(
                "%s: %d images do not fit their digest; decoding them anew", stored.path, stored.broken().sum()
            )
        pixels[:] = stored.pixels
        hashes[:] = stored.stated
    try:
        _decode_into(pixels, hashes, paths, todo, store, workers)
    except DataError:
        path.unlink()  # with holes in it, it is of no use to anybody
        raise
    pixels.flush()  # type: ignore[attr-defined]
    store.save(path, stamps, hashes)
    read_only = np.memmap(path, np.uint8, "r", shape=store.shape)
    return _opened(_Stored(path, read_only, stamps, hashes, hashes), len(todo))


def _decode_into(
    pixels: npt.NDArray[np.uint8],
    hashes: Hashes,
    paths: Sequence[Path],
    todo: npt.NDArray[np.intp],
    store: _Store,
    workers: int,
) -> None:
    """Decode the images `todo` into their places; Pillow decodes outside of the interpreter's lock, so threads do.

    Raises:
        DataError: after all have been tried, how many cannot be read, and the first three.
    """
    _, size, _, channels = pixels.shape

    def decode_one(position: int) -> str | None:
        try:
            image = decode(paths[position], size, store.fit, channels, store.claims)
        except DataError:
            raise  # of no single image: a library is missing
        except UNREADABLE as error:
            return f"{paths[position]} ({_reason(error)})"
        pixels[position] = image
        hashes[position] = _hash(image)
        return None

    pool = ThreadPoolExecutor(max(1, workers))
    try:
        failures = [failure for failure in pool.map(decode_one, todo.tolist()) if failure is not None]
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


def _opened(stored: _Stored, decoded: int) -> ImageCache:
    return ImageCache(stored.pixels, hashlib.sha256(stored.stated.tobytes()).hexdigest(), decoded)


def _hash(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    return np.frombuffer(hashlib.sha256(np.ascontiguousarray(image).data).digest(), np.uint8)


def _hashes(pixels: npt.NDArray[np.uint8]) -> Hashes:
    return np.stack([_hash(image) for image in pixels])


def _stamps(paths: Sequence[Path]) -> Stamps:
    return np.array([(s.st_size, s.st_mtime_ns) for s in (path.stat() for path in paths)], np.int64)


def _size(path: Path) -> int:
    """Bytes, −1 if there is no such file."""
    return path.stat().st_size if path.exists() else -1
