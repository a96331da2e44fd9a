"""Whether a weights file holds the encoder that its config describes, told from the file's header: no torch.

The names are those of DINOv2 files; of the attention both the files' old names and transformers' new ones are known.
Loading the encoder (`trainables.backbones`) stays the last judge; this is the judge before anything is trained.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

Shape = tuple[int, ...]

_RENAMED = (  # new name in memory → name in files
    (re.compile(r"\.attention\.q_proj\."), ".attention.attention.query."),
    (re.compile(r"\.attention\.k_proj\."), ".attention.attention.key."),
    (re.compile(r"\.attention\.v_proj\."), ".attention.attention.value."),
    (re.compile(r"\.attention\.o_proj\."), ".attention.output.dense."),
)
_PREFIX = "dinov2."  # of files that were saved from a model with a head


def stored_shapes(path: Path) -> dict[str, Shape]:
    """Name → shape of each tensor of a safetensors file, from its header alone.

    Raises:
        ValueError: not a whole safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(str(error).strip().partition("\n")[0]) from error


def misfit(stored: Mapping[str, Shape], config: Mapping[str, Any]) -> str:
    """How the tensors of a file differ from those that the config promises; empty where they do not.

    Args:
        stored: name → shape.
        config: a config.json of a `dinov2`, its sizes whole numbers.
    """
    found = {_canonical(name): shape for name, shape in stored.items()}
    wanted = dict(_dinov2(config))
    if config.get("use_swiglu_ffn"):  # three layouts are in use: left to loading
        found = {name: shape for name, shape in found.items() if ".mlp." not in name}
        wanted = {name: shape for name, shape in wanted.items() if ".mlp." not in name}
    missing = sorted(wanted.keys() - found.keys())
    unexpected = sorted(found.keys() - wanted.keys())
    other = sorted(name for name in wanted.keys() & found.keys() if wanted[name] != found[name])
    said = []
    if missing:
        said.append(f"{len(missing)} of {len(wanted)} tensors are missing, first {missing[0]}")
    if unexpected:
        said.append(f"{len(unexpected)} tensors are not part of the encoder, first {unexpected[0]}")
    if other:
        first = other[0]
        said.append(f"{len(other)} have another shape, first {first}: {found[first]} instead of {wanted[first]}")
    return "; ".join(said)


def _canonical(name: str) -> str:
    name = name.removeprefix(_PREFIX)
    for pattern, old in _RENAMED:
        name = pattern.sub(old, name)
    return name


def _dinov2(config: Mapping[str, Any]) -> Iterator[tuple[str, Shape]]:
    """Every tensor of a Dinov2Model, by its name in files."""
    hidden, patch = config["hidden_size"], config.get("patch_size", 14)
    height, width = _pair(config.get("image_size", 224))
    yield "embeddings.cls_token", (1, 1, hidden)
    if config.get("use_mask_token", True):
        yield "embeddings.mask_token", (1, hidden)
    yield "embeddings.position_embeddings", (1, (height // patch) * (width // patch) + 1, hidden)
    yield "embeddings.patch_embeddings.projection.weight", (hidden, config.get("num_channels", 3), patch, patch)
    yield "embeddings.patch_embeddings.projection.bias", (hidden,)
    for layer in range(config["num_hidden_layers"]):
        for name, shape in _block(hidden, int(hidden * config.get("mlp_ratio", 4)), config.get("qkv_bias", True)):
            yield f"encoder.layer.{layer}.{name}", shape
    yield "layernorm.weight", (hidden,)
    yield "layernorm.bias", (hidden,)


def _block(hidden: int, inner: int, qkv_bias: bool) -> Iterator[tuple[str, Shape]]:
    for part in ("query", "key", "value"):
        yield f"attention.attention.{part}.weight", (hidden, hidden)
        if qkv_bias:
            yield f"attention.attention.{part}.bias", (hidden,)
    yield "attention.output.dense.weight", (hidden, hidden)
    yield "attention.output.dense.bias", (hidden,)
    for name in ("norm1", "norm2"):
        yield f"{name}.weight", (hidden,)
        yield f"{name}.bias", (hidden,)
    for name in ("layer_scale1", "layer_scale2"):
        yield f"{name}.lambda1", (hidden,)
    yield "mlp.fc1.weight", (inner, hidden)
    yield "mlp.fc1.bias", (inner,)
    yield "mlp.fc2.weight", (hidden, inner)
    yield "mlp.fc2.bias", (hidden,)


def _pair(size: Any) -> tuple[int, int]:
    return (size[0], size[1]) if isinstance(size, list) else (size, size)
