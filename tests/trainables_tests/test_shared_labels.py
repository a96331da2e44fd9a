"""Labels that two data sets share, and the index of one tested by another's training."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainables.data import chestxray14, chexpert, vindr_cxr
from trainables.data.index import SPLITS, DataError
from trainables.data.opened import Data, Folders, open_away, open_data, refuse_images_in_both
from trainables.data.registry import away_settings, load_away, load_index
from trainables.data.shared_labels import shared_labels
from trainables.settings import DatasetSettings

NIH, CHEXPERT, VINDR = chestxray14.CLASSES, chexpert.CLASSES, vindr_cxr.LOCAL + vindr_cxr.GLOBAL


def shared(home: tuple[str, ...], away: tuple[str, ...], **given: str) -> dict[str, str]:
    return shared_labels(home, away, given, names=("home", "away"))


def test_chest_data_sets_share_the_labels_that_the_field_compares_them_by() -> None:
    assert shared(NIH, CHEXPERT) == {
        "Atelectasis": "Atelectasis",
        "Cardiomegaly": "Cardiomegaly",
        "Effusion": "Pleural Effusion",
        "Pneumonia": "Pneumonia",
        "Pneumothorax": "Pneumothorax",
        "Consolidation": "Consolidation",
        "Edema": "Edema",
    }
    assert shared(NIH, VINDR) == {
        "Atelectasis": "Atelectasis",
        "Cardiomegaly": "Cardiomegaly",
        "Effusion": "Pleural effusion",
        "Infiltration": "Infiltration",
        "Pneumonia": "Pneumonia",
        "Pneumothorax": "Pneumothorax",
        "Consolidation": "Consolidation",
        "Edema": "Edema",
        "Emphysema": "Emphysema",
        "Fibrosis": "Pulmonary fibrosis",
        "Pleural_Thickening": "Pleural thickening",
    }


def test_no_finding_means_another_thing_in_every_data_set() -> None:
    assert "No Finding" not in shared(CHEXPERT, VINDR)
    assert {"Lung Opacity": "Lung Opacity"}.items() <= shared(CHEXPERT, VINDR).items()


def test_the_same_pairs_are_found_from_either_side() -> None:
    there, back = shared(NIH, VINDR), shared(VINDR, NIH)
    assert {theirs: ours for ours, theirs in there.items()} == back


def test_a_study_maps_further_labels_itself_and_none_twice() -> None:
    mapped = shared(NIH, VINDR, Mass="Nodule/Mass", Infiltration="Lung Opacity")
    assert (mapped["Mass"], mapped["Infiltration"]) == ("Nodule/Mass", "Lung Opacity")
    taken = shared(NIH, VINDR, Mass="Infiltration")
    assert "Infiltration" not in taken
    assert len(set(taken.values())) == len(taken)


@pytest.mark.parametrize(
    ("home", "given", "message"),
    [
        (NIH, {"Masses": "Nodule/Mass"}, r"labels: home has no class 'Masses'"),
        (NIH, {"Mass": "Lump"}, r"labels: away has no class 'Lump'"),
        (("nv", "mel"), {}, r"home and away have no label in common \(nv, mel; .*map some by dataset\.test_on\.labels"),
    ],
)
def test_what_cannot_be_mapped_is_refused(home: tuple[str, ...], given: dict[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        shared_labels(home, VINDR, given, names=("home", "away"))


# -- indexes ----------------------------------------------------------------------------------------------------------


def settings(**changes: Any) -> DatasetSettings:
    other = {"name": "phantom", "hospital": 7, "images": 600}
    values = {"name": "phantom", "images": 600, "image_size": 32, "test_on": other} | changes
    return DatasetSettings.model_validate(values)


CSV = {
    "name": "csv",
    "split": "official",
    "table": "labels.csv",
    "image_column": "file",
    "group_column": "patient",
    "split_column": "split",
    "channels": 1,
}


def columns(*names: str, root: Path) -> dict[str, Any]:
    return CSV | {"root": str(root), "label_columns": names}


def make_table(root: Path, images: list[str], labels: dict[str, np.ndarray], split: np.ndarray) -> None:
    lines = [",".join(["file", "patient", "split", *labels])]
    for i, name in enumerate(images):
        lines.append(",".join([name, name[:8], SPLITS[split[i]], *(str(column[i]) for column in labels.values())]))
    (root / "labels.csv").write_text("\n".join(lines) + "\n")


def folders(root: Path) -> Folders:
    return Folders(root / "drawn", root / "decoded", root / "splits")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hospital's table of drawn images: three labels in another order, one under another name, one of its own."""
    root = tmp_path_factory.mktemp("data")
    drawn = settings(hospital=7, images=200, test_on=None, drop_classes=())
    at = folders(root)
    from trainables.data.registry import place, read_table, split_table

    index = split_table(read_table(drawn).usable(), drawn)
    source = place(drawn, at.phantoms)
    (root / "own").mkdir()
    shutil.copytree(source / "images", root / "own" / "images")
    chosen = {
        "Own": "Mass",
        "Pleural effusion": "Effusion",
        "atelectasis": "Atelectasis",
        "Infiltration": "Infiltration",
    }
    labels = {name: index.labels[:, NIH.index(finding)] for name, finding in chosen.items()}
    make_table(root / "own", index.names.tolist(), labels, index.split)
    return root / "own"


