"""NIH ChestX-ray14: table, official lists and image folders, with the variants that lie on users' disks.

Read from `Data_Entry_2017_v2020.csv` (or the older `Data_Entry_2017.csv`, or Kaggle's `sample_labels.csv`); images
flat in `images/` or in `images_001/images` … `images_012/images`. Patient ids may be zero-padded and ages written
`060Y` (ages are not read). The header's bracketed names hold unquoted commas, so that `OriginalImage[Width` and
`Height]` are two fields: only the columns named here are looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from trainables.data.adapter import Adapter, DatasetInfo, Table
from trainables.data.boxes import Boxes, box_fault
from trainables.data.index import CHEST_RADIOGRAPHS, SPLITS, DataError
from trainables.data.tables import RowError, find_file, multi_hot, read_rows, root_of, texts
from trainables.settings import DatasetSettings

CLASSES = (
    "Atelectasis",
    "Cardiomegaly",
    "Effusion",
    "Infiltration",
    "Mass",
    "Nodule",
    "Pneumonia",
    "Pneumothorax",
    "Consolidation",
    "Edema",
    "Emphysema",
    "Fibrosis",
    "Pleural_Thickening",
    "Hernia",
)
NO_FINDING = "No Finding"
TABLE_FILES = ("Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv", "sample_labels.csv")
HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)
BOXES_FILE = "BBox_List_2017.csv"
BOXES_HEADER = "Image Index,Finding Label,Bbox [x,y,w,h],,,"
BOX_SPELLING = {"Infiltration": "Infiltrate"}  # class → its name in the list of boxes
_BOX_COLUMNS = ("Bbox [x", "y", "w", "h]")
ORIGINAL_SIZE = 1024  # px: boxes are of the originals, whatever the size of the copies
OFFICIAL_LISTS = {"train": "train_val_list.txt", "test": "test_list.txt"}


def read_table(settings: DatasetSettings) -> Table:
    """Read the table under `settings.root`, with the official lists if `settings.split` asks for them.

    Raises:
        DataError: no table, a missing column, or lists that do not cover the table.
    """
    root = root_of(INFO.name, settings.root)
    path = find_file(INFO.name, root, TABLE_FILES)
    columns = {"image": ["Image Index"], "findings": ["Finding Labels"], "patient": ["Patient ID"]}
    known: dict[str, tuple[str, ...]] = {}

    def parse(values: list[str]) -> tuple[str, str, tuple[str, ...]]:
        name, text, patient = values
        if text not in known:
            known[text] = _parse_findings(text)
        return _checked_name(name), _patient(patient), known[text]

    read = read_rows(path, columns, parse).without_repeats(lambda row: row[0])
    names = [name for name, _, _ in read.rows]
    official = _official(root, path, names) if settings.split == "official" else None
    table = to_table(names, [patient for _, patient, _ in read.rows], [found for _, _, found in read.rows], official)
    return replace(table, refused=tuple(read.refused))


def to_table(
    names: Sequence[str],
    patients: Sequence[str],
    findings: Sequence[Sequence[str]],
    official: npt.NDArray[np.uint8] | None = None,
) -> Table:
    """Build the table from columns; `findings` holds the names of each image's findings, out of `CLASSES`."""
    return Table(texts(names), texts(patients), multi_hot(findings, CLASSES), official)


def _checked_name(name: str) -> str:
    if not name:
        raise RowError("no image name; expected one such as 00000001_000.png")
    return name


def _patient(text: str) -> str:
    """Patient id without leading zeros: copies differ in the padding of one patient's id."""
    if not (text.isascii() and text.isdigit()):
        raise RowError(f"Patient ID {text!r}; expected a number")
    return text.lstrip("0") or "0"


def _parse_findings(text: str) -> tuple[str, ...]:
    """Split `A|B`; `No Finding` alone is none."""
    if text == NO_FINDING:
        return ()
    found = tuple(text.split("|"))
    unknown = [finding for finding in found if finding not in CLASSES]
    if unknown:
        raise RowError(
            f"Finding Labels {text!r} names {', '.join(map(repr, unknown))}; "
            f"expected {NO_FINDING!r} alone or some of {', '.join(CLASSES)}, joined by |"
        )
    return found


