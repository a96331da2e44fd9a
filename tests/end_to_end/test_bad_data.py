"""Data sets and encoders that cannot be used, through the real command line: said before training, nothing begun."""

from __future__ import annotations

import csv
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from bad_inputs import TABLE, Told, chest_data, chest_options, launch, launch_all, refused, written

from trainables.backbone_files import SHIPPED

# ------------------------------------------------------------------------------------------------------------- data


def edit(column: int, line: int, value: str) -> Callable[[Path], None]:
    """Another value in a line of the table, lines counted from 1."""

    def harm(root: Path) -> None:
        with (root / TABLE).open(newline="", encoding="utf-8") as file:
            lines = file.read().splitlines()
        fields = next(csv.reader([lines[line - 1]]))
        fields[column] = value
        lines[line - 1] = ",".join(fields)
        (root / TABLE).write_text("\n".join(lines) + "\n", encoding="utf-8")

    return harm


def replace(old: str, new: str) -> Callable[[Path], None]:
    def harm(root: Path) -> None:
        table = root / TABLE
        table.write_text(table.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")

    return harm


def content(data: bytes) -> Callable[[Path], None]:
    return lambda root: (root / TABLE).write_bytes(data) and None


def remove_images(root: Path) -> None:
    for number in range(1, 8):
        (root / "images" / f"{number:08d}_000.png").unlink()


def remove_table(root: Path) -> None:
    (root / TABLE).unlink()


DATA: dict[str, tuple[Callable[[Path], None], list[str], list[str]]] = {
    "missing column": (replace("Patient ID", "Person"), [], [f"{TABLE}: no column 'Patient ID'; its header is Image"]),
    "broken row": (
        lambda root: (root / TABLE).write_text((root / TABLE).read_text() + "00000099_000.png,Effusion\n") and None,
        [],
        [f"{TABLE}, line 42: 2 fields; expected 11 as in the header"],
    ),
    "broken value": (edit(3, 7, "x5"), [], [f"{TABLE}, line 7: Patient ID 'x5'; expected a number"]),
    "unknown finding": (edit(1, 3, "Efusion"), [], [f"{TABLE}, line 3: Finding Labels 'Efusion' names 'Efusion'"]),
    "image twice": (edit(0, 9, "00000001_000.png"), [], [f"{TABLE}, line 9: image 00000001_000.png is listed already"]),
    "empty table": (content(b""), [], [f"{TABLE}"]),
    "not text": (content(np.random.default_rng(1).bytes(3000)), [], [f"{TABLE}: cannot be read as CSV in UTF-8"]),
    "no table": (remove_table, [], [f"expected {TABLE} or Data_Entry_2017.csv"]),
    "missing images": (
        remove_images,
        [],
        ["7 of 40 images are not under ", "first missing is 00000001_000.png, then 00000002_000.png, then 00000003"],
    ),
    "image outside": (
        edit(0, 3, "../../secret.png"),
        [],
        ["image name '../../secret.png' leaves the data set's folder"],
    ),
    "image at the root": (edit(0, 3, "/etc/secret.png"), [], ["image name '/etc/secret.png' leaves the data set's"]),
    "patient in two splits": (
        edit(3, 41, "3"),
        ["-o", "dataset.split=official"],
        ["1 patient(s) have images in two splits (patient 3 in train and test): the split leaks"],
    ),
    "class without positives": (
        replace("Effusion", "No Finding"),
        [],
        ["1 class(es) without a positive", "Effusion train 0, val 0, test 0"],
    ),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Told]]:
    folder = tmp_path_factory.mktemp("data")
    sound = chest_data(folder / "sound")
    cases = {}
    for name, (harm, options, _) in DATA.items():
        root = Path(shutil.copytree(sound, folder / name))
        harm(root)
        cases[name] = (folder, ["ablation", *chest_options(root, folder / f"{name}, results"), *options])
    return folder, launch_all(cases)


@pytest.mark.parametrize("case", DATA)
def test_data_that_cannot_be_trained_on(data: tuple[Path, dict[str, Told]], case: str) -> None:
    folder, told = data
    refused(told[case], *DATA[case][2])
    assert not (folder / f"{case}, results").exists()


def test_an_edited_split_file_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    root, storage = chest_data(tmp_path / "nih"), tmp_path / "results"
    from trainables.data.registry import load_index
    from trainables.settings import DatasetSettings

    drop = tuple(c for c in _classes() if c != "Effusion")
    load_index(DatasetSettings(name="chestxray14", root=str(root), drop_classes=drop), storage / "splits")
    (file,) = (storage / "splits").iterdir()
    edited = file.read_text(encoding="utf-8").replace(",train\n", ",test\n", 1)
    file.write_text(edited, encoding="utf-8")
    told = launch(tmp_path, "ablation", *chest_options(root, storage))
    refused(told, f"{file}: the split file is damaged or was edited", "restore it, or delete it to split anew")
    assert written(storage) == [str(file.relative_to(storage))]
    assert file.read_text(encoding="utf-8") == edited


