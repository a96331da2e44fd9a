"""The studies of chest data sets on files in CheXpert's true layout, as users run them on the real one."""

from __future__ import annotations

import csv
from pathlib import Path

import pandas as pd
import pytest

from tests.launches import launched
from tests.made_datasets import make_chexpert
from trainables.data.registry import load_index, prepare
from trainables.settings import DatasetSettings

pytestmark = pytest.mark.slow

SMALL = {
    "model.backbone": "tiny-phantom",
    "dataset.image_size": 56,
    "optimiser.batch_size": 16,
    "strategy.head_epochs": 1,
    "strategy.tune_epochs": 2,
    "seeds": "[0,1]",
}
SHARED = 7  # labels that CheXpert and ChestX-ray14 have in common


@pytest.fixture(scope="module")
def stanford(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CheXpert's folders; as in the true one, nobody in valid.csv has a fracture."""
    root = make_chexpert(tmp_path_factory.mktemp("stanford"))
    table = root / "CheXpert-v1.0-small" / "valid.csv"
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({**row, "Fracture": "0.0"} for row in rows)
    return root


def test_chexpert_is_reported_per_class_with_its_undefined_class_named_and_the_literature_beside(
    stanford: Path, tmp_path: Path
) -> None:
    given = ("--dataset", "chexpert", "--data-root", str(stanford))
    with launched(tmp_path, *given, study="chexpert", overrides=SMALL) as launch:
        assert launch.wait() == 0, launch.output
    report = tmp_path / "chexpert" / "report"
    cells = pd.read_csv(report / "cells.csv")
    assert len(cells) == 4
    defined = cells.filter(like="auc/")
    assert defined.shape[1] == 13
    assert "auc/Fracture" not in defined, "undefined, and not 0 or 0.5"
    assert cells["macro_auc"].tolist() == pytest.approx(defined.mean(axis=1).tolist())
    assert pd.read_csv(report / "table.csv")["undefined_classes"].eq("Fracture").all()
    page = (report / "report.html").read_text()
    for named in ("Fracture", "CheXzero (Tiu et al. 2022)", "GLoRIA (Huang et al. 2021)", "Published numbers"):
        assert named in page


def test_a_study_trained_on_chexpert_is_tested_on_chestxray14_over_the_labels_of_both(
    stanford: Path, tmp_path: Path
) -> None:
    """ChestX-ray14's layout is that of the phantoms."""
    phantoms = DatasetSettings(name="phantom", images=600)
    nih = prepare(phantoms, load_index(phantoms), tmp_path / "drawn")
    roots = ("--data-root", f"chexpert={stanford}", "--data-root", f"chestxray14={nih}")
    with launched(tmp_path / "runs", "--dataset", "chexpert", *roots, study="cross_dataset", overrides=SMALL) as launch:
        assert launch.wait() == 0, launch.output
    cells = pd.read_csv(tmp_path / "runs" / "cross_dataset" / "report" / "cells.csv").set_index("dataset")
    assert set(cells.index) == {"chexpert", "chexpert→chestxray14"}
    away = cells.loc["chexpert→chestxray14"]
    assert away["status"].eq("FINISHED").all()
    assert away["macro_auc"].between(0, 1).all()
    assert cells.filter(like="auc/").shape[1] == SHARED
