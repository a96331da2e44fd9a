"""Every image of a data set opened once: what cannot be read, what is not what it claims, what is there twice."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from trainables.data.decode import UNREADABLE, decode_whole
from trainables.data.dicom import WrongImageError
from trainables.data.index import DataError, Index, Refused


@dataclass(frozen=True)
class Survey:
    """What was found in the files.

    Attributes:
        unreadable: images that cannot be decoded.
        wrong: images that are not what the data set claims: of another modality or body part.
        duplicates: rows of the index whose pixels are the same, each set ascending, two rows at least.
    """

    unreadable: tuple[Refused, ...]
    wrong: tuple[Refused, ...]
    duplicates: tuple[tuple[int, ...], ...]


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

    def look(row: int) -> str | Refused | WrongImageError | None:
        path = paths[row]
        if path is None:
            return None
        try:
            image = decode_whole(path, index.channels, index.claims)
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
    )
