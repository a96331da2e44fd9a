"""The files of a model in transformers' layout, found and read without loading it: no torch, no transformers.

A model is shipped with the project, a folder, or a hub id that is looked up in the local cache of the hub and
downloaded when it is not there.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import isfinite
from pathlib import Path
from typing import Any

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
OTHER_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5")
HUB_SECONDS = 4.0  # for the hub to answer


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


def find_model(
    name: str,
    shipped: Mapping[str, Path],
    *,
    download: bool,
    architectures: Sequence[str],
    weights: bool = True,
) -> ModelFiles:
    """Find and read the files of a model.

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
    # os.path takes any text for a path: Path raises for a name too long to be one.
    folder = shipped.get(name) or (Path(name) if os.path.isdir(name) else None)  # noqa: PTH112
    if folder is None:
        folder, config_file, preprocessor_file = _from_hub(name, download, shipped)
    else:
        config_file, preprocessor_file = folder / CONFIG, folder / PREPROCESSOR
        if weights:
            _require_weights(name, folder)
    if not config_file.is_file():
        raise BackboneError(f"backbone {name!r}: {config_file} does not exist; save the encoder with save_pretrained()")
    config = read_json(config_file)
    kind = config.get("model_type")
    if kind not in architectures:
        raise BackboneError(f"backbone {name!r}: architecture {kind!r}; expected one of {', '.join(architectures)}")
    processor = read_json(preprocessor_file) if preprocessor_file and preprocessor_file.is_file() else {}
    return ModelFiles(folder, config_file, config, processor)


def pixel_statistics(name: str, processor: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation that a model takes, 3 values each in [0, 1]; ImageNet's where its files say none.

    Raises:
        BackboneError: the files hold something else.
    """
    return (
        _triple(name, processor, "image_mean", (0.485, 0.456, 0.406)),
        _triple(name, processor, "image_std", (0.229, 0.224, 0.225)),
    )


def _require_weights(name: str, folder: Path) -> None:
    if (folder / WEIGHTS).is_file():
        return
    others = sorted(path.name for pattern in OTHER_WEIGHTS for path in folder.glob(pattern))
    found = f" (it holds {', '.join(others[:3])})" if others else ""
    raise BackboneError(f"backbone {name!r}: no {WEIGHTS} in {folder}{found}; save it with save_pretrained()")


def _from_hub(name: str, download: bool, shipped: Iterable[str]) -> tuple[Path | None, Path, Path | None]:
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") != 1
    is_file = os.path.isfile(name)  # noqa: PTH113
    if is_file or looks_like_path:
        found = "a file" if is_file else "no such folder"
        ours = ", ".join(shipped)
        raise BackboneError(f"backbone {name!r}: {found}; expected a folder, a hub id owner/name, or {ours}")
    config = hub_file(name, CONFIG, fetch=True)
    if config is None:
        raise BackboneError(f"backbone {name!r}: the hub has no {CONFIG} for it")
    processor = hub_file(name, PREPROCESSOR, fetch=download)
    weights = hub_file(name, WEIGHTS, fetch=download)
    if download and weights is None:
        raise BackboneError(f"backbone {name!r}: the hub has no {WEIGHTS} for it; give a folder with --backbone DIR")
    return (weights.parent if weights else None), config, processor


def hub_file(name: str, file: str, *, fetch: bool) -> Path | None:
    """A file of a hub id in the local cache; None where the hub, or without `fetch` the cache, does not have it.

    Raises:
        BackboneError: it had to be fetched, and could not be.
    """
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, RemoteEntryNotFoundError, RepositoryNotFoundError

    try:
        cached = try_to_load_from_cache(name, file)
    except HFValidationError as error:
        raise BackboneError(f"backbone {name!r}: no folder, and no id that the hub could have") from error
    if cached is not None:  # a path, or the mark of a file that the hub does not have
        return Path(cached) if isinstance(cached, str) else None
    if not fetch:
        return None
    try:
        if not constants.HF_HUB_OFFLINE and (fault := _hub_fault(constants.ENDPOINT)) is not None:
            raise fault
        return Path(hf_hub_download(name, file))
    except RemoteEntryNotFoundError:
        return None
    except RepositoryNotFoundError as error:
        raise BackboneError(
            f"backbone {name!r}: the hub has no such model, or it is private; expected a folder or a hub id owner/name"
        ) from error
    except Exception as error:  # whatever kept the hub from answering, the user's remedy is the same
        raise BackboneError(
            f"backbone {name!r}: {file} is not in the local hub cache and could not be fetched "
            f"({type(error).__name__}); give a folder with --backbone DIR or make the hub reachable"
        ) from error


@cache
def _hub_fault(endpoint: str) -> Exception | None:
    """Why the hub does not answer, asked once: its client would try for half a minute, and say so each time."""
    from huggingface_hub import get_session

    try:
        get_session().head(endpoint, timeout=HUB_SECONDS)
    except Exception as error:  # as in `hub_file`
        return error
    return None


def read_json(path: Path) -> dict[str, Any]:
    """What a JSON file holds.

    Raises:
        BackboneError: it cannot be read, or holds no object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BackboneError(f"{path}: not a readable JSON file ({error})") from error
    if not isinstance(data, dict):
        raise BackboneError(f"{path}: expected a JSON object")
    return data


def _triple(name: str, processor: Mapping[str, Any], key: str, default: tuple[float, ...]) -> tuple[float, ...]:
    """Three values, one for each channel; one value stands for all."""
    values = processor.get(key, default)
    numbers = isinstance(values, list | tuple) and all(isinstance(v, int | float) and isfinite(v) for v in values)
    if not numbers or len(values) not in (1, 3):
        raise BackboneError(f"backbone {name!r}: {PREPROCESSOR}: {key} is {values!r}; expected 1 or 3 numbers")
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
