"""Where masks of anatomical structures lie and how they are read: folders of images, or the table of CheXmask.

Two layouts: `masks/STRUCTURE/NAME.png` beside `images/` (JSRT as it is commonly distributed, and the phantoms), and
CheXmask's CSV of run-length codes for the data sets that it annotates. Left and right are the patient's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from trainables.data.decode import size_of
from trainables.data.index import DataError, Index
from trainables.data.masks import (
    CHEXMASK_STRUCTURES,
    Mask,
    aspect_fault,
    by_stem,
    read_chexmask,
    read_mask,
    rows_by_stem,
    stem_of,
)
from trainables.data.registry import locate

FOLDER = "masks"
TABLE_COLUMNS = {"left_lung": "Left Lung", "right_lung": "Right Lung", "heart": "Heart"}


@dataclass(frozen=True)
class Found:
    """A mask as read, in its own pixels.

    Attributes:
        row, structure: position in the index, and among the structures.
        mask: (height, width).
    """

    row: int
    structure: int
    mask: Mask


@dataclass(frozen=True)
class MaskFolders:
    """`masks/STRUCTURE/NAME.png` under a data set's folder; every image has every mask."""

    index: Index
    root: Path
    structures: tuple[str, ...]

    @cached_property
    def files(self) -> list[list[Path]]:
        """(N, C) paths.

        Raises:
            DataError: a structure without a folder, or images without a mask: how many, and the first.
        """
        columns = [self._column(structure) for structure in self.structures]
        return [list(row) for row in zip(*columns, strict=True)]

    def _column(self, structure: str) -> list[Path]:
        folder = self.root / FOLDER / structure
        if not folder.is_dir():
            present = sorted(f.name for f in (self.root / FOLDER).glob("*") if f.is_dir())
            raise DataError(
                f"{self.index.dataset}: no masks of {structure!r}: expected {folder} with a file an image"
                f"{'; there are ' + ', '.join(present) if present else ''}; choose with segmentation.structures, or "
                "name a table of run-length codes with segmentation.masks"
            )
        files, rows = by_stem(folder), rows_by_stem(self.index)
        found = [files.get(stem) for stem in rows]
        missing = [name for name, file in zip(self.index.names.tolist(), found, strict=True) if file is None]
        if missing:
            raise DataError(
                f"{self.index.dataset}: {len(missing)} of {len(found)} images have no mask in {folder}; the first is "
                f"{missing[0]}. Complete the download"
            )
        return [file for file in found if file is not None]

    def stamps(self) -> list[tuple[str, int, int]]:
        """Name, size and time of change of every file."""
        files = (file for row in self.files for file in row)
        return [(file.name, s.st_size, s.st_mtime_ns) for file in files for s in (file.stat(),)]

    def read(self) -> Iterator[Found]:
        """Every mask, image by image.

        Raises:
            DataError: an unreadable file, or a mask that does not go with its image; names the file.
        """
        images = locate(self.index, self.root)
        for row, files in enumerate(self.files):
            for structure, file in enumerate(files):
                mask = read_mask(file)
                _check_aspect(file.as_posix(), images[row], mask.shape)
                yield Found(row, structure, mask)


@dataclass(frozen=True)
class MaskTable:
    """CheXmask's table: a row an image, a run-length code a structure, and an estimate of the masks' quality.

    An image that the table does not have, or whose quality is below `min_quality`, has no usable mask: such masks are
    made by a model, and CheXmask's authors advise to leave out what reverse classification accuracy finds poor.
    """

    index: Index
    root: Path
    structures: tuple[str, ...]
    path: Path
    min_quality: float

    def stamps(self) -> list[tuple[str, int, int]]:
        """Name, size and time of change of the table.

        Raises:
            DataError: there is none.
        """
        if not self.path.is_file():
            raise DataError(f"segmentation.masks: no table {self.path}; expected CheXmask's CSV of this data set")
        stat = self.path.stat()
        return [(self.path.name, stat.st_size, stat.st_mtime_ns)]

    def read(self) -> Iterator[Found]:
        """Every mask of an image of the index, in the table's order.

        Raises:
            DataError: a broken row (with its line), a mask that does not go with its image, or no image of the index.
        """
        wanted = rows_by_stem(self.index)
        images = locate(self.index, self.root)
        planes = [CHEXMASK_STRUCTURES.index(self._column(name)) for name in self.structures]
        masks = read_chexmask(self.path, self.min_quality)
        for name in masks.names:
            if (row := wanted.get(stem_of(name))) is not None:
                drawn = masks.read(name)
                _check_aspect(f"{self.path}, image {name}", images[row], drawn.shape[1:])
                for structure, plane in enumerate(planes):
                    yield Found(row, structure, drawn[plane])
        if not wanted.keys() & {stem_of(name) for name in (*masks.names, *masks.left_out)}:
            raise DataError(
                f"{self.path}: has none of the {len(wanted)} images of {self.index.dataset}, such as "
                f"{self.index.names[0]}; expected the table of this data set"
            )

    def _column(self, structure: str) -> str:
        if structure not in TABLE_COLUMNS:
            raise DataError(
                f"segmentation.structures: CheXmask has no {structure!r}; it has {', '.join(TABLE_COLUMNS)}"
            )
        return TABLE_COLUMNS[structure]


def mask_source(
    index: Index, root: Path, structures: Sequence[str], *, table: str | None, min_quality: float
) -> MaskFolders | MaskTable:
    """The masks of an index: folders under `root`, or the CheXmask table `table` (absolute, or relative to root)."""
    if table is None:
        return MaskFolders(index, root, tuple(structures))
    return MaskTable(index, root, tuple(structures), root / Path(table).expanduser(), min_quality)


def _check_aspect(at: str, image: Path, shape: tuple[int, ...]) -> None:
    fault = aspect_fault(shape, size_of(image))
    if fault is not None:
        raise DataError(
            f"{at}: {fault}, {image.name}; expected the same proportions (of CheXmask: OriginalResolution, not "
            "Preprocessed)"
        )
