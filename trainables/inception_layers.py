"""Inception v3 told layer by layer, for its arithmetic; `trainables.baseline_models` builds it of timm's modules."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from trainables.conv_shapes import Pair, Shape, Widths

# A layer of a path: channels, kernel, stride, padding.
Layer = tuple[int, int | Pair, int, int | Pair]
Module = Callable[[Shape, int], None]

TALL, WIDE = (7, 1), (1, 7)
TALL_PAD, WIDE_PAD = (3, 0), (0, 3)
INPUTS = {  # module → (timm's class, channels that it takes, its own number of channels where it has one)
    "Mixed_5b": ("InceptionA", 192, 32),
    "Mixed_5c": ("InceptionA", 256, 64),
    "Mixed_5d": ("InceptionA", 288, 64),
    "Mixed_6a": ("InceptionB", 288, None),
    "Mixed_6b": ("InceptionC", 768, 128),
    "Mixed_6c": ("InceptionC", 768, 160),
    "Mixed_6d": ("InceptionC", 768, 160),
    "Mixed_6e": ("InceptionC", 768, 192),
    "Mixed_7a": ("InceptionD", 768, None),
    "Mixed_7b": ("InceptionE", 1280, None),
    "Mixed_7c": ("InceptionE", 2048, None),
}
# The stem: as above, None for a max-pooling of 3 with stride 2. Small images keep their size longer.
STEM: tuple[Layer | None, ...] = (
    (32, 3, 2, 0),
    (32, 3, 1, 0),
    (64, 3, 1, 1),
    None,
    (80, 1, 1, 0),
    (192, 3, 1, 0),
    None,
)
SMALL_STEM: tuple[Layer | None, ...] = (
    (32, 3, 2, 1),
    (32, 3, 1, 1),
    (64, 3, 1, 1),
    None,
    (80, 1, 1, 0),
    (192, 3, 1, 1),
)


def inception_stem(shape: Shape, widths: Widths) -> None:
    """Everything before the first module."""
    for layer in SMALL_STEM if widths.small else STEM:
        if layer is None:
            shape.pool(3, stride=2)
        else:
            _pass(shape, layer, widths.base)


def mixed_modules() -> list[Module]:
    """The eleven modules in order: each takes a shape, and what all channels are divided by, and leads it through."""
    told: dict[str, Callable[..., None]] = {
        "InceptionA": _a,
        "InceptionB": _b,
        "InceptionC": _c,
        "InceptionD": _d,
        "InceptionE": _e,
    }
    return [told[kind] if own is None else partial(_with_own, told[kind], own) for kind, _, own in INPUTS.values()]


def _with_own(module: Callable[..., None], own: int, shape: Shape, by: int) -> None:
    module(shape, by, own)


def _pass(shape: Shape, layer: Layer, by: int) -> None:
    channels, kernel, stride, pad = layer
    shape.conv_norm(channels // by, kernel, stride=stride, pad=pad)


def _join(shape: Shape, by: int, paths: tuple[tuple[Layer, ...], ...], *, also: int = 0) -> None:
    """Paths side by side; their channels are put together, with `also` more of a pooled copy of the input."""
    channels = also
    for path in paths:
        with shape.branch() as beside:
            for layer in path:
                _pass(beside, layer, by)
        channels += beside.channels
    shape.go(channels, like=beside)


def _a(shape: Shape, by: int, pool: int) -> None:
    double = ((64, 1, 1, 0), (96, 3, 1, 1), (96, 3, 1, 1))
    _join(shape, by, (((64, 1, 1, 0),), ((48, 1, 1, 0), (64, 5, 1, 2)), double, ((pool, 1, 1, 0),)))


def _b(shape: Shape, by: int) -> None:
    double = ((64, 1, 1, 0), (96, 3, 1, 1), (96, 3, 2, 0))
    _join(shape, by, (((384, 3, 2, 0),), double), also=shape.channels)


def _c(shape: Shape, by: int, inner: int) -> None:
    once = ((inner, 1, 1, 0), (inner, WIDE, 1, WIDE_PAD), (192, TALL, 1, TALL_PAD))
    twice = (
        (inner, 1, 1, 0),
        (inner, TALL, 1, TALL_PAD),
        (inner, WIDE, 1, WIDE_PAD),
        (inner, TALL, 1, TALL_PAD),
        (192, WIDE, 1, WIDE_PAD),
    )
    _join(shape, by, (((192, 1, 1, 0),), once, twice, ((192, 1, 1, 0),)))


def _d(shape: Shape, by: int) -> None:
    seven = ((192, 1, 1, 0), (192, WIDE, 1, WIDE_PAD), (192, TALL, 1, TALL_PAD), (192, 3, 2, 0))
    _join(shape, by, (((192, 1, 1, 0), (320, 3, 2, 0)), seven), also=shape.channels)


def _e(shape: Shape, by: int) -> None:
    """Two of its four paths end in a fork of 1×3 and 3×1."""
    fork = (((384, (1, 3), 1, (0, 1)),), ((384, (3, 1), 1, (1, 0)),))
    channels = 0
    for path in (((384, 1, 1, 0),), ((448, 1, 1, 0), (384, 3, 1, 1))):
        with shape.branch() as beside:
            for layer in path:
                _pass(beside, layer, by)
            _join(beside, by, fork)
        channels += beside.channels
    _join(shape, by, (((320, 1, 1, 0),), ((192, 1, 1, 0),)), also=channels)
