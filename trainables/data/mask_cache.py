"""Masks resized along with their images, kept a bit a pixel in a memory map that all trials of a machine share.

The geometry is that of the image (crop, squash or letterbox); a pixel is inside where at least half of its area is
(box filter ≥ 0.5). The map is made once for a set of images, structures, size and source files, and hashed whenever it
is opened: one that does not fit its hash is made again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from filelock import FileLock
from PIL import Image

from trainables.data.index import DataError, Index
from trainables.data.mask_files import Found, MaskFolders, MaskTable, mask_source
from trainables.data.masks import Mask
from trainables.data.placing import Fit, place
from trainables.settings import DatasetSettings, SegmentationSettings

_log = logging.getLogger(__name__)

_RULE = "box filter, at least half"  # part of a map's name: change it with the rule
_BITS, _STATE = "masks.u8", "state.npz"
_AT_ONCE = 256  # rows unpacked or hashed at a time


@dataclass(frozen=True)
class MaskCache:
    """The masks of an index at one size.

    Attributes:
        structures: C names.
        size: S, px.
        bits: (N, C, ⌈S²/8⌉) uint8, packed row by row, in the index's order.
        known: (N, C) whether there is a usable mask; where not, its bits are 0 and mean nothing.
        contents_digest: sha256 over structures, size, bits and known.
    """

    structures: tuple[str, ...]
    size: int
    bits: npt.NDArray[np.uint8]
    known: npt.NDArray[np.bool_]
    contents_digest: str

    def of(self, rows: npt.NDArray[np.intp]) -> npt.NDArray[np.bool_]:
        """(B, C, S, S) masks of rows."""
        flat = np.unpackbits(self.bits[rows], axis=-1, count=self.size**2)
        return flat.view(np.bool_).reshape(len(rows), len(self.structures), self.size, self.size)

    def area(self, rows: npt.NDArray[np.intp]) -> npt.NDArray[np.int64]:
        """(B, C) pixels inside."""
        parts = [np.bitwise_count(self.bits[part]).sum(-1, dtype=np.int64) for part in _parts(rows)]
        return np.concatenate(parts) if parts else np.zeros((0, len(self.structures)), np.int64)


def open_masks(
    dataset: DatasetSettings, settings: SegmentationSettings, index: Index, *, root: Path, folder: Path
) -> MaskCache:
    """Open the masks of an index, decoding them first if no process has.

    Args:
        dataset: size and fit of the images.
        settings: which structures, from which source.
        index: whose images, in its order.
        root: folder of the data set.
        folder: of all decoded images and masks.

    Raises:
        DataError: masks that are missing, unreadable, or do not go with their images; names the file.
    """
    source = mask_source(index, root, settings.structures, table=settings.masks, min_quality=settings.min_mask_quality)
    place = folder / _name(dataset, settings, index, source)
    opened = _load(place, settings.structures, dataset.image_size, len(index))
    if opened is None:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(place.with_suffix(".lock")):
            opened = _load(place, settings.structures, dataset.image_size, len(index))
            if opened is None:
                _make(place, source, len(index), dataset.image_size, dataset.fit)
                opened = _load(place, settings.structures, dataset.image_size, len(index))
    if opened is None:
        raise DataError(f"{place}: masks that were just written cannot be read back; check the disk")
    return opened


def resize(mask: Mask, size: int, fit: Fit) -> Mask:
    """(S, S) mask with the geometry that the image has; what a letterbox adds is outside."""
    height, width = mask.shape
    if (height, width) == (size, size):
        return mask
    plane = Image.fromarray(mask.astype(np.float32))
    if fit == "letterbox":
        left, top, wide, high = map(int, place(width, height, size, fit))
        square = Image.new("F", (size, size))
        square.paste(plane.resize((wide, high), Image.Resampling.BOX), (left, top))
    else:
        square = plane.resize((size, size), Image.Resampling.BOX, box=_visible(width, height, size, fit))
    inside: Mask = np.asarray(square) >= 0.5
    return inside


def _visible(width: int, height: int, size: int, fit: Fit) -> tuple[float, float, float, float]:
    """The part of an image that its input shows, in px of the image: left, top, right, bottom."""
    left, top, wide, high = place(width, height, size, fit)
    right, bottom = (size - left) * width / wide, (size - top) * height / high
    return -left * width / wide, -top * height / high, min(right, width), min(bottom, height)


# -- the map on disk ---------------------------------------------------------------------------------------------------


def _name(
    dataset: DatasetSettings, settings: SegmentationSettings, index: Index, source: MaskFolders | MaskTable
) -> str:
    facts = {
        "geometry": [dataset.image_size, dataset.fit, _RULE],
        "masks": [settings.structures, settings.min_mask_quality, source.stamps()],
        "images": index.names.tolist(),
    }
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    return f"{index.dataset}-masks-{dataset.image_size}-{dataset.fit}-{digest[:16]}"


def _make(place: Path, source: MaskFolders | MaskTable, images: int, size: int, fit: Fit) -> None:
    """Decode every mask into a folder that is renamed when complete; the caller holds the lock."""
    for leftover in place.parent.glob(f".{place.name}.partial-*"):
        shutil.rmtree(leftover)
    shutil.rmtree(place, ignore_errors=True)
    partial = place.with_name(f".{place.name}.partial-{os.getpid()}")
    partial.mkdir()
    shape = (images, len(source.structures), (size * size + 7) // 8)
    _require_space(place.parent, int(np.prod(shape)))
    bits = np.memmap(partial / _BITS, np.uint8, "w+", shape=shape)
    known = np.zeros(shape[:2], np.bool_)
    for found in source.read():
        _write(bits, known, found, size, fit)
    bits.flush()
    digest = _digest(source.structures, size, bits, known)
    del bits
    np.savez(partial / _STATE, known=known, digest=np.array(digest))
    partial.rename(place)


def _write(bits: npt.NDArray[np.uint8], known: npt.NDArray[np.bool_], found: Found, size: int, fit: Fit) -> None:
    bits[found.row, found.structure] = np.packbits(resize(found.mask, size, fit))
    known[found.row, found.structure] = True


def _load(place: Path, structures: tuple[str, ...], size: int, images: int) -> MaskCache | None:
    """The masks at a place; None where there are none, or where they are damaged."""
    if not place.is_dir():
        return None
    try:
        with np.load(place / _STATE) as state:
            known, stated = state["known"], str(state["digest"])
        bits = np.memmap(place / _BITS, np.uint8, "r", shape=(images, len(structures), (size * size + 7) // 8))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        _log.warning("%s: damaged (%s); decoding anew", place, error)
        return None
    if _digest(structures, size, bits, known) != stated:
        _log.warning("%s: masks do not fit their digest; decoding anew", place)
        return None
    return MaskCache(structures, size, bits, known, stated)


def _digest(structures: tuple[str, ...], size: int, bits: npt.NDArray[np.uint8], known: npt.NDArray[np.bool_]) -> str:
    h = hashlib.sha256(json.dumps([structures, size, list(bits.shape)]).encode())
    for part in _parts(np.arange(len(bits))):
        h.update(np.ascontiguousarray(bits[part]).data)
    h.update(known.tobytes())
    return h.hexdigest()


def _parts(rows: npt.NDArray[np.intp]) -> Iterator[npt.NDArray[np.intp]]:
    return (rows[start : start + _AT_ONCE] for start in range(0, len(rows), _AT_ONCE))


def _require_space(folder: Path, wanted: int) -> None:
    free = shutil.disk_usage(folder).free
    if wanted > free:
        raise DataError(
            f"{folder}: masks need {wanted / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; make room, choose another "
            "--storage, or a smaller dataset.image_size"
        )
