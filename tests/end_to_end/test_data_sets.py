"""Every data set in its true layout through a study's `--smoke`: made-up files of all layouts, and real ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from bad_inputs import launch

from study.dataset_check import check_dataset
from tests.detection_extra import needs_detection
from tests.made_datasets import MADE, Made, make_chexmask, make_coco
from tests.studies_for_tests import run_smoke
from trainables.data.registry import load_index
from trainables.settings import DatasetSettings

pytestmark = pytest.mark.slow

SMALL = {
    "dataset.image_size": 32,
    "model.backbone": "tiny-phantom",
    "model.head_hidden": 32,
    "optimiser.batch_size": 32,
    "weighting.boosts": {},
    "seeds": [0],
}
DETECTION = {"model.backbone": "tiny-yolo", "dataset.image_size": 64, "dataset.drop_classes": [], "seeds": [0]}
SEGMENTATION = {"model.backbone": "tiny-sam2", "dataset.image_size": 64, "optimiser.batch_size": 8, "seeds": [0]}


def smoke(storage: Path, made: Made, root: Path, changes: Mapping[str, Any], study: str = "ablation") -> pd.DataFrame:
    """Cells of what `STUDY --smoke --dataset … --data-root … -o …` runs."""
    if made.dataset == "vindr_cxr":
        pytest.importorskip("pydicom", reason="the extra 'dicom' is not installed")
    ran = run_smoke(
        storage,
        study,
        executor="local",
        sharing=True,
        dataset=made.dataset,
        root=root,
        overrides={**made.options, **changes},
    )
    assert ran.complete
    table = ran.cells()
    assert len(table) == 4
    assert set(table["status"]) == {"FINISHED"}
    return table


# One of each, csv aside (below); the other splits and readings of the same files are checked in test_dataset_check.py.
LAYOUTS = (
    *("chestxray14", "chexpert, official, U-Ignore", "ham10000", "vindr_cxr of PhysioNet", "vindr_cxr of Kaggle"),
    *("tbx11k", "jsrt", "coco", "yolo"),
)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_study_of_every_layout_runs_to_its_table(name: str, tmp_path: Path) -> None:
    made = MADE[name]
    cells = smoke(tmp_path / "outputs", made, made.make(tmp_path / "data"), SMALL)
    assert cells["macro_auc"].between(0, 1).all()


@needs_detection
def test_detection_on_boxes_of_an_official_split_runs_to_its_table(tmp_path: Path) -> None:
    """Boxes of VinDr-CXR and TBX11K: test_boxes_and_masks.py."""
    made = Made("coco", make_coco, {"dataset.split": "official"})
    root = made.make(tmp_path / "data")
    cells = smoke(tmp_path / "outputs", made, root, DETECTION, "detection_ablation")
    assert cells["map50_95"].between(0, 1).all()


def test_segmentation_on_masks_of_a_table_runs_to_its_table(tmp_path: Path) -> None:
    """Folders of masks: test_boxes_and_masks.py."""
    made = Made("vindr_cxr", make_chexmask, {"segmentation.masks": "OriginalResolution/VinDr-CXR.csv"})
    root = made.make(tmp_path / "data")
    cells = smoke(tmp_path / "outputs", made, root, SEGMENTATION, "segmentation_ablation")
    assert cells["mean_dice"].between(0, 1).all()


def test_a_table_of_ones_own_is_checked_and_studied_by_the_same_options(tmp_path: Path) -> None:
    """As a user types it, quotes of a shell aside."""
    made = MADE["csv, official, separated"]
    root = made.make(tmp_path / "data")
    options = [part for key, value in made.options.items() for part in ("-o", f"{key}={value}")]
    told = launch(tmp_path, "check", "csv", "--data-root", str(root), *options, "--json")
    assert (told.status, told.err) == (0, "")
    assert json.loads(told.out)["splits"]["test"]["images"] == 32
    small = [part for key, value in SMALL.items() for part in ("-o", f"{key}={json.dumps(value)}")]
    told = launch(
        tmp_path,
        *("ablation", "--smoke", "--dataset", "csv", "--data-root", str(root), *options, *small),
        *("--executor", "local", "--storage", "results"),
    )
    assert told.status == 0, told.err
    cells = pd.read_csv(tmp_path / "results" / "ablation" / "report" / "cells.csv")
    assert set(cells["status"]) == {"FINISHED"}


# --------------------------------------------------------------------------------------------------------- real data


def sound(name: str, root: Path, **options: Any) -> None:
    found = check_dataset({"name": name, "root": str(root), **options})
    assert found.missing == found.unreadable == found.refused == found.leaks == ()
    assert found.images >= 50


@pytest.mark.parametrize("name", ["chestxray14", "ham10000"])
def test_real_images_are_sound_and_run_to_a_table(name: str, real_data: Path, tmp_path: Path) -> None:
    sound(name, real_data / name)
    made = Made(name, lambda root: root, {"dataset.drop_classes": ["Hernia"]} if name == "chestxray14" else {})
    cells = smoke(tmp_path, made, real_data / name, {**SMALL, "optimiser.head_lr": 1e-3})
    assert cells["macro_auc"].between(0, 1).all()


def test_real_radiographs_as_they_were_distributed_are_sound(real_data: Path, tmp_path: Path) -> None:
    """The 48 originals of 1024 px, four of them RGBA, under their true rows."""
    originals = real_data / "chestxray14" / "original_1024"
    names = {path.name for path in originals.iterdir()}
    table = (real_data / "chestxray14" / "Data_Entry_2017_v2020.csv").read_text().splitlines()
    kept = [table[0], *(line for line in table[1:] if line.split(",")[0] in names)]
    (tmp_path / "Data_Entry_2017_v2020.csv").write_text("\n".join(kept) + "\n")
    (tmp_path / "images").symlink_to(originals)
    found = check_dataset({"name": "chestxray14", "root": str(tmp_path)})
    assert (found.images, found.missing, found.unreadable, found.refused) == (48, (), (), ())


@needs_detection
def test_real_boxes_are_sound_and_run_to_a_table(real_data: Path, tmp_path: Path) -> None:
    root = real_data / "nih_boxes"
    (path,) = (root / "annotated_data" / "COCO").iterdir()
    table = str(path.relative_to(root))
    chosen = {"table": table, "group_pattern": "^[0-9]+", "channels": 1}
    sound("coco", root, **chosen)
    made = Made("coco", lambda given: given, {f"dataset.{key}": value for key, value in chosen.items()})
    cells = smoke(tmp_path, made, root, DETECTION, "detection_ablation")
    assert cells["map50_95"].between(0, 1).all()
    index = load_index(DatasetSettings(name="coco", root=str(root), **chosen), labels_learnt=False)
    splits = [set(index.groups[index.rows(split)].tolist()) for split in ("train", "val", "test")]
    assert len(set.union(*splits)) == sum(map(len, splits)) == 41, "no patient is in two splits"


def test_real_masks_are_sound_and_run_to_a_table(real_data: Path, tmp_path: Path) -> None:
    sound("jsrt", real_data / "jsrt")
    made = Made("jsrt", lambda root: root)
    small = {**SEGMENTATION, "dataset.images": 60}
    cells = smoke(tmp_path, made, real_data / "jsrt", small, "segmentation_ablation")
    assert cells["mean_dice"].between(0, 1).all()
    assert cells[[f"dice/{name}" for name in ("left_lung", "right_lung", "heart")]].notna().all(axis=None)
    page = tmp_path / "segmentation_ablation" / "report" / "report.html"
    assert "masks are drawn by experts" in page.read_text(encoding="utf-8")
