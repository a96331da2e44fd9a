"""How a table is read acts on a study's keys through what it says, never through where it lies or what it is called."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from study.plan import Plan
from tests.made_datasets import CSV_OPTIONS, make_csv, make_tbx11k
from tests.studies_for_tests import planned
from trainables.data.registry import load_index
from trainables.settings import READING, DatasetSettings

SMALL = {"seeds": [0], "dataset.image_size": 32, "model.backbone": "tiny-phantom"}
OWN = {**CSV_OPTIONS, "dataset.name": "csv", "dataset.label_columns": ["Mass", "Nodule"]}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 160 images described by a table."""
    return make_csv(tmp_path_factory.mktemp("data") / "own")


def keys(plan: Plan) -> list[tuple[str, ...]]:
    return [chain.keys for chain in plan.chains]


def keys_of(storage: Path, root: Path, **changes: Any) -> list[tuple[str, ...]]:
    chosen = {f"dataset.{name}": value for name, value in changes.items()}
    return keys(planned(storage, {**SMALL, **OWN, "dataset.root": str(root), **chosen}))


def test_the_same_table_under_another_name_folder_encoding_and_columns_has_the_same_keys(
    root: Path, tmp_path: Path
) -> None:
    before = keys_of(tmp_path / "a", root)
    moved = tmp_path / "moved"
    shutil.copytree(root, moved)
    text = (moved / "labels.csv").read_text().replace("file,patient", "Bild,Träger", 1)
    (moved / "labels.csv").unlink()
    (moved / "mine.csv").write_text(text, encoding="cp1252")
    described = {"table": "mine.csv", "image_column": "Bild", "group_column": "Träger", "encoding": "cp1252"}
    assert keys_of(tmp_path / "b", moved, **described) == before
    labels = {"label_columns": None, "label_column": "findings", "label_separator": "|"}
    assert keys_of(tmp_path / "c", root, **{**labels, "label_columns": []}) == before, "the same labels, told otherwise"


@pytest.mark.parametrize(
    "changes",
    [
        {"group_column": None},
        {"split_column": "part"},
        {"label_columns": ["Nodule", "Mass"]},
        {"label_columns": [], "label_column": "diagnosis"},
        {"label_columns": ["Mass"]},
        {"channels": 1},
    ],
    ids=str,
)
def test_what_changes_rows_groups_labels_split_or_channels_changes_every_key(
    root: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    before, after = keys_of(tmp_path, root), keys_of(tmp_path, root, **changes)
    assert {key for chain in before for key in chain}.isdisjoint(key for chain in after for key in chain)


@pytest.mark.parametrize("changes", [{"merge_classes": True}, {"only_tb": True}, {"split": "official"}], ids=str)
def test_so_do_the_settings_of_data_sets_with_choices(tmp_path: Path, changes: dict[str, Any]) -> None:
    root = make_tbx11k(tmp_path)
    for part in ("train", "val"):  # the images with tuberculosis, some of which have both kinds
        path = root / "annotations" / "json" / f"TBX11K_{part}.json"
        path.with_stem(f"{path.stem}_only_tb").write_text(path.read_text().replace("health/", "sick/"))
    plain = DatasetSettings(name="tbx11k", root=str(root))
    assert load_index(plain.model_copy(update=changes)).digest() != load_index(plain).digest()


def test_every_setting_of_reading_belongs_to_some_data_set() -> None:
    from trainables.data.registry import _ADAPTERS

    read = {option for adapter in _ADAPTERS.values() for option in adapter.options}
    assert read == READING <= set(DatasetSettings.model_fields)
