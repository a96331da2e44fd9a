"""Where the encoders of baselines lie and what is known of them without loading them: no torch, no timm.

A baseline's encoder is named `timm:ID` (or by its hub id, timm/ID), a folder that holds a copy of such a repository,
or `albef`. Its weights come from the hub, or from what `model.weights` names for it. With `model.small` it is built
narrow and its weights are drawn.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainables.architectures import ALBEF, ARCHITECTURES, Architecture
from trainables.backbone_weights import stored_shapes
from trainables.model_files import CONFIG, WEIGHTS, BackboneError, file_sha256, hub_file, pixel_statistics, read_json
from trainables.settings import ModelSettings

PREFIXES = ("timm:", "timm/")
FORMATS = (".safetensors", ".pth", ".pt", ".bin")
CLASSIFIERS = ("fc.", "classifier.", "head.", "AuxLogits.")  # of the classes that the weights were trained for
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
ALBEF_KEYS = "visual_encoder."
SEED = 20_260  # that small encoders are drawn from; the same for every training seed


@dataclass(frozen=True)
class Baseline:
    """An encoder of `trainables.architectures` with its weights' place.

    Attributes:
        name: as the study says it.
        file: its weights; None while they are not downloaded, and where they are drawn.
        small: narrow, with weights drawn from `SEED`.
        mean, std: pixel statistics it was trained with, in [0, 1].
    """

    name: str
    architecture: Architecture
    file: Path | None
    small: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def weights_digest(self) -> str:
        """sha256 of the weights file, what they are drawn from, or a placeholder that no finished stage can have."""
        if self.small:
            return f"drawn: small {self.architecture.name}, seed {SEED}"
        return f"not downloaded: {self.name}" if self.file is None else file_sha256(self.file)


def is_baseline(name: str) -> bool:
    """Whether a backbone is one of these, told from its name and, of a folder, from its config.json."""
    if name == ALBEF.name or name.startswith(PREFIXES):
        return True
    config = os.path.join(name, CONFIG)  # noqa: PTH118 (any text will do: Path raises for a name too long to be one)
    return os.path.isfile(config) and "architecture" in read_json(Path(config))  # noqa: PTH113


def own_size(name: str) -> int | None:
    """Side of the images that a baseline's weights were trained with, px; None for other backbones."""
    return _architecture(name)[0].image_size if is_baseline(name) else None


def find_baseline(model: ModelSettings, *, download: bool = False) -> Baseline:
    """What is known of the encoder that the settings name.

    Args:
        download: fetch weights that are on a hub alone.

    Raises:
        BackboneError: an architecture that is not known, or weights that are missing or are another architecture's.
    """
    name = model.backbone
    architecture, tag = _architecture(name)
    if model.small:
        mean, std = architecture.statistics
        return Baseline(name, architecture, None, small=True, mean=mean, std=std)
    folder, file = _given(model)
    if file is None and architecture is ALBEF:
        raise BackboneError(
            f"backbone {name!r}: its checkpoint is on no hub; name the file by -o model.weights.{name}=ALBEF.pth"
        )
    config: Mapping[str, Any] = {}
    if folder is not None:
        config = _config(folder)
    elif file is None:
        config, file = _from_hub(f"timm/{architecture.name}.{tag}", known=tag == architecture.hub, download=download)
    if file is not None and file.suffix == ".safetensors":
        _refuse_other_weights(name, architecture, file)
    stated = _statistics(config, architecture)
    return Baseline(name, architecture, file, small=False, mean=stated[0], std=stated[1])


# -- names -----------------------------------------------------------------------------------------------------------


def _architecture(name: str) -> tuple[Architecture, str]:
    """The architecture that a name means, and the tag of its weights."""
    if name == ALBEF.name:
        return ALBEF, ""
    said = name
    for prefix in PREFIXES:
        said = said.removeprefix(prefix)
    if said == name:
        said = str(read_json(Path(name) / CONFIG)["architecture"])
    base, _, tag = said.partition(".")
    if base not in ARCHITECTURES:
        known = ", ".join(f"timm:{a.name}.{a.hub}" for a in ARCHITECTURES.values())
        raise BackboneError(f"backbone {name!r}: no known architecture {base!r}; known are {known}, {ALBEF.name}")
    architecture = ARCHITECTURES[base]
    return architecture, tag or architecture.hub


