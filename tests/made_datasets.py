"""Small data sets with images in the true layouts: noise, and a bright square of its own for each label."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from trainables.data import chexpert, vindr_cxr

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


def _write(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
