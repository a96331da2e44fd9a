"""Shapes of the tensors in a file of detector weights, read without torch: so that a plan can refuse what does not fit.

A `.safetensors` file says its shapes in its head. A `.pt` is a pickle of the whole model: it is read by an unpickler
that makes empty parts in place of every object, so that no code of the file, of torch or of ultralytics runs.
"""

from __future__ import annotations

import json
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from trainables.task_kind import ModelError

Shapes = Mapping[str, tuple[int, ...]]

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")  # of BatchNorm: no parameters
_UNREADABLE = (
    OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, EOFError, RecursionError,
    struct.error, pickle.UnpicklingError, zipfile.BadZipFile,
)  # fmt: skip
_LONGEST_HEAD = 100_000_000  # bytes, the format's own limit


def require_fit(path: Path, name: str, parameters: Sequence[int]) -> None:
    """Refuse a file of weights whose backbone is not the model's.

    Args:
        path: of the file.
        name: of the model, for the message.
        parameters: of each layer of the model's backbone.

    Raises:
        ModelError: the file cannot be read, or a layer of its backbone has another number of parameters.
    """
    found = [0] * len(parameters)
    for tensor, shape in shapes_of(path).items():
        words = tensor.split(".")
        if len(words) > 2 and words[1].isdigit() and int(words[1]) < len(found) and words[-1] not in _BUFFERS:
            found[int(words[1])] += math.prod(shape)
    wrong = [layer for layer, count in enumerate(parameters) if found[layer] != count]
    if wrong:
        layer = wrong[0]
        raise ModelError(
            f"detection.weights: {path} is not of {name!r}: layer {layer} of the backbone has {found[layer]:,} "
            f"parameters in it, {parameters[layer]:,} in the model ({len(wrong)} of {len(parameters)} layers differ); "
            "name the file of this model, or the model of this file with model.backbone"
        )


def shapes_of(path: Path) -> Shapes:
    """Name of each tensor → its shape, by ultralytics' names.

    Raises:
        ModelError: the file cannot be read as a detector's weights.
    """
    return _shapes(path, path.stat().st_mtime_ns)


@cache
def _shapes(path: Path, _stamp: int) -> Shapes:
    try:
        return _of_safetensors(path) if path.suffix == ".safetensors" else _of_pickle(path)
    except _UNREADABLE as error:
        said = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ModelError(f"detection.weights: {path} cannot be read as a detector's weights ({said})") from error


def _of_safetensors(path: Path) -> Shapes:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > min(_LONGEST_HEAD, path.stat().st_size):
            raise ValueError("no head of safetensors")
        head = json.loads(file.read(length))
    return {name: tuple(facts["shape"]) for name, facts in head.items() if name != "__metadata__"}


# -- pickles -----------------------------------------------------------------------------------------------------------


class _Part:
    """Stands for any object of a pickle; keeps the state that it was given and does nothing."""

    def __init__(self, *_arguments: Any, **_named: Any) -> None:
        self.state: Any = {}

    def __call__(self, *_arguments: Any, **_named: Any) -> _Part:
        return _Part()

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        """Items of a mapping of another class: nothing that shapes are found in."""

    def append(self, value: Any) -> None:
        """Items of a list of another class."""


class _Shape(tuple[int, ...]):
    """Stands for a tensor."""


def _rebuilt(_storage: Any, _offset: int, size: Any, *_rest: Any) -> _Shape:
    return _Shape(int(side) for side in size)


def _parameter(data: Any, *_rest: Any) -> Any:
    return data


_KNOWN: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuilt,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("collections", "OrderedDict"): OrderedDict,
    ("__builtin__", "set"): set,
    ("builtins", "set"): set,
}


class _Reader(pickle.Unpickler):
    """Finds no class and loads no data: whatever a file names becomes a part."""

    def find_class(self, module: str, name: str) -> Any:
        return _KNOWN.get((module, name), _Part)

    def persistent_load(self, pid: Any) -> None:
        return None


def _of_pickle(path: Path) -> Shapes:
    with zipfile.ZipFile(path) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        with archive.open(member) as file:
            checkpoint = _Reader(file).load()
    if not isinstance(checkpoint, dict):
        raise TypeError("no checkpoint of ultralytics")
    model = checkpoint.get("ema") or checkpoint.get("model")
    if not isinstance(model, _Part):
        raise TypeError("no model in it")
    return dict(_tensors(model, ""))


def _tensors(module: _Part, prefix: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes below a module, as its `state_dict` would name them."""
    for group in ("_parameters", "_buffers"):
        for name, shape in module.state.get(group, {}).items():
            if isinstance(shape, _Shape):
                yield f"{prefix}{name}", tuple(shape)
    for name, child in module.state.get("_modules", {}).items():
        if isinstance(child, _Part):
            yield from _tensors(child, f"{prefix}{name}.")
