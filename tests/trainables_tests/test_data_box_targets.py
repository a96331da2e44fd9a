"""Boxes: read from ChestX-ray14's list and from COCO files, put where the image lies, refused where they are none."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_indices import made_index
from PIL import Image

from tests.made_datasets import SIZE as MADE_SIZE
from tests.made_datasets import make_vindr
from tests.task_cases import CASES, opened
from trainables.data.box_targets import BoxTargets, load_box_targets, with_sizes
from trainables.data.boxes import fused
from trainables.data.chest_scene import BOXED, draw_chest
from trainables.data.chestxray14 import ORIGINAL_SIZE
from trainables.data.decode import LETTERBOX_GREY, Fit, decode
from trainables.data.index import DataError, Index
from trainables.data.placing import place
from trainables.data.registry import load_index, read_boxes
from trainables.data.scenes import SIZE
from trainables.detection_kind import DETECTION, boxed_classes
from trainables.settings import Settings

LIST = "Image Index,Finding Label,Bbox [x,y,w,h],,,\n"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp() / "task_cases"


def index_of(*names: str, classes: tuple[str, ...] = ("Mass", "Nodule"), dropped: tuple[str, ...] = ()) -> Index:
    """Real images, the first two to train on."""
    labels, split = (
        np.ones((len(names), len(classes)), np.uint8),
        np.resize(np.array([0, 0, 1, 2], np.uint8), len(names)),
    )
    return made_index(names, classes, labels=labels, split=split, group_kind="patient", dropped=dropped)


def settings_of(root: Path, **detection: Any) -> Settings:
    dataset = {"name": "chestxray14", "root": str(root), "fit": "letterbox", "image_size": 64}
    return Settings.model_validate({"task": "detection", "dataset": dataset, "detection": detection})


def coco(folder: Path, name: str = "boxes.json", **changes: Any) -> Path:
    document = {
        "images": [
            {"id": 7, "file_name": "part/a.png", "width": 200, "height": 100},
            {"id": 8, "file_name": "b.jpg", "width": 100, "height": 100},
            {"id": 9, "file_name": "elsewhere.png", "width": 100, "height": 100},
        ],
        "categories": [{"id": 3, "name": "Nodule"}, {"id": 1, "name": "Mass"}, {"id": 2, "name": "Rib fracture"}],
        "annotations": [
            {"id": 1, "image_id": 8, "category_id": 3, "bbox": [10, 20, 30, 40]},
            {"id": 2, "image_id": 7, "category_id": 1, "bbox": [50, 0, 100, 50]},
            {"id": 3, "image_id": 9, "category_id": 1, "bbox": [0, 0, 10, 10]},
        ],
    }
    path = folder / name
    path.write_text(json.dumps({**document, **changes}), encoding="utf-8")
    return path


# -- the phantom -----------------------------------------------------------------------------------------------------


def test_boxes_of_the_phantom_are_those_of_its_scenes(drawn: Path) -> None:
    settings = CASES["detection by YOLO"].settings()
    data = opened(settings, drawn)
    boxes = load_box_targets(settings, data.index, data.root)
    assert boxes.classes == boxed_classes(settings, data.index) == ("Atelectasis", "Effusion", "Infiltration", "Nodule")
    assert boxes.annotated.all()
    with (data.root / "Data_Entry_2017_v2020.csv").open(encoding="utf-8") as file:
        rows = {row["Image Index"]: row for row in csv.DictReader(file)}
    seen = 0
    for number, name in enumerate(data.index.names.tolist()[:20]):
        row = rows[name]
        findings = [f for f in row["Finding Labels"].split("|") if f != "No Finding"]
        patient, follow_up = int(row["Patient ID"]), int(row["Follow-up #"])
        scene = draw_chest(0, patient, follow_up, findings, ap=row["View Position"] == "AP")
        expected = {
            (boxes.classes.index(f), *np.round(np.array([x, y, x + w, y + h]) / SIZE, 9).tolist())
            for f, (x, y, w, h) in scene.boxes.items()
            if f in boxes.classes
        }
        mine = boxes.rows == number
        shown = np.round(boxes.corners[mine] / ORIGINAL_SIZE, 9).tolist()
        found = {(label, *box) for label, box in zip(boxes.labels[mine].tolist(), shown, strict=True)}
        assert found == expected
        seen += len(expected)
    assert seen > 10


def test_the_plan_knows_the_phantoms_classes_without_drawing_it(tmp_path: Path) -> None:
    settings = CASES["detection by YOLO"].settings()
    index = index_of("a.png", "b.png", "c.png", "d.png", classes=("Edema", *BOXED))
    assert boxed_classes(settings, index) == BOXED
    with pytest.raises(DataError, match="no class with boxes is left; keep one of Atelectasis"):
        boxed_classes(settings, index_of("a.png", classes=("Edema", "Hernia")))


# -- files -----------------------------------------------------------------------------------------------------------


def test_the_list_of_chestxray14_is_read_with_its_spelling_and_its_1024_px(tmp_path: Path) -> None:
    rows = "b.png,Infiltrate,512,256,256,128\na.png,Mass,0,0,1024,512,,,\nother.png,Mass,0,0,9,9\n"
    (tmp_path / "BBox_List_2017.csv").write_text(LIST + rows, encoding="utf-8")
    index = index_of("a.png", "b.png", "c.png", classes=("Infiltration", "Mass"))
    boxes = load_box_targets(settings_of(tmp_path), index, tmp_path)
    assert boxes.classes == ("Infiltration", "Mass")
    assert boxes.rows.tolist() == [0, 1]
    assert boxes.labels.tolist() == [1, 0]
    assert boxes.corners.tolist() == [[0, 0, 1024, 512], [512, 256, 768, 384]]
    assert boxes.in_input(64, "squash").tolist() == [[0, 0, 64, 32], [32, 16, 48, 24]]
    assert boxes.annotated.tolist() == [True, True, False], "an image that is not listed was not looked at"


def test_a_coco_file_is_read_by_names_with_or_without_folder_and_extension(tmp_path: Path) -> None:
    index = index_of("b", "a.png", "c.png")
    boxes = load_box_targets(settings_of(tmp_path, boxes=coco(tmp_path).name), index, tmp_path)
    assert boxes.classes == ("Mass", "Nodule"), "the data set's order; a category without a box is no class"
    assert boxes.rows.tolist() == [0, 1]
    assert boxes.labels.tolist() == [1, 0]
    assert boxes.corners.tolist() == [[10, 20, 40, 60], [50, 0, 150, 50]]
    assert boxes.sizes[:2].tolist() == [[100, 100], [200, 100]]
    assert boxes.annotated.tolist() == [True, True, False]


def test_dropped_classes_have_no_boxes_and_images_without_any_still_count(tmp_path: Path) -> None:
    index = index_of("b.jpg", "a.png", classes=("Mass",), dropped=("Nodule",))
    boxes = load_box_targets(settings_of(tmp_path, boxes=str(coco(tmp_path))), index, tmp_path)
    assert boxes.classes == ("Mass",)
    assert boxes.rows.tolist() == [1]
    assert boxes.annotated.tolist() == [True, True]


def test_a_changed_box_changes_the_digest_that_keys_depend_on(tmp_path: Path) -> None:
    index = index_of("b.jpg", "a.png")
    path = coco(tmp_path)
    settings = settings_of(tmp_path, boxes=str(path))
    before = DETECTION.targets_digest(settings, index)
    assert DETECTION.targets_digest(settings, index) == before
    path.write_text(
        path.read_text(encoding="utf-8").replace("[10, 20, 30, 40]", "[11, 20, 30, 40.0]"), encoding="utf-8"
    )
    assert DETECTION.targets_digest(settings, index) != before


def test_boxes_that_are_none_are_refused_with_their_place_and_number(tmp_path: Path) -> None:
    whole = [{"id": n, "image_id": 8, "category_id": 1, "bbox": box} for n, box in enumerate(([90, 90, 30, 5], "none"))]
    settings = settings_of(tmp_path, boxes=str(coco(tmp_path, annotations=whole)))
    with pytest.raises(DataError, match=r"annotations\[0\]: box .* reaches out of the image .*\(2 such boxes in all"):
        load_box_targets(settings, index_of("b.jpg", "a.png"), tmp_path)


def test_a_name_without_folder_that_several_images_have_is_nobodys(tmp_path: Path) -> None:
    index = index_of("p1/a.png", "p2/a.png", "b.jpg")
    boxes = load_box_targets(settings_of(tmp_path, boxes=str(coco(tmp_path))), index, tmp_path)
    assert boxes.annotated.tolist() == [False, False, True]


def test_readers_are_fused_and_sizes_that_no_table_tells_are_those_of_the_decoded_images(tmp_path: Path) -> None:
    """VinDr-CXR's boxes are in px of the image, whose size is in its file alone."""
    make_vindr(tmp_path, images=20)
    settings = Settings.model_validate(
        {
            "task": "detection",
            "dataset": {"name": "vindr_cxr", "root": str(tmp_path), "fit": "letterbox", "image_size": 64},
        }
    )
    index = load_index(settings.dataset)
    planned = load_box_targets(settings, index, tmp_path)
    assert not planned.sizes.any()
    boxes = with_sizes(planned, index, np.full((len(index), 2), MADE_SIZE))
    drawn = read_boxes(settings.dataset)
    assert drawn is not None
    assert len(boxes.rows) == len(fused(drawn)) < len(drawn)
    assert (boxes.sizes[boxes.rows] == MADE_SIZE).all()
    assert (boxes.in_input(64, "letterbox") <= 64).all()
    with pytest.raises(DataError, match=r"image 0{31}\d: box .* reaches out of the image of 9 × 9 px; mend or remove"):
        with_sizes(planned, index, np.full((len(index), 2), 9))


