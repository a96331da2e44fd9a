"""Where a backbone lies and what its files say, without loading it: no torch, no transformers.

`tiny-phantom` is shipped with the project; anything else is a folder in transformers' layout, or a hub id that is
looked up in the local cache of the hub and downloaded when it is not there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

SHIPPED = {"tiny-phantom": Path(__file__).parent / "tiny_phantom"}
WEIGHTS = "model.safetensors"
CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
ARCHITECTURES = ("dinov2",)


class BackboneError(ValueError):
    """The backbone cannot be used; the message names the file and the remedy."""


@dataclass(frozen=True)
class ModelFiles:
    """The files of a model in transformers' layout.

    Attributes:
        folder: where they lie; None for a hub id whose weights are not downloaded yet.
        config_file, config: config.json and what it holds.
        processor: what preprocessor_config.json holds, nothing where there is none.
    """

    folder: Path | None
    config_file: Path
    config: dict[str, Any]
    processor: dict[str, Any]


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
    files = model_files(name, SHIPPED, download=download, architectures=ARCHITECTURES)
    missing = [key for key in ("hidden_size", "num_hidden_layers") if key not in files.config]
    if missing:
        raise BackboneError(f"backbone {name!r}: {CONFIG} has no {', '.join(missing)}")
    mean, std = pixel_statistics(files.processor)
    return Backbone(
        name=name,
        folder=files.folder,
        hidden=int(files.config["hidden_size"]),
        layers=int(files.config["num_hidden_layers"]),
        mlp_ratio=float(files.config.get("mlp_ratio", 4)),
        patch=int(files.config.get("patch_size", 14)),
        mean=mean,
        std=std,
    )


def model_files(
    name: str,
    shipped: Mapping[str, Path],
    *,
    download: bool,
    architectures: Sequence[str],
    weights: bool = True,
) -> ModelFiles:
    """Find and read the files of a model in transformers' layout.

    Args:
        name: a name of `shipped`, a folder, or a hub id 'owner/name'.
        shipped: name → folder of what comes with the project.
        download: fetch a hub id's weights when they are not in the local cache.
        architectures: values of model_type that will do.
        weights: whether a folder must hold weights.

    Raises:
        BackboneError: no such folder, missing or unreadable files, another architecture, or a hub id that can be
            neither found in the cache nor fetched.
    """
    folder = shipped.get(name) or (Path(name) if Path(name).is_dir() else None)
    if folder is None:
        folder, config_file, preprocessor_file = _from_hub(name, download, shipped)
    else:
        config_file, preprocessor_file = folder / CONFIG, folder / PREPROCESSOR
        if weights and not (folder / WEIGHTS).is_file():
            raise BackboneError(f"backbone {name!r}: no {WEIGHTS} in {folder}; save it with save_pretrained()")
    config = _json(config_file)
    kind = config.get("model_type")
    if kind not in architectures:
        raise BackboneError(f"backbone {name!r}: architecture {kind!r}; expected one of {', '.join(architectures)}")
    processor = _json(preprocessor_file) if preprocessor_file and preprocessor_file.is_file() else {}
    return ModelFiles(folder, config_file, config, processor)


def pixel_statistics(processor: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation that a model takes, 3 values each in [0, 1]; ImageNet's where its files say none."""
    return (
        _triple(processor.get("image_mean", (0.485, 0.456, 0.406))),
        _triple(processor.get("image_std", (0.229, 0.224, 0.225))),
    )


def _from_hub(name: str, download: bool, shipped: Iterable[str]) -> tuple[Path | None, Path, Path | None]:
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") != 1
    if looks_like_path:
        ours = ", ".join(shipped)
        raise BackboneError(f"backbone {name!r}: no such folder; expected a folder, a hub id owner/name, or {ours}")
    config = _hub_file(name, CONFIG, fetch=True)
    if config is None:
        raise BackboneError(f"backbone {name!r}: the hub has no {CONFIG} for it")
    processor = _hub_file(name, PREPROCESSOR, fetch=download)
    weights = _hub_file(name, WEIGHTS, fetch=download)
    return (weights.parent if weights else None), config, processor


def _hub_file(name: str, file: str, *, fetch: bool) -> Path | None:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import RemoteEntryNotFoundError

    cached = try_to_load_from_cache(name, file)
    if cached is not None:  # a path, or the mark of a file that the hub does not have
        return Path(cached) if isinstance(cached, str) else None
    if not fetch:
        return None
    try:
        return Path(hf_hub_download(name, file))
    except RemoteEntryNotFoundError:
        return None
    except Exception as error:  # whatever kept the hub from answering, the user's remedy is the same
        raise BackboneError(
            f"backbone {name!r}: {file} is not in the local hub cache and could not be fetched "
            f"({type(error).__name__}); give a folder with --backbone DIR or make the hub reachable"
        ) from error


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BackboneError(f"{path}: not a readable JSON file ({error})") from error
    if not isinstance(data, dict):
        raise BackboneError(f"{path}: expected a JSON object")
    return data


def _triple(values: Any) -> tuple[float, ...]:
    triple = tuple(float(v) for v in values)
    return triple * 3 if len(triple) == 1 else triple


@cache
def _sha256(path: Path, size: int, mtime_ns: int) -> str:
    h = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            h.update(chunk)
    return h.hexdigest()


def file_sha256(path: Path) -> str:
    """sha256 of a file, computed once a process as long as its size and time stay the same."""
    stat = path.stat()
    return _sha256(path, stat.st_size, stat.st_mtime_ns)
