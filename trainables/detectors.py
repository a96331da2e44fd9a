"""Detectors by name: their YAML, size and facts, read without torch and without importing ultralytics.

`yolov8n` … `yolov8x` and `rtdetr-l`, `rtdetr-x` are the YAML files that ultralytics brings; a path to a YAML file of
the same form is any other model of the same modules. `tiny-yolo` and `tiny-rtdetr` are shipped, for trying.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import yaml

from trainables.costs import Costs
from trainables.detector_layers import IMAGE, Layer, Scale, carried, layers_of
from trainables.model_files import file_sha256
from trainables.settings import Settings
from trainables.task_kind import ModelError, ModelFacts
from trainables.weight_shapes import require_fit

SHIPPED = {name: Path(__file__).parent / "tiny_detectors" / f"{name}.yaml" for name in ("tiny-yolo", "tiny-rtdetr")}
NEEDED = ("ultralytics", "torchvision", "faster_coco_eval")
EXTRA = "pip install 'spft-studies[detection]' (ultralytics, AGPL-3.0)"
WEIGHTS = (".pt", ".safetensors")
_KEYS = {"nc", "scales", "scale", "depth_multiple", "width_multiple", "reg_max", "backbone", "head"}
_STRIDE = 32  # of the deepest level that any of these detectors has

Family = Literal["yolo", "rtdetr"]


@dataclass(frozen=True)
class Detector:
    """A detector's YAML with its size chosen.

    Attributes:
        document: the YAML's keys.
        scale: depth, width and channels of the size.
        blocks: layers of the backbone, each a block; all others are the head.
        weights: file that it starts from, None where it is drawn at random.
    """

    name: str
    document: Mapping[str, Any]
    scale: Scale
    family: Family
    blocks: int
    weights: Path | None

    def layers(self, image_size: int, classes: int) -> tuple[Layer, ...]:
        """Every layer at an image size; see `layers_of`."""
        return layers_of(self.document, self.scale, image_size, classes)

    def digest(self) -> str:
        """sha256 of the architecture, and of the release of ultralytics that makes layers of it."""
        text = json.dumps([self.document, self.scale.__dict__, version("ultralytics")], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def find_detector(settings: Settings) -> Detector:
    """The detector of `model.backbone`, with the starting weights of `detection.weights`.

    Raises:
        ModelError: no such model or file, a YAML that is none of a detector, or ultralytics is not installed.
    """
    name = settings.model.backbone
    document, letter = _document(name)
    rows = [*document["backbone"], *document["head"]]
    last = str(rows[-1][2]) if isinstance(rows[-1], list) and len(rows[-1]) == 4 else "?"
    families: dict[str, Family] = {"Detect": "yolo", "RTDETRDecoder": "rtdetr"}
    if last not in families:
        raise ModelError(f"backbone {name!r}: its last layer is {last}; expected one of {', '.join(families)}")
    return Detector(
        name=name,
        document=document,
        scale=_scale(name, document, letter),
        family=families[last],
        blocks=len(document["backbone"]),
        weights=_weights(settings.detection.weights) or _shipped_weights(name),
    )


def detector_facts(settings: Settings, classes: tuple[str, ...]) -> ModelFacts:
    """Facts of a detector at the image size of the settings; nothing is ever downloaded.

    Raises:
        ModelError: see `find_detector`; an image size that is no multiple of 32; or weights that cannot be read or are
            another model's.
    """
    detector = find_detector(settings)
    size = settings.dataset.image_size
    if size % _STRIDE:
        nearest = max(_STRIDE, round(size / _STRIDE) * _STRIDE)
        raise ModelError(f"dataset.image_size: {size} px is no multiple of {_STRIDE}, as detectors need; try {nearest}")
    layers = detector.layers(size, len(classes))
    if detector.weights is not None and settings.detection.weights is not None:  # shipped weights fit by a test
        require_fit(detector.weights, detector.name, [layer.count.parameters for layer in layers[: detector.blocks]])
    drawn = f"drawn: {detector.digest()}"
    return ModelFacts(
        name=detector.name,
        weights_digest=hashlib.sha256(drawn.encode()).hexdigest()
        if detector.weights is None
        else file_sha256(detector.weights),
        shape_digest=detector.digest(),
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        costs=detector_costs(layers, detector.blocks, size),
    )


def detector_costs(layers: tuple[Layer, ...], blocks: int, image_size: int) -> Costs:
    """Costs of a detector's parts: no embedding, one block a backbone layer, neck and head together the head.

    What a boundary keeps is every output that a later layer takes, so the head's input is as large as the maps it
    starts from: nothing pooled.
    """

    def values(position: int) -> int:
        return sum(3 * image_size**2 if s == IMAGE else layers[s].values for s in carried(layers, position))

    head = layers[blocks:]
    return Costs(
        embedding=0,
        blocks=tuple(_units(layer.count.macs) for layer in layers[:blocks]),
        head=_units(sum(layer.count.macs for layer in head)),
        token_values=tuple(values(position) for position in range(blocks + 1)),
        feature_values=values(blocks),
        pooled=False,
        block_parameters=tuple(layer.count.parameters for layer in layers[:blocks]),
        head_parameters=sum(layer.count.parameters for layer in head),
    )


def _units(macs: float) -> int:
    return max(1, round(macs / 1000))


def _document(name: str) -> tuple[dict[str, Any], str]:
    """The YAML of a model's name, and the letter of its size."""
    if name in SHIPPED:
        return _read(SHIPPED[name], name), ""
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not os.path.isfile(path):  # noqa: PTH113 (Path raises for a name too long to be one)
            raise ModelError(f"backbone {name!r}: no such file")
        return _read(path, name), ""
    named = re.fullmatch(r"(yolov8)([nsmlx])|rtdetr-([lx])", name)
    if named is None:
        known = ", ".join([f"yolov8{letter}" for letter in "nsmlx"] + ["rtdetr-l", "rtdetr-x", *SHIPPED])
        raise ModelError(f"backbone {name!r} is no detector; expected one of {known}, or a YAML file")
    file = "v8/yolov8.yaml" if named[1] else f"rt-detr/{name}.yaml"
    return _read(_ultralytics() / "cfg" / "models" / file, name), named[2] or named[3]