def test_boxes_of_other_images_and_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"chestxray14: none of the 3 images that have boxes .* part/a.png"):
        load_box_targets(settings_of(tmp_path, boxes=str(coco(tmp_path))), index_of("x.png", "y.png"), tmp_path)
    with pytest.raises(DataError, match=r"detection.boxes: .*nowhere.json does not exist"):
        load_box_targets(settings_of(tmp_path, boxes="nowhere.json"), index_of("a.png"), tmp_path)
    with pytest.raises(DataError, match=r"chestxray14: no boxes come with .*; set detection.boxes"):
        load_box_targets(settings_of(tmp_path), index_of("a.png"), tmp_path)


def test_a_class_without_a_training_box_is_refused_with_what_to_drop(tmp_path: Path) -> None:
    index = index_of("a.png", "x.png", "b.jpg")  # the nodule is in a validation image
    with pytest.raises(DataError, match=r"no training box of Nodule; .* dataset.drop_classes=\[Nodule\]"):
        boxed_classes(settings_of(tmp_path, boxes=str(coco(tmp_path))), index)


def test_a_split_without_a_box_is_refused_with_the_counts(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, boxes=str(coco(tmp_path)))
    with pytest.raises(DataError, match=r"no box in test \(boxes: train 2, val 1, test 0\); take more images"):
        boxed_classes(settings, index_of("a.png", "b.jpg", "elsewhere.png", "x.png"))