def _classes() -> tuple[str, ...]:
    from trainables.data.chestxray14 import CLASSES

    return CLASSES


def test_all_images_that_cannot_be_read_are_counted_before_training_and_no_cache_is_taken_for_whole(
    tmp_path: Path,
) -> None:
    root, storage = chest_data(tmp_path / "nih"), tmp_path / "results"
    images = sorted((root / "images").iterdir())
    for path in images[1:5]:
        path.write_bytes(b"not an image")
    images[20].write_bytes(b"")
    images[39].write_bytes(images[39].read_bytes()[:200])
    told = launch(tmp_path, "ablation", *chest_options(root, storage))
    refused(told, "6 of 40 images cannot be read", *(f"{path} (not an image)" for path in images[1:4]), "Replace the")
    assert not any(name.endswith("state.npz") for name in written(storage))
    assert any(name.endswith("begun.npz") for name in written(storage)), "what could be read is not read again"
    assert not (storage / "states").exists() and not (storage / "mlflow.db").exists()


def test_a_link_that_the_owner_of_the_folder_made_is_followed(tmp_path: Path) -> None:
    """Names come from a table that somebody sent; links only from who may write to the folder, and they are common."""
    root = chest_data(tmp_path / "nih")
    (root / "images").rename(tmp_path / "scratch")
    (root / "images").symlink_to(tmp_path / "scratch")
    told = launch(tmp_path, "ablation", *chest_options(root, tmp_path / "results"), "--plan", "--json")
    assert told.status == 0, told.err
    assert '"images_to_decode": 40' in told.out


# --------------------------------------------------------------------------------------------------------- backbone


def tiny(folder: Path) -> Path:
    return Path(shutil.copytree(SHIPPED["tiny-phantom"], folder))


def config(old: str, new: str) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        path = folder / "config.json"
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new), encoding="utf-8")

    return harm


BACKBONES: dict[str, tuple[Callable[[Path], None], str]] = {
    "absent": (shutil.rmtree, "no such folder; expected a folder, a hub id owner/name, or tiny-phantom"),
    "no-weights": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin") and None,
        "(it holds pytorch_model.bin); save it with save_pretrained()",
    ),
    "no-config": (
        lambda folder: (folder / "config.json").unlink(),
        "config.json does not exist; save the encoder with",
    ),
    "another": (config('"dinov2"', '"vit"'), "architecture 'vit'; expected one of dinov2"),
    "thin": (
        config('"num_hidden_layers": 12', '"num_hidden_layers": 10'),
        "tensors are not part of the encoder, first",
    ),
    "wide": (
        config('"hidden_size": 48', '"hidden_size": 96'),
        "have another shape, first embeddings.cls_token: (1, 1,",
    ),
    "nonsense": (
        config('"hidden_size": 48', '"hidden_size": "many"'),
        "hidden_size is 'many'; expected a whole number",
    ),
    "truncated": (
        lambda folder: os.truncate(folder / "model.safetensors", 100_000),
        "is no whole safetensors file",
    ),
}


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Told]:
    folder = tmp_path_factory.mktemp("backbones")
    cases = {}
    for name, (harm, _) in BACKBONES.items():
        harm(tiny(folder / name))
        cases[name] = (folder, ["ablation", "--backbone", f"./{name}", "--storage", "results"])
    cases["offline"] = (folder, ["ablation", "--backbone", "nobody/nothing", "--storage", "results"])
    told = launch_all(cases)
    assert not (folder / "results").exists()
    return told


@pytest.mark.parametrize("case", BACKBONES)
def test_an_encoder_that_cannot_be_used_is_refused_before_any_worker_loads_it(
    backbones: dict[str, Told], case: str
) -> None:
    refused(backbones[case], f"./{case}", BACKBONES[case][1])


def test_a_hub_id_without_a_network(backbones: dict[str, Told]) -> None:
    refused(backbones["offline"], "could not be fetched", "give a folder with --backbone DIR or make the hub reachable")


def test_a_hub_that_is_unreachable_is_not_tried_for_half_a_minute(tmp_path: Path) -> None:
    environment = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:1", "HF_HOME": str(tmp_path / "hub")}
    told = launch(tmp_path, "ablation", "--backbone", "nobody/nothing", "--plan", environment=environment)
    refused(told, "backbone 'nobody/nothing': config.json is not in the local hub cache and could not be fetched (")
