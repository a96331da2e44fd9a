"""VinDr-CXR: readers fused by majority, in PhysioNet's layout and in Kaggle's, and boxes as they were drawn."""

from __future__ import annotations

import gzip
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from layout_copies import LAYOUTS, copy_with, plain_rows

from trainables.data import vindr_cxr
from trainables.data.adapter import Table
from trainables.data.boxes import fused
from trainables.data.index import DataError
from trainables.data.registry import load_index, read_boxes, read_table
from trainables.settings import DatasetSettings


def chosen(root: Path, **changes: object) -> DatasetSettings:
    return DatasetSettings(name="vindr_cxr", root=str(root)).model_copy(update=changes)


def labels_of(table: Table, row: int) -> set[str]:
    assert len(table) > row
    classes = (table.info or vindr_cxr.INFO).classes
    return {classes[column] for column in np.flatnonzero(table.labels[row])}


def test_a_label_needs_more_than_half_of_an_images_readers() -> None:
    table = read_table(chosen(LAYOUTS / "vindr_cxr")).usable()
    assert table.names.tolist() == ["aaaa0001", "aaaa0002", "aaaa0003"]
    assert labels_of(table, 0) == {"Cardiomegaly", "Pleural effusion"}  # two of three each; COPD and TB one
    assert labels_of(table, 1) == {"No finding"}
    assert labels_of(table, 2) == set()
    assert table.labels.shape == (3, 28)
    assert table.warnings == (
        "image_labels_train.csv: the readers of 1 images agree by majority on no label at all",
        "the test part is left aside: it is the test split of dataset.split=official",
    )


def test_the_official_test_part_is_a_consensus_that_spells_other_disease() -> None:
    table = read_table(chosen(LAYOUTS / "vindr_cxr", split="official")).usable()
    assert table.official is not None
    assert table.official.tolist() == [0, 0, 0, 2]
    assert labels_of(table, 3) == {"Pneumonia", "Other diseases"}


def test_the_folder_around_the_release_will_do(tmp_path: Path) -> None:
    (tmp_path / "1.0.0").symlink_to(LAYOUTS / "vindr_cxr")
    assert len(read_table(chosen(tmp_path))) == 3
    (tmp_path / "1.0.0").unlink()
    (tmp_path / "1.0.0" / "train").mkdir(parents=True)
    assert vindr_cxr.image_folders(tmp_path) == [tmp_path / "1.0.0" / "train"]


def test_kaggle_readers_gave_the_labels_of_their_boxes() -> None:
    table = read_table(chosen(LAYOUTS / "vindr_cxr_kaggle")).usable()
    assert labels_of(table, 0) == {"Cardiomegaly"}  # two boxes of one reader are one vote for Aortic enlargement
    assert labels_of(table, 1) == {"No finding"}
    assert table.info is not None
    assert len(table.info.classes) == 15


def test_kaggle_has_no_official_split() -> None:
    with pytest.raises(DataError, match=r"Kaggle's test part are withheld; set dataset.split=grouped"):
        read_table(chosen(LAYOUTS / "vindr_cxr_kaggle", split="official"))


def test_a_reading_that_contradicts_itself_is_told(tmp_path: Path) -> None:
    root = copy_with(tmp_path, "vindr_cxr_kaggle", "train.csv", "No finding,14,R8,,,,", "Mass,8,R8,1,2,3,4")
    with pytest.raises(DataError, match="line 7: class_name 'Mass'; expected one of Aortic enlargement"):
        read_table(chosen(root)).usable()
    (root / "train.csv").write_text(
        (LAYOUTS / "vindr_cxr_kaggle" / "train.csv").read_text() + "aaaa0002,ILD,5,R8,1,2,3,4\n"
    )
    warnings = read_table(chosen(root)).usable().warnings
    assert "1 readings say 'No finding' beside a finding, the first is reader R8 of image aaaa0002" in warnings[0]


