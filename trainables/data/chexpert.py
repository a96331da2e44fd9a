"""CheXpert v1.0 and v1.0-small: `train.csv`, `valid.csv`, and images at the paths they give.

The root is the folder that holds `train.csv`, or the one around it. Paths begin with that folder's name as distributed
(`CheXpert-v1.0-small/train/patient00001/…`), which users rename: what comes before `train/` or `valid/` is not looked
at. A label is 1, 0, −1 (uncertain) or blank; blank is no mention and counts as absent.

`dataset.split=grouped` splits train.csv by patient; `official` takes valid.csv, which radiologists labelled, as test.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from trainables.data.adapter import Adapter, DatasetInfo, Table
from trainables.data.index import CHEST_RADIOGRAPHS, SPLITS, UNLABELLED, DataError
from trainables.data.tables import RowError, Rows, read_rows, root_of, texts
from trainables.settings import DatasetSettings

CLASSES = (
    "No Finding",
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Opacity",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
)
VIEW = "Frontal/Lateral"
TRAIN, VALID = "train.csv", "valid.csv"
_UNCERTAIN = -1
_AS = {"ones": 1, "zeros": 0, "ignore": UNLABELLED}  # what an uncertain label becomes
_VALUES = {"": 0, "0": 0, "0.0": 0, "1": 1, "1.0": 1, "-1": _UNCERTAIN, "-1.0": _UNCERTAIN}
_PATH = re.compile(r"(?:.*/)?((?:train|valid)/(?:.*/)?(patient\d+)/.+)")

_Row = tuple[str, str, bool, tuple[int, ...]]  # name, patient, frontal, values


def read_table(settings: DatasetSettings) -> Table:
    """Read train.csv, and for the official split valid.csv too.

    Raises:
        DataError: no table, or a missing column.
    """
    root = root_of(INFO.name, settings.root)
    folder = table_folder(root)
    official = settings.split == "official"
    parts = [_read(folder / TRAIN), *([_read(folder / VALID)] if official else [])]
    rows = [row for part in parts for row in part.rows]
    marks = np.repeat([SPLITS.index("train"), SPLITS.index("test")][: len(parts)], [len(part.rows) for part in parts])
    values = np.array([row[3] for row in rows], np.int8).reshape(len(rows), len(CLASSES))
    table = Table(
        names=texts([row[0] for row in rows]),
        groups=texts([row[1] for row in rows]),
        labels=np.where(values == _UNCERTAIN, np.int8(_AS[settings.uncertain]), values),
        official=marks.astype(np.uint8) if official else None,
        strata=(values == 1).astype(np.int8),  # the same split under every policy
        info=replace(INFO, notes=(*INFO.notes, *_notes(settings))),
        refused=tuple(refused for part in parts for refused in part.refused),
        warnings=_aside(folder, official),
    )
    return table.take(_of_views(settings, rows))


def table_folder(root: Path) -> Path:
    """The folder that holds train.csv: the root, or the only one in it that does.

    Raises:
        DataError: there is none, or there are several.
    """
    if (root / TRAIN).is_file():
        return root
    found = sorted(path.parent for path in root.glob(f"*/{TRAIN}"))
    if len(found) == 1:
        return found[0]
    problem = f"no {TRAIN}" if not found else f"several {TRAIN}, in {' and '.join(path.name for path in found)}"
    raise DataError(f"{INFO.name}: {problem} in {root}; give the folder that holds {TRAIN}, train/ and valid/")


def _read(path: Path) -> Rows[_Row]:
    if not path.is_file():
        raise DataError(f"{path} does not exist: the official split needs it; or set dataset.split=grouped")
    columns = {"path": ["Path"], "view": [VIEW], **{name: [name] for name in CLASSES}}
    return read_rows(path, columns, _parse).without_repeats(lambda row: row[0])


def _parse(fields: list[str]) -> _Row:
    path, view, *values = fields
    place = _PATH.fullmatch(path)
    if place is None:
        raise RowError(f"Path {path!r}; expected one such as train/patient00001/study1/view1_frontal.jpg")
    if view not in ("Frontal", "Lateral"):
        raise RowError(f"{VIEW} {view!r}; expected Frontal or Lateral")
    unknown = [f"{name} {value!r}" for name, value in zip(CLASSES, values, strict=True) if value not in _VALUES]
    if unknown:
        raise RowError(f"{', '.join(unknown)}; expected 1, 0, -1 or nothing")
    return place[1], place[2], view == "Frontal", tuple(_VALUES[value] for value in values)


def _of_views(settings: DatasetSettings, rows: list[_Row]) -> npt.NDArray[np.intp]:
    return np.flatnonzero([settings.views == "all" or frontal for _, _, frontal, _ in rows])


def _notes(settings: DatasetSettings) -> tuple[str, ...]:
    meaning = {"ones": "present (U-Ones)", "zeros": "absent (U-Zeros)", "ignore": "unlabelled (U-Ignore)"}
    notes = [f"Uncertain labels count as {meaning[settings.uncertain]}, blank ones as absent."]
    if settings.views == "frontal":
        notes.append("Frontal images only.")
    if settings.split == "official":
        notes.append("The test split is the official valid.csv, labelled by radiologists; val is held out of train.")
    return tuple(notes)


def _aside(folder: Path, official: bool) -> tuple[str, ...]:
    if official or not (folder / VALID).is_file():
        return ()
    return (f"{VALID} is left aside: it is the test split of dataset.split=official",)


def image_folders(root: Path) -> list[Path]:
    """The folder of the tables, under which their paths lie."""
    return [table_folder(root)]


INFO = DatasetInfo(
    name="chexpert",
    title="CheXpert",
    classes=CLASSES,
    group_kind="patient",
    single_label=False,
    channels=1,
    synthetic=False,
    licence="Stanford University Dataset Research Use Agreement",
    notes=(
        "Labels were mined from radiology reports.",
        "RAD-DINO was pretrained on images of CheXpert: test images may have been seen unlabelled.",
    ),
    claims=CHEST_RADIOGRAPHS,
)
ADAPTER = Adapter(INFO, read_table, image_folders, options=frozenset({"uncertain", "views"}))
