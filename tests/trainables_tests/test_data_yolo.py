"""Data sets in YOLO's form: two layouts of folders, parts of the image to pixels, every bad line by its place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainables.data.index import DataError
from trainables.data.registry import load_index, locate, read_boxes, read_table
from trainables.settings import DatasetSettings

NAMES = "names: [Mass, Nodule]\ntrain: ../train/images\n"


def write(root: Path, images: str, labels: str, first: int, count: int) -> None:
    """Images of 50 × 40 px; odd numbers have a Mass, every third a Nodule; others have an empty file or none."""
    for folder in (images, labels):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "data.yaml").write_text(NAMES)
    for n in range(first, first + count):
        Image.fromarray(np.zeros((40, 50), np.uint8)).save(root / images / f"n{n}.jpg")
        lines = ["0 0.5 0.5 0.2 0.5"] * (n % 2) + ["1 0.1 0.1 0.2 0.2"] * (n % 3 == 0)
        if lines or n % 4:
            (root / labels / f"n{n}.txt").write_text("\n".join(lines))


def chosen(root: Path, **changes: object) -> DatasetSettings:
    return DatasetSettings(name="yolo", root=str(root)).model_copy(update=changes)


@pytest.mark.parametrize("form", [("images/{}", "labels/{}", "val"), ("{}/images", "{}/labels", "valid")])
def test_both_layouts_give_labels_and_the_official_split(tmp_path: Path, form: tuple[str, str, str]) -> None:
    images, labels, val = form
    for word, first, count in (("train", 0, 120), (val, 120, 30), ("test", 150, 30)):
        write(tmp_path, images.format(word), labels.format(word), first, count)
    index = load_index(chosen(tmp_path, split="official"))
    assert [len(index.rows(split)) for split in ("train", "val", "test")] == [120, 30, 30]
    number = np.array([int(Path(name).stem[1:]) for name in index.names.tolist()])
    assert np.array_equal(index.labels, np.stack([number % 2, number % 3 == 0], 1))
    assert len(locate(index, tmp_path)) == 180


def test_a_single_folder_is_split_by_us_and_images_without_a_file_are_counted(tmp_path: Path) -> None:
    write(tmp_path, "images", "labels", 0, 100)
    index = load_index(chosen(tmp_path))
    assert [len(index.rows(split)) for split in ("train", "val", "test")] == [80, 10, 10]
    without = sum(n % 2 == 0 and n % 3 != 0 and n % 4 == 0 for n in range(100))
    warning = f"{without} images have no text file: read as images without a box"
    assert read_table(chosen(tmp_path)).warnings == (warning,)


def test_groups_are_found_in_names_whatever_folder_they_lie_in(tmp_path: Path) -> None:
    write(tmp_path, "images/train", "labels/train", 10, 60)
    write(tmp_path, "images/val", "labels/val", 70, 30)
    index = load_index(chosen(tmp_path, group_pattern=r"^n\d"))
    assert set(index.groups.tolist()) == {f"n{digit}" for digit in range(1, 10)}


def test_boxes_are_pixels_of_the_original(tmp_path: Path) -> None:
    write(tmp_path, "images", "labels", 3, 1)
    boxes = read_boxes(chosen(tmp_path))
    assert boxes is not None
    assert boxes.corners == pytest.approx(np.array([[20, 10, 30, 30], [0, 0, 10, 8]]))
    assert boxes.sizes == {"images/n3.jpg": (50, 40)}
    assert boxes.labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("0 0.5 0.5 0.2", "4 values; expected class, x_centre, y_centre, width, height"),
        ("2 0.5 0.5 0.2 0.2", "class 2; expected 0 … 1, as data.yaml names them"),
        ("0 0.95 0.5 0.2 0.2", "box 0.95 0.5 0.2 0.2 reaches out of the image"),
        ("0 0.5 0.5 0 0.2", "box 0.5, 0.4, 0.5, 0.6 has no area"),
        ("Mass 0.5 0.5 0.2 0.2", "invalid literal for int() with base 10: 'Mass'"),
        ("0 nan 0.5 0.2 0.2", "box"),
    ],
)
def test_a_line_that_cannot_be_used_is_refused_by_its_place(tmp_path: Path, line: str, reason: str) -> None:
    write(tmp_path, "images", "labels", 0, 6)
    (tmp_path / "labels" / "n3.txt").write_text(f"0 0.5 0.5 0.2 0.5\n\n{line}\n")
    for refused in (read_table(chosen(tmp_path)).refused, read_boxes(chosen(tmp_path)).refused):  # type: ignore[union-attr]
        assert len(refused) == 1
        assert refused[0].place.endswith("labels/n3.txt, line 3")
        assert refused[0].reason.startswith(reason)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("names: {0: Mass, 1: Nodule}", None),
        ("names: {1: Mass, 2: Nodule}", "names: expected a list of the classes' names"),
        ("names: [Mass, Mass]", "names: expected a list"),
        ("nc: 2", "names: expected a list"),
        ("names: [", "cannot be read as YAML"),
        ("!!python/object:os.system x", "cannot be read as YAML"),
    ],
)
def test_the_classes_names_are_read_from_the_yaml(tmp_path: Path, text: str, expected: str | None) -> None:
    write(tmp_path, "images", "labels", 0, 6)
    (tmp_path / "data.yaml").write_text(text)
    if expected is None:
        assert read_table(chosen(tmp_path)).info.classes == ("Mass", "Nodule")  # type: ignore[union-attr]
        return
    with pytest.raises(DataError, match=expected):
        read_table(chosen(tmp_path))


def test_what_is_not_there_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no data.yaml or dataset.yaml or data.yml in .*: it names the classes"):
        read_table(chosen(tmp_path))
    (tmp_path / "data.yaml").write_text(NAMES)
    with pytest.raises(DataError, match=r"no images/ or train/images/ in"):
        read_table(chosen(tmp_path))
    write(tmp_path, "images", "labels", 0, 6)
    with pytest.raises(DataError, match=r"no train folder beside .*; set dataset.split=grouped"):
        read_table(chosen(tmp_path, split="official"))
