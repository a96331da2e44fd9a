"""HAM10000: `HAM10000_metadata.csv` (also without its extension) and its two image folders.

Groups are lesions: no patient id was released, and a split by image would leak the 2,545 further views of a lesion.
A newer copy has a column `dataset`; ages may be missing; neither is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from trainables.data.adapter import Adapter, DatasetInfo, Table
from trainables.data.index import DataError
from trainables.data.tables import RowError, find_file, one_hot, read_rows, root_of, texts
from trainables.settings import DatasetSettings

CLASSES = ("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc")
TABLE_FILES = ("HAM10000_metadata.csv", "HAM10000_metadata")
HEADER = ("lesion_id", "image_id", "dx", "dx_type", "age", "sex", "localization")
IMAGE_FOLDERS = ("HAM10000_images_part_1", "HAM10000_images_part_2", "HAM10000_images", "images")


def read_table(settings: DatasetSettings) -> Table:
    """Read the table under `settings.root`.

    Raises:
        DataError: no table, a missing column, or an official split asked for.
    """
    if settings.split == "official":
        raise DataError(f"{INFO.name}: there is no official split; set dataset.split=grouped")
    root = root_of(INFO.name, settings.root)
    path = find_file(INFO.name, root, TABLE_FILES)
    columns = {"image": ["image_id"], "lesion": ["lesion_id"], "dx": ["dx"]}
    read = read_rows(path, columns, _parse).without_repeats(lambda row: row[0])
    table = to_table(*([row[k] for row in read.rows] for k in range(3)))
    return replace(table, refused=tuple(read.refused))


def _parse(values: list[str]) -> tuple[str, str, str]:
    name, lesion, dx = values
    if not name or not lesion:
        raise RowError(f"image_id {name!r}, lesion_id {lesion!r}; expected both")
    if dx not in CLASSES:
        raise RowError(f"dx {dx!r}; expected one of {', '.join(CLASSES)}")
    return name, lesion, dx


def to_table(names: Sequence[str], lesions: Sequence[str], diagnoses: Sequence[str]) -> Table:
    """Build the table from columns; diagnoses are out of `CLASSES`."""
    return Table(texts(names), texts(lesions), one_hot(diagnoses, CLASSES))


def image_folders(root: Path) -> list[Path]:
    """The two parts, a joint folder, or the root itself, as far as they hold images."""
    named = [root / folder for folder in IMAGE_FOLDERS if (root / folder).is_dir()]
    return named or [root]


INFO = DatasetInfo(
    name="ham10000",
    title="HAM10000",
    classes=CLASSES,
    group_kind="lesion",
    single_label=True,
    channels=3,
    synthetic=False,
    licence="CC BY-NC 4.0",
    notes=("No patient id was released: the split is by lesion, and one patient's lesions may be in two splits.",),
)
ADAPTER = Adapter(INFO, read_table, image_folders)
