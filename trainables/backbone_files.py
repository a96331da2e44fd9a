"""What a backbone's files say, without loading it: no torch, no transformers.

`tiny-phantom` is shipped with the project; anything else is a folder in transformers' layout, or a hub id.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainables.model_files import CONFIG, WEIGHTS, BackboneError, file_sha256, find_model, pixel_statistics

SHIPPED = {"tiny-phantom": Path(__file__).parent / "tiny_phantom"}
ARCHITECTURES = ("dinov2",)


@dataclass(frozen=True)
class Backbone:
    """What the plan needs to know of an encoder.

    Attributes:
        name: as the study says it.
        folder: where its files lie; None for a hub id whose weights are not downloaded yet.
        hidden, layers, mlp_ratio, patch: shape of the ViT.
        mean, std: pixel statistics it was trained with, 3 values in [0, 1].
    """

    name: str
    folder: Path | None
    hidden: int
    layers: int
    mlp_ratio: float
    patch: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def weights_digest(self) -> str:
        """sha256 of the weights file, or a placeholder that no finished stage can have."""
        if self.folder is None:
            return f"not downloaded: {self.name}"
        return file_sha256(self.folder / WEIGHTS)


def find_backbone(name: str, *, download: bool = False) -> Backbone:
    """Read a backbone's description.

    Args:
        name: `tiny-phantom`, a folder, or a hub id 'owner/name'.
        download: fetch a hub id's weights when they are not in the local cache.

    Raises:
        BackboneError: no such folder, missing or unreadable files, an architecture that is not supported, or a hub id
            that can be neither found in the cache nor fetched.
    """
    files = find_model(name, SHIPPED, download=download, architectures=ARCHITECTURES)
    config = files.config
    _check_config(name, config)
    if files.folder is not None:
        _check_weights(name, files.folder, config)
    mean, std = pixel_statistics(name, files.processor)
    return Backbone(
        name=name,
        folder=files.folder,
        hidden=config["hidden_size"],
        layers=config["num_hidden_layers"],
        mlp_ratio=float(config.get("mlp_ratio", 4)),
        patch=config.get("patch_size", 14),
        mean=mean,
        std=std,
    )


def _check_config(name: str, config: dict[str, Any]) -> None:
    missing = [key for key in ("hidden_size", "num_hidden_layers") if key not in config]
    if missing:
        raise BackboneError(f"backbone {name!r}: {CONFIG} has no {', '.join(missing)}")
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size", "num_channels"):
        if key in config and not _whole(config[key]):
            raise BackboneError(
                f"backbone {name!r}: {CONFIG}: {key} is {config[key]!r}; expected a whole number above 0"
            )
    ratio, size, heads = (
        config.get("mlp_ratio", 4),
        config.get("image_size", 224),
        config.get("num_attention_heads", 12),
    )
    if not isinstance(ratio, int | float) or not 0 < ratio < 1000:
        raise BackboneError(f"backbone {name!r}: {CONFIG}: mlp_ratio is {ratio!r}; expected a number above 0")
    if not _whole(size) and not (isinstance(size, list) and len(size) == 2 and all(map(_whole, size))):
        raise BackboneError(f"backbone {name!r}: {CONFIG}: image_size is {size!r}; expected one or two whole numbers")
    if config["hidden_size"] % heads:
        raise BackboneError(
            f"backbone {name!r}: {CONFIG}: hidden_size {config['hidden_size']} is no multiple of {heads} heads"
        )


def _check_weights(name: str, folder: Path, config: dict[str, Any]) -> None:
    """Refuse weights that are none, or another model's: before training, and without loading them."""
    from trainables.backbone_weights import misfit, stored_shapes

    try:
        stored = stored_shapes(folder / WEIGHTS)
    except ValueError as error:
        raise BackboneError(
            f"backbone {name!r}: {folder / WEIGHTS} is no whole safetensors file ({error}); copy or download it again"
        ) from error
    if wrong := misfit(stored, config):
        raise BackboneError(
            f"backbone {name!r}: {WEIGHTS} does not fit {CONFIG} in {folder}: {wrong}; save both from one encoder with "
            "save_pretrained()"
        )


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1_000_000
