"""The tables of ChestX-ray14 and HAM10000 in all the forms in which they lie on users' disks."""

from __future__ import annotations

import csv
import gzip
from pathlib import Path

import numpy as np
import pytest
from layout_copies import LAYOUTS, copy_with

from trainables.data import chestxray14, ham10000
from trainables.data.adapter import Table
from trainables.data.index import DataError
from trainables.data.registry import read_boxes
from trainables.settings import DatasetSettings


def chest(root: Path, split: str = "grouped") -> Table:
    return chestxray14.read_table(DatasetSettings(name="chestxray14", root=str(root), split=split)).usable()


def ham(root: Path) -> Table:
    return ham10000.read_table(DatasetSettings(name="ham10000", root=str(root))).usable()


def findings(table: Table, row: int) -> set[str]:
    return {chestxray14.CLASSES[column] for column in np.flatnonzero(table.labels[row])}


def test_chestxray14_reads_the_unquoted_bracketed_header_and_patient_sex() -> None:
    table = chest(LAYOUTS / "chestxray14")
    assert table.names.tolist() == ["90000001_000.png", "90000001_001.png", "90000002_000.png", "90000003_000.png"]
    assert table.groups.tolist() == ["90000001", "90000001", "90000002", "90000003"]
    assert [findings(table, row) for row in range(4)] == [
        {"Cardiomegaly", "Emphysema"},
        set(),
        {"Hernia"},
        {"Pleural_Thickening", "Infiltration", "Mass"},
    ]


def test_chestxray14_reads_the_older_name_with_its_trailing_comma_and_ages_in_years() -> None:
    table = chest(LAYOUTS / "chestxray14_older")
    assert findings(table, 0) == {"Edema"}
    assert findings(table, 1) == set()


def test_chestxray14_reads_kaggles_sample_and_unpads_patient_ids() -> None:
    table = chest(LAYOUTS / "chestxray14_kaggle")
    assert table.groups.tolist() == ["21", "21", "22"]
    assert findings(table, 0) == {"Fibrosis", "Infiltration"}


def test_chestxray14_marks_the_official_lists_even_without_a_last_newline() -> None:
    table = chest(LAYOUTS / "chestxray14", split="official")
    assert table.official is not None
    assert table.official.tolist() == [0, 0, 0, 2]


@pytest.mark.parametrize(
    ("file", "old", "new", "expected"),
    [
        ("Data_Entry_2017_v2020.csv", "Patient ID", "Patient", "no column 'Patient ID'; its header is Image Index"),
        ("Data_Entry_2017_v2020.csv", "|Emphysema", "|Emphysem", "line 2: Finding Labels 'Cardiomegaly|Emphysem'"),
        ("Data_Entry_2017_v2020.csv", "|Emphysema", "|No Finding", "line 2: .*names 'No Finding'"),
        ("Data_Entry_2017_v2020.csv", ",0,90000002,", ",0,P2,", "line 4: Patient ID 'P2'; expected a number"),
        ("Data_Entry_2017_v2020.csv", ",81,F,AP,2500,2048,0.171,0.171", "", "line 4: 4 fields; expected 11"),
        ("Data_Entry_2017_v2020.csv", "90000003_000.png", "90000001_001.png", "line 5: .*already in line 3"),
        ("test_list.txt", "90000003_000.png", "90000001_000.png", "90000001_000.png is in train_val_list.txt too"),
        ("test_list.txt", "90000003_000.png", "", "1 of 4 images are in neither .* first is 90000003_000.png"),
    ],
)
def test_chestxray14_names_the_place_of_what_is_broken(
    tmp_path: Path, file: str, old: str, new: str, expected: str
) -> None:
    root = copy_with(tmp_path, "chestxray14", file, old, new)
    with pytest.raises(DataError, match=expected):
        chest(root, split="official")