# -- files -----------------------------------------------------------------------------------------------------------


def _given(model: ModelSettings) -> tuple[Path | None, Path | None]:
    """Folder and weights file that the settings name; (None, file) of a file alone."""
    name = model.backbone
    told = model.weights.get(_architecture(name)[0].name)
    told_by = f"model.weights.{_architecture(name)[0].name}"
    folder = Path(name) if told is None and os.path.isfile(os.path.join(name, CONFIG)) else None  # noqa: PTH113, PTH118
    if told is not None:
        path = Path(told).expanduser()
        if os.path.isfile(path):  # noqa: PTH113
            if path.suffix not in FORMATS:
                raise BackboneError(f"{told_by}: {path} is none of {', '.join(FORMATS)}")
            return None, path
        if not os.path.isdir(path):  # noqa: PTH112
            raise BackboneError(f"{told_by}: no such file or folder: {path}")
        folder = path
    if folder is None:
        return None, None
    file = folder / WEIGHTS
    if not file.is_file():
        raise BackboneError(f"backbone {name!r}: no {WEIGHTS} in {folder}")
    return folder, file


def _config(folder: Path) -> Mapping[str, Any]:
    file = folder / CONFIG
    return read_json(file) if file.is_file() else {}


def _from_hub(hub_id: str, *, known: bool, download: bool) -> tuple[Mapping[str, Any], Path | None]:
    """The repository's config, empty for weights whose facts are known, and its weights if they are on this machine."""
    weights = hub_file(hub_id, WEIGHTS, fetch=download)
    if download and weights is None:
        raise BackboneError(f"backbone {hub_id!r}: the hub has no {WEIGHTS} for it")
    if known:
        return {}, weights
    config = hub_file(hub_id, CONFIG, fetch=True)
    if config is None:
        raise BackboneError(f"backbone {hub_id!r}: the hub has no {CONFIG} for it")
    return read_json(config), weights


def _statistics(config: Mapping[str, Any], architecture: Architecture) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Pixel statistics that a copy of a timm repository states, the architecture's where it states none."""
    stated = config.get("pretrained_cfg", config)
    if not isinstance(stated, dict) or "mean" not in stated or "std" not in stated:
        return architecture.statistics
    return pixel_statistics(architecture.name, {"image_mean": stated["mean"], "image_std": stated["std"]})


def _refuse_other_weights(name: str, architecture: Architecture, file: Path) -> None:
    """A safetensors file says in its header how many numbers it holds: another architecture's holds another number."""
    try:
        stored = stored_shapes(file)
    except ValueError as error:
        raise BackboneError(f"{file}: not a readable safetensors file ({error})") from error
    found = sum(_numbers(shape) for key, shape in encoder_tensors(stored).items() if _is_weight(key))
    parts = architecture.parts(architecture.image_size, small=False)
    expected = parts.stem.parameters + sum(b.parameters for b in parts.blocks) + parts.neck_parameters
    if parts.tokens:  # the table of positions is as long as the images it was trained with had patches
        expected -= ((architecture.image_size // 16) ** 2 + 1) * parts.features
    if found != expected:
        raise BackboneError(
            f"backbone {name!r}: {file} holds {found:,} weights of an encoder, {architecture.name} has {expected:,}"
        )


def encoder_tensors(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The encoder's entries of a weights file: without a classifier's, of ALBEF's checkpoint the image encoder's."""
    if any(key.startswith(ALBEF_KEYS) for key in stored):
        stored = {k.removeprefix(ALBEF_KEYS): value for k, value in stored.items() if k.startswith(ALBEF_KEYS)}
    return {key: value for key, value in stored.items() if not key.startswith(CLASSIFIERS)}


def _is_weight(key: str) -> bool:
    return not key.endswith(BUFFERS) and key != "pos_embed"


def _numbers(shape: tuple[int, ...]) -> int:
    total = 1
    for side in shape:
        total *= side
    return total
