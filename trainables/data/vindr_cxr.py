"""VinDr-CXR: PhysioNet's 1.0.0 folder (28 image labels), or Kaggle's VinBigData (`train.csv`, 14 local labels).

Each training image was read by three radiologists. A label holds if more than half of an image's readers gave it; on
Kaggle a reader gave the labels of his boxes, or `No finding`. The readers' boxes are fused where a task asks for it
(`boxes.fused`). PhysioNet's test part has one consensus reading.

`dataset.split=grouped` splits the training part by image, since no patient id was released; `official` (PhysioNet
alone) takes the test part as test.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from trainables.data.adapter import Adapter, DatasetInfo, Table
from trainables.data.boxes import Boxes, box_fault
from trainables.data.index import CHEST_RADIOGRAPHS, SPLITS, DataError
from trainables.data.masks import Masks, read_chexmask
from trainables.data.tables import RowError, Rows, multi_hot, read_rows, root_of, texts
from trainables.settings import DatasetSettings

LOCAL = (
    "Aortic enlargement",
    "Atelectasis",
    "Calcification",
    "Cardiomegaly",
    "Clavicle fracture",
    "Consolidation",
    "Edema",
    "Emphysema",
    "Enlarged PA",
    "ILD",
    "Infiltration",
    "Lung Opacity",
    "Lung cavity",
    "Lung cyst",
    "Mediastinal shift",
    "Nodule/Mass",
    "Pleural effusion",
    "Pleural thickening",
    "Pneumothorax",
    "Pulmonary fibrosis",
    "Rib fracture",
    "Other lesion",
)
NO_FINDING = "No finding"
GLOBAL = ("COPD", "Lung tumor", "Pneumonia", "Tuberculosis", "Other diseases", NO_FINDING)
_NOT_ON_KAGGLE = {
    "Clavicle fracture",
    "Edema",
    "Emphysema",
    "Enlarged PA",
    "Lung cavity",
    "Lung cyst",
    "Mediastinal shift",
    "Rib fracture",
}
KAGGLE_LOCAL = tuple(name for name in LOCAL if name not in _NOT_ON_KAGGLE)
SPELLINGS = {"Other diseases": ["Other diseases", "Other disease"]}
_ALL = frozenset(LOCAL + GLOBAL)
KAGGLE_TABLE = "train.csv"
CORNERS = ("x_min", "y_min", "x_max", "y_max")
CHEXMASK_TABLES = ("OriginalResolution/VinDr-CXR.csv", "Preprocessed/VinDr-CXR.csv", "VinDr-CXR.csv")
CONSENSUS = "consensus"  # the reader of PhysioNet's test part


@dataclass(frozen=True)
class _Reading:
    """What one reader said of one image: his labels, or one box of his."""

    image: str
    reader: str
    labels: tuple[str, ...]
    corners: tuple[float, ...] = ()


def read_table(settings: DatasetSettings) -> Table:
    """Read the image labels (PhysioNet) or the boxes' labels (Kaggle), readers fused by majority.

    Raises:
        DataError: neither layout, a missing column, or an official split where there is none.
    """
    folder, kaggle = _layout(settings)
    if kaggle:
        return _kaggle_table(folder)
    parts = ("train", "test") if settings.split == "official" else ("train",)
    tables = [_part_table(folder, part) for part in parts]
    whole = Table(
        names=np.concatenate([table.names for table in tables]),
        groups=np.concatenate([table.groups for table in tables]),
        labels=np.concatenate([table.labels for table in tables]),
        refused=tuple(refused for table in tables for refused in table.refused),
        warnings=tuple(warning for table in tables for warning in table.warnings),
    )
    if settings.split != "official":
        aside = "the test part is left aside: it is the test split of dataset.split=official"
        return replace(whole, warnings=(*whole.warnings, aside))
    marks = np.repeat([SPLITS.index(part) for part in parts], [len(table) for table in tables])
    return replace(whole, official=marks.astype(np.uint8))


def read_boxes(settings: DatasetSettings) -> Boxes | None:
    """Boxes of the images that `read_table` gives, each reader's own (`boxes.fused` makes them one); None without them.

    Raises:
        DataError: a table lacks a column, or one of two is missing.
    """
    folder, kaggle = _layout(settings)
    if kaggle:
        return _drawn([_read_boxes(folder / KAGGLE_TABLE)], KAGGLE_LOCAL)
    parts = ("train", "test") if settings.split == "official" else ("train",)
    paths = {part: _annotations(folder) / f"annotations_{part}.csv" for part in parts}
    if not any(path.is_file() for path in paths.values()):
        return None
    return _drawn([_read_boxes(path, part) for part, path in paths.items()], LOCAL)


def _layout(settings: DatasetSettings) -> tuple[Path, bool]:
    """The data set's folder, and whether it is laid out as on Kaggle."""
    root = root_of(INFO.name, settings.root)
    for folder in (root, root / "1.0.0"):
        if (_annotations(folder) / "image_labels_train.csv").is_file():
            return folder, False
    if not (root / KAGGLE_TABLE).is_file():
        raise DataError(
            f"{INFO.name}: no table in {root}: expected annotations/image_labels_train.csv (PhysioNet) or "
            f"{KAGGLE_TABLE} (Kaggle)"
        )
    if settings.split == "official":
        raise DataError(
            f"{INFO.name}: the labels of Kaggle's test part are withheld; set dataset.split=grouped, or take the "
            "copy on PhysioNet"
        )
    return root, True


