"""Masks read one image at a time: CheXmask's run lengths, and JSRT's folders."""

from __future__ import annotations

import csv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_indices import made_index
from PIL import Image

from trainables.data.index import DataError
from trainables.data.masks import read_chexmask, rows_by_stem, run_lengths
from trainables.data.registry import load_index, locate, read_masks, read_table
from trainables.settings import DatasetSettings

HEADER = [
    "image_id",
    "Dice RCA (Max)",
    "Dice RCA (Mean)",
    "Landmarks",
    "Left Lung",
    "Right Lung",
    "Heart",
    "Height",
    "Width",
]


def encoded(mask: np.ndarray) -> str:
    """Pixel by pixel, rows first: a run begins where the one before is outside."""
    runs: list[int] = []
    for position, inside in enumerate(mask.ravel().tolist()):
        if inside and (position == 0 or not mask.ravel()[position - 1]):
            runs += [position + 1, 0]
        if inside:
            runs[-1] += 1
    return " ".join(map(str, runs))


@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 12))
def test_run_lengths_are_row_by_row_and_count_from_one(seed: int, height: int, width: int) -> None:
    mask = np.random.default_rng(seed).random((height, width)) < 0.4
    assert np.array_equal(run_lengths(encoded(mask), height, width), mask)


def test_a_run_of_a_known_place() -> None:
    mask = run_lengths("4 2 9 1", 3, 3)  # second row, first two pixels; last pixel of all
    assert mask.astype(int).tolist() == [[0, 0, 0], [1, 1, 0], [0, 0, 1]]


@pytest.mark.parametrize("text", ["1", "0 1", "9 2", "1 0", "a b"])
def test_runs_that_cannot_be_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"pairs of start|leaves the image|invalid literal"):
        run_lengths(text, 3, 3)


def write_chexmask(path: Path, qualities: list[float], *, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = {}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(HEADER)
        for number, quality in enumerate(qualities):
            masks = rng.random((3, 20, 30)) < 0.5
            truth[f"i{number}"] = masks
            landmarks = "[" + ", ".join(map(str, range(40))) + "]"
            writer.writerow([f"i{number}", 0.9, quality, landmarks, *map(encoded, masks), 20, 30.0])
    return truth


def test_chexmask_is_decoded_image_by_image_above_the_quality_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "OriginalResolution" / "VinDr-CXR.csv"
    truth = write_chexmask(path, [0.9, 0.69, 0.7, 0.95])
    masks = read_masks(DatasetSettings(name="vindr_cxr", root=str(tmp_path)))
    assert masks is not None
    assert masks.structures == ("Left Lung", "Right Lung", "Heart")
    assert masks.names == ("i0", "i2", "i3")
    assert masks.left_out == {"i1": "Dice RCA (Mean) is 0.69, below 0.70"}
    for name in reversed(masks.names):
        assert np.array_equal(masks.read(name), truth[name])
    with pytest.raises(DataError, match="no masks of image i1 of the quality asked for"):
        masks.read("i1")
    assert read_chexmask(path, quality=0.5).names == ("i0", "i1", "i2", "i3")


def test_long_rows_are_read_and_the_csv_modules_limit_is_left_as_it_was(tmp_path: Path) -> None:
    runs = " ".join(f"{2 * i + 1} 1" for i in range(30_000))  # 300,000 characters
    path = tmp_path / "VinDr-CXR.csv"
    path.write_text(",".join(HEADER) + f"\ni0,0.9,0.9,,{runs},1 1,1 1,300,300\n")
    before = csv.field_size_limit()
    assert read_chexmask(path).read("i0")[0].sum() == 30_000
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("i0,0.9,good,,1 1,1 1,1 1,3,3", "line 2: could not convert string to float: 'good'"),
        (",0.9,0.9,,1 1,1 1,1 1,3,3", "line 2: no image"),
        ("i0", "line 2: list index out of range; expected 9 fields"),
        ("i0,0.9,0.9,,1 1,1 1,1 1,3,3\ni0,0.9,0.9,,1 1,1 1,1 1,3,3", "line 3: image i0 is listed already"),
    ],
)
def test_a_broken_row_of_chexmask_is_named(tmp_path: Path, row: str, expected: str) -> None:
    (tmp_path / "VinDr-CXR.csv").write_text(",".join(HEADER) + "\n" + row + "\n")
    with pytest.raises(DataError, match=expected):
        read_chexmask(tmp_path / "VinDr-CXR.csv")


def test_a_mask_that_cannot_be_decoded_names_its_line(tmp_path: Path) -> None:
    (tmp_path / "VinDr-CXR.csv").write_text(",".join(HEADER) + "\ni0,0.9,0.9,,1 99,1 1,1 1,3,3\n")
    with pytest.raises(DataError, match="line 2: masks of image i0: a run leaves the image of 3 × 3 pixels"):
        read_chexmask(tmp_path / "VinDr-CXR.csv").read("i0")
    (tmp_path / "VinDr-CXR.csv").write_text("image_id,Heart\n")
    with pytest.raises(DataError, match=r"no column 'Dice RCA \(Mean\)', 'Left Lung'"):
        read_chexmask(tmp_path / "VinDr-CXR.csv")


