"""What a data set must hold depends on what a task learns: few images are refused for its own classes alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from study.documents import StudyError, apply
from study.plan import Plan, make_plan
from study.spec import Choices, find_study, load_study
from tests.detection_extra import needs_detection
from trainables.data.index import DataError, Index
from trainables.data.opened import Folders, open_data
from trainables.data.registry import load_index
from trainables.detection_kind import boxed_classes
from trainables.settings import DatasetSettings, Settings

FEW = DatasetSettings(name="phantom", images=40, image_size=64)


def plan_of(study: str, storage: Path, **changes: object) -> Plan:
    named = {"dataset.images": 40, "dataset.image_size": 64, **changes}
    return make_plan(load_study(find_study(study), Choices(apply({}, named))), storage=storage)


def few(**changes: object) -> Index:
    return load_index(FEW.model_copy(update=changes), labels_learnt=False)


def test_classification_of_forty_phantoms_is_refused_for_findings_that_no_split_could_measure(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Hernia train \d+, val 0"):
        load_index(FEW)
    with pytest.raises(StudyError, match="Hernia"):
        plan_of("ablation", tmp_path)
    with pytest.raises(DataError, match="Hernia"):
        open_data(FEW, Folders(tmp_path / "drawn", tmp_path / "decoded", tmp_path / "splits"))


def test_segmentation_of_forty_phantoms_asks_nothing_of_their_findings(tmp_path: Path) -> None:
    chain = plan_of("segmentation_ablation", tmp_path).chains[0]
    assert len(chain.material.index) == 40
    assert chain.material.classes == ("left_lung", "right_lung", "heart")
    data = open_data(FEW, Folders(tmp_path / "drawn", tmp_path / "decoded", tmp_path / "splits"), labels_learnt=False)
    assert data.index.digest() == chain.material.index.digest()


def test_detection_is_refused_for_a_class_without_a_training_box_and_for_no_other() -> None:
    index, settings = few(), Settings(task="detection", dataset=FEW)
    positives = dict(zip(index.classes, index.class_counts("train")[0].tolist(), strict=True))
    assert [name for name, images in positives.items() if not images] == ["Cardiomegaly", "Consolidation"]
    with pytest.raises(DataError, match=r"no training box of Cardiomegaly; .* dataset.drop_classes=\[Cardiomegaly\]"):
        boxed_classes(settings, index)  # Consolidation has no boxes in any image: it is no class of detection
    kept = boxed_classes(settings, few(drop_classes=("Cardiomegaly",)))
    assert kept == ("Atelectasis", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax")


def test_detection_is_refused_where_a_split_has_no_box_at_all() -> None:
    alone = tuple(name for name in few().classes if name != "Mass")
    with pytest.raises(DataError, match=r"no box in val and test \(boxes: train 3, val 0, test 0\)"):
        boxed_classes(Settings(task="detection", dataset=FEW), few(drop_classes=alone))


@needs_detection
def test_a_detection_study_of_forty_phantoms_is_planned(tmp_path: Path) -> None:
    planned = plan_of("detection_ablation", tmp_path, **{"dataset.drop_classes": ["Cardiomegaly"]})
    assert planned.chains[0].material.classes[-1] == "Pneumothorax"