def _annotations(folder: Path) -> Path:
    return folder / "annotations"


# -- labels ----------------------------------------------------------------------------------------------------------


def _part_table(folder: Path, part: str) -> Table:
    classes = LOCAL + GLOBAL
    path = _annotations(folder) / f"image_labels_{part}.csv"
    columns = {"image": ["image_id"], **{name: SPELLINGS.get(name, [name]) for name in classes}}
    if part == "train":
        columns["reader"] = ["rad_id"]

    def parse(values: list[str]) -> _Reading:
        image, *given = values[: 1 + len(classes)]
        reader = values[-1] if part == "train" else CONSENSUS
        _refuse_unnamed(image, reader)
        wrong = [f"{name} {value!r}" for name, value in zip(classes, given, strict=True) if value not in _BINARY]
        if wrong:
            raise RowError(f"{', '.join(wrong)}; expected 0 or 1")
        return _Reading(image, reader, tuple(n for n, v in zip(classes, given, strict=True) if _BINARY[v]))

    rows = read_rows(path, columns, parse).without_repeats(lambda row: f"{row.image} of reader {row.reader}")
    return _by_majority(rows, classes)


_BINARY = {"0": 0, "1": 1, "0.0": 0, "1.0": 1}


def _kaggle_table(folder: Path) -> Table:
    boxes = _read_boxes(folder / KAGGLE_TABLE)
    said: dict[tuple[str, str], dict[str, None]] = {}
    for row in boxes.rows:
        said.setdefault((row.image, row.reader), {}).update(dict.fromkeys(row.labels))
    readings = [_Reading(image, reader, tuple(labels)) for (image, reader), labels in said.items()]
    table = _by_majority(Rows(boxes.path, readings, [], boxes.refused), (*KAGGLE_LOCAL, NO_FINDING))
    info = replace(
        INFO, classes=(*KAGGLE_LOCAL, NO_FINDING), notes=(*INFO.notes, "Labels are those of Kaggle's boxes.")
    )
    return replace(table, info=info)


def _by_majority(rows: Rows[_Reading], classes: tuple[str, ...]) -> Table:
    """A row an image, in the order of first mention; 1 where more than half of its readers gave the label."""
    images = list(dict.fromkeys(row.image for row in rows.rows))
    position = {image: row for row, image in enumerate(images)}
    member = np.array([position[row.image] for row in rows.rows], np.intp)
    given = multi_hot([row.labels for row in rows.rows], classes)
    votes = np.zeros((len(images), len(classes)), np.int64)
    np.add.at(votes, member, given)
    readers = np.bincount(member, minlength=len(images))
    labels = (2 * votes > readers[:, None]).astype(np.int8)
    names = texts(images)
    return Table(names, names, labels, refused=tuple(rows.refused), warnings=_oddities(rows, given, labels, classes))


