"""Detection and segmentation on data sets in their own layouts, run to the report: DICOM, COCO, folders of masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from analysis.report import write_report
from study.pictures import images_of
from tests.detection_extra import needs_detection
from tests.made_datasets import make_tbx11k, make_vindr, save
from tests.studies_for_tests import Ran, run_study

pytestmark = pytest.mark.slow

SHORT = {"seeds": [0], "strategy.head_epochs": 1, "strategy.tune_epochs": 1}
DETECTORS = {
    "study": "small",
    "title": "Small detectors",
    "task": "detection",
    "dataset": {"image_size": 64, "fit": "letterbox"},
    "optimiser": {"batch_size": 16, "encoder_lr": 5e-4, "head_lr": 1e-3},
    "strategy": {"depth": "all"},
    "rows": {
        "list": [
            {"name": "YOLOv8", "set": {"model.backbone": "tiny-yolo", "weighting.enabled": True, "ema.enabled": True}},
            {"name": "RT-DETR", "set": {"model.backbone": "tiny-rtdetr", "strategy.unfreezing": "plain"}},
        ]
    },
    "report": {"per_class": True},
}


def small_detectors(folder: Path, **dataset: object) -> str:
    """The file of a study of two small detectors."""
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(DETECTORS | {"dataset": {"image_size": 64, "fit": "letterbox", **dataset}}))
    return str(path)


def page_of(ran: Ran) -> str:
    """The report with its images, as a run writes it."""
    folder = ran.storage / ran.plan.study.name / "report"
    return write_report(ran.records(), folder, images_of(ran.plan, ran.storage)).html.read_text(encoding="utf-8")


@needs_detection
def test_both_detectors_train_on_vindr_cxr_and_tbx11k_in_one_study(tmp_path: Path) -> None:
    pytest.importorskip("pydicom", reason="VinDr-CXR's images are DICOM files: the extra 'dicom' is not installed")
    roots = {"vindr_cxr": make_vindr(tmp_path / "vindr", images=60), "tbx11k": make_tbx11k(tmp_path / "tbx", images=60)}
    # every image of VinDr-CXR's has a box of its one class
    changes: dict[str, Any] = {**SHORT, "datasets": list(roots)}
    ran = run_study(tmp_path / "out", changes, study=small_detectors(tmp_path), roots=roots)
    assert ran.complete
    page = page_of(ran)
    cells = ran.cells().reset_index()
    assert sorted(zip(cells["dataset"], cells["row"], strict=True)) == sorted(
        (dataset, row) for dataset in roots for row in ("YOLOv8", "RT-DETR")
    )
    of_vindr, of_tbx = (cells[cells["dataset"] == dataset] for dataset in roots)
    assert of_vindr[["ap50/Nodule/Mass", "precision/Nodule/Mass"]].notna().all(axis=None)
    assert of_tbx[["ap50/Active TB", "ap50/Obsolete TB"]].notna().all(axis=None)
    assert "faster-coco-eval" in page and "64 px (letterbox)" in page and "100 boxes an image" in page
    assert page.count("Predictions beside the truth on") >= 2


def make_masks(root: Path, images: int = 50) -> Path:
    """JSRT's layout: a bright heart and two small clavicles, which move from image to image."""
    rng = np.random.default_rng(0)
    for number in range(images):
        pixels = rng.integers(0, 90, (64, 64))
        x, y = rng.integers(0, 8, 2).tolist()
        places = {
            "heart": (slice(30 + y, 50 + y), slice(24 + x, 44 + x)),
            "left_clavicle": (slice(8 + y, 12 + y), slice(36 + x, 56)),
            "right_clavicle": (slice(8 + y, 12 + y), slice(8, 28 - x)),
        }
        name = f"JPC{'LN'[number % 2]}N{number:03d}.png"
        for structure, place in places.items():
            mask = np.zeros((64, 64), np.uint8)
            mask[place] = 255
            pixels[place] += 120
            save(root / "masks" / structure / name, mask)
        save(root / "images" / name, pixels.astype(np.uint8))
    return root


def test_clavicles_are_structures_as_lungs_and_heart_are(tmp_path: Path) -> None:
    structures = ["heart", "left_clavicle", "right_clavicle"]
    changes = {
        **SHORT,
        "dataset.name": "jsrt",
        "dataset.root": str(make_masks(tmp_path / "jsrt")),
        "dataset.image_size": 64,
        "model.backbone": "tiny-sam2",
        "segmentation.structures": structures,
    }
    ran = run_study(tmp_path / "out", changes, study="segmentation")
    assert ran.complete
    cells = ran.cells()
    assert len(cells) == 3
    of_structures = cells[[f"dice/{name}" for name in structures]]
    assert of_structures.notna().all(axis=None)
    assert cells["mean_dice"].tolist() == pytest.approx(of_structures.mean(axis=1).tolist())
    page = page_of(ran)
    assert all(name in page for name in structures)
    assert "64 px (crop)" in page and "box around the whole image" in page
