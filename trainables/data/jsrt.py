"""JSRT with SCR's expert masks, as folders: `images/NAME.png` and `masks/STRUCTURE/NAME.png` (see `masks.read_mask`).

Any data set in this layout is read. The image label of JSRT is in its names: JPCLN… has a nodule, JPCNN… has none; a
name of another form is unlabelled. Every image is of another patient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trainables.data.adapter import Adapter, DatasetInfo, Table
from trainables.data.index import CHEST_RADIOGRAPHS, UNLABELLED, DataError, Refused
from trainables.data.masks import Mask, Masks, by_stem, read_mask
from trainables.data.tables import root_of, texts
from trainables.settings import DatasetSettings

CLASSES = ("Nodule",)
_LABELS = {"JPCLN": 1, "JPCNN": 0}


def read_table(settings: DatasetSettings) -> Table:
    """A row an image of `images/`; images without a mask of every structure are refused.

    Raises:
        DataError: no folder of images or masks, or an official split asked for.
    """
    if settings.split == "official":
        raise DataError(f"{INFO.name}: there is no official split; set dataset.split=grouped")
    root = root_of(INFO.name, settings.root)
    names = _files(root / "images")
    refused = []
    complete = set(names)
    for structure in structures(root):
        lacking = sorted(names.keys() - _files(root / "masks" / structure).keys())
        refused += [Refused(str(names[name]), f"no mask of {structure}") for name in lacking]
        complete -= set(lacking)
    kept = [name for name in names if name in complete]
    labels = np.array([[_LABELS.get(name[:5].upper(), UNLABELLED)] for name in kept], np.int8).reshape(-1, 1)
    return Table(texts(kept), texts(kept), labels, refused=tuple(refused))


def structures(root: Path) -> tuple[str, ...]:
    """Names of the folders in `masks/`, in alphabetical order.

    Raises:
        DataError: there are none.
    """
    folder = root / "masks"
    found = tuple(sorted(path.name for path in folder.iterdir() if path.is_dir())) if folder.is_dir() else ()
    if not found:
        raise DataError(f"{INFO.name}: no folder masks/STRUCTURE in {root}; expected images/NAME.png beside them")
    return found


def read_masks(settings: DatasetSettings) -> Masks:
    """Masks of every structure.

    Raises:
        DataError: as `read_table`.
    """
    root = root_of(INFO.name, settings.root)
    found = structures(root)
    files = tuple(_files(root / "masks" / structure) for structure in found)
    return Masks(found, tuple(read_table(settings).names.tolist()), _Reader(root / "masks", files).read, {})


@dataclass(frozen=True)
class _Reader:
    folder: Path
    files: tuple[Mapping[str, Path], ...]  # of each structure: name → file

    def read(self, name: str) -> Mask:
        """(S, H, W) masks of an image.

        Raises:
            DataError: a mask cannot be read, or the masks differ in size.
        """
        masks = [read_mask(files[name]) for files in self.files]
        if len({mask.shape for mask in masks}) != 1:
            raise DataError(f"{self.folder}: masks of {name} differ in size; make them those of the image")
        return np.stack(masks)


def _files(folder: Path) -> dict[str, Path]:
    """Name → file."""
    if not folder.is_dir():
        raise DataError(f"{INFO.name}: {folder} is not a folder; expected images/NAME.png and masks/STRUCTURE/NAME.png")
    return by_stem(folder)


def image_folders(root: Path) -> list[Path]:
    """`images`."""
    return [folder for folder in (root / "images",) if folder.is_dir()]


INFO = DatasetInfo(
    name="jsrt",
    title="JSRT with masks of lungs, heart and clavicles",
    classes=CLASSES,
    group_kind="patient",
    single_label=False,
    channels=1,
    synthetic=False,
    licence="research only",
    notes=("The label is the presence of a nodule, by the image's name; masks are drawn by experts (SCR).",),
    claims=CHEST_RADIOGRAPHS,
)
ADAPTER = Adapter(INFO, read_table, image_folders, read_masks=read_masks)
