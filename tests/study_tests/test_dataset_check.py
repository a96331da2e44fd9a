"""`check`: counts as a study would split, every fault in a list, exit status 1 where a result would be false."""

from __future__ import annotations

import csv
import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from study.dataset_check import check_dataset, text_of, write_findings
from study.documents import StudyError
from tests.made_datasets import (
    CSV_OPTIONS,
    MADE,
    make_chexmask,
    make_chexpert,
    make_coco,
    make_csv,
    make_jsrt,
    make_vindr,
    save,
    save_dicom,
)
from trainables.data.index import DataError
from trainables.data.registry import DATASETS, load_index
from trainables.settings import DatasetSettings

LAUNCH = Path(__file__).resolve().parents[2] / "study" / "launch.py"
KEYS = ["images", "groups", "splits", "leaks", "missing", "unreadable", "refused", "duplicates", "warnings"]
LABELS = {"label_columns": ["Mass", "Nodule"]}


def settings_of(root: Path, **changes: object) -> dict[str, Any]:
    given = {key.removeprefix("dataset."): value for key, value in CSV_OPTIONS.items()}
    return {"name": "csv", "root": str(root), **given, **LABELS, **changes}


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A table of 160 images of 80 patients without a fault."""
    return make_csv(tmp_path / "own")


def launch(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`check` as a user runs it."""
    return subprocess.run(
        [sys.executable, str(LAUNCH), "check", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | {"COLUMNS": "160", "NO_COLOR": "1"},
    )


def edit_row(root: Path, line: int, **changes: str) -> None:
    """Change values of one row of the table; line 1 is the header."""
    with (root / "labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    rows[line - 2] |= changes
    with (root / "labels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def options() -> list[str]:
    given = {**CSV_OPTIONS, "dataset.label_column": "findings", "dataset.label_separator": "|"}
    return [part for key, value in given.items() for part in ("-o", f"{key}={value}")]


def test_without_a_fault_the_status_is_0_the_keys_are_those_promised_and_nothing_is_left_behind(
    own: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    done = launch(folder, "csv", "--data-root", str(own), *options(), "--json")
    assert (done.returncode, done.stderr) == (0, "")
    facts = json.loads(done.stdout)
    assert list(facts) == KEYS
    assert (facts["images"], facts["groups"]) == (160, 80)
    assert list(facts["splits"]) == ["train", "val", "test"]
    assert all(list(split) == ["images", "groups", "positives"] for split in facts["splits"].values())
    assert sum(split["positives"]["Mass"] for split in facts["splits"].values()) == 80
    assert all(facts[key] == [] for key in ("leaks", "missing", "unreadable", "refused", "duplicates"))
    assert list(folder.iterdir()) == []


def test_with_faults_the_status_is_1_and_all_are_listed_in_a_file(own: Path, tmp_path: Path) -> None:
    (own / "images" / "w1" / "n1.png").unlink()
    (own / "images" / "w2" / "n2.png").write_bytes(b"no image")
    edit_row(own, 5, patient="")
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    done = launch(folder, "csv", "--data-root", str(own), *options())
    assert done.returncode == 1
    assert done.stderr == "3 faults, listed in findings-csv.csv\n"
    with (folder / "findings-csv.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["kind"], row["place"].rpartition("/")[2]) for row in rows] == [
        ("missing", "n1"),
        ("unreadable", "n2.png"),
        ("refused", "labels.csv, line 5"),
    ]
    for row in rows:
        assert f"{row['kind']}: {row['place']}: {row['detail']}" in done.stdout
    done = launch(folder, "csv", "--data-root", str(own), *options(), "--findings", "a/b.csv")
    assert done.returncode == 2
    assert "--findings a/b.csv: cannot be written (No such file or directory)" in done.stderr


def test_bad_settings_are_status_2_and_write_nothing(own: Path, tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    done = launch(
        folder, "csv", "--data-root", str(own), "-o", "dataset.table=labels.csv", "-o", "dataset.imag_column=f"
    )
    assert done.returncode == 2
    assert "imag_column" in done.stderr
    done = launch(folder, "csv", "--data-root", str(own), *[o.replace("=file", "=name") for o in options()])
    assert done.returncode == 2
    assert done.stderr.startswith(
        "error dataset.image_column: labels.csv has no column 'name'; the columns of labels.csv"
    )
    assert list(folder.iterdir()) == []


def test_a_leaking_split_column_is_listed_with_its_groups(own: Path) -> None:
    edit_row(own, 2, part="test")
    found = check_dataset(settings_of(own, split_column="part"), tables_only=True)
    assert found.facts()["leaks"] == [{"group": "0", "splits": ["train", "test"], "images": 2}]
    assert found.faults() == [("leak", "group 0", "2 images in train and test")]
    with pytest.raises(DataError, match="group 0 in train and test"):
        load_index(DatasetSettings.model_validate(settings_of(own, split_column="part")))


def test_tables_only_opens_no_image(own: Path) -> None:
    shutil.rmtree(own / "images")
    found = check_dataset(settings_of(own), tables_only=True)
    assert (found.images, found.faults()) == (160, [])
    assert len(check_dataset(settings_of(own)).missing) == 160


class TestDuplicates:
    def copy(self, own: Path, source: int, target: int, suffix: str = ".png") -> None:
        paths = [own / "images" / f"w{n % 3}" / f"n{n}.png" for n in (source, target)]
        with Image.open(paths[0]) as image:
            paths[1].unlink()
            image.save(paths[1].with_suffix(suffix), **({"compress_level": 0} if suffix == ".png" else {}))

    def test_they_are_found_by_their_pixels_whatever_the_compression(self, own: Path) -> None:
        self.copy(own, 0, 8)  # patient 0 and patient 4, both without a label
        self.copy(own, 16, 24, ".bmp")
        found = check_dataset(settings_of(own)).facts()["duplicates"]
        assert [item["images"] for item in found] == [["w0/n0", "w2/n8"], ["w1/n16", "w0/n24"]]

    def test_in_two_splits_they_falsify(self, own: Path) -> None:
        self.copy(own, 0, 32)
        found = check_dataset(settings_of(own, split_column="part"))
        assert found.faults() == [("duplicate", "w0/n0, w2/n32", "the same pixels in train and test")]

    def test_of_two_patients_they_falsify(self, own: Path) -> None:
        self.copy(own, 0, 8)
        found = check_dataset(settings_of(own, split_column="part"))
        assert found.faults() == [("duplicate", "w0/n0, w2/n8", "the same pixels of 2 groups")]

    def test_with_different_labels_they_falsify(self, own: Path) -> None:
        self.copy(own, 0, 2)
        found = check_dataset(settings_of(own, split_column="part"))
        assert found.faults() == [("duplicate", "w0/n0, w2/n2", "the same pixels with different labels")]

    def test_alike_in_all_they_are_a_warning(self, own: Path) -> None:
        self.copy(own, 0, 1)
        found = check_dataset(settings_of(own, split_column="part"))
        assert found.faults() == []
        assert len(found.duplicates) == 1
        assert (
            "1 images are there more than once, in one split and alike, the first is w0/n0 and w1/n1" in found.warnings
        )


def test_a_class_that_cannot_be_measured_is_a_warning_with_the_remedy(own: Path) -> None:
    found = check_dataset(settings_of(own, label_columns=None, label_column="file") | {"label_columns": []})
    assert found.faults() == []
    assert "160 class(es) without a positive or without a negative in some split" in found.warnings[-1]


def test_unknown_settings_are_one_clear_error() -> None:
    with pytest.raises(StudyError, match=r"dataset\.views: Input should be 'all' or 'frontal'"):
        check_dataset({"name": "chexpert", "views": "side"})


def test_images_of_another_modality_are_refused_and_boxes_out_of_range_too(tmp_path: Path) -> None:
    pytest.importorskip("pydicom", reason="the extra 'dicom' is not installed")
    root = make_vindr(tmp_path, 60)
    save_dicom(root / "train" / f"{3:032x}.dicom", np.zeros((40, 40), np.uint8), Modality="CT")
    with (root / "annotations" / "annotations_train.csv").open("a") as file:
        file.write(f"{3:032x},R1,ILD,5,5,5,9\n")
    found = check_dataset({"name": "vindr_cxr", "root": str(root)})
    assert [refused.reason for refused in found.refused] == [
        "box 5, 5, 5, 9 has no area; expected x_min < x_max and y_min < y_max",
        "Modality is CT; expected CR or DX or DR",
    ]
    assert "60 images\n" in text_of(found)


def test_findings_are_a_table(tmp_path: Path) -> None:
    write_findings([("leak", 'patient "7", a', "2 images")], tmp_path / "f.csv")
    with (tmp_path / "f.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [["kind", "place", "detail"], ["leak", 'patient "7", a', "2 images"]]


def test_the_text_shows_the_first_faults_of_each_kind(own: Path) -> None:
    shutil.rmtree(own / "images")
    lines = text_of(check_dataset(settings_of(own))).splitlines()
    assert lines[0] == "any table of yours, described by settings: 160 images of 80 groups"
    assert [line for line in lines if line.startswith("missing")][-1] == "missing: … 155 more"
    assert len([line for line in lines if line.startswith("missing")]) == 6


def of_true_table(real_data: Path, tmp_path: Path, packed: str, name: str) -> Path:
    (tmp_path / name).write_bytes(gzip.decompress((real_data / "tables" / packed).read_bytes()))
    return tmp_path


def test_the_true_nih_table_has_no_fault(real_data: Path, tmp_path: Path) -> None:
    root = of_true_table(real_data, tmp_path, "Data_Entry_2017_v2020.csv.gz", "Data_Entry_2017_v2020.csv")
    found = check_dataset({"name": "chestxray14", "root": str(root)}, tables_only=True)
    assert (found.images, found.groups, found.faults(), found.warnings) == (112_120, 30_805, [], ())
    totals: dict[str, int] = {}
    for split in found.splits.values():
        for name, count in split["positives"].items():
            totals[name] = totals.get(name, 0) + count
    assert (totals["Infiltration"], totals["Hernia"]) == (19_894, 227)


def test_classes_of_500_positives_have_the_same_share_in_every_split_of_the_true_nih_table(
    real_data: Path, tmp_path: Path
) -> None:
    root = of_true_table(real_data, tmp_path, "Data_Entry_2017_v2020.csv.gz", "Data_Entry_2017_v2020.csv")
    index = load_index(DatasetSettings(name="chestxray14", root=str(root)), tmp_path / "splits")
    common = index.labels.sum(0) >= 500
    assert common.sum() == 13
    for split in ("train", "val", "test"):
        share = index.labels[index.rows(split)].mean(0)
        assert abs(share / index.labels.mean(0) - 1)[common].max() < 0.1


@pytest.mark.parametrize("name", MADE)
def test_made_data_sets_of_every_layout_have_no_fault(name: str, tmp_path: Path) -> None:
    made = MADE[name]
    if made.dataset == "vindr_cxr":
        pytest.importorskip("pydicom", reason="the extra 'dicom' is not installed")
    found = check_dataset(made.checked(made.make(tmp_path)))
    assert found.faults() == []
    assert found.images >= 100


def test_every_data_set_has_a_made_copy() -> None:
    assert {made.dataset for made in MADE.values()} == {name for name, info in DATASETS.items() if not info.synthetic}


def test_a_broken_png_is_told_apart_from_a_missing_one(own: Path) -> None:
    path = own / "images" / "w0" / "n0.png"
    save(path, np.random.default_rng(0).integers(0, 255, (40, 40)).astype(np.uint8))
    path.write_bytes(path.read_bytes()[:-200])
    found = check_dataset(settings_of(own))
    assert found.missing == ()
    assert [refused.place for refused in found.unreadable] == [str(path)]


def reasons(name: str, root: Path) -> list[str]:
    return [refused.reason for refused in check_dataset({"name": name, "root": str(root)}).refused]


def test_a_box_beyond_the_edge_of_an_image_whose_size_no_file_tells_is_found_by_opening_it(tmp_path: Path) -> None:
    pytest.importorskip("pydicom", reason="the extra 'dicom' is not installed")
    root = make_vindr(tmp_path, 60)
    with (root / "annotations" / "annotations_train.csv").open("a") as file:
        file.write(f"{3:032x},R1,ILD,5,5,45,9\n")
    assert reasons("vindr_cxr", root) == ["box 5, 5, 45, 9 reaches out of the image of 40 × 40 px"]
    found = check_dataset({"name": "vindr_cxr", "root": str(root)}, tables_only=True)
    assert found.faults() == [], "the tables alone cannot tell"


def test_an_image_of_other_proportions_than_its_boxes_is_found(tmp_path: Path) -> None:
    root = make_coco(tmp_path)
    noise = np.random.default_rng(0).integers(0, 255, (80, 80)).astype(np.uint8)
    save(root / "train2017" / "n1.jpg", noise)  # twice the size: boxes are scaled with their image
    save(root / "train2017" / "n3.jpg", noise[:40])
    assert reasons("coco", root) == ["is 80 × 40 px, its boxes are of an image of 40 × 40 px"]


def test_masks_that_cannot_be_read_or_show_something_else_are_found(tmp_path: Path) -> None:
    root = make_jsrt(tmp_path / "jsrt")
    (root / "masks" / "heart" / "JPCLN001.png").write_bytes(b"no image")
    for structure in ("heart", "left_lung", "right_lung"):
        save(root / "masks" / structure / "JPCLN003.png", np.full((20, 40), 255, np.uint8))
    first, second = reasons("jsrt", root)
    assert "masks/heart/JPCLN001.png: the mask cannot be read" in first
    assert second == "a mask of 20 × 40 px (height × width) does not go with an image of 40 × 40"
    pytest.importorskip("pydicom", reason="the extra 'dicom' is not installed")
    root = make_chexmask(tmp_path / "vindr")
    table = root / "OriginalResolution" / "VinDr-CXR.csv"
    lines = table.read_text().splitlines()
    lines[5] = lines[5].replace(",40,40", ",40,80")
    table.write_text("\n".join(lines) + "\n")
    warnings = check_dataset({"name": "vindr_cxr", "root": str(root)}).warnings
    told = f"the masks of 15 images are left out, the first are those of {10:032x}: Dice RCA (Mean) is 0.50, below 0.70"
    assert told in warnings
    assert reasons("vindr_cxr", root) == ["a mask of 40 × 80 px (height × width) does not go with an image of 40 × 40"]


def test_an_image_with_and_without_a_finding_is_a_conflict_that_is_told(tmp_path: Path) -> None:
    root = make_chexpert(tmp_path)
    settings = {"name": "chexpert", "root": str(root)}
    index = load_index(DatasetSettings.model_validate(settings))
    none, devices = (index.classes.index(name) for name in ("No Finding", "Support Devices"))
    others = np.delete(index.labels, [none, devices], 1)
    rows = np.flatnonzero((index.labels[:, none] == 1) & (others == 1).any(1))
    told = f"{len(rows)} images are labelled 'No Finding' beside a finding, the first is {index.names[rows[0]]}"
    assert told in check_dataset(settings, tables_only=True).warnings


def test_dicom_files_of_several_kinds_are_told_where_nothing_else_is_known(tmp_path: Path) -> None:
    pytest.importorskip("pydicom", reason="the extra 'dicom' is not installed")
    root = make_csv(tmp_path)
    rng = np.random.default_rng(0)
    for number in range(5):
        (root / "images" / f"w{number % 3}" / f"n{number}.png").unlink()
        pixels = rng.integers(0, 255, (40, 40)).astype(np.uint8)
        kind = {"Modality": "CT", "BodyPartExamined": "HEAD"} if number == 3 else {}
        save_dicom(root / "images" / f"w{number % 3}" / f"n{number}.dcm", pixels, **kind)
    found = check_dataset(settings_of(root))
    assert found.faults() == []
    assert "DICOM files of several modalities or body parts: 4 DX of CHEST, 1 CT of HEAD" in found.warnings