def test_every_row_that_cannot_be_used_is_kept_with_its_line_and_reason(tmp_path: Path) -> None:
    root = copy_with(tmp_path, "chestxray14", "Data_Entry_2017_v2020.csv", "|Emphysema", "|Emphysem")
    with (root / "Data_Entry_2017_v2020.csv").open("a") as file:
        file.write("90000004_000.png,Edema,0,P4,1,M,PA,1,1,1,1\n90000003_000.png,Edema,0,5,1,M,PA,1,1,1,1\nshort,row\n")
    settings = DatasetSettings(name="chestxray14", root=str(root))
    table = chestxray14.read_table(settings)
    assert table.names.tolist() == ["90000001_001.png", "90000002_000.png", "90000003_000.png"]
    assert [refused.place.rpartition(", ")[2] for refused in table.refused] == ["line 2", "line 6", "line 8", "line 7"]
    assert table.refused[-1].reason == "image 90000003_000.png is listed already in line 5; remove one"
    with pytest.raises(DataError, match=r"line 2: Finding.* 3 more cannot be used \(.*line 6; .*line 7\): the command"):
        table.usable()


def test_chestxray14_without_a_table_says_which_files_it_looks_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no table in .*: expected Data_Entry_2017_v2020.csv or Data_Entry_2017.csv"):
        chest(tmp_path)


def test_chestxray14_without_the_lists_offers_the_grouped_split() -> None:
    with pytest.raises(DataError, match=r"train_val_list.txt does not exist: .*dataset.split=grouped"):
        chest(LAYOUTS / "chestxray14_older", split="official")


def test_a_table_that_is_no_text_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "Data_Entry_2017_v2020.csv").write_bytes(gzip.compress(b"not a table"))
    with pytest.raises(DataError, match="cannot be read as CSV in UTF-8"):
        chest(tmp_path)