@pytest.mark.parametrize(
    ("file", "old", "new", "expected"),
    [
        (
            "image_labels_train.csv",
            "aaaa0001,R1,0",
            "aaaa0001,R1,-1",
            "line 2: Aortic enlargement '-1'; expected 0 or 1",
        ),
        (
            "image_labels_train.csv",
            "aaaa0001,R2",
            "aaaa0001,R1",
            "line 3: image aaaa0001 of reader R1 is listed already",
        ),
        ("image_labels_train.csv", "aaaa0001,R1,", "aaaa0001,,", "line 2: image_id 'aaaa0001', rad_id ''"),
        ("image_labels_train.csv", "COPD", "Copd", "no column 'COPD'; its header is image_id, rad_id"),
    ],
)
def test_what_is_broken_is_named_with_its_place(tmp_path: Path, file: str, old: str, new: str, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        read_table(chosen(copy_with(tmp_path, "vindr_cxr", f"annotations/{file}", old, new))).usable()


def test_neither_layout_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected annotations/image_labels_train.csv \(PhysioNet\) or train.csv"):
        read_table(chosen(tmp_path))


def test_boxes_are_kept_as_drawn_with_the_readers_who_drew_none() -> None:
    boxes = read_boxes(chosen(LAYOUTS / "vindr_cxr"))
    assert boxes is not None
    assert len(boxes) == 6
    assert boxes.readers_of["aaaa0002"] == {"R8", "R9", "R10"}
    assert [boxes.classes[label] for label in boxes.labels[boxes.of(["aaaa0002"])[0]]] == ["Nodule/Mass"]
    official = read_boxes(chosen(LAYOUTS / "vindr_cxr", split="official"))
    assert official is not None
    assert official.readers[-1] == ""
    assert "bbbb0001" not in official.readers_of
    assert fused(official).names.tolist().count("bbbb0001") == 1


@pytest.mark.parametrize(
    ("new", "reason"),
    [
        ("100,200,90,400", "box 100, 200, 90, 400 has no area"),
        ("-5,200,300,400", "box -5, 200, 300, 400 reaches out of the image"),
        ("100,200,,400", "box '100, 200, , 400'; expected x_min, y_min, x_max, y_max as numbers"),
        ("nan,200,300,400", "box nan, 200, 300, 400 is not finite"),
    ],
)
def test_a_box_that_cannot_be_is_refused_by_its_line(tmp_path: Path, new: str, reason: str) -> None:
    boxes = read_boxes(chosen(copy_with(tmp_path, "vindr_cxr_kaggle", "train.csv", "100,200,300,400", new)))
    assert boxes is not None
    (refused,) = boxes.refused
    assert refused.place.endswith("train.csv, line 2")
    assert refused.reason.startswith(reason)
    assert len(boxes) == 4


def test_the_true_kaggle_table_agrees_with_a_plain_counting_of_votes(real_data: Path, tmp_path: Path) -> None:
    with gzip.open(real_data / "tables" / "vinbigdata-train.csv.gz") as packed:
        (tmp_path / "train.csv").write_bytes(packed.read())
    rows = plain_rows(tmp_path / "train.csv")
    assert len(rows) == 67_914
    said: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for row in rows:
        said[row["image_id"]][row["rad_id"]].add(row["class_name"])
    assert {len(readers) for readers in said.values()} == {3}
    table = read_table(chosen(tmp_path)).usable()
    assert len(table) == len(said) == 15_000
    assert table.info is not None
    votes = {image: Counter(name for labels in readers.values() for name in labels) for image, readers in said.items()}
    expected = [[int(votes[image][name] >= 2) for name in table.info.classes] for image in table.names.tolist()]
    assert table.labels.tolist() == expected
    assert sum(table.labels[:, -1].tolist()) == 10_606  # images without a finding, as Kaggle's pages count them
    boxes = read_boxes(chosen(tmp_path))
    assert boxes is not None
    assert len(boxes) == sum(row["class_name"] != "No finding" for row in rows) == 36_096
    assert boxes.refused == ()
    index = load_index(chosen(tmp_path))
    assert [len(index.rows(split)) for split in ("train", "val", "test")] == pytest.approx(
        [12_000, 1_500, 1_500], abs=6
    )
