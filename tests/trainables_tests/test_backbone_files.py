"""What a backbone's folder or hub id says, and one clear sentence where it cannot be used."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Dinov2Model

from trainables.backbone_files import find_backbone
from trainables.backbones import load_encoder
from trainables.model_files import BackboneError, file_sha256


@pytest.fixture
def folder(encoder: Path, tmp_path: Path) -> Path:
    """A copy of the small encoder that may be harmed."""
    return Path(shutil.copytree(encoder, tmp_path / "encoder"))


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The hub's client as a process started with HF_HUB_OFFLINE=1 and an empty cache has it."""
    from huggingface_hub import constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def rewrite(path: Path, **changes: Any) -> None:
    config = json.loads(path.read_text()) if path.exists() else {}
    config |= changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def message_of(name: str | Path) -> str:
    with pytest.raises(BackboneError) as caught:
        find_backbone(str(name))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_folder_says_its_shape(folder: Path) -> None:
    backbone = find_backbone(str(folder))
    assert (backbone.hidden, backbone.layers, backbone.mlp_ratio, backbone.patch) == (16, 4, 4.0, 8)
    assert backbone.folder == folder
    assert backbone.weights_digest() == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_without_a_preprocessors_file_the_pixel_statistics_are_imagenets(folder: Path) -> None:
    backbone = find_backbone(str(folder))
    assert backbone.mean == (0.485, 0.456, 0.406)
    assert backbone.std == (0.229, 0.224, 0.225)


@pytest.mark.parametrize(
    ("mean", "std", "means", "stds"),
    [
        ([0.5307, 0.5307, 0.5307], [0.2583] * 3, (0.5307,) * 3, (0.2583,) * 3),
        ([0.5307], [0.2583], (0.5307,) * 3, (0.2583,) * 3),
        ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6], (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)),
    ],
)
def test_the_preprocessors_statistics_are_taken(
    folder: Path, mean: list[float], std: list[float], means: tuple[float, ...], stds: tuple[float, ...]
) -> None:
    rewrite(folder / "preprocessor_config.json", image_mean=mean, image_std=std)
    backbone = find_backbone(str(folder))
    assert (backbone.mean, backbone.std) == (means, stds)


def test_the_shipped_encoder_has_twelve_blocks_and_fits_in_two_megabytes() -> None:
    backbone = find_backbone("tiny-phantom")
    assert backbone.folder is not None
    assert (backbone.hidden, backbone.layers, backbone.patch) == (48, 12, 8)
    assert (backbone.folder / "model.safetensors").stat().st_size <= 2_000_000
    assert len(load_encoder(backbone).encoder.layer) == 12


def test_missing_weights_are_named_with_the_remedy(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    message = message_of(folder)
    assert f"no model.safetensors in {folder}" in message
    assert "save_pretrained()" in message


def test_a_missing_config_is_named(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert str(folder / "config.json") in message_of(folder)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b'{"model_type": ', "not a readable JSON file"),
        (b"\xff\xfe\x00", "not a readable JSON file"),
        (b"", "not a readable JSON file"),
        (b"[1, 2]", "expected a JSON object"),
        (b"[" * 100_000, "not a readable JSON file"),
        (b'{"hidden_size": ' + b"9" * 5000 + b"}", "not a readable JSON file"),
    ],
)
@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json"])
def test_broken_json_is_named_by_its_file(folder: Path, file: str, text: bytes, said: str) -> None:
    (folder / file).write_bytes(text)
    message = message_of(folder)
    assert str(folder / file) in message
    assert said in message


@pytest.mark.parametrize("kind", ["vit", None])
def test_another_architecture_is_refused_with_what_is_expected(folder: Path, kind: str | None) -> None:
    rewrite(folder / "config.json", model_type=kind)
    assert message_of(folder) == f"backbone {str(folder)!r}: architecture {kind!r}; expected one of dinov2"


def test_a_config_without_its_shape_names_what_is_missing(folder: Path) -> None:
    rewrite(folder / "config.json", hidden_size=None, num_hidden_layers=None)
    assert "config.json has no hidden_size, num_hidden_layers" in message_of(folder)


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "~/nothing", "no-such-name", "a/b/c"])
def test_a_folder_that_is_not_there_is_never_looked_up_on_the_hub(name: str) -> None:
    started = time.perf_counter()
    message = message_of(name)
    assert time.perf_counter() - started < 0.5
    assert "no such folder; expected a folder, a hub id owner/name, or tiny-phantom" in message


@pytest.mark.usefixtures("no_hub")
def test_a_hub_id_without_a_network_gives_one_message_at_once() -> None:
    started = time.perf_counter()
    message = message_of("nobody/nothing")
    assert time.perf_counter() - started < 5
    assert "'nobody/nothing': config.json is not in the local hub cache and could not be fetched" in message
    assert "--backbone DIR" in message


