"""Masks: read from folders and from CheXmask's codes, resized as their images are, kept a bit a pixel, whole or not."""

from __future__ import annotations

import csv
import dataclasses
import multiprocessing
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from made_indices import made_index
from PIL import Image

from tests.made_datasets import make_chexmask
from trainables.data import mask_cache
from trainables.data.chest_scene import draw_chest
from trainables.data.decode import decode
from trainables.data.index import DataError, Index
from trainables.data.mask_cache import MaskCache, open_masks, resize
from trainables.data.mask_files import MaskFolders
from trainables.data.masks import read_mask, run_lengths, stem_of
from trainables.data.phantom import chest_images, draw_chest_phantom
from trainables.data.placing import Fit
from trainables.data.registry import load_index
from trainables.settings import DatasetSettings, SegmentationSettings

Mask = npt.NDArray[np.bool_]
STRUCTURES = ("left_lung", "right_lung", "heart")
FITS: tuple[Fit, ...] = ("crop", "squash", "letterbox")


def index_of(names: Sequence[str], dataset: str = "chestxray14") -> Index:
    """An index of images that lie flat in images/, as ChestX-ray14's and JSRT's do."""
    groups = np.array([f"g{i}" for i in range(len(names))])
    return made_index(names, ("any",), dataset=dataset, groups=groups, group_kind="patient")


def blob(rng: np.random.Generator, height: int, width: int) -> Mask:
    """An ellipse somewhere, large enough to survive any resizing."""
    y, x = np.mgrid[:height, :width]
    cy, cx = rng.uniform(0.4, 0.6, 2) * (height, width)
    mask: Mask = ((y - cy) / (0.3 * height)) ** 2 + ((x - cx) / (0.2 * width)) ** 2 < 1
    return mask


def grey(mask: Mask) -> Image.Image:
    return Image.fromarray(mask.astype(np.uint8) * 255)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Index, Path]:
    """Four images of 40 × 60 px with masks of the three structures."""
    rng = np.random.default_rng(3)
    names = [f"a{i}.png" for i in range(4)]
    (tmp_path / "images").mkdir()
    for structure in STRUCTURES:
        (tmp_path / "masks" / structure).mkdir(parents=True)
    for name in names:
        Image.fromarray(rng.integers(0, 256, (40, 60), dtype=np.uint8)).save(tmp_path / "images" / name)
        for structure in STRUCTURES:
            grey(blob(rng, 40, 60)).save(tmp_path / "masks" / structure / name)
    return index_of(names), tmp_path


def opened(index: Index, root: Path, size: int = 32, fit: Fit = "crop", **given: object) -> MaskCache:
    settings = SegmentationSettings.model_validate(given)
    dataset = DatasetSettings(name=index.dataset, image_size=size, fit=fit)
    return open_masks(dataset, settings, index, root=root, folder=root / "decoded")


# ---------------------------------------------------------------------------------------------------- run-length codes


def test_a_run_length_code_counts_from_one_and_goes_row_by_row() -> None:
    """2 3 | 9 1 | 12 1 in a 3 × 4 image: pixels 2–4 of the first row, the first and the last of the third."""
    mask = run_lengths("2 3 9 1 12 1", 3, 4)
    assert mask.astype(int).tolist() == [[0, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 1]]
    assert not run_lengths("", 3, 4).any()
    assert run_lengths("1 12", 3, 4).all()


@pytest.mark.parametrize("seed", range(5))
def test_codes_written_pixel_by_pixel_are_read_back(seed: int) -> None:
    mask = np.random.default_rng(seed).random((17, 23)) < 0.4
    code, flat = [], mask.flatten().tolist()
    for at, inside in enumerate(flat):
        if inside and (at == 0 or not flat[at - 1]):
            code += [at + 1, 1]
        elif inside:
            code[-1] += 1
    assert (run_lengths(" ".join(map(str, code)), *mask.shape) == mask).all()


@pytest.mark.parametrize("code", ["1", "1 2 3", "1 x", "0 3", "10 4", "3 0", "1 5 4 2", "5 2 1 2", "1 -2"])
def test_a_broken_code_is_refused(code: str) -> None:
    with pytest.raises(ValueError, match=r"pairs|leaves the image|overlap|invalid literal"):
        run_lengths(code, 3, 4)


# ---------------------------------------------------------------------------------------------------------- mask files


