"""Small data sets with images in the true layouts: noise, and a bright square of its own for each label."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from trainables.data import chestxray14, chexpert, ham10000, vindr_cxr

SIZE = 40


def picture(labels: Sequence[int], rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """(40, 40) noise; class c, if present, brightens a square of its own."""
    pixels = rng.integers(0, 120, (SIZE, SIZE))
    for column, present in enumerate(labels):
        if present:
            row, place = divmod(column, 5)
            pixels[row * 8 : row * 8 + 8, place * 8 : place * 8 + 8] += 100
    return pixels.clip(0, 255).astype(np.uint8)


def save(path: Path, pixels: npt.NDArray[np.uint8]) -> None:
    """Write a PNG or JPEG, with its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def save_dicom(path: Path, pixels: npt.NDArray[np.uint8], **tags: object) -> None:
    """Write an uncompressed DX image of the chest."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    data.Modality, data.BodyPartExamined, data.PhotometricInterpretation = "DX", "CHEST", "MONOCHROME2"
    data.Rows, data.Columns, data.SamplesPerPixel, data.PixelRepresentation = *pixels.shape, 1, 0
    data.BitsAllocated = data.BitsStored = 8
    data.HighBit, data.PixelData = 7, pixels.tobytes()
    for name, value in tags.items():
        setattr(data, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)


def make_csv(root: Path, images: int = 160, *, seed: int = 0) -> Path:
    """`labels.csv` of two images a patient with columns Mass, Nodule, findings, diagnosis, part; names lack .png."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(images):
        labels = [number // 2 % 2, number // 4 % 2]
        findings = "|".join(name for name, on in zip(("Mass", "Nodule"), labels, strict=True) if on)
        part = ("train", "train", "train", "val", "test")[number // 8 % 5]
        diagnosis = ("none", "nodule", "mass", "both")[2 * labels[0] + labels[1]]
        rows.append([f"w{number % 3}/n{number}", number // 2, part, findings, diagnosis, *labels])
        save(root / "images" / f"w{number % 3}" / f"n{number}.png", picture(labels, rng))
    _write(root / "labels.csv", ["file", "patient", "part", "findings", "diagnosis", "Mass", "Nodule"], rows)
    return root


CSV_OPTIONS = {
    "dataset.table": "labels.csv",
    "dataset.image_column": "file",
    "dataset.group_column": "patient",
}


def make_chexpert(root: Path, patients: int = 150) -> Path:
    """`CheXpert-v1.0-small` under root: a frontal and a lateral image a patient, a tenth of the labels uncertain."""
    rng = np.random.default_rng(1)
    header = ["Path", "Sex", "Age", chexpert.VIEW, "AP/PA", *chexpert.CLASSES]
    for file, part, first in (("train.csv", "train", 0), ("valid.csv", "valid", 64540)):
        rows = []
        for number in range(first, first + patients // (1 if part == "train" else 5)):
            labels = (rng.random(14) < 0.35).astype(int)
            for view in ("Frontal", "Lateral"):
                name = f"{part}/patient{number:05d}/study1/view1_{view.lower()}.jpg"
                told = np.where(labels == 1, "1.0", np.where(rng.random(14) < 0.5, "", "0.0")).astype("<U4")
                if part == "train":
                    told[rng.random(14) < 0.1] = "-1.0"
                rows.append([f"CheXpert-v1.0-small/{name}", "Male", 50, view, "AP" if view == "Frontal" else "", *told])
                save(root / "CheXpert-v1.0-small" / name, picture(labels.tolist(), rng))
        _write(root / "CheXpert-v1.0-small" / file, header, rows)
    return root


def make_vindr(root: Path, images: int = 160) -> Path:
    """PhysioNet's layout: three readers who disagree now and then, DICOM images, a few boxes."""
    rng = np.random.default_rng(2)
    classes = vindr_cxr.LOCAL + vindr_cxr.GLOBAL
    votes, boxes = [], []
    for number in range(images):
        truth = (rng.random(len(classes)) < 0.3).astype(int)
        truth[-1] = int(number % 3 == 0)
        for reader in ("R1", "R2", "R3"):
            said = truth ^ (rng.random(len(classes)) < 0.05)
            votes.append([f"{number:032x}", reader, *said])
            corner = rng.uniform(0, 10, 2).round(1)
            boxes.append([f"{number:032x}", reader, "Nodule/Mass", *corner, *(corner + 12)])
        save_dicom(root / "train" / f"{number:032x}.dicom", picture(truth[:25].tolist(), rng))
    annotations = root / "annotations"
    _write(annotations / "image_labels_train.csv", ["image_id", "rad_id", *classes], votes)
    _write(annotations / "annotations_train.csv", ["image_id", "rad_id", "class_name", *vindr_cxr.CORNERS], boxes)
    return root


def make_tbx11k(root: Path, images: int = 150) -> Path:
    """Train and val with healthy and sick images and two kinds of tuberculosis."""
    rng = np.random.default_rng(3)
    names = ("ActiveTuberculosis", "ObsoletePulmonaryTuberculosis", "PulmonaryTuberculosis")
    for part in ("train", "val"):
        listed, drawn = [], []
        for number in range(images if part == "train" else images // 2):
            kind = number % 3
            name = f"{('health', 'tb', 'tb')[kind]}/{part}{number:04d}.png"
            listed.append({"id": number, "file_name": name, "width": SIZE, "height": SIZE})
            if kind:
                drawn.append({"id": number, "image_id": number, "category_id": kind, "bbox": [1, 1, 8, 8]})
            save(root / "imgs" / name, picture([kind == 1, kind == 2], rng))
        categories = [{"id": position + 1, "name": name} for position, name in enumerate(names)]
        path = root / "annotations" / "json" / f"TBX11K_{part}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"images": listed, "annotations": drawn, "categories": categories}))
    return root


def make_vindr_kaggle(root: Path, images: int = 160) -> Path:
    """Kaggle's layout: `train.csv` of three readers' boxes or `No finding`, and DICOM images of odd forms."""
    rng = np.random.default_rng(4)
    rows: list[list[object]] = []
    for number in range(images):
        labels = (rng.random(len(vindr_cxr.KAGGLE_LOCAL)) < 0.3).astype(int)
        if number % 3 == 0:
            labels[:] = 0
        for reader in ("R8", "R9", "R10"):
            found = [name for name, on in zip(vindr_cxr.KAGGLE_LOCAL, labels, strict=True) if on]
            corner = rng.uniform(0, 10, 2).round(1).tolist()
            drawn = [*corner, corner[0] + 12, corner[1] + 15]
            image = f"{number:032x}"
            rows += [[image, name, vindr_cxr.KAGGLE_LOCAL.index(name), reader, *drawn] for name in found]
            rows += [] if found else [[image, "No finding", 14, reader, "", "", "", ""]]
        pixels = picture([*labels, int(not labels.any())], rng)
        path = root / "train" / f"{number:032x}.dicom"
        if number % 2:
            save_dicom(path, 255 - pixels, PhotometricInterpretation="MONOCHROME1")
        else:
            save_dicom(path, pixels)
    header = ["image_id", "class_name", "class_id", "rad_id", *vindr_cxr.CORNERS]
    _write(root / "train.csv", header, rows)
    return root


def make_chexmask(root: Path) -> Path:
    """PhysioNet's VinDr-CXR with CheXmask's table beside it; a tenth of its masks are poor, one image has none."""
    make_vindr(root)
    rows: list[list[object]] = []
    for number in range(1, 160):
        lungs = [" ".join(f"{SIZE * y + x + 1} 10" for y in range(8, 30)) for x in (4, 24)]
        heart = " ".join(f"{SIZE * y + 15} 12" for y in range(20, 32))
        quality = 0.5 if number % 10 == 0 else 0.9
        rows.append([f"{number:032x}", 0.95, quality, "[]", *lungs, heart, SIZE, SIZE])
    header = ["image_id", "Dice RCA (Max)", "Dice RCA (Mean)", "Landmarks", "Left Lung", "Right Lung", "Heart"]
    _write(root / "OriginalResolution" / "VinDr-CXR.csv", [*header, "Height", "Width"], rows)
    return root


def make_chestxray14(root: Path, patients: int = 100) -> Path:
    """Two images a patient in two of the twelve folders, a tenth of them RGBA; the lists, and a few boxes."""
    rng = np.random.default_rng(5)
    rows, boxes, lists = [], [], {name: list[str]() for name in ("train", "test")}
    for patient in range(1, patients + 1):
        for follow_up in range(2):
            labels = (rng.random(14) < 0.35).astype(int)
            found = [name for name, on in zip(chestxray14.CLASSES, labels, strict=True) if on]
            name = f"{patient:08d}_{follow_up:03d}.png"
            told = "|".join(found) or chestxray14.NO_FINDING
            rows.append([name, told, follow_up, patient, 40, "F", "PA", 2500, 2048, 0.171, 0.171])
            lists["test" if patient % 4 == 0 else "train"].append(name)
            boxed = [finding.replace("Infiltration", "Infiltrate") for finding in found[:1]]
            boxes += [[name, finding, 100, 100, 200, 300, "", "", ""] for finding in boxed]
            pixels = picture(labels.tolist(), rng)
            if patient % 10 == 0:
                pixels = np.dstack([pixels] * 3 + [np.full_like(pixels, 255)])
            save(root / f"images_00{1 + patient % 2}" / "images" / name, pixels)
    for file, header, lines in (
        (chestxray14.TABLE_FILES[0], chestxray14.HEADER, rows),
        (chestxray14.BOXES_FILE, chestxray14.BOXES_HEADER, boxes),
    ):
        with (root / file).open("w", newline="", encoding="utf-8") as table:
            table.write(header + "\n")
            csv.writer(table, lineterminator="\n").writerows(lines)
    for split, file in chestxray14.OFFICIAL_LISTS.items():
        (root / file).write_text("\n".join(lists[split]), encoding="utf-8")
    return root


def make_ham10000(root: Path, lesions: int = 110) -> Path:
    """One or two JPEGs a lesion in the two folders; every seventh age is missing."""
    rng = np.random.default_rng(6)
    rows = []
    for lesion in range(lesions):
        dx = lesion % 7
        for view in range(1 + lesion % 2):
            name = f"ISIC_{2 * lesion + view:07d}"
            age = "" if lesion % 7 == 0 else "45.0"
            rows.append([f"HAM_{lesion:07d}", name, ham10000.CLASSES[dx], "histo", age, "male", "back"])
            folder = ham10000.IMAGE_FOLDERS[lesion % 2]
            pixels = picture([int(column == dx) for column in range(7)], rng)
            save(root / folder / f"{name}.jpg", np.dstack([pixels, pixels // 2, pixels // 3]))
    _write(root / "HAM10000_metadata.csv", ham10000.HEADER, rows)
    return root


def make_jsrt(root: Path, images: int = 100) -> Path:
    """Radiographs with and without nodule, and expert masks of three structures."""
    rng = np.random.default_rng(7)
    for number in range(images):
        name = f"JPC{'LN' if number % 2 else 'NN'}{number:03d}.png"
        save(root / "images" / name, picture([number % 2], rng))
        for structure, (top, left) in {"left_lung": (8, 24), "right_lung": (8, 4), "heart": (20, 14)}.items():
            mask = np.zeros((SIZE, SIZE), np.uint8)
            mask[top : top + 18, left : left + 12] = 255
            save(root / "masks" / structure / name, mask)
    return root


def make_coco(root: Path) -> Path:
    """`annotations/instances_….json` of three splits, JPEGs of two shapes, a category without any box."""
    rng = np.random.default_rng(8)
    categories = [{"id": number, "name": name} for number, name in enumerate(("findings", "Mass", "Nodule"))]
    first = 0
    for split, count in (("train", 120), ("val", 40), ("test", 40)):
        images, annotations = [], []
        for number in range(first, first + count):
            width, height = (SIZE, SIZE) if number % 2 else (SIZE, 30)
            labels = [number % 2, number // 2 % 2]
            images.append({"id": number, "file_name": f"n{number}.jpg", "width": width, "height": height})
            annotations += [
                {"image_id": number, "category_id": 1 + c, "bbox": [8 * c + 1, 1, 7, 8]} for c in (0, 1) if labels[c]
            ]
            save(root / f"{split}2017" / f"n{number}.jpg", picture(labels, rng)[:height])
        path = root / "annotations" / f"instances_{split}2017.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
        first += count
    return root


def make_yolo(root: Path, images: int = 160) -> Path:
    """`data.yaml`, `images/train` … with `labels/train` …; images without a box have an empty file or none."""
    rng = np.random.default_rng(9)
    for number in range(images):
        split = ("train", "train", "train", "val", "test")[number // 8 % 5]
        labels = [number % 2, number // 2 % 2]
        save(root / "images" / split / f"n{number}.png", picture(labels, rng))
        lines = [f"{c} {0.1 + 0.2 * c} 0.1 0.2 0.2" for c in (0, 1) if labels[c]]
        if lines or number % 8:
            path = root / "labels" / split / f"n{number}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(lines))
    (root / "data.yaml").write_text("names: [Mass, Nodule]\ntrain: ../elsewhere/images\n")
    return root


@dataclass(frozen=True)
class Made:
    """A data set in one of its true layouts.

    Attributes:
        make: folder → root.
        options: what reads it, as after `-o`.
    """

    dataset: str
    make: Callable[[Path], Path]
    options: Mapping[str, Any] = field(default_factory=dict)

    def checked(self, root: Path) -> dict[str, Any]:
        """Settings of the group `dataset`."""
        own = {key.removeprefix("dataset."): value for key, value in self.options.items()}
        return {"name": self.dataset, "root": str(root), **own}


MADE = {
    "chestxray14": Made("chestxray14", make_chestxray14),
    "chestxray14, official": Made("chestxray14", make_chestxray14, {"dataset.split": "official"}),
    "chexpert, official, U-Ignore": Made(
        "chexpert", make_chexpert, {"dataset.uncertain": "ignore", "dataset.split": "official"}
    ),
    "ham10000": Made("ham10000", make_ham10000),
    "vindr_cxr of PhysioNet": Made("vindr_cxr", make_vindr),
    "vindr_cxr of Kaggle": Made("vindr_cxr", make_vindr_kaggle),
    "vindr_cxr with CheXmask": Made("vindr_cxr", make_chexmask),
    "tbx11k": Made("tbx11k", make_tbx11k),
    "tbx11k, official, merged": Made(
        "tbx11k", make_tbx11k, {"dataset.split": "official", "dataset.merge_classes": True}
    ),
    "jsrt": Made("jsrt", make_jsrt),
    "coco": Made("coco", make_coco),
    "coco, official": Made("coco", make_coco, {"dataset.split": "official"}),
    "yolo": Made("yolo", make_yolo),
    "yolo, official": Made("yolo", make_yolo, {"dataset.split": "official"}),
    "csv": Made("csv", make_csv, {**CSV_OPTIONS, "dataset.label_columns": ["Mass", "Nodule"]}),
    "csv, official, separated": Made(
        "csv",
        make_csv,
        {
            **CSV_OPTIONS,
            "dataset.label_column": "findings",
            "dataset.label_separator": "|",
            "dataset.split_column": "part",
            "dataset.split": "official",
        },
    ),
}


def _write(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