def test_both_indexes_hold_the_shared_labels_in_the_order_of_the_first(table: Path) -> None:
    data = settings(test_on=columns("Own", "Pleural effusion", "atelectasis", "Infiltration", root=table))
    home, away = load_index(data), load_away(data)
    assert home.classes == away.classes == ("Atelectasis", "Effusion", "Infiltration")
    plain = load_index(settings(test_on=None))
    assert home.split.tolist() == plain.split.tolist(), "no image changes its split"
    assert home.labels.tolist() == plain.labels[:, [NIH.index(name) for name in home.classes]].tolist()
    lines = [line.split(",") for line in (table / "labels.csv").read_text().splitlines()[1:]]
    expected = {line[0]: [int(line[5]), int(line[4]), int(line[6])] for line in lines if line[2] == "test"}
    assert {name: label.tolist() for name, label in zip(away.names, away.labels, strict=True)} == expected
    assert set(home.dropped) == set(NIH) - set(home.classes)
    assert "Trained on 3 of its 14 labels, which csv has too: Atelectasis, Effusion, Infiltration." in home.notes


def test_dropped_classes_are_dropped_on_both_sides() -> None:
    data = settings(drop_classes=("Hernia", "Mass"))
    assert load_index(data).classes == load_away(data).classes == tuple(c for c in NIH if c not in ("Hernia", "Mass"))


def test_only_test_images_of_the_other_data_set_are_kept_and_its_patients_are_others() -> None:
    data = settings()
    home, away = load_index(data), load_away(data)
    whole = load_index(away_settings(data))
    assert away.names.tolist() == whole.names[whole.rows("test")].tolist()
    assert away.rows("test").tolist() == list(range(len(away)))
    assert home.digest() != away.digest()


def test_hospitals_draw_other_patients_and_no_image_twice(tmp_path: Path) -> None:
    data = settings(images=200, drop_classes=tuple(set(NIH) - {"Effusion", "Atelectasis"}))
    home, away = open_data(data, folders(tmp_path)), open_away(data, folders(tmp_path))
    refuse_images_in_both(home, away)
    seen = {row.tobytes() for row in home.images.pixels}
    assert not seen & {row.tobytes() for row in away.images.pixels}


def test_images_that_training_looks_at_cannot_be_tested_elsewhere(tmp_path: Path) -> None:
    """Another table over the same files: groups and names say nothing, the pixels do."""
    kept = ("Effusion", "Atelectasis")
    drawn = settings(hospital=3, images=200, test_on=None, drop_classes=tuple(set(NIH) - set(kept)))
    at = folders(tmp_path)
    home = open_data(drawn, at)
    root = tmp_path / "copy"
    (root / "images").mkdir(parents=True)
    new = [f"{i:08d}.png" for i in range(len(home.index))]
    for name, copied in zip(home.index.names, new, strict=True):
        shutil.copy(home.root / "images" / name, root / "images" / copied)
    labels = {name: home.index.labels[:, home.index.classes.index(name)] for name in kept}
    make_table(root, new, labels, np.roll(home.index.split, 7))
    data = drawn.model_copy(update={"test_on": settings(test_on=columns(*kept, root=root)).test_on})
    there: Data = open_away(data, at)
    trained = {home.index.names[i] for i in range(len(home.index)) if home.index.split[i] != SPLITS.index("test")}
    both = [name for name in there.index.names if home.index.names[int(name[:8])] in trained]
    assert both
    message = (
        rf"{len(both)} of {len(there.index)} test images of csv .* looks at, first {both[0]}; test on other patients"
    )
    with pytest.raises(DataError, match=message):
        refuse_images_in_both(open_data(data, at), there)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_on": {"name": "phantom", "hospital": 0}}, r"it is phantom itself.*dataset\.test_on\.hospital"),
        ({"test_on": {"name": "phantom", "hospital": 7, "images": 60}}, r"cannot measure .*dataset\.test_on\.images"),
        ({"test_on": {"name": "ham10000", "root": "nowhere"}}, r"nowhere"),
        ({"test_on": {"name": "csv", "root": "tests"}}, r"^dataset\.test_on\.table: name the table"),
        ({"test_on": {"name": "phantom-derm"}}, r"phantom and phantom-derm have no label in common"),
    ],
)
def test_a_data_set_that_cannot_be_tested_on_is_refused_with_the_remedy(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_away(settings(**changes))