def require_extra() -> None:
    """Say in one error what of the extra `detection` is not installed; imports nothing.

    Raises:
        ModelError: something is missing; names it and how to install it.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ModelError(f"the task detection needs {', '.join(missing)}, not installed: {EXTRA}")


def _ultralytics() -> Path:
    spec = find_spec("ultralytics")
    if spec is None or spec.origin is None:
        raise ModelError(f"this detector's layers come with ultralytics, which is not installed: {EXTRA}")
    return Path(spec.origin).parent


@cache
def _read(path: Path, name: str) -> dict[str, Any]:
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ModelError(
            f"backbone {name!r}: {path} is no readable YAML file ({str(error).splitlines()[0]})"
        ) from error
    if not isinstance(document, dict) or not all(
        document.get(k) and isinstance(document[k], list) for k in ("backbone", "head")
    ):
        raise ModelError(f"backbone {name!r}: {path} has no lists of layers `backbone` and `head`")
    unknown = sorted(str(key) for key in document.keys() - _KEYS)
    if unknown:
        raise ModelError(
            f"backbone {name!r}: {path}: unknown keys {', '.join(unknown)}; known are {', '.join(sorted(_KEYS))}"
        )
    return document


def _scale(name: str, document: Mapping[str, Any], letter: str) -> Scale:
    """Depth, width and most channels of the size; a file with several sizes says which by `scale`, else the first."""
    scales = document.get("scales")
    if not scales:
        return Scale(float(document.get("depth_multiple", 1)), float(document.get("width_multiple", 1)), math.inf)
    chosen = letter or document.get("scale") or next(iter(scales))
    try:
        depth, width, most = map(float, scales[chosen])
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"backbone {name!r}: scales: no [depth, width, max channels] for size {chosen!r}") from error
    return Scale(depth, width, most)


def _weights(given: str | None) -> Path | None:
    if given is None:
        return None
    path = Path(given)
    if path.suffix not in WEIGHTS:
        raise ModelError(f"detection.weights: {given}: expected a file that ends with {' or '.join(WEIGHTS)}")
    if not os.path.isfile(path):  # noqa: PTH113
        raise ModelError(f"detection.weights: {given}: no such file; nothing is downloaded")
    return path


def _shipped_weights(name: str) -> Path | None:
    path = SHIPPED[name].with_suffix(".safetensors") if name in SHIPPED else None
    return path if path is not None and path.is_file() else None
