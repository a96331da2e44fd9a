"""Every image of a data set opened once: what cannot be read, what is not what it claims, what is there twice."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from trainables.data.boxes import Boxes, box_fault
from trainables.data.decode import UNREADABLE, decode_whole, holds_dicom
from trainables.data.dicom import WrongImageError, claimed
from trainables.data.index import DataError, Index, Refused
from trainables.data.masks import Masks, aspect_fault, rows_by_stem, stem_of


@dataclass(frozen=True)
class Survey:
    """What was found in the files.

    Attributes:
        unreadable: images that cannot be decoded.
        wrong: images that are not what the data set claims: of another modality or body part.
        duplicates: rows of the index whose pixels are the same, each set ascending, two rows at least.
        sizes: (N, 2) width and height, px; 0 where an image is missing or unreadable.
        claimed: (modality, body part) that DICOM files say of themselves → how many; of data sets that claim neither.
    """

    unreadable: tuple[Refused, ...]
    wrong: tuple[Refused, ...]
    duplicates: tuple[tuple[int, ...], ...]
    sizes: npt.NDArray[np.int64]
    claimed: Mapping[tuple[str, str], int]


def survey_images(
    index: Index, paths: Sequence[Path | None], workers: int = 1, seen: Callable[[], None] = lambda: None
) -> Survey:
    """Decode every image at full size, and compare them by their pixels: another compression is no other image.

    Args:
        index: whose images.
        paths: their files, None for those that are missing.
        workers: threads that decode.
        seen: called after each image.

    Raises:
        DataError: a library that some image needs is not installed.
    """
    sizes = np.zeros((len(index), 2), np.int64)
    said: list[tuple[str, str]] = []

    def look(row: int) -> str | Refused | WrongImageError | None:
        path = paths[row]
        if path is None:
            return None
        try:
            image = decode_whole(path, index.channels, index.claims)
            sizes[row] = image.size
            if index.claims is None and holds_dicom(path):
                said.append(claimed(path))
            return hashlib.sha256(f"{image.size} ".encode() + image.tobytes()).hexdigest()
        except (DataError, WrongImageError) as error:
            if isinstance(error, DataError):
                raise
            return error
        except UNREADABLE as error:
            return Refused(str(path), f"{type(error).__name__}: {error}")

    found: list[str | Refused | WrongImageError | None] = []
    with ThreadPoolExecutor(max(1, workers)) as pool:
        for result in pool.map(look, range(len(index))):
            found.append(result)
            seen()
    rows_of: dict[str, list[int]] = {}
    for row, result in enumerate(found):
        if isinstance(result, str):
            rows_of.setdefault(result, []).append(row)
    return Survey(
        tuple(result for result in found if isinstance(result, Refused)),
        tuple(Refused(str(paths[row]), str(r)) for row, r in enumerate(found) if isinstance(r, WrongImageError)),
        tuple(tuple(rows) for rows in rows_of.values() if len(rows) > 1),
        sizes,
        Counter(said),
    )


def survey_boxes(index: Index, boxes: Boxes, sizes: npt.NDArray[np.int64]) -> list[Refused]:
    """Boxes that do not go with the images that were found.

    Args:
        index: whose images.
        boxes: as their file gives them.
        sizes: (N, 2) as in `Survey`.

    Returns:
        Each box that reaches out of its image, where no file tells the image's size; and each image of other
        proportions than the file of boxes says, since boxes are scaled with their image.
    """
    size_of = {name: (int(w), int(h)) for name, (w, h) in zip(index.names.tolist(), sizes.tolist(), strict=True) if w}
    found: dict[Refused, None] = {}
    for name, corners in zip(boxes.names.tolist(), boxes.corners.tolist(), strict=True):
        size, stated = size_of.get(name), boxes.sizes.get(name)
        if size is None:
            continue
        fault = box_fault(corners, size) if stated is None else _other_proportions(size, stated)
        if fault is not None:
            found[Refused(f"image {name}", fault)] = None
    return list(found)


def _other_proportions(size: tuple[int, int], stated: tuple[int, int]) -> str | None:
    if aspect_fault(stated[::-1], size) is None:
        return None
    return f"is {size[0]} × {size[1]} px, its boxes are of an image of {stated[0]} × {stated[1]} px"


def survey_masks(index: Index, masks: Masks, sizes: npt.NDArray[np.int64], workers: int = 1) -> list[Refused]:
    """Masks of the index's images that cannot be read, or do not show what their image shows.

    Args:
        index: whose images.
        masks: of the data set.
        sizes: (N, 2) as in `Survey`.
        workers: threads that decode.
    """
    rows = rows_by_stem(index)

    def look(name: str) -> Refused | None:
        width, height = sizes[rows[stem_of(name)]].tolist()
        try:
            fault = aspect_fault(masks.read(name).shape[1:], (width, height)) if width else None
        except DataError as error:
            return Refused(f"masks of {name}", str(error))
        return None if fault is None else Refused(f"masks of {name}", fault)

    with ThreadPoolExecutor(max(1, workers)) as pool:
        looked = pool.map(look, [name for name in masks.names if stem_of(name) in rows])
        return [fault for fault in looked if fault is not None]