def test_a_byte_that_is_no_utf_8_is_named_with_its_line(tmp_path: Path) -> None:
    text = (LAYOUTS / "ham10000" / "HAM10000_metadata.csv").read_text().replace("scalp", "Sch\xe4del", 1)
    (tmp_path / "HAM10000_metadata.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=r"HAM10000_metadata.csv, line 2: cannot be read as CSV in UTF-8"):
        ham(tmp_path)


def test_a_table_with_a_header_alone_is_refused(tmp_path: Path) -> None:
    (tmp_path / "Data_Entry_2017_v2020.csv").write_text(chestxray14.HEADER + "\n")
    with pytest.raises(DataError, match="holds no rows"):
        chest(tmp_path)


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(tmp_path: Path) -> None:
    text = (LAYOUTS / "ham10000" / "HAM10000_metadata.csv").read_text()
    (tmp_path / "HAM10000_metadata.csv").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert ham(tmp_path).names.tolist() == ham(LAYOUTS / "ham10000").names.tolist()


def test_real_data_needs_a_root_that_exists() -> None:
    with pytest.raises(DataError, match="--data-root ham10000=DIR"):
        ham10000.read_table(DatasetSettings(name="ham10000"))
    with pytest.raises(DataError, match="nowhere is not a folder"):
        ham(Path("nowhere"))


def test_ham10000_groups_by_lesion_and_needs_no_age() -> None:
    table = ham(LAYOUTS / "ham10000")
    assert table.groups.tolist() == ["HAM_9000001", "HAM_9000001", "HAM_9000002", "HAM_9000003"]
    assert [ham10000.CLASSES[column] for column in table.labels.argmax(1)] == ["bkl", "bkl", "vasc", "nv"]
    assert table.labels.sum(1).tolist() == [1, 1, 1, 1]


def test_ham10000_reads_the_newer_table_with_its_column_dataset() -> None:
    assert ham(LAYOUTS / "ham10000_newer").names.tolist() == ["ISIC_9000011", "ISIC_9000012"]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("vasc,", "scc,", "line 4: dx 'scc'; expected one of akiec, bcc"),
        ("HAM_9000002,", ",", "line 4: image_id 'ISIC_9000003', lesion_id ''; expected both"),
        ("lesion_id", "lesion", "no column 'lesion_id'"),
        ("ISIC_9000002", "ISIC_9000001", "line 3: image ISIC_9000001 is listed already in line 2"),
    ],
)
def test_ham10000_names_the_place_of_what_is_broken(tmp_path: Path, old: str, new: str, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        ham(copy_with(tmp_path, "ham10000", "HAM10000_metadata.csv", old, new))


def test_ham10000_has_no_official_split() -> None:
    settings = DatasetSettings(name="ham10000", root=str(LAYOUTS / "ham10000"), split="official")
    with pytest.raises(DataError, match=r"no official split; set dataset.split=grouped"):
        ham10000.read_table(settings)


def test_image_folders_of_the_twelve_archives(tmp_path: Path) -> None:
    (tmp_path / "images_001" / "images").mkdir(parents=True)
    (tmp_path / "images_012").mkdir()
    (tmp_path / "images_old").mkdir()
    assert chestxray14.image_folders(tmp_path) == [tmp_path / "images_001" / "images", tmp_path / "images_012"]


def test_the_true_nih_table_has_its_published_numbers(real_data: Path, tmp_path: Path) -> None:
    with gzip.open(real_data / "tables" / "Data_Entry_2017_v2020.csv.gz") as packed:
        (tmp_path / "Data_Entry_2017_v2020.csv").write_bytes(packed.read())
    table = chest(tmp_path)
    assert (len(table), len(set(table.groups.tolist()))) == (112_120, 30_805)
    counts = dict(zip(chestxray14.CLASSES, table.labels.sum(0).tolist(), strict=True))
    # Numbers of images a finding in Wang et al., CVPR 2017, as corrected in the released table.
    assert (counts["Infiltration"], counts["Hernia"], counts["Pneumonia"]) == (19_894, 227, 1_431)
    assert int((table.labels.sum(1) == 0).sum()) == 60_361


def test_the_true_ham10000_table_has_its_published_numbers(real_data: Path) -> None:
    table = ham(real_data / "tables")
    assert (len(table), len(set(table.groups.tolist()))) == (10_015, 7_470)
    assert table.labels.sum(0).tolist() == [327, 514, 1099, 115, 1113, 6705, 142]


def test_the_readers_agree_with_a_plain_csv_reading(real_data: Path) -> None:
    table = chest(real_data / "chestxray14")
    with (real_data / "chestxray14" / "Data_Entry_2017_v2020.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert table.names.tolist() == [row["Image Index"] for row in rows]
    for position, row in enumerate(rows):
        assert findings(table, position) == set(row["Finding Labels"].split("|")) - {"No Finding"}


def test_the_true_boxes_of_nih_are_inside_of_their_images_and_spell_infiltration(
    real_data: Path, tmp_path: Path
) -> None:
    settings = DatasetSettings(name="chestxray14", root=str(tmp_path))
    assert read_boxes(settings) is None
    with gzip.open(real_data / "tables" / "BBox_List_2017.csv.gz") as packed:
        (tmp_path / "BBox_List_2017.csv").write_bytes(packed.read())
    boxes = read_boxes(settings)
    assert boxes is not None
    assert boxes.refused == ()
    with (tmp_path / "BBox_List_2017.csv").open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    assert len(boxes) == len(rows) == 984
    for row, name, label, corners in zip(rows, boxes.names, boxes.labels, boxes.corners, strict=True):
        x, y, w, h = map(float, row[2:6])
        assert corners.tolist() == [x, y, x + w, y + h]
        assert (row[0], row[1].replace("Infiltrate", "Infiltration")) == (name, chestxray14.CLASSES[label])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("a.png,Masse,1,2,3,4", "Finding Label 'Masse'; expected one of Atelectasis"),
        ("a.png,Mass,1,2,x,4", "box '1, 2, x, 4'; expected x, y, w, h as numbers"),
        ("a.png,Mass,1000,2,30,4", "box 1000, 2, 1030, 6 reaches out of the image of 1024 × 1024 px"),
    ],
)
def test_a_box_of_nih_that_cannot_be_is_refused_by_its_line(tmp_path: Path, row: str, reason: str) -> None:
    (tmp_path / "BBox_List_2017.csv").write_text(f"{chestxray14.BOXES_HEADER}\n{row}\n")
    boxes = read_boxes(DatasetSettings(name="chestxray14", root=str(tmp_path)))
    assert boxes is not None
    (refused,) = boxes.refused
    assert refused.place.endswith("BBox_List_2017.csv, line 2")
    assert refused.reason.startswith(reason)