@pytest.mark.parametrize("top", [1, 128, 255])
def test_masks_of_any_brightness_are_read_alike(tmp_path: Path, top: int) -> None:
    mask = blob(np.random.default_rng(0), 20, 30)
    Image.fromarray((mask * top).astype(np.uint8)).save(tmp_path / "m.png")
    assert (read_mask(tmp_path / "m.png") == mask).all()


def test_an_empty_mask_is_empty_and_an_antialiased_edge_is_cut_in_the_middle(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 127, 128, 255]], np.uint8)).save(tmp_path / "edge.png")
    Image.fromarray(np.zeros((1, 4), np.uint8)).save(tmp_path / "none.png")
    assert read_mask(tmp_path / "edge.png").tolist() == [[False, False, True, True]]
    assert not read_mask(tmp_path / "none.png").any()


def test_images_and_masks_find_each_other_by_stem() -> None:
    assert [stem_of(n) for n in ("a.png", "train/b.dicom", "c", "1.2.840.5")] == ["a", "b", "c", "1.2.840.5"]


# ------------------------------------------------------------------------------------------------------------ geometry


def test_a_pixel_is_inside_where_at_least_half_of_its_area_is() -> None:
    mask = np.array([[1, 1, 0, 0], [0, 0, 0, 1], [1, 1, 0, 0], [1, 0, 0, 0]], np.bool_)
    assert resize(mask, 2, "squash").tolist() == [[True, False], [True, False]]


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize(("height", "width"), [(90, 60), (60, 90), (64, 64), (23, 31)])
def test_a_mask_has_the_geometry_of_its_image(tmp_path: Path, fit: Fit, height: int, width: int) -> None:
    """The same picture, decoded as an image and as a mask: they may differ on the edge's own pixels alone."""
    mask = blob(np.random.default_rng(height), height, width)
    grey(mask).save(tmp_path / "i.png")
    pixels = decode(tmp_path / "i.png", 48, fit, 1)[:, :, 0]
    inside = resize(mask, 48, fit)
    if fit == "letterbox":
        pixels = np.where(pixels == 114, 0, pixels)  # what the letterbox adds is no part of the picture
    seen = pixels > 127
    assert inside.sum() > 200
    assert (inside != seen).sum() <= 0.08 * inside.sum()  # a shift by one pixel would change more
    ours, theirs = (np.array(np.nonzero(m)).mean(axis=1) for m in (inside, seen))
    assert np.abs(ours - theirs).max() < 0.2  # px


def test_masks_of_the_phantom_are_those_of_its_scenes(tmp_path: Path) -> None:
    settings = DatasetSettings(name="phantom", images=40, image_size=96)
    draw_chest_phantom(settings, tmp_path)
    rows = chest_images(0, 40)
    masks = opened(index_of([row.name for row in rows], "phantom"), tmp_path, size=96)
    for number in (0, 17, 39):
        row = rows[number]
        scene = draw_chest(0, row.patient, row.follow_up, row.findings, ap=row.ap)
        ours = masks.of(np.array([number]))[0]
        assert all((ours[c] == scene.masks[name]).all() for c, name in enumerate(STRUCTURES))


def test_rows_and_areas_are_those_of_the_files(folders: tuple[Index, Path]) -> None:
    index, root = folders
    masks = opened(index, root, size=40, fit="crop", structures=("heart", "left_lung"))
    rows = np.array([3, 1])
    for place, row in enumerate(rows):
        for c, structure in enumerate(("heart", "left_lung")):
            whole = np.asarray(Image.open(root / "masks" / structure / f"a{row}.png")) > 127
            assert (masks.of(rows)[place, c] == whole[:, 10:50]).all()
            assert masks.area(rows)[place, c] == whole[:, 10:50].sum()
    assert masks.known.all()


# ---------------------------------------------------------------------------------------------------------- bad input


def test_a_missing_folder_is_named_with_those_that_there_are(folders: tuple[Index, Path]) -> None:
    index, root = folders
    with pytest.raises(DataError, match=r"no masks of 'clavicle'.*there are heart, left_lung, right_lung"):
        opened(index, root, structures=("heart", "clavicle"))


def test_missing_masks_are_counted_and_the_first_is_named(folders: tuple[Index, Path]) -> None:
    index, root = folders
    for name in ("a1.png", "a3.png"):
        (root / "masks" / "heart" / name).unlink()
    with pytest.raises(DataError, match=r"2 of 4 images have no mask in .*heart; the first is a1\.png"):
        opened(index, root)