def test_a_hub_that_does_not_answer_is_said_within_seconds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A closed port of this machine in the place of the hub: its client alone would try for half a minute."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    started = time.perf_counter()
    message = message_of("nobody/nothing")
    assert time.perf_counter() - started < 10
    assert "could not be fetched (ConnectError)" in message


@pytest.fixture
def snapshot(encoder: Path, tmp_path: Path) -> Path:
    """The small encoder as the hub's client caches 'some/encoder'."""
    repository = tmp_path / "hub" / "models--some--encoder"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("f" * 40)
    return Path(shutil.copytree(encoder, repository / "snapshots" / ("f" * 40)))


@pytest.mark.usefixtures("no_hub")
def test_a_hub_id_in_the_local_cache_needs_no_network(snapshot: Path) -> None:
    rewrite(snapshot / "preprocessor_config.json", image_mean=[0.5307], image_std=[0.2583])
    backbone = find_backbone("some/encoder", download=True)
    assert (backbone.folder, backbone.layers, backbone.mean) == (snapshot, 4, (0.5307,) * 3)


@pytest.mark.usefixtures("no_hub")
def test_a_hub_id_can_be_planned_from_its_config_before_its_weights_are_there(snapshot: Path) -> None:
    (snapshot / "model.safetensors").unlink()
    backbone = find_backbone("some/encoder")
    assert (backbone.folder, backbone.hidden) == (None, 16)
    assert backbone.weights_digest() == "not downloaded: some/encoder"
    with pytest.raises(BackboneError, match="could not be fetched"):
        find_backbone("some/encoder", download=True)
    with pytest.raises(BackboneError, match="its weights are not downloaded"):
        load_encoder(backbone)


@pytest.mark.usefixtures("no_hub")
def test_a_preprocessors_file_that_the_hub_is_known_not_to_have_is_not_asked_for(snapshot: Path) -> None:
    mark = snapshot.parents[1] / ".no_exist" / ("f" * 40) / "preprocessor_config.json"
    mark.parent.mkdir(parents=True)
    mark.touch()
    assert find_backbone("some/encoder", download=True).mean == (0.485, 0.456, 0.406)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model-00001-of-00002.safetensors"])
def test_weights_in_another_form_are_named(folder: Path, name: str) -> None:
    (folder / "model.safetensors").rename(folder / name)
    assert f"no model.safetensors in {folder} (it holds {name}); save it with save_pretrained()" in message_of(folder)


def test_a_file_in_the_place_of_a_folder_is_said(folder: Path) -> None:
    assert "a file; expected a folder, a hub id owner/name, or tiny-phantom" in message_of(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": "16"}, "config.json: hidden_size is '16'; expected a whole number above 0"),
        ({"num_hidden_layers": -4}, "config.json: num_hidden_layers is -4; expected a whole number above 0"),
        ({"num_hidden_layers": True}, "config.json: num_hidden_layers is True; expected a whole number"),
        ({"patch_size": [8, 8]}, "config.json: patch_size is [8, 8]; expected a whole number"),
        ({"mlp_ratio": "four"}, "config.json: mlp_ratio is 'four'; expected a number above 0"),
        ({"image_size": [32]}, "config.json: image_size is [32]; expected one or two whole numbers"),
        ({"num_attention_heads": 3}, "config.json: hidden_size 16 is no multiple of 3 heads"),
    ],
)
def test_a_value_that_no_encoder_can_have_is_named(folder: Path, changes: dict[str, Any], said: str) -> None:
    rewrite(folder / "config.json", **changes)
    assert said in message_of(folder)


@pytest.mark.parametrize("value", [3, "grey", [0.1, 0.2], [], [0.1, None, 0.2]])
def test_pixel_statistics_that_are_none_are_named(folder: Path, value: object) -> None:
    rewrite(folder / "preprocessor_config.json", image_mean=value, image_std=[0.2])
    assert f"preprocessor_config.json: image_mean is {value!r}; expected 1 or 3 numbers" in message_of(folder)


def test_the_digest_follows_a_file_that_changes(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    assert file_sha256(file) == hashlib.sha256(b"one").hexdigest()
    file.write_bytes(b"another")
    assert file_sha256(file) == hashlib.sha256(b"another").hexdigest()


@pytest.mark.real
def test_the_real_dinov2_small_is_read_and_loaded(real_data: Path) -> None:
    backbone = find_backbone(str(real_data / "dinov2-small"))
    assert (backbone.hidden, backbone.layers, backbone.mlp_ratio, backbone.patch) == (384, 12, 4.0, 14)
    assert (backbone.mean, backbone.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    encoder = load_encoder(backbone)
    assert isinstance(encoder, Dinov2Model)
    tensors = load_file(real_data / "dinov2-small" / "model.safetensors")
    assert sum(t.numel() for t in tensors.values()) == sum(p.numel() for p in encoder.parameters()) == 22_056_576
    assert torch.equal(encoder.embeddings.cls_token, tensors["embeddings.cls_token"].float())
