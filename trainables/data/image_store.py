"""The files of a cache of decoded images: whole, begun, refreshed, or evicted for another one.

`pixels-….u8` holds (N, S, S, C) bytes. `state.npz`, renamed into place last, names the pixel file of a whole cache,
with the length and time of change of each image file, the sha256 of a few of them, and of each decoded image its
sha256 and its own size. `begun.npz` is the same of one that is being decoded, where images that are not there yet have
the hash 0: decoding that was stopped goes on from it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import numpy as np
import numpy.typing as npt
from filelock import FileLock, Timeout

from trainables.cache_files import claim_blocks
from trainables.data.index import Claims, DataError, Index
from trainables.data.placing import Fit

_log = logging.getLogger(__name__)

Hashes = npt.NDArray[np.uint8]  # (N, 32) sha256 of each image's pixels
Sizes = npt.NDArray[np.int64]  # (N, 2) width and height of each image itself, px

STATE, BEGUN = "state.npz", "begun.npz"
SAMPLED = 16  # files whose contents tell one data set from another of the same names, lengths and times
EVICTABLE_SECONDS = 24 * 3600.0  # since a cache was last opened: nobody is about to read it again


@dataclass(frozen=True)
class Files:
    """What tells whether image files are still the ones that were decoded.

    Attributes:
        stamps: (N, 2) length in bytes, time of change in ns.
        samples: (K, 32) sha256 of the contents of a few, spread evenly: another data set may have files of the same
            names, lengths and times, since archives give them all one time.
    """

    stamps: npt.NDArray[np.int64]
    samples: npt.NDArray[np.uint8]

    @classmethod
    def of(cls, paths: Sequence[Path]) -> Files:
        """Look at image files."""
        stamps = np.array([(s.st_size, s.st_mtime_ns) for s in (path.stat() for path in paths)], np.int64)
        samples = [hashlib.sha256(_contents(paths[place])).digest() for place in _sampled(len(paths))]
        return cls(stamps, np.frombuffer(b"".join(samples), np.uint8).reshape(-1, 32))

    def changed(self, since: Files) -> npt.NDArray[np.bool_]:
        """(N,) whether each file is another one: all are, where one of the samples is and its stamp does not say so."""
        changed: npt.NDArray[np.bool_] = (self.stamps != since.stamps).any(1)
        unsaid = (self.samples != since.samples).any(1) & ~changed[_sampled(len(changed))]
        return changed | bool(unsaid.any())


@dataclass(frozen=True)
class Stored:
    """A cache as it lies on disk, pixels already hashed."""

    path: Path
    pixels: npt.NDArray[np.uint8]
    files: Files
    sizes: Sizes
    stated: Hashes
    actual: Hashes

    def outdated(self, files: Files) -> npt.NDArray[np.intp]:
        """Images to decode again."""
        return np.flatnonzero(files.changed(self.files) | self.broken())

    def broken(self) -> npt.NDArray[np.bool_]:
        """(N,) whether the pixels differ from what was decoded."""
        broken: npt.NDArray[np.bool_] = (self.stated != self.actual).any(1)
        return broken


@dataclass(frozen=True)
class ImageStore:
    """The files of one cache."""

    folder: Path
    shape: tuple[int, int, int, int]
    fit: Fit
    claims: Claims | None
    most_bytes: int | None = None  # that it and all caches beside it may take

    @classmethod
    def of(cls, index: Index, image_size: int, fit: Fit, folder: Path, most_bytes: int | None = None) -> ImageStore:
        """The cache of an index at a size, under the folder of all caches."""
        h = hashlib.sha256(f"{image_size} {fit} {index.channels} {len(index)}\0".encode())
        h.update("\0".join(index.names.tolist()).encode())
        name = f"{index.dataset}-{image_size}-{fit}-{h.hexdigest()[:16]}"
        shape = (len(index), image_size, image_size, index.channels)
        return cls(folder / name, shape, fit, index.claims, most_bytes)

    @property
    def lock(self) -> FileLock:
        """Held by who decodes; freed by the system when its holder dies."""
        return FileLock(self.folder.with_suffix(".lock"))

    def exists(self) -> bool:
        """Whether a whole cache lies there, its pixel file of the right size."""
        state = self._read(STATE)
        return state is not None and _size(self.folder / str(state["pixels"])) == self._bytes()

    def load(self) -> Stored | None:
        """Map and hash the stored pixels; None if there are none, or if they cannot be used."""
        stored = self._load(STATE)
        if stored is not None:
            os.utime(self.folder / STATE)  # when it was last of use: `_evict`
        return stored

    def some(self, rows: Sequence[int]) -> npt.NDArray[np.uint8] | None:
        """(K, S, S, C) pixels of a few images, hashed alone; None where they are not what was decoded."""
        state = self._read(STATE)
        if state is None or not len(rows):
            return None
        pixels = np.memmap(self.folder / str(state["pixels"]), np.uint8, "r", shape=self.shape)[list(rows)]
        actual = np.stack([hash_of(image) for image in pixels])
        return np.asarray(pixels) if (actual == state["hashes"][list(rows)]).all() else None

    def begun(self) -> Stored | None:
        """As `load`, of what a decoding that was stopped has left; its pixels may be written."""
        return self._load(BEGUN)

    def _load(self, name: str) -> Stored | None:
        state = self._read(name)
        if state is None:
            return None
        path = self.folder / str(state["pixels"])
        if _size(path) != self._bytes():
            _log.warning("%s: %d bytes instead of %d; decoding anew", path, _size(path), self._bytes())
            return None
        pixels = np.memmap(path, np.uint8, "r" if name == STATE else "r+", shape=self.shape)
        files = Files(state["stamps"].astype(np.int64), state["samples"].astype(np.uint8))
        sizes, stated = state["sizes"].astype(np.int64), state["hashes"].astype(np.uint8)
        return Stored(path, pixels, files, sizes, stated, np.stack([hash_of(image) for image in pixels]))

    def create(self) -> tuple[Path, npt.NDArray[np.uint8]]:
        """A new, writable pixel file; caches that were long of no use make room for it.

        Raises:
            DataError: the disk is too full for it, or what caches may take is taken.
            OSError: it has become so meanwhile.
        """
        self._evict()
        if self.most_bytes is not None and self.most_bytes - _taken(self.folder) < self._bytes():
            raise DataError(
                f"dataset.cache_gb: decoded images need {self._bytes() / 1e9:.2f} GB; of {self.most_bytes / 1e9:.2f} "
                f"that are allowed, caches in use today take {_taken(self.folder) / 1e9:.2f}; allow more, delete some "
                f"of {self.folder.parent}, or choose a smaller dataset.image_size"
            )
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

    def keep(self, path: Path, files: Files, sizes: Sizes, hashes: Hashes) -> None:
        """Say how far a pixel file has come, so that its decoding can go on after a sudden end."""
        self._write(BEGUN, path, files, sizes, hashes)

    def save(self, path: Path, files: Files, sizes: Sizes, hashes: Hashes) -> None:
        """Commit a written pixel file, then remove what no state names any more."""
        self._write(STATE, path, files, sizes, hashes)
        self.sweep(path, keep_begun=False)

    def sweep(self, *pixels: Path, keep_begun: bool = True) -> None:
        """Remove files of killed processes and former pixels but for `pixels`; the caller holds the lock."""
        names = {STATE, *(path.name for path in pixels), *([BEGUN] if keep_begun else [])}
        for path in self.folder.iterdir():
            if path.name not in names:
                path.unlink()

    def _write(self, name: str, path: Path, files: Files, sizes: Sizes, hashes: Hashes) -> None:
        partial = self.folder / f"{name}-{uuid4().hex}.partial"
        with partial.open("wb") as file:
            named, stamps, samples = np.array(path.name), files.stamps, files.samples
            np.savez(file, pixels=named, stamps=stamps, samples=samples, sizes=sizes, hashes=hashes)
        partial.replace(self.folder / name)

    def _read(self, name: str) -> dict[str, npt.NDArray[np.generic]] | None:
        path = self.folder / name
        if not path.exists():
            return None
        try:
            with np.load(path) as stored:
                state = {key: stored[key] for key in ("pixels", "stamps", "samples", "sizes", "hashes")}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            _log.warning("%s: damaged (%s); decoding anew", path, error)
            return None
        return state

    def _bytes(self) -> int:
        return int(np.prod(self.shape))

    def _room(self) -> int:
        """Bytes that this cache may take now."""
        free = shutil.disk_usage(self.folder).free
        return free if self.most_bytes is None else min(free, self.most_bytes - _taken(self.folder))

    def _evict(self) -> None:
        """Delete caches beside this one, the longest unused first, until there is room; who reads one goes on.

        Only caches that nobody has opened for a day, so that two studies never take turns at evicting each other's.
        """
        old = time.time() - EVICTABLE_SECONDS
        beside = [path for path in self.folder.parent.glob(f"*/{STATE}") if path.parent != self.folder]
        for used, other in sorted((path.stat().st_mtime, path.parent) for path in beside):
            if self._room() >= self._bytes() or used > old:
                return
            try:
                with FileLock(other.with_suffix(".lock"), timeout=0):
                    shutil.rmtree(other)
            except Timeout:  # somebody is about to use it
                continue
            days = (time.time() - used) / 86400
            _log.warning("%s: deleted, unused for %.0f days, to make room for %s", other, days, self.folder)


def _taken(folder: Path) -> int:
    """Bytes of the decoded images of all caches beside `folder`."""
    return sum(path.stat().st_size for path in folder.parent.glob("*/pixels-*.u8") if path.parent != folder)


def hash_of(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """(32,) sha256 of an image's pixels."""
    return np.frombuffer(hashlib.sha256(np.ascontiguousarray(image).data).digest(), np.uint8)


def _sampled(images: int) -> list[int]:
    """Positions of the files that are read as samples."""
    return sorted(set(np.linspace(0, images - 1, min(images, SAMPLED)).round().astype(int).tolist()))


def _contents(path: Path) -> bytes:
    """Of a file; nothing where it cannot be read, which decoding will say."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _size(path: Path) -> int:
    """Bytes, −1 if there is no such file."""
    return path.stat().st_size if path.exists() else -1
