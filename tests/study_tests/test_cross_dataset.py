"""Trained on one data set, tested on another: a cell elsewhere is another look at the same trajectory."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from sklearn.metrics import roc_auc_score
from small_studies import document, loaded, planned

from study.chains import Chain
from study.declare import cell_headers, row_headers
from study.documents import StudyError
from study.plan import Plan
from study.plan_view import plan_table
from study.preparing import prepare_away
from study.spec import Choices
from study.store import Store
from tests.made_datasets import CSV_OPTIONS, make_csv
from tests.studies_for_tests import TINY, Ran, run_study
from trainables.data.registry import load_away, load_index

OTHER = {"name": "phantom", "hospital": 7, "images": 600}
HOME, AWAY = "phantom", "phantom→hospital 7"


def declared(**changes: Any) -> dict[str, Any]:
    return document(dataset={"test_on": OTHER | changes})


def by_place(plan: Plan, seed: int = 0) -> dict[str, Chain]:
    return {chain.cell.dataset: chain for chain in plan.chains if chain.cell.seed == seed}


def refusal(tmp_path: Path, content: dict[str, Any], choices: Choices | None = None) -> str:
    with pytest.raises(StudyError) as caught:
        loaded(tmp_path, content, choices)
    return str(caught.value)


# -- the plan ---------------------------------------------------------------------------------------------------------


def test_cells_at_home_and_elsewhere_are_two_looks_at_one_trajectory(tmp_path: Path) -> None:
    plan = planned(tmp_path, declared())
    assert plan.study.datasets == (HOME, AWAY)
    home, away = by_place(plan)[HOME], by_place(plan)[AWAY]
    assert home.keys == away.keys
    assert home.observer.name != away.observer.name
    assert home.observer.copy == away.observer.copy
    assert home.key != away.key
    assert {stage.cells for stage in plan.stages} == {2}
    alone = planned(tmp_path, document(seeds=[0, 1]))
    assert plan.units.shared == alone.units.shared, "to look elsewhere costs no training"
    assert plan.units.alone == 2 * alone.units.alone


def test_the_other_data_set_acts_on_the_look_and_not_on_the_training(tmp_path: Path) -> None:
    first, second = (by_place(planned(tmp_path, declared(**c))) for c in ({}, {"split_seed": 1}))
    assert first[HOME].keys == second[HOME].keys
    assert first[HOME].observer == second[HOME].observer
    assert first[AWAY].observer.name != second[AWAY].observer.name
    assert first[AWAY].key != second[AWAY].key


def test_the_labels_that_are_trained_on_are_part_of_the_trajectory(tmp_path: Path) -> None:
    plain = by_place(planned(tmp_path, document()))[HOME]
    all_shared = by_place(planned(tmp_path, declared()))[HOME]
    assert plain.keys == all_shared.keys, "where all labels are shared, training is that of any other study"
    fewer = document(dataset={"test_on": OTHER, "drop_classes": ["Hernia"]})
    assert by_place(planned(tmp_path, fewer))[HOME].keys[0] != plain.keys[0]


def test_without_sharing_every_look_trains_for_itself(tmp_path: Path) -> None:
    cells = by_place(planned(tmp_path, declared(), sharing=False))
    assert not set(cells[HOME].keys) & set(cells[AWAY].keys)


def test_both_data_sets_are_decoded_and_named_as_drawn(tmp_path: Path) -> None:
    plan = planned(tmp_path, declared())
    settings = by_place(plan)[AWAY].cell.settings.dataset
    assert plan.images_to_decode == len(load_index(settings)) + len(load_away(settings))
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(plan_table(plan, 0))
    assert f"{HOME} (synthetic), {AWAY} (synthetic)" in console.export_text()


# -- the study file ---------------------------------------------------------------------------------------------------


def test_rows_cannot_be_tested_on_different_data(tmp_path: Path) -> None:
    rows = [{"name": "a", "set": {"dataset.test_on.hospital": 8}}, {"name": "b", "set": {"dataset.tested": "away"}}]
    told = refusal(tmp_path, document(rows, dataset={"test_on": OTHER}))
    assert "dataset.test_on.hospital" in told
    assert told.count("a row cannot change the data set") == 2


def test_what_the_study_sets_itself_is_refused(tmp_path: Path) -> None:
    assert "the study sets it" in refusal(tmp_path, document(dataset={"test_on": OTHER, "tested": "away"}))
    assert "dataset.test_on.name" in refusal(tmp_path, document(dataset={"tested": "away"}))


def test_other_tasks_have_no_labels_to_share(tmp_path: Path) -> None:
    segmentation = document(dataset={"test_on": OTHER}, model={"backbone": "tiny-sam2"}, strategy={"depth": 4})
    assert "the task segmentation has no labels by name" in refusal(tmp_path, segmentation | {"task": "segmentation"})


def test_each_folder_goes_to_its_data_set(tmp_path: Path) -> None:
    content = document(dataset={"name": "chestxray14", "images": 600, "test_on": {"name": "chexpert"}})
    roots = {"chestxray14": "nih", "chexpert": "stanford"}
    study = loaded(tmp_path, content, Choices(data_roots=roots))
    assert study.datasets == ("chestxray14", "chestxray14→chexpert")
    for settings in (row.settings[name].dataset for row in study.rows for name in study.datasets):
        assert (settings.root, settings.test_on and settings.test_on.root) == ("nih", "stanford")
    told = refusal(tmp_path, content, Choices(data_roots={"chexprt": "x"}))
    assert "the study has no data set 'chexprt'" in told
    assert "it has chestxray14, chexpert" in told


def test_both_directions_make_four_places(tmp_path: Path) -> None:
    both = {"datasets": ["chestxray14", "chexpert"], "profiles": {"chexpert": {"dataset.test_on.name": "chestxray14"}}}
    content = document(dataset={"images": 600, "test_on": {"name": "chexpert"}}) | both
    study = loaded(tmp_path, content)
    assert study.datasets == ("chestxray14", "chestxray14→chexpert", "chexpert", "chexpert→chestxray14")


def test_missing_folders_of_both_are_told_at_once(tmp_path: Path) -> None:
    content = document(dataset={"name": "chestxray14", "images": 600, "test_on": {"name": "chexpert"}})
    with pytest.raises(StudyError) as caught:
        planned(tmp_path, content)
    assert "chestxray14" in str(caught.value)


def tables(tmp_path: Path, home: Path, away: Path) -> Plan:
    told = {name.removeprefix("dataset."): value for name, value in CSV_OPTIONS.items()}
    told |= {"name": "csv", "label_columns": ["Mass", "Nodule"]}
    other = told | {"root": str(away)}
    dataset = told | {"root": str(home), "images": None, "image_size": 32, "test_on": other}
    return planned(tmp_path, document(dataset=dataset, model={"backbone": "tiny-phantom"}))


def test_folders_that_were_moved_change_no_key_of_rows_and_cells(tmp_path: Path) -> None:
    home, away = make_csv(tmp_path / "home"), make_csv(tmp_path / "away", seed=1)
    before = tables(tmp_path, home, away)
    assert before.study.datasets == ("csv", "csv→another csv")
    moved = [shutil.copytree(folder, tmp_path / "moved" / folder.name) for folder in (home, away)]
    after = tables(tmp_path, *moved)
    assert [c.key for c in before.chains] == [c.key for c in after.chains]
    keys = [{place: header.key for place, header in row_headers(plan).items()} for plan in (before, after)]
    assert keys[0] == keys[1]
    sources = [{c.dataset: c.dataset_source for c in cell_headers(p, row_headers(p))} for p in (before, after)]
    assert sources[0]["csv→another csv"] == f"{home}, tested on {away}"
    assert sources[0] != sources[1]


# -- the run ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def overrides() -> dict[str, Any]:
    return {**TINY, "seeds": [0], "dataset.test_on.images": 600}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, overrides: dict[str, Any]) -> Ran:
    return run_study(tmp_path_factory.mktemp("cross"), overrides, study="cross_dataset")


def predictions(ran: Ran, place: str, row: str) -> dict[str, np.ndarray[Any, Any]]:
    (chain,) = [c for c in ran.plan.chains if (c.cell.dataset, c.cell.row.name) == (place, row)]
    with np.load(Store(ran.storage).predictions(chain.leaf, chain.observer.name)) as file:
        return dict(file)


@pytest.mark.slow
def test_one_training_is_tested_at_home_and_elsewhere(ran: Ran) -> None:
    assert ran.complete
    cells = ran.cells().reset_index()
    assert len(cells) == 4
    assert ran.header.units.executed == ran.header.units.shared
    for row, pair in cells.groupby("row"):
        places = pair.set_index("dataset")
        assert set(places.index) == {HOME, AWAY}
        for same in ("weights_sha256", "trajectory_sha256", "best_epoch"):
            assert places.loc[HOME, same] == places.loc[AWAY, same], (row, same)
        assert places.loc[HOME, "split_digest"] != places.loc[AWAY, "split_digest"]
        assert places.loc[HOME, "macro_auc"] != places.loc[AWAY, "macro_auc"]


@pytest.mark.slow
def test_what_is_reported_elsewhere_is_measured_on_the_other_test_split(ran: Ran) -> None:
    cells = ran.cells().reset_index().set_index(["dataset", "row"])
    settings = next(c.cell.settings.dataset for c in ran.plan.chains if c.cell.dataset == AWAY)
    away = load_away(settings)
    for row in ("MLP head only", "SPFT"):
        kept = predictions(ran, AWAY, row)
        assert kept["names"].tolist() == away.names.tolist()
        assert np.array_equal(kept["labels"], away.labels)
        aucs = [roc_auc_score(kept["labels"][:, c], kept["scores"][:, c]) for c in range(len(away.classes))]
        assert cells.loc[(AWAY, row), "macro_auc"] == pytest.approx(np.mean(aucs), abs=1e-9)
        assert set(predictions(ran, HOME, row)["names"]) != set(kept["names"])


@pytest.mark.slow
def test_every_place_by_itself_gives_the_same_bits(tmp_path: Path, overrides: dict[str, Any], ran: Ran) -> None:
    alone = run_study(tmp_path, overrides, study="cross_dataset", sharing=False)
    assert alone.header.units.executed == alone.header.units.alone
    columns = ["weights_sha256", "trajectory_sha256", "best_epoch", "macro_auc"]
    tables = [r.cells().reset_index().set_index(["dataset", "row"]).sort_index()[columns] for r in (ran, alone)]
    pd.testing.assert_frame_equal(*tables, check_exact=True)


@pytest.mark.slow
def test_changed_images_elsewhere_are_refused_before_anything_is_trained(ran: Ran) -> None:
    store = Store(ran.storage)
    prepare_away(ran.plan, store, Console(quiet=True))
    for recorded in (ran.storage / "contents").iterdir():
        recorded.write_bytes(b"0" * 64)
    with pytest.raises(StudyError, match="the images have changed"):
        prepare_away(ran.plan, store, Console(quiet=True))