def _oddities(
    rows: Rows[_Reading], given: npt.NDArray[np.int8], labels: npt.NDArray[np.int8], classes: tuple[str, ...]
) -> tuple[str, ...]:
    none = classes.index(NO_FINDING)
    conflicts = np.flatnonzero((given[:, none] == 1) & (given.sum(1) > 1))
    empty = int((labels.sum(1) == 0).sum())
    found = []
    if len(conflicts):
        first = rows.rows[int(conflicts[0])]
        found.append(
            f"{rows.path.name}: {len(conflicts)} readings say {NO_FINDING!r} beside a finding, the first is reader "
            f"{first.reader} of image {first.image}"
        )
    if empty:
        found.append(f"{rows.path.name}: the readers of {empty} images agree by majority on no label at all")
    return tuple(found)


def _refuse_unnamed(image: str, reader: str) -> None:
    if not image or not reader:
        raise RowError(f"image_id {image!r}, rad_id {reader!r}; expected both")


# -- boxes -----------------------------------------------------------------------------------------------------------


def _read_boxes(path: Path, part: str = "train") -> Rows[_Reading]:
    if not path.is_file():
        raise DataError(f"{path} does not exist; complete the download")
    columns = {"image": ["image_id"], "class": ["class_name"], **{name: [name] for name in CORNERS}}
    if part == "train":
        columns["reader"] = ["rad_id"]

    def parse(values: list[str]) -> _Reading:
        image, name, *corners = values[:6]
        reader = values[-1] if part == "train" else CONSENSUS
        _refuse_unnamed(image, reader)
        if name not in _ALL:
            raise RowError(f"class_name {name!r}; expected one of {', '.join(LOCAL + GLOBAL)}")
        return _Reading(image, reader, (name,), () if name in GLOBAL else _corners(corners))

    return read_rows(path, columns, parse)


def _corners(values: list[str]) -> tuple[float, ...]:
    try:
        corners = tuple(float(value) for value in values)
    except ValueError:
        raise RowError(f"box {', '.join(values)!r}; expected {', '.join(CORNERS)} as numbers") from None
    fault = box_fault(corners)
    if fault is not None:
        raise RowError(fault)
    return corners


def _drawn(parts: Sequence[Rows[_Reading]], classes: tuple[str, ...]) -> Boxes:
    """The boxes of all readers; one who drew none is among the image's readers all the same."""
    rows = [row for part in parts for row in part.rows]
    drawn = [row for row in rows if row.corners]
    readers_of: dict[str, set[str]] = {}
    for row in rows:
        if row.reader != CONSENSUS:
            readers_of.setdefault(row.image, set()).add(row.reader)
    return Boxes(
        classes,
        texts([row.image for row in drawn]),
        np.array([classes.index(row.labels[0]) for row in drawn], np.int64),
        np.array([row.corners for row in drawn], np.float64).reshape(-1, 4),
        texts(["" if row.reader == CONSENSUS else row.reader for row in drawn]),
        {image: frozenset(readers) for image, readers in readers_of.items()},
        np.ones(len(drawn)),
        {},
        tuple(refused for part in parts for refused in part.refused),
    )


def read_masks(settings: DatasetSettings) -> Masks | None:
    """CheXmask's masks for VinDr-CXR, from a copy of its table under the root; None without one.

    Raises:
        DataError: it cannot be used.
    """
    root = root_of(INFO.name, settings.root)
    path = next((root / name for name in CHEXMASK_TABLES if (root / name).is_file()), None)
    return None if path is None else read_chexmask(path)


def image_folders(root: Path) -> list[Path]:
    """`train` and `test` (also under `1.0.0`), then `images`, as far as they exist."""
    folders = [base / name for base in (root, root / "1.0.0") for name in ("train", "test", "images")]
    return [folder for folder in folders if folder.is_dir()]


INFO = DatasetInfo(
    name="vindr_cxr",
    title="VinDr-CXR",
    classes=LOCAL + GLOBAL,
    group_kind="image",
    single_label=False,
    channels=1,
    synthetic=False,
    licence="PhysioNet Credentialed Health Data License 1.5.0",
    notes=(
        "No patient id was released: the split is by image, and one patient's images may be in two splits.",
        "A label holds if more than half of an image's readers gave it.",
    ),
    claims=CHEST_RADIOGRAPHS,
)
ADAPTER = Adapter(INFO, read_table, image_folders, read_boxes=read_boxes, read_masks=read_masks)
