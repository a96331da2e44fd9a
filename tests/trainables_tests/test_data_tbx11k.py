"""TBX11K: COCO files, image labels from boxes, an unknown kind of tuberculosis, and val as the official test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from layout_copies import LAYOUTS, copy_with

from trainables.data.boxes import fused
from trainables.data.index import DataError
from trainables.data.registry import find, load_index, read_boxes, read_table
from trainables.settings import DatasetSettings

TRAIN = "annotations/json/TBX11K_train.json"


def chosen(root: Path = LAYOUTS / "tbx11k", **changes: object) -> DatasetSettings:
    return DatasetSettings(name="tbx11k", root=str(root)).model_copy(update=changes)


def labelled(**changes: object) -> dict[str, list[int]]:
    table = read_table(chosen(**changes)).usable()
    return dict(zip(table.names.tolist(), table.labels.tolist(), strict=True))


def test_labels_are_the_presence_of_boxes_and_a_tb_image_without_one_is_unlabelled() -> None:
    assert labelled() == {
        "health/h9001.png": [0, 0],
        "sick/s9001.png": [0, 0],
        "tb/tb9001.png": [1, 1],
        "tb/tb9002.png": [0, 1],
        "tb/tb9003.png": [-1, -1],
        "health/h9002.png": [0, 0],
        "tb/tb9004.png": [1, 0],
    }
    assert read_table(chosen()).warnings == ("1 images of tb/ have no box of a known kind",)


def test_merged_there_is_one_class_and_the_unknown_kind_has_it() -> None:
    assert {name: row[0] for name, row in labelled(merge_classes=True).items()} == {
        name: int(name.startswith("tb/")) for name in labelled()
    }
    table = read_table(chosen(merge_classes=True))
    assert table.info is not None
    assert table.info.classes == ("Tuberculosis",)


def test_tuberculosis_alone_where_asked_for() -> None:
    assert all(name.startswith("tb/") for name in labelled(only_tb=True))


def test_val_is_the_official_test_since_test_labels_are_withheld() -> None:
    table = read_table(chosen(split="official"))
    assert table.official is not None
    assert table.official.tolist() == [0, 0, 0, 0, 0, 2, 2]
    assert table.info is not None
    assert "test labels are withheld" in table.info.notes[-1]


def test_boxes_are_corners_in_pixels_and_merge_with_the_classes() -> None:
    boxes = read_boxes(chosen())
    assert boxes is not None
    assert boxes.corners.tolist() == [
        [10, 20, 110, 70],
        [300.5, 300.5, 340.5, 340.5],
        [1, 1, 31, 31],
        [100, 100, 512, 512],
    ]
    assert [boxes.classes[label] for label in boxes.labels] == ["Active TB", "Obsolete TB", "Obsolete TB", "Active TB"]
    assert boxes.sizes["health/h9001.png"] == (512, 512)
    merged = read_boxes(chosen(merge_classes=True))
    assert merged is not None
    assert merged.labels.tolist() == [0, 0, 0, 0]
    assert fused(boxes).corners.tolist() == boxes.corners.tolist()


@pytest.mark.parametrize(
    ("old", "new", "place", "reason"),
    [
        ('"image_id": 3', '"image_id": 77', "annotations[0]", "image_id 77 is not among the images"),
        ('"category_id": 1', '"category_id": 9', "annotations[0]", "category_id 9 is not among the categories"),
        ("10.0,", "480.0,", "annotations[0]", "box 480, 20, 580, 70 reaches out of the image of 512 × 512 px"),
        ("100.0,\n    50.0", "0.0,\n    50.0", "annotations[0]", "box 10, 20, 10, 70 has no area"),
        ('"file_name": "sick/s9001.png",', "", "images[1]", "no 'file_name'"),
        ("sick/s9001.png", "health/h9001.png", "images[1]", "image health/h9001.png is listed twice"),
        ("sick/s9001.png", "health/h9002.png", "", "image health/h9002.png is listed in the train file too"),
    ],
)
def test_what_cannot_be_used_is_refused_by_its_place(
    tmp_path: Path, old: str, new: str, place: str, reason: str
) -> None:
    table = read_table(chosen(copy_with(tmp_path, "tbx11k", TRAIN, old, new)))
    refused = {item.place.rpartition(", ")[2] if place else "": item.reason for item in table.refused}
    assert refused.get(place, "").startswith(reason)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[1, 2", "is no JSON in UTF-8"),
        ("[]", "holds no list 'images'"),
        (json.dumps({"images": [], "annotations": {}, "categories": []}), "holds no list 'annotations'"),
        (
            json.dumps({"images": [], "annotations": [], "categories": [{"id": 1}]}),
            "categories: no 'name'; expected an id",
        ),
        ("[" * 100_000, "is no JSON in UTF-8"),
    ],
)
def test_a_file_that_is_no_coco_is_one_clear_error(tmp_path: Path, text: str, expected: str) -> None:
    root = copy_with(tmp_path, "tbx11k", TRAIN, "images", "images")
    (root / TRAIN).write_text(text)
    with pytest.raises(DataError, match=expected):
        read_table(chosen(root))


def test_images_are_found_under_imgs(tmp_path: Path) -> None:
    root = tmp_path / "tbx"
    for part in ("train", "val"):
        images = [
            {"id": i, "file_name": f"{'tb' if i % 3 else 'health'}/{part}{i}.png", "width": 512, "height": 512}
            for i in range(90)
        ]
        boxes = [{"image_id": i, "category_id": 1 + i % 2, "bbox": [1, 1, 5, 5]} for i in range(90) if i % 3]
        names = ["ActiveTuberculosis", "ObsoletePulmonaryTuberculosis", "PulmonaryTuberculosis"]
        categories = [{"id": i + 1, "name": name} for i, name in enumerate(names)]
        (root / "annotations" / "json").mkdir(parents=True, exist_ok=True)
        (root / "annotations" / "json" / f"TBX11K_{part}.json").write_text(
            json.dumps({"images": images, "annotations": boxes, "categories": categories})
        )
        for image in images:
            (root / "imgs" / str(image["file_name"])).parent.mkdir(parents=True, exist_ok=True)
            (root / "imgs" / str(image["file_name"])).touch()
    index = load_index(chosen(root, split="official"))
    assert len(index.rows("test")) == 90
    assert len(index.rows("val")) == pytest.approx(10, abs=2)
    assert None not in find(index, root)
