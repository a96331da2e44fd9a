"""Tables and images that chance or malice has broken: one clear error or named rows, no traceback, no hang, no bomb."""

from __future__ import annotations

import csv
import io
import json
import shutil
import struct
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layout_copies import LAYOUTS
from made_indices import made_index
from PIL import Image

from tests.made_datasets import CSV_OPTIONS
from trainables.data.decode import UNREADABLE, decode_whole, size_of
from trainables.data.images import ImageCache
from trainables.data.index import DataError, Index
from trainables.data.registry import find, read_boxes, read_masks, read_table, split_table
from trainables.settings import DatasetSettings

SECONDS = 5.0  # that reading a broken file of a few kB may take, however busy the machine is
OFFICIAL: dict[str, Any] = {"split": "official"}
OWN = {key.removeprefix("dataset."): value for key, value in CSV_OPTIONS.items()}


@dataclass(frozen=True)
class Layout:
    """A small true layout.

    Attributes:
        files: that are broken, by turns.
        images: table with one row an image, if there is one: each row must be accounted for.
    """

    dataset: str
    folder: str
    files: tuple[str, ...]
    images: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


NIH, HAM, CHEXPERT = "Data_Entry_2017_v2020.csv", "HAM10000_metadata.csv", "CheXpert-v1.0-small/train.csv"
LABELS = "annotations/image_labels_train.csv"
COCO = "annotations/json/TBX11K_train.json"
CASES = (
    Layout("chestxray14", "chestxray14", (NIH, "BBox_List_2017.csv"), NIH),
    Layout("chestxray14", "chestxray14", (NIH, "train_val_list.txt", "test_list.txt"), NIH, OFFICIAL),
    Layout("ham10000", "ham10000", (HAM,), HAM),
    Layout("chexpert", "chexpert", (CHEXPERT,), CHEXPERT),
    Layout("vindr_cxr", "vindr_cxr", (LABELS, "annotations/annotations_train.csv", "VinDr-CXR.csv")),
    Layout("vindr_cxr", "vindr_cxr_kaggle", ("train.csv",)),
    Layout("tbx11k", "tbx11k", (COCO,)),
    Layout("coco", "tbx11k", (COCO,), None, {"table": COCO}),
    Layout("csv", "csv", ("labels.csv",), "labels.csv", {**OWN, "label_columns": ["Mass", "Nodule"]}),
    Layout("csv", "csv", ("labels.csv",), "labels.csv", {**OWN, "label_column": "findings", "label_separator": "|"}),
    Layout("yolo", "yolo", ("data.yaml", "labels/train/n0.txt")),
)
TOKENS = (
    *(b"../../secret.png", b"/etc/passwd", b"\0", b"..", b"a/../../b", b"~root/x", b"C:\\x", b"x" * 1500, b"y/" * 900),
    *(b"nan", b"inf", b"Infinity", b"-Infinity", b"1e999", b"-1", b"9" * 400, b"0x1f", "²".encode(), "٣".encode()),
    *(
        b'"',
        b'""',
        b",",
        b"\n",
        b"\r",
        b"|",
        b"||",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"\x80",
        b"{",
        b"]",
        b"*a",
        b"!!python/x",
    ),
)