def test_the_true_boxes_of_real_radiographs_are_read(real_data: Path) -> None:
    path = next((real_data / "nih_boxes").rglob("*coco*.json"))
    document = json.loads(path.read_text(encoding="utf-8"))
    images = {image["id"]: image["file_name"] for image in document["images"]}
    index = index_of(*sorted(images.values()))
    boxes = load_box_targets(settings_of(path.parent, boxes=str(path)), index, path.parent)
    assert len(boxes.corners) == len(document["annotations"]) == 283
    assert set(boxes.classes) <= {c["name"] for c in document["categories"]}
    first = document["annotations"][0]
    x, y, w, h = first["bbox"]
    mine = boxes.rows == index.names.tolist().index(images[first["image_id"]])
    assert np.isclose(boxes.corners[mine], [x, y, x + w, y + h]).all(1).any()


# -- geometry --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fit", ["letterbox", "squash"])
@pytest.mark.parametrize(("width", "height"), [(120, 80), (80, 120), (97, 31), (64, 64)])
def test_a_box_lies_on_the_same_pixels_of_the_input_as_of_the_image(
    fit: Fit, width: int, height: int, tmp_path: Path
) -> None:
    """A white rectangle is drawn, decoded, and found again where its box is said to be."""
    left, top, right, bottom = width // 4, height // 3, width // 4 + width // 3, height // 3 + height // 2
    pixels = np.zeros((height, width), np.uint8)
    pixels[top:bottom, left:right] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    corners = np.array([[left, top, right, bottom]], np.float64)
    boxes = BoxTargets(("x",), np.array([0]), np.array([0]), corners, np.array([[width, height]]), np.ones(1, np.bool_))
    x1, y1, x2, y2 = boxes.in_input(64, fit)[0]
    shown = decode(tmp_path / "a.png", 64, fit, 1)[..., 0]
    rows, columns = np.nonzero(shown > 180)
    found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    np.testing.assert_allclose([x1, y1, x2, y2], found, atol=1.01)


def test_letterboxing_keeps_the_whole_image_and_its_shape_on_grey(tmp_path: Path) -> None:
    Image.fromarray(np.full((30, 90), 200, np.uint8)).save(tmp_path / "wide.png")
    shown = decode(tmp_path / "wide.png", 60, "letterbox", 3)
    assert shown.shape == (60, 60, 3)
    assert (shown[20:40] == 200).all()
    assert (shown[:20] == LETTERBOX_GREY).all() and (shown[40:] == LETTERBOX_GREY).all()
    assert place(90, 30, 60, "letterbox") == (0, 20, 60, 20)
    assert place(90, 30, 60, "crop") == (-60, 0, 180, 60)


def test_boxes_of_rows_come_in_the_rows_order() -> None:
    rows = np.array([1, 1, 3, 4, 4, 4])
    boxes = BoxTargets(("x",), rows, np.zeros(6, int), np.zeros((6, 4)), np.ones((6, 2), int), np.ones(6, np.bool_))
    image, number = boxes.of(np.array([4, 0, 1]))
    assert image.tolist() == [0, 0, 0, 2, 2]
    assert number.tolist() == [3, 4, 5, 0, 1]
