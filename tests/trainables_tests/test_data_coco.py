"""Data sets in COCO's form: files of one split each or one for all, labels from boxes, images wherever they lie."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainables.data.index import DataError
from trainables.data.registry import load_index, locate, read_boxes, read_table
from trainables.settings import DatasetSettings

CATEGORIES = ({"id": 0, "name": "findings"}, {"id": 1, "name": "Mass"}, {"id": 2, "name": "Nodule"})


def write(path: Path, first: int, count: int, folder: Path) -> Path:
    """Images first … first + count − 1 with boxes of Mass (odd numbers) and Nodule (every third); one pixel each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    images = [{"id": n, "file_name": f"n{n}.jpg", "width": 50, "height": 40} for n in range(first, first + count)]
    boxes = [(n, 1) for n in range(first, first + count) if n % 2] + [
        (n, 2) for n in range(first, first + count) if n % 3 == 0
    ]
    annotations = [{"image_id": n, "category_id": category, "bbox": [1, 2, 10, 20]} for n, category in boxes]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": CATEGORIES}))
    for image in images:
        Image.fromarray(np.zeros((4, 5), np.uint8)).save(folder / str(image["file_name"]))
    return path


def chosen(root: Path, **changes: object) -> DatasetSettings:
    return DatasetSettings(name="coco", root=str(root)).model_copy(update=changes)


@pytest.mark.parametrize("form", ["annotations/instances_{}2017.json", "{}/_annotations.coco.json"])
def test_files_of_one_split_each_are_the_official_split(tmp_path: Path, form: str) -> None:
    word = "valid" if form.startswith("{}") else "val"
    for split, first, count in (("train", 0, 120), (word, 120, 30), ("test", 150, 30)):
        folder = tmp_path / split if form.startswith("{}") else tmp_path / f"{split}2017"
        write(tmp_path / form.format(split), first, count, folder)
    index = load_index(chosen(tmp_path, split="official"))
    assert [len(index.rows(split)) for split in ("train", "val", "test")] == [120, 30, 30]
    assert index.classes == ("Mass", "Nodule")  # 'findings' has no box
    number = np.array([int(name[1:-4]) for name in index.names.tolist()])
    assert np.array_equal(index.labels, np.stack([number % 2, number % 3 == 0], 1))
    assert len(locate(index, tmp_path)) == 180


def test_without_a_test_file_val_is_the_test(tmp_path: Path) -> None:
    write(tmp_path / "annotations" / "train.json", 0, 180, tmp_path / "images")
    write(tmp_path / "annotations" / "val.json", 180, 30, tmp_path / "images")
    index = load_index(chosen(tmp_path, split="official"))
    assert len(index.rows("test")) == 30
    assert len(index.rows("val")) == pytest.approx(20, abs=2)


def test_one_file_is_split_by_us(tmp_path: Path) -> None:
    write(tmp_path / "boxes.json", 0, 100, tmp_path / "raw" / "all")
    index = load_index(chosen(tmp_path, table="boxes.json"))
    assert [len(index.rows(split)) for split in ("train", "val", "test")] == [80, 10, 10]
    with pytest.raises(DataError, match=r"no train file beside .*dataset.split=grouped"):
        load_index(chosen(tmp_path, table="boxes.json", split="official"))


def test_a_pattern_finds_the_patient_in_names_and_keeps_his_images_together(tmp_path: Path) -> None:
    write(tmp_path / "boxes.json", 0, 100, tmp_path / "raw")
    index = load_index(chosen(tmp_path, table="boxes.json", group_pattern=r"^n(\d)"))
    assert index.groups.tolist() == [name[1] for name in index.names.tolist()]
    assert index.group_kind == "group"
    assert all(len(set(index.split[index.groups == group].tolist())) == 1 for group in "0123456789")
    with pytest.raises(DataError, match=r"'n\[1-9\]' finds nothing in 1 of 100 image names, first 'n0.jpg'"):
        load_index(chosen(tmp_path, table="boxes.json", group_pattern="n[1-9]"))
    with pytest.raises(ValueError, match=r"'\(' is no regular expression: missing \)"):
        DatasetSettings(name="coco", group_pattern="(")


def test_an_image_in_two_files_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "annotations" / "a_train.json", 0, 60, tmp_path)
    write(tmp_path / "annotations" / "a_val.json", 59, 60, tmp_path)
    with pytest.raises(DataError, match=r"a_val.json: image n59.jpg is listed in a_train.json too"):
        load_index(chosen(tmp_path))


def test_what_is_not_there_or_there_twice_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no json file in .*expected annotations/\*train\*.json"):
        read_table(chosen(tmp_path))
    with pytest.raises(DataError, match=r"dataset.table: .*gone.json is not a file"):
        read_table(chosen(tmp_path, table="gone.json"))
    for name in ("train_a.json", "train_b.json"):
        write(tmp_path / "annotations" / name, 0, 5, tmp_path)
    with pytest.raises(DataError, match=r"train may be .*train_a.json or .*train_b.json; leave one"):
        read_table(chosen(tmp_path))


def test_the_real_boxes_of_nih_in_coco_form(real_data: Path) -> None:
    root = real_data / "nih_boxes"
    (path,) = (root / "annotated_data" / "COCO").iterdir()
    settings = chosen(root, table=str(path.relative_to(root)))
    data = json.loads(path.read_text())
    table, boxes = read_table(settings), read_boxes(settings)
    assert boxes is not None
    assert len(table) == len(data["images"]) == 50
    assert len(boxes) + len(boxes.refused) == len(data["annotations"]) == 283
    assert table.refused == boxes.refused
    of_patients = read_table(settings.model_copy(update={"group_pattern": "^[0-9]+"}))
    assert set(of_patients.groups.tolist()) == {image["file_name"].partition("_")[0] for image in data["images"]}
    assert len(set(of_patients.groups.tolist())) == 41