def _official(root: Path, table: Path, names: Sequence[str]) -> npt.NDArray[np.uint8]:
    """Positions in SPLITS by the distributed lists; what is in train_val_list.txt counts as train."""
    listed: dict[str, str] = {}
    for split, file in OFFICIAL_LISTS.items():
        if not (root / file).is_file():
            raise DataError(f"{root / file} does not exist: the official split needs it; or set dataset.split=grouped")
        for name in _words(root / file):
            if listed.setdefault(name, split) != split:
                raise DataError(f"{root / file}: {name} is in {OFFICIAL_LISTS[listed[name]]} too; expected one of them")
    missing = [name for name in names if name not in listed]
    if missing:
        raise DataError(
            f"{table}: {len(missing)} of {len(names)} images are in neither {' nor '.join(OFFICIAL_LISTS.values())}, "
            f"the first is {missing[0]}; complete the lists or set dataset.split=grouped"
        )
    return np.array([SPLITS.index(listed[name]) for name in names], np.uint8)


def _words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").split()
    except (OSError, UnicodeError) as error:
        raise DataError(f"{path}: cannot be read as a list of names in UTF-8: {error}") from error


def read_boxes(settings: DatasetSettings) -> Boxes | None:
    """Boxes of `BBox_List_2017.csv`: 984 on 880 images, in pixels of the 1024 px originals; None without the file.

    Raises:
        DataError: the file lacks a column.
    """
    path = root_of(INFO.name, settings.root) / BOXES_FILE
    if not path.is_file():
        return None
    columns = {"image": ["Image Index"], "finding": ["Finding Label"], **{name: [name] for name in _BOX_COLUMNS}}
    read = read_rows(path, columns, _parse_box)
    return Boxes(
        CLASSES,
        texts([name for name, _, _ in read.rows]),
        np.array([CLASSES.index(finding) for _, finding, _ in read.rows], np.int64),
        np.array([corners for _, _, corners in read.rows], np.float64).reshape(-1, 4),
        np.full(len(read.rows), ""),
        {},
        np.ones(len(read.rows)),
        {name: (ORIGINAL_SIZE, ORIGINAL_SIZE) for name, _, _ in read.rows},
        tuple(read.refused),
        looked_at=frozenset(name for name, _, _ in read.rows),
    )


def _parse_box(values: list[str]) -> tuple[str, str, tuple[float, float, float, float]]:
    name, finding, *numbers = values
    spelt = {spelling: finding for finding, spelling in BOX_SPELLING.items()}
    if spelt.get(finding, finding) not in CLASSES:
        raise RowError(f"Finding Label {finding!r}; expected one of {', '.join(CLASSES)}")
    try:
        x, y, width, height = (float(number) for number in numbers)
    except ValueError:
        raise RowError(f"box {', '.join(numbers)!r}; expected x, y, w, h as numbers") from None
    corners = (x, y, x + width, y + height)
    fault = box_fault(corners, (ORIGINAL_SIZE, ORIGINAL_SIZE))
    if fault is not None:
        raise RowError(fault)
    return _checked_name(name), spelt.get(finding, finding), corners


def image_folders(root: Path) -> list[Path]:
    """`images`, then `images_001/images` … (or `images_001` itself), as far as they exist."""
    flat = [root / "images"]
    numbered = sorted(root.glob("images_[0-9][0-9][0-9]"))
    nested = [part / "images" if (part / "images").is_dir() else part for part in numbered]
    return [folder for folder in flat + nested if folder.is_dir()]


INFO = DatasetInfo(
    name="chestxray14",
    title="NIH ChestX-ray14",
    classes=CLASSES,
    group_kind="patient",
    single_label=False,
    channels=1,
    synthetic=False,
    licence="NIH Clinical Center: free use with attribution",
    notes=(
        "Labels were mined from radiology reports.",
        "RAD-DINO was pretrained on images of ChestX-ray14: test images may have been seen unlabelled.",
    ),
    claims=CHEST_RADIOGRAPHS,
)
ADAPTER = Adapter(INFO, read_table, image_folders, read_boxes=read_boxes)