@st.composite
def breakings(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """One to three changes of a file: cut, exchanged, doubled, sprinkled, or saved in another encoding."""
    steps = draw(
        st.lists(
            st.tuples(
                st.sampled_from(("cut", "cut off", "double", "token", "token", "token", "bytes", "encoding")),
                st.floats(0, 1),
                st.integers(1, 40),
                st.sampled_from(TOKENS),
                st.binary(max_size=12),
                st.sampled_from(("utf-16", "utf-32", "cp037", "utf-7")),
            ),
            min_size=1,
            max_size=3,
        )
    )

    def broken(content: bytes) -> bytes:
        for kind, where, length, token, noise, encoding in steps:
            at = int(where * len(content))
            before, part, after = content[:at], content[at : at + length], content[at + length :]
            content = {
                "cut": before + after,
                "cut off": before,
                "double": before + part + part + after,
                "token": before + token + after,
                "bytes": before + noise + part + after,
                "encoding": content.decode("latin-1").encode(encoding),
            }[kind]
        return content

    return broken


def copied(case: Layout, root: Path) -> Path:
    """The layout, with files that the small copies lack."""
    if case.dataset == "yolo":
        for folder in ("images/train", "labels/train"):
            (root / folder).mkdir(parents=True)
        for number in range(3):
            Image.fromarray(np.zeros((4, 4), np.uint8)).save(root / "images" / "train" / f"n{number}.png")
        (root / "data.yaml").write_text("names: [Mass, Nodule]\ntrain: images/train\n")
        (root / "labels" / "train" / "n0.txt").write_text("0 0.5 0.5 0.2 0.5\n1 0.1 0.1 0.2 0.2\n")
        return root
    shutil.copytree(LAYOUTS / case.folder, root, dirs_exist_ok=True)
    if "BBox_List_2017.csv" in case.files:
        (root / "BBox_List_2017.csv").write_text(
            "Image Index,Finding Label,Bbox [x,y,w,h],,,\n90000001_000.png,Infiltrate,225.08,547.01,86.7,79.1,,,\n"
        )
    if "VinDr-CXR.csv" in case.files:
        header = "image_id,Dice RCA (Max),Dice RCA (Mean),Landmarks,Left Lung,Right Lung,Heart,Height,Width"
        (root / "VinDr-CXR.csv").write_text(f'{header}\naaaa0001,0.9,0.9,"[1, 2]",1 3 9 2,4 2,1 1,5,6\n')
    return root


def records(path: Path) -> int:
    """Rows of a table that hold something, below its header."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        return sum(any(fields) for fields in csv.reader(file)) - 1


def read_everything(case: Layout, root: Path) -> None:
    """Read as `check` and a study do; what is refused must say where and why."""
    chosen = DatasetSettings.model_validate({"name": case.dataset, "root": str(root), **case.options})
    table = read_table(chosen)
    assert len(table.names) == len(table.groups) == len(table.labels) == len(set(table.names.tolist()))
    assert all(refused.place and refused.reason for refused in table.refused)
    if case.images is not None:
        named = {refused.place for refused in table.refused}
        assert len(table) + len(named) == records(root / case.images), "every row is read or refused by its line"
    boxes, masks = read_boxes(chosen), read_masks(chosen)
    if boxes is not None:
        assert np.isfinite(boxes.corners).all()
        assert (boxes.corners[:, 2:] > boxes.corners[:, :2]).all()
    for name in () if masks is None else masks.names:
        masks.read(name)
    for path in find(split_table(table, chosen), root):
        assert path is None or path.resolve().is_relative_to(root.resolve()), "nothing outside of the root is opened"


@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"{case.dataset} {case.folder} {case.options.get('split', '')}"
)
@given(breaking=breakings(), turn=st.integers(0, 5))
@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_broken_file_is_one_clear_error_or_named_rows(
    case: Layout, breaking: Callable[[bytes], bytes], turn: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = copied(case, Path(folder) / "data")
        path = root / case.files[turn % len(case.files)]
        path.write_bytes(breaking(path.read_bytes()))
        started = time.process_time()
        try:
            read_everything(case, root)
        except DataError as error:
            assert str(error).strip()
        assert time.process_time() - started < SECONDS


def test_the_layouts_are_sound_before_they_are_broken(tmp_path: Path) -> None:
    for number, case in enumerate(CASES):
        read_everything(case, copied(case, tmp_path / str(number)))


@given(st.lists(st.sampled_from(TOKENS).map(lambda t: t.decode("utf-8", "replace")) | st.text(max_size=30), max_size=4))
@settings(max_examples=60, deadline=None)
def test_hostile_names_of_images_find_nothing_outside_of_the_root(parts: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "root"
        (root / "images").mkdir(parents=True)
        (Path(folder) / "secret.png").touch()
        (root / "images" / "a.png").touch()
        for name in ("/".join(parts), "../secret", "images/../../secret.png"):
            if not name or "\0" in name:
                continue  # the readers of tables refuse both
            try:
                (path,) = find(index_of(name), root)
            except DataError as error:
                assert str(error)
                continue
            assert path is None or path.resolve().is_relative_to(root.resolve())


def index_of(*names: str) -> Index:
    return made_index(names, dataset="csv", channels=3)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"file,patient,Mass\na,1,1\n" + b"n" * 200_000 + b",2,0\n", "field larger than field limit"),
        (b"file,patient,Mass\na,1,1\nb\0c,2,0\n", "line 3: a value of 3 characters with a NUL among them"),
        (b"file,patient,Mass\na,1,1\n" + b"n" * 1200 + b",2,0\n", "line 3: a value of 1200 characters"),
    ],
)
def test_values_that_would_blow_up_an_array_are_refused(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "labels.csv").write_bytes(content)
    chosen = DatasetSettings.model_validate({"name": "csv", "root": str(tmp_path), **OWN, "label_columns": ["Mass"]})
    with pytest.raises(DataError, match=said):
        read_table(chosen).usable()


@pytest.mark.parametrize(
    "entry",
    [
        {"images": [{"id": 1, "file_name": "a.png", "width": float("inf"), "height": 4}]},
        {"images": [{"id": [], "file_name": "a.png", "width": 4, "height": 4}]},
        {"images": [{"id": 1, "file_name": "x" * 5000, "width": 4, "height": 4}]},
        {"images": [{"id": 1, "file_name": "a\0b", "width": 4, "height": 4}]},
        {"images": ["a.png"], "annotations": ["b", 7, None, {"image_id": {}, "category_id": 1}]},
    ],
    ids=lambda entry: str(entry)[:60],
)
def test_entries_of_coco_that_hold_something_else_are_refused_by_their_place(
    tmp_path: Path, entry: dict[str, Any]
) -> None:
    sound = {
        "images": [{"id": 9, "file_name": "z.png", "width": 9, "height": 9}],
        "annotations": [{"image_id": 9, "category_id": 1, "bbox": [1, 1, 2, 2]}],
        "categories": [{"id": 1, "name": "Mass"}],
    }
    mixed = {key: entry.get(key, []) + sound[key] for key in sound}
    (tmp_path / "boxes.json").write_text(json.dumps(mixed))
    table = read_table(DatasetSettings(name="coco", root=str(tmp_path), table="boxes.json"))
    assert table.names.tolist() == ["z.png"]
    assert len(table.refused) == sum(len(entry.get(key, [])) for key in sound)


def test_aliases_that_unfold_to_gigabytes_are_no_names(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    layers = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
    (tmp_path / "data.yaml").write_text(f"a0: &a0 [lol, lol]\n{layers}names: [*a11]\n")
    with pytest.raises(DataError, match="names: expected a list of the classes' names"):
        read_table(DatasetSettings(name="yolo", root=str(tmp_path)))


def test_a_mask_of_more_pixels_than_there_is_memory_is_refused(tmp_path: Path) -> None:
    header = "image_id,Dice RCA (Mean),Left Lung,Right Lung,Heart,Height,Width"
    for height in ("999999999", "1e300", "-5"):
        (tmp_path / "VinDr-CXR.csv").write_text(f"{header}\na,0.9,1 1,1 1,1 1,{height},999999999\n")
        masks = read_masks(DatasetSettings(name="vindr_cxr", root=str(tmp_path)))
        assert masks is not None
        with pytest.raises(DataError, match="line 2: masks of image a"):
            masks.read("a")


# ------------------------------------------------------------------------------------------------------------- images


def picture(kind: str) -> bytes:
    grey = np.random.default_rng(0).integers(0, 255, (24, 20)).astype(np.uint8)
    image = {
        "16 bits": lambda: Image.fromarray(grey.astype(np.uint16) * 200),
        "RGBA": lambda: Image.fromarray(np.dstack([grey] * 4)),
        "palette": lambda: Image.fromarray(grey).convert("P"),
    }.get(kind, lambda: Image.fromarray(grey))()
    stream = io.BytesIO()
    image.save(stream, kind if kind in ("JPEG", "TIFF", "BMP", "WEBP", "JPEG2000") else "PNG")
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "16 bits", "RGBA", "palette", "JPEG", "TIFF", "BMP", "WEBP", "JPEG2000"])
@given(breaking=breakings())
@settings(max_examples=50, deadline=None)
@pytest.mark.filterwarnings("ignore")
def test_a_broken_image_is_read_or_unreadable_and_nothing_else(kind: str, breaking: Callable[[bytes], bytes]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.png"
        path.write_bytes(breaking(picture(kind)))
        started = time.process_time()
        for channels in (1, 3):
            try:
                assert decode_whole(path, channels).mode in ("L", "RGB")
            except UNREADABLE as error:
                assert not isinstance(error, DataError)
        try:
            assert min(size_of(path)) > 0
        except DataError as error:
            assert str(path) in str(error)
        assert time.process_time() - started < SECONDS


def bomb() -> bytes:
    """A PNG of 100 bytes that says it is 60,000 × 60,000."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    data = zlib.compress(bytes(60_001) * 4)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_bombs_truncated_files_and_programs_in_disguise_are_all_named(tmp_path: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    contents = {
        "bomb": bomb(),
        "cut": picture("PNG")[:-200],
        "empty": b"",
        "text": b"not an image",
        "program": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) (w) file\n",
        "sound": picture("PNG"),
    }
    for name, content in contents.items():
        (root / f"{name}.png").write_bytes(content)
    index = index_of(*(f"{name}.png" for name in contents))
    started = time.process_time()
    with pytest.raises(DataError, match=r"^5 of 6 images cannot be read: .*bomb.png \(DecompressionBombError") as error:
        ImageCache.open(index, root, image_size=16, fit="crop", folder=tmp_path / "cache")
    assert time.process_time() - started < SECONDS
    assert all(str(root / f"{name}.png") in str(error.value) for name in ("bomb", "cut", "empty"))


def test_a_dicom_bomb_is_refused_before_its_pixels_are_made(tmp_path: Path) -> None:
    pydicom = pytest.importorskip("pydicom", reason="the extra 'dicom' is not installed")
    from tests.made_datasets import save_dicom

    path = tmp_path / "a.dcm"
    save_dicom(path, np.zeros((16, 16), np.uint8))
    data = pydicom.dcmread(path)
    data.Rows = data.Columns = 65_535
    data.save_as(path)
    with pytest.raises(ValueError, match=r"65535 × 65535 pixels; expected at most"):
        decode_whole(path, 1)
