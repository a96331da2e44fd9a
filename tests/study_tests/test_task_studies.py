"""The studies of detection and segmentation on real data: full-size models, wherever there are boxes or masks."""

from __future__ import annotations

from pathlib import Path

import pytest

from study.documents import apply
from study.plan import make_plan
from study.spec import Choices, Row, Study, find_study, load_study
from tests.detection_extra import needs_detection
from tests.made_datasets import make_tbx11k, make_vindr
from trainables.data.registry import _ADAPTERS
from trainables.tasks import TASKS

BOXED = [name for name, adapter in _ADAPTERS.items() if adapter.read_boxes and not adapter.info.synthetic]
ROWS = ["YOLOv8, plain", "YOLOv8, SPFT", "RT-DETR, plain", "RT-DETR, SPFT"]


def on(study: str, dataset: str) -> Study:
    return load_study(find_study(study), Choices(dataset=dataset, data_roots={dataset: "/data"}))


@pytest.mark.parametrize("dataset", BOXED)
def test_every_data_set_of_boxes_has_full_size_detectors_at_640_px(dataset: str) -> None:
    detection = on("detection", dataset)
    assert [row.name for row in detection.rows] == ROWS
    settings = [row.settings[dataset] for row in detection.rows]
    assert [s.model.backbone for s in settings] == ["yolov8s", "yolov8s", "rtdetr-l", "rtdetr-l"]
    assert [s.optimiser.encoder_lr for s in settings] == [1e-4, 1e-4, 1e-5, 1e-5]
    settings += [row.settings[dataset] for row in on("detection_ablation", dataset).rows]
    assert {(s.dataset.image_size, s.dataset.fit, s.strategy.depth) for s in settings} == {(640, "letterbox", "all")}
    assert settings[-1].model.backbone == "yolov8s"


@pytest.mark.parametrize("dataset", ["jsrt", "vindr_cxr"])
def test_data_sets_of_masks_have_sam2_at_its_own_size(dataset: str) -> None:
    for study in ("segmentation", "segmentation_ablation"):
        settings = [row.settings[dataset] for row in on(study, dataset).rows]
        assert {s.model.backbone for s in settings} == {"facebook/sam2.1-hiera-tiny"}
        assert {(s.dataset.image_size, s.strategy.depth) for s in settings} == {(1024, 4)}


@pytest.mark.parametrize("study", ["detection", "segmentation"])
def test_plain_fine_tuning_trains_everything_from_the_first_epoch(study: str) -> None:
    rows = load_study(find_study(study)).rows
    plain = [row for row in rows if "lain" in row.name]
    spft = [row for row in rows if "SPFT" in row.name]
    assert len(plain) == len(spft) == (2 if study == "detection" else 1)
    for row in plain:
        settings = row.settings["phantom"]
        assert settings.strategy.unfreezing == "plain"
        assert not settings.weighting.enabled and not settings.ema.enabled
    for row in spft:
        settings = row.settings["phantom"]
        assert settings.strategy.unfreezing == "progressive"
        assert settings.weighting.enabled and settings.ema.enabled


@needs_detection
def test_detection_is_planned_on_vindr_cxr_and_tbx11k_together(tmp_path: Path) -> None:
    pytest.importorskip("pydicom", reason="VinDr-CXR's images are DICOM files: the extra 'dicom' is not installed")
    roots = {"vindr_cxr": str(make_vindr(tmp_path / "vindr")), "tbx11k": str(make_tbx11k(tmp_path / "tbx"))}
    choices = Choices(apply({}, {"datasets": list(roots), "seeds": [0]}), data_roots=roots)
    plan = make_plan(load_study(find_study("detection"), choices), storage=tmp_path / "out")
    assert len(plan.chains) == 8
    classes = {chain.cell.dataset: chain.material.classes for chain in plan.chains}
    assert classes == {"vindr_cxr": ("Nodule/Mass",), "tbx11k": ("Active TB", "Obsolete TB")}
    # A published detector of 80 classes has 11.2 million parameters; a pass at 640 px costs 14.3 · 10⁹ products.
    costs = plan.chains[0].material.model.costs
    assert 10_000_000 < sum(costs.block_parameters) + costs.head_parameters < 11_200_000


def test_tables_say_how_boxes_and_masks_were_measured() -> None:
    (detection,) = {line for row in on("detection", "coco").rows for line in notes_of(row, "coco") if "AP by" in line}
    for said in ("faster-coco-eval", "640 px (letterbox)", "100 boxes an image (maxDets)", "one threshold for all"):
        assert said in detection
    masks = {line for row in on("segmentation", "jsrt").rows for line in notes_of(row, "jsrt")}
    for said in ("at 1024 px (crop)", "box around the whole image", "Figures named oracle", "multiply all that their"):
        assert any(said in line for line in masks), said


def notes_of(row: Row, dataset: str) -> tuple[str, ...]:
    settings = row.settings[dataset]
    return TASKS[settings.task].notes(settings)
