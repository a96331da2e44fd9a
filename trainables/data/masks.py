"""Masks of structures, read one image at a time, and CheXmask's run-length encoding.

A data set's masks are found when a task asks for them (`registry.read_masks`), and decoded when an image is asked for:
18,000 images of three structures would be hundreds of gigabytes.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from threading import Lock

import numpy as np
import numpy.typing as npt

from trainables.data.files import IMAGE_SUFFIXES
from trainables.data.index import DataError, Index

Mask = npt.NDArray[np.bool_]

CHEXMASK_STRUCTURES = ("Left Lung", "Right Lung", "Heart")
CHEXMASK_QUALITY = 0.7  # Dice RCA (Mean) from which its authors trust a mask
_QUALITY = "Dice RCA (Mean)"
_IMAGE = ("image_id", "Image Index", "Path", "dicom_id")  # each data set's table names its images in its own way
_COLUMNS = (_QUALITY, *CHEXMASK_STRUCTURES, "Height", "Width")
_ASPECT = 0.01  # relative difference of height : width that rounding explains
_LARGEST_MASK = 2**28  # pixels
_LARGEST_FIELD = 2**24  # characters of one run-length encoding; the csv module allows 2^17 by itself


@dataclass(frozen=True, eq=False)
class Masks:
    """The masks of a data set.

    Attributes:
        structures: names, in the order of the masks' first axis.
        names: images that have masks, as the table names them.
        read: image name → (S, H, W) bool, at the size of the mask's file.
        left_out: image → why its masks are not used.
    """

    structures: tuple[str, ...]
    names: tuple[str, ...]
    read: Callable[[str], Mask]
    left_out: Mapping[str, str]


def read_mask(path: Path) -> Mask:
    """(height, width) of an image file: inside is what is at least half as bright as its brightest pixel.

    So 0/1, 0/255 and antialiased masks are read alike, and an all-black one is empty.

    Raises:
        DataError: the file cannot be decoded.
    """
    from PIL import Image  # a plan reads tables, and needs no images

    from trainables.data.decode import FORMATS

    try:
        with Image.open(path, formats=FORMATS) as image:
            grey = np.asarray(image.convert("L"))
    except Exception as error:  # what damage makes of a header may raise anything
        raise DataError(
            f"{path}: the mask cannot be read ({type(error).__name__}: {error}); replace the file"
        ) from error
    inside: Mask = (grey > 0) & (2 * grey.astype(np.int32) >= int(grey.max()))
    return inside


def stem_of(name: str) -> str:
    """File name without folders and extension, by which an image and its masks find each other."""
    path = PurePosixPath(name)
    return path.stem if path.suffix.lower() in IMAGE_SUFFIXES else path.name


def rows_by_stem(index: Index) -> dict[str, int]:
    """Name of an image without folders and extension → its row, in the index's order.

    Raises:
        DataError: two images have the same one, so that it cannot be told whose a mask is.
    """
    names = index.names.tolist()
    rows = {stem_of(name): row for row, name in enumerate(names)}
    if len(rows) < len(names):
        stem, count = Counter(map(stem_of, names)).most_common(1)[0]
        first = next(name for name in names if stem_of(name) == stem)
        raise DataError(
            f"{index.dataset}: {count} images are called {stem}, such as {first}: masks find their images by names "
            "without folders and extensions; rename the images and their masks, so that each name is there once"
        )
    return rows


def by_stem(folder: Path) -> dict[str, Path]:
    """Image files of a folder by name without extension, by which an image and its masks find each other."""
    return {path.stem: path for path in sorted(folder.iterdir()) if path.name.lower().endswith(IMAGE_SUFFIXES)}


def aspect_fault(mask: tuple[int, ...], image: tuple[int, int]) -> str | None:
    """Why a mask of (height, width) does not go with an image of (width, height), px; None where it does.

    A mask is scaled with its image, so both must show the same field: padded, cropped or turned ones do not.
    """
    width, height = image
    if abs(height * mask[1] - width * mask[0]) <= _ASPECT * width * mask[0]:
        return None
    return f"a mask of {mask[0]} × {mask[1]} px (height × width) does not go with an image of {height} × {width}"


def run_lengths(text: str, height: int, width: int) -> Mask:
    """(H, W) mask of `start length start length …`, starts counted from 1, row by row.

    Raises:
        ValueError: an odd number of values, a value that is no number, or runs that overlap or leave the
            image.
    """
    if not 0 < height * width <= _LARGEST_MASK:
        raise ValueError(f"{height} × {width} pixels; expected an image of at most {_LARGEST_MASK:,}")
    values = np.array(text.split(), dtype=np.int64)
    if values.size % 2:
        raise ValueError(f"{values.size} numbers; expected pairs of start and length")
    starts, lengths = values[::2] - 1, values[1::2]
    if values.size and (starts.min() < 0 or lengths.min() < 1 or (starts + lengths).max() > height * width):
        raise ValueError(f"a run leaves the image of {height} × {width} pixels")
    if (starts[1:] < (starts + lengths)[:-1]).any():
        raise ValueError("runs overlap or are out of order")
    # +1 where a run begins and −1 behind its end: the running sum is above 0 inside of runs.
    steps = np.zeros(height * width + 1, np.int32)
    np.add.at(steps, starts, 1)
    np.add.at(steps, starts + lengths, -1)
    inside: Mask = steps[:-1].cumsum().reshape(height, width) > 0
    return inside


def read_chexmask(path: Path, quality: float = CHEXMASK_QUALITY) -> Masks:
    """CheXmask's table for one data set: masks that a model drew, with its own estimate of their quality.

    The file is gone through once for names, quality and the place of each row; the masks are decoded on demand.

    Args:
        path: such as `OriginalResolution/VinDr-CXR.csv`.
        quality: smallest `Dice RCA (Mean)` of a mask that is used.

    Raises:
        DataError: the file cannot be read, lacks a column, or has a row that cannot be used (with its line).
    """
    try:
        with _long_fields():
            places, left_out, columns = _survey(path, quality)
    except (OSError, UnicodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as CSV in UTF-8: {error}") from error
    return Masks(CHEXMASK_STRUCTURES, tuple(places), _ChexmaskReader(path, places, columns).read, left_out)


def _survey(path: Path, quality: float) -> tuple[dict[str, tuple[int, int]], dict[str, str], dict[str, int]]:
    """Image → (line, offset of its row in bytes), what is left out, and the columns' positions."""
    places: dict[str, tuple[int, int]] = {}
    left_out: dict[str, str] = {}
    with path.open("rb") as file:
        header = next(csv.reader([file.readline().decode("utf-8-sig")]), [])
        columns = {name: position for position, name in enumerate(header)}
        naming = next((name for name in _IMAGE if name in columns), _IMAGE[0])
        absent = [name for name in (naming, *_COLUMNS) if name not in columns]
        if absent:
            raise DataError(
                f"{path}: no column {', '.join(map(repr, absent))}; its header is {', '.join(header)[:300]}"
            )
        columns["image"] = columns[naming]
        line, offset = 2, file.tell()
        while raw := file.readline():
            fields = next(csv.reader([raw.decode()]), [])
            if fields:
                image, told = _of_row(path, line, fields, columns)
                if image in places or image in left_out:
                    raise DataError(f"{path}, line {line}: image {image} is listed already; remove one")
                if told >= quality:
                    places[image] = line, offset
                else:
                    left_out[image] = f"Dice RCA (Mean) is {told:.2f}, below {quality:.2f}"
            line, offset = line + 1, file.tell()
    return places, left_out, columns


