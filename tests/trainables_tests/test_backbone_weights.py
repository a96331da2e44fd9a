"""The verdict on a weights file from its header is the verdict that loading it comes to."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Dinov2Config, Dinov2ForImageClassification, Dinov2Model

from trainables.backbone_files import Backbone, find_backbone
from trainables.backbone_weights import misfit, stored_shapes
from trainables.backbones import load_encoder
from trainables.model_files import BackboneError

Tensors = dict[str, Tensor]


@pytest.fixture
def folder(encoder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(encoder, tmp_path / "encoder"))


def refusal(act: Callable[[], object]) -> str:
    """What is said against it; nothing if it is accepted."""
    try:
        act()
    except BackboneError as error:
        return str(error)
    return ""


def as_loaded(folder: Path) -> str:
    """What loading says, the header unread."""
    return refusal(lambda: load_encoder(Backbone("any", folder, 16, 4, 4.0, 8, (0.5,) * 3, (0.5,) * 3)))


def rewrite(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    for derived in ("out_features", "out_indices", "stage_names"):
        config.pop(derived, None)
    path.write_text(json.dumps(config))


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key.replace(old, new): value for key, value in tensors.items()}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict, ""),
        (
            without("encoder.layer.2.mlp.fc1.weight"),
            "1 of 79 tensors are missing, first encoder.layer.2.mlp.fc1.weight",
        ),
        (without("layernorm.bias"), "1 of 79 tensors are missing, first layernorm.bias"),
        (lambda t: {**t, "extra": torch.zeros(3)}, "1 tensors are not part of the encoder, first extra"),
        (
            lambda t: {**t, "embeddings.cls_token": torch.zeros(1, 1, 8)},
            "1 have another shape, first embeddings.cls_token: (1, 1, 8) instead of (1, 1, 16)",
        ),
        (renamed("attention.attention.query", "attention.q_proj"), ""),
        (renamed("attention.output.dense", "attention.o_proj"), ""),
        (renamed("attention.output.dense", "attention.proj"), "8 of 79 tensors are missing"),
        (lambda t: {f"dinov2.{name}": value for name, value in t.items()}, ""),
        (lambda t: {name: value.half() for name, value in t.items()}, ""),
        (lambda t: {"encoder": torch.zeros(1)}, "79 of 79 tensors are missing"),
    ],
)
def test_tensors_that_are_missing_unexpected_or_of_another_shape(
    folder: Path, change: Callable[[Tensors], Tensors], said: str
) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    told = refusal(lambda: find_backbone(str(folder)))
    assert said in told
    assert bool(told) == bool(said) == bool(as_loaded(folder))


@pytest.mark.parametrize(
    ("changes", "fits"),
    [
        ({"num_hidden_layers": 3}, False),
        ({"num_hidden_layers": 5}, False),
        ({"hidden_size": 24}, False),
        ({"patch_size": 4}, False),
        ({"image_size": 64}, False),
        ({"mlp_ratio": 2}, False),
        ({"num_channels": 1}, False),
        ({"qkv_bias": False}, False),
        ({"use_mask_token": False}, False),
        ({"num_attention_heads": 4}, True),
        ({"drop_path_rate": 0.1, "layerscale_value": 0.5, "hidden_act": "relu"}, True),
    ],
    ids=str,
)
def test_a_config_that_promises_another_encoder_than_the_file_holds(
    folder: Path, changes: dict[str, Any], fits: bool
) -> None:
    rewrite(folder, **changes)
    told = refusal(lambda: find_backbone(str(folder)))
    assert bool(told) == (not fits) == bool(as_loaded(folder))
    assert fits or "model.safetensors does not fit config.json" in told
    assert fits or "save both from one encoder with save_pretrained()" in told


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        lambda data: data[:100],
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2],
        lambda data: b"\xff" * len(data),
    ],
)
def test_a_file_that_is_cut_off_or_of_another_kind(folder: Path, damage: Callable[[bytes], bytes]) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    told = refusal(lambda: find_backbone(str(folder)))
    assert f"{file} is no whole safetensors file (" in told
    assert told.endswith("copy or download it again")
    assert "\n" not in told
    assert as_loaded(folder)


@pytest.mark.parametrize("swiglu", [False, True])
def test_what_transformers_saves_fits_its_config_whatever_the_layout(tmp_path: Path, swiglu: bool) -> None:
    config = Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, image_size=28, patch_size=7, use_swiglu_ffn=swiglu
    )
    Dinov2Model(config).save_pretrained(tmp_path)
    assert refusal(lambda: find_backbone(str(tmp_path))) == "" == as_loaded(tmp_path)


def test_a_checkpoint_with_a_classifier_is_refused_as_loading_it_would_be(tmp_path: Path) -> None:
    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8)
    Dinov2ForImageClassification(config).save_pretrained(tmp_path)
    told = refusal(lambda: find_backbone(str(tmp_path)))
    assert "2 tensors are not part of the encoder, first classifier.bias" in told
    assert as_loaded(tmp_path)


@pytest.mark.real
def test_the_real_dinov2_small_fits_its_config(real_data: Path) -> None:
    config = json.loads((real_data / "dinov2-small" / "config.json").read_text())
    stored = stored_shapes(real_data / "dinov2-small" / "model.safetensors")
    assert misfit(stored, config) == ""
    assert len(stored) == 223


def test_the_header_is_read_without_torch(encoder: Path) -> None:
    program = (
        "import sys; from trainables.backbone_files import find_backbone; find_backbone(sys.argv[1]); "
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program, str(encoder)], check=True, cwd=Path(__file__).parents[2])