def test_an_unreadable_mask_is_named(folders: tuple[Index, Path]) -> None:
    index, root = folders
    file = root / "masks" / "heart" / "a2.png"
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(DataError, match=r"a2\.png: the mask cannot be read"):
        opened(index, root)
    assert not [p for p in (root / "decoded").iterdir() if p.is_dir() and not p.name.startswith(".")]


def test_a_mask_of_other_proportions_than_its_image_is_refused(folders: tuple[Index, Path]) -> None:
    index, root = folders
    grey(np.ones((60, 40), np.bool_)).save(root / "masks" / "heart" / "a0.png")
    with pytest.raises(DataError, match=r"a0\.png: a mask of 60 × 40 px .* an image of 40 × 60, a0\.png;"):
        opened(index, root)


# ------------------------------------------------------------------------------------------------------------ CheXmask


HEADER = ["image_id", "Dice RCA (Max)", "Dice RCA (Mean)", "Landmarks", "Left Lung", "Right Lung", "Heart"]


def write_table(path: Path, rows: Sequence[Sequence[object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([[*HEADER, "Height", "Width"], *rows])


def line(name: str, quality: object, code: str = "1 60", shape: tuple[int, int] = (40, 60)) -> list[object]:
    return [name, 0.9, quality, "[]", code, code, "121 60", *shape]


def test_chexmask_is_read_by_name_and_poor_or_absent_masks_are_unknown(folders: tuple[Index, Path]) -> None:
    index, root = folders
    write_table(root / "t.csv", [line("a2", 0.7), line("other", 0.9), line("a0", 0.69), line("a1", "nan")])
    masks = opened(index, root, size=60, fit="squash", masks="t.csv")
    assert masks.known.tolist() == [[False] * 3, [False] * 3, [True] * 3, [False] * 3]
    wanted = np.zeros((40, 60), np.bool_)
    wanted[0] = True
    assert (masks.of(np.array([2]))[0, 0] == resize(wanted, 60, "squash")).all()
    assert (masks.of(np.array([2]))[0, 2] == resize(np.roll(wanted, 2, axis=0), 60, "squash")).all()
    assert not masks.of(np.array([0])).any()
    lower = opened(index, root, size=60, fit="squash", masks=str(root / "t.csv"), min_mask_quality=0.6)
    assert lower.known[:, 0].tolist() == [True, False, True, False]


def test_chexmask_goes_with_the_dicom_files_that_it_was_made_for(tmp_path: Path) -> None:
    pytest.importorskip("pydicom", reason="the extra 'dicom' is not installed")
    index = load_index(DatasetSettings(name="vindr_cxr", root=str(make_chexmask(tmp_path))))
    masks = opened(index, tmp_path, size=40, masks="OriginalResolution/VinDr-CXR.csv")
    assert masks.known.all(1).sum() == 159 - 15, "one is not listed, every tenth is poor"
    row = int(np.flatnonzero(masks.known.all(1))[0])
    assert masks.area(np.array([row]))[0].tolist() == [220, 220, 144]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([line("a0", 0.9), line("a0", 0.9)], r"t\.csv, line 3: image a0 is listed already"),
        ([line("a0", 0.9, shape=(60, 60))], r"t\.csv, image a0: a mask of 60 × 60 px .*OriginalResolution"),
        ([line("a0", 0.9, "2400 2")], r"t\.csv, line 2: masks of image a0: a run leaves the image of 40 × 60"),
        ([line("a0", "good")], r"t\.csv, line 2: .*'good'; expected .* quality a number"),
        ([[*line("a0", 0.9)[:-1], "wide"]], r"t\.csv, line 2: masks of image a0: .*'wide'"),
        ([line("b", 0.9)], r"t\.csv: has none of the 4 images of chestxray14, such as a0\.png"),
    ],
)
def test_a_bad_table_is_refused_with_its_line(
    folders: tuple[Index, Path], rows: list[list[object]], message: str
) -> None:
    index, root = folders
    write_table(root / "t.csv", rows)
    with pytest.raises(DataError, match=message):
        opened(index, root, masks="t.csv")


def test_no_table_and_a_structure_that_chexmask_lacks_are_refused(folders: tuple[Index, Path]) -> None:
    index, root = folders
    with pytest.raises(DataError, match=r"segmentation\.masks: no table .*gone\.csv"):
        opened(index, root, masks="gone.csv")
    write_table(root / "t.csv", [line("a0", 0.9)])
    with pytest.raises(DataError, match=r"CheXmask has no 'left_clavicle'; it has left_lung, right_lung, heart"):
        opened(index, root, masks="t.csv", structures=("left_clavicle",))


# ------------------------------------------------------------------------------------------------------------- the map


def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one whenever masks are decoded."""
    counted: list[int] = []
    read = MaskFolders.read

    def counting(self: MaskFolders) -> object:
        counted.append(1)
        return read(self)

    monkeypatch.setattr(MaskFolders, "read", counting)
    return counted


def test_masks_are_decoded_once_and_again_when_a_file_changes(
    folders: tuple[Index, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    index, root = folders
    counted = reads(monkeypatch)
    first, again = opened(index, root), opened(index, root)
    assert len(counted) == 1
    assert first.contents_digest == again.contents_digest
    grey(~blob(np.random.default_rng(8), 40, 60)).save(root / "masks" / "heart" / "a0.png")
    changed = opened(index, root)
    assert len(counted) == 2
    assert changed.contents_digest != first.contents_digest
    assert (changed.of(np.array([0]))[0, 2] != first.of(np.array([0]))[0, 2]).any()


def test_each_size_fit_and_choice_of_structures_has_a_map_of_its_own(folders: tuple[Index, Path]) -> None:
    index, root = folders
    digests = {opened(index, root, size=s, fit=f).contents_digest for s in (32, 40) for f in FITS}
    digests.add(opened(index, root, structures=("heart",)).contents_digest)
    assert len(digests) == 7


@pytest.mark.parametrize("damage", ["bit", "cut", "no state", "broken state"])
def test_a_damaged_map_is_made_again(folders: tuple[Index, Path], damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    index, root = folders
    whole = opened(index, root)
    place = next(p for p in (root / "decoded").iterdir() if p.is_dir())
    bits, state = place / "masks.u8", place / "state.npz"
    content = whole.bits.tobytes()
    if damage == "bit":
        bits.write_bytes(content[:100] + bytes([content[100] ^ 8]) + content[101:])
    elif damage == "cut":
        bits.write_bytes(content[:-1])
    elif damage == "no state":
        state.unlink()
    else:
        state.write_bytes(state.read_bytes()[:50])
    counted = reads(monkeypatch)
    assert opened(index, root).contents_digest == whole.contents_digest
    assert len(counted) == 1


def _killed_on_the_way(index: Index, root: Path) -> None:
    write = mask_cache._write
    written: list[int] = []

    def dying(*arguments: object) -> None:
        written.append(1)
        if len(written) == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        write(*arguments)  # type: ignore[arg-type]

    mask_cache._write = dying  # type: ignore[assignment]
    opened(index, root)


def test_a_process_killed_while_decoding_leaves_nothing_half_made(folders: tuple[Index, Path]) -> None:
    index, root = folders
    process = multiprocessing.get_context("fork").Process(target=_killed_on_the_way, args=(index, root))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert [p.name for p in (root / "decoded").glob(".*.partial-*")], "it died on the way"
    assert opened(index, root).known.all()
    assert not list((root / "decoded").glob(".*.partial-*"))


def test_masks_of_real_radiographs_lie_where_anatomy_has_them(real_data: Path, tmp_path: Path) -> None:
    """JSRT's expert masks: the patient's left lung is on the right of the image, the heart between and below."""
    root = real_data / "jsrt"
    names = sorted(path.name for path in (root / "images").iterdir())
    index = dataclasses.replace(index_of(names), dataset="chestxray14")
    masks = open_masks(
        DatasetSettings(name="chestxray14", image_size=128),
        SegmentationSettings(),
        index,
        root=root,
        folder=tmp_path,
    )
    rows = np.arange(len(names))
    assert len(names) == 247
    areas = masks.area(rows) / 128**2
    assert (areas > 0.02).all()
    assert (areas < 0.35).all()
    y, x = np.mgrid[:128, :128]
    planes = masks.of(rows)
    centre_x = (planes * x).sum((2, 3)) / planes.sum((2, 3))
    centre_y = (planes * y).sum((2, 3)) / planes.sum((2, 3))
    assert (centre_x[:, 0] > centre_x[:, 2]).all()
    assert (centre_x[:, 2] > centre_x[:, 1]).all()
    assert (centre_y[:, 2] > centre_y[:, :2].max(axis=1)).all()