def _of_row(path: Path, line: int, fields: list[str], columns: Mapping[str, int]) -> tuple[str, float]:
    try:
        image, told = fields[columns["image"]], float(fields[columns[_QUALITY]])
    except (IndexError, ValueError) as error:
        raise DataError(
            f"{path}, line {line}: {error}; expected {len(columns) - 1} fields, quality a number"
        ) from error
    if not image:
        raise DataError(f"{path}, line {line}: no image")
    return image, told


@dataclass(frozen=True)
class _ChexmaskReader:
    path: Path
    places: Mapping[str, tuple[int, int]]
    columns: Mapping[str, int]

    def read(self, name: str) -> Mask:
        """(3, H, W) masks of an image.

        Raises:
            DataError: no mask of that name, or one that cannot be decoded (with its line).
        """
        if name not in self.places:
            raise DataError(f"{self.path}: no masks of image {name} of the quality asked for")
        line, offset = self.places[name]
        with self.path.open("rb") as file:
            file.seek(offset)
            raw = file.readline().decode()
        try:
            with _long_fields():
                fields = next(csv.reader([raw]))
            height, width = (int(float(fields[self.columns[side]])) for side in ("Height", "Width"))
            masks = [run_lengths(fields[self.columns[s]], height, width) for s in CHEXMASK_STRUCTURES]
        except (IndexError, ValueError, OverflowError, csv.Error) as error:
            raise DataError(f"{self.path}, line {line}: masks of image {name}: {error}") from error
        return np.stack(masks)


_LIMIT = Lock()


@contextmanager
def _long_fields() -> Iterator[None]:
    """Let csv read codes that are longer than it would by itself; it has one limit for all threads of a process."""
    with _LIMIT:
        previous = csv.field_size_limit(_LARGEST_FIELD)
        try:
            yield
        finally:
            csv.field_size_limit(previous)