def test_images_of_one_name_in_several_folders_do_not_share_a_mask() -> None:
    names = ["p1/view1.jpg", "p2/view1.jpg", "p3/view2.jpg"]
    with pytest.raises(DataError, match=r"2 images are called view1, such as p1/view1\.jpg: .* rename the images"):
        rows_by_stem(made_index(names))
    assert rows_by_stem(made_index(names[1:])) == {"view1": 0, "view2": 1}


def test_long_rows_are_read_in_many_threads_at_once(tmp_path: Path) -> None:
    """csv has one limit for the process, and each reader raises it for itself."""
    path = tmp_path / "VinDr-CXR.csv"
    drawn = write_chexmask(path, [0.9] * 8, seed=3)
    before = csv.field_size_limit(200)
    try:
        masks = read_chexmask(path)
        with ThreadPoolExecutor(8) as pool:
            read = list(pool.map(masks.read, list(masks.names) * 20))
        assert csv.field_size_limit() == 200
    finally:
        csv.field_size_limit(before)
    assert len(read) == 20 * len(drawn)


def make_jsrt(root: Path, names: list[str]) -> Path:
    for name in names:
        for folder in ("images", "masks/heart", "masks/lung"):
            (root / folder).mkdir(parents=True, exist_ok=True)
            pixels = np.zeros((8, 8), np.uint8)
            pixels[:4] = 255 if folder.endswith("heart") else 60
            Image.fromarray(pixels).save(root / folder / f"{name}.png")
    return root


def test_jsrt_folders_give_structures_names_and_labels(tmp_path: Path) -> None:
    settings = DatasetSettings(name="jsrt", root=str(make_jsrt(tmp_path, ["JPCLN001", "JPCNN002", "other"])))
    table = read_table(settings).usable()
    assert dict(zip(table.names.tolist(), table.labels[:, 0].tolist(), strict=True)) == {
        "JPCLN001": 1,
        "JPCNN002": 0,
        "other": -1,
    }
    masks = read_masks(settings)
    assert masks is not None
    assert masks.structures == ("heart", "lung")
    assert masks.read("other").sum((1, 2)).tolist() == [32, 32], "of any brightness"


@pytest.mark.parametrize("suffix", [".bmp", ".jp2", ".pgm", ".tif", ".webp"])
def test_images_and_masks_of_a_folder_may_be_of_other_formats(suffix: str, tmp_path: Path) -> None:
    root = make_jsrt(tmp_path, ["JPCLN001", "JPCNN002"])
    for path in (root / "images" / "JPCLN001.png", root / "masks" / "heart" / "JPCNN002.png"):
        Image.open(path).save(path.with_suffix(suffix))
        path.unlink()
    settings = DatasetSettings(name="jsrt", root=str(root))
    table, masks = read_table(settings).usable(), read_masks(settings)
    assert table.names.tolist() == ["JPCLN001", "JPCNN002"]
    assert masks is not None
    assert masks.read("JPCNN002").sum((1, 2)).tolist() == [32, 32]


def test_a_jsrt_image_without_a_mask_is_refused_by_name(tmp_path: Path) -> None:
    root = make_jsrt(tmp_path, ["JPCLN001", "JPCNN002"])
    (root / "masks" / "lung" / "JPCNN002.png").unlink()
    table = read_table(DatasetSettings(name="jsrt", root=str(root)))
    assert [(Path(r.place).name, r.reason) for r in table.refused] == [("JPCNN002.png", "no mask of lung")]
    assert table.names.tolist() == ["JPCLN001"]


def test_jsrt_masks_that_are_none_name_their_file(tmp_path: Path) -> None:
    root = make_jsrt(tmp_path, ["JPCLN001"])
    masks = read_masks(DatasetSettings(name="jsrt", root=str(root)))
    assert masks is not None
    (root / "masks" / "heart" / "JPCLN001.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"heart/JPCLN001.png: the mask cannot be read"):
        masks.read("JPCLN001")
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(root / "masks" / "heart" / "JPCLN001.png")
    with pytest.raises(DataError, match="masks of JPCLN001 differ in size"):
        masks.read("JPCLN001")
    (root / "images" / "images").mkdir()
    with pytest.raises(DataError, match="no folder masks/STRUCTURE"):
        read_table(DatasetSettings(name="jsrt", root=str(root / "images")))


def test_the_real_jsrt_has_its_154_nodules_and_masks_of_five_structures(real_data: Path) -> None:
    settings = DatasetSettings(name="jsrt", root=str(real_data / "jsrt"))
    index = load_index(settings)
    assert (len(index), int(index.labels.sum())) == (247, 154)
    assert len(locate(index, real_data / "jsrt")) == 247
    masks = read_masks(settings)
    assert masks is not None
    assert masks.structures == ("heart", "left_clavicle", "left_lung", "right_clavicle", "right_lung")
    shares = np.mean([masks.read(name).mean((1, 2)) for name in masks.names[:20]], axis=0)
    assert shares[2] == pytest.approx(0.13, abs=0.05)
    assert (shares > 0).all()
