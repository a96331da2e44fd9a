"""A detector's layers by arithmetic: channels, sizes, costs and parameters from its YAML, without building it.

The YAML is that of ultralytics' models: rows of [from, repeats, module, arguments], `backbone` then `head`. What is
counted is what the modules of ultralytics 8.4 compute at evaluation: multiply-accumulates of convolutions, linear maps
and attention. Tests hold the counts to what PyTorch counts in the real models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from trainables.task_kind import ModelError

IMAGE = -1  # source of the first layer


class Count(NamedTuple):
    """Multiply-accumulates of one image, and parameters (of convolutions, norms and linear maps alike)."""

    macs: float
    parameters: int

    def __add__(self, other: Count) -> Count:  # type: ignore[override]
        return Count(self.macs + other.macs, self.parameters + other.parameters)


NOTHING = Count(0, 0)


@dataclass(frozen=True)
class Layer:
    """One row of the YAML, for one image size.

    Attributes:
        sources: layers whose outputs it takes, IMAGE for the image.
        channels, size: of its output, px a side (0 of the last layer, whose output is no map).
    """

    module: str
    sources: tuple[int, ...]
    channels: int
    size: int
    count: Count

    @property
    def values(self) -> int:
        """Numbers in its output, one image."""
        return self.channels * self.size**2


@dataclass(frozen=True)
class Scale:
    """Depth and width of a model's size (n, s, m, l, x)."""

    depth: float
    width: float
    most_channels: float

    def channels(self, wanted: int) -> int:
        """Channels of a layer whose YAML says `wanted`: a multiple of 8."""
        return math.ceil(min(wanted, self.most_channels) * self.width / 8) * 8

    def repeats(self, wanted: int) -> int:
        """Repeats of a layer whose YAML says `wanted`."""
        return max(round(wanted * self.depth), 1) if wanted > 1 else wanted


@dataclass(frozen=True)
class _Row:
    """A row of the YAML with what its inputs are."""

    inputs: tuple[tuple[int, int], ...]  # (channels, size) of each source
    repeats: int
    arguments: tuple[Any, ...]
    scale: Scale
    classes: int
    bins: int

    @property
    def channels(self) -> int:
        return self.inputs[0][0]

    @property
    def size(self) -> int:
        return self.inputs[0][1]

    def argument(self, position: int, default: Any) -> Any:
        return self.arguments[position] if position < len(self.arguments) else default


def layers_of(document: Mapping[str, Any], scale: Scale, image_size: int, classes: int) -> tuple[Layer, ...]:
    """Every layer of a model's YAML at an image size.

    Raises:
        ModelError: a module that no detector here is made of, or a row that is none; names the row.
    """
    layers: list[Layer] = []
    bins = int(document.get("reg_max", 16))
    for number, row in enumerate([*document["backbone"], *document["head"]]):
        try:
            layers.append(_layer(row, layers, scale, image_size, classes, bins))
        except (TypeError, ValueError, IndexError, KeyError) as error:
            known = ", ".join(_COUNTERS)
            raise ModelError(
                f"layer {number} of the detector, {row}: {error}; modules that are known: {known}"
            ) from error
    return tuple(layers)


def _layer(
    row: Sequence[Any], before: Sequence[Layer], scale: Scale, image_size: int, classes: int, bins: int
) -> Layer:
    source, repeats, module, arguments = row
    number = len(before)
    sources = tuple(number + s if s < 0 else int(s) for s in ([source] if isinstance(source, int) else source))
    if any(not IMAGE <= s < number for s in sources):
        raise ValueError(f"takes the output of layer {max(sources)}, which does not come before it")
    inputs = tuple((3, image_size) if s == IMAGE else (before[s].channels, before[s].size) for s in sources)
    if module not in _COUNTERS:
        raise ValueError(f"module {module!r} is not known")
    made = _Row(inputs, scale.repeats(int(repeats)), tuple(arguments), scale, classes, bins)
    channels, size, count = _COUNTERS[module](made)
    return Layer(module, sources, channels, size, count)


# -- parts ----------------------------------------------------------------------------------------------------------


def _conv(c_in: int, c_out: int, kernel: int, size: int, groups: int = 1) -> Count:
    """Convolution without bias, then BatchNorm; `size` of the output."""
    weights = c_in // groups * c_out * kernel**2
    return Count(weights * size**2, weights + 2 * c_out)


def _linear(c_in: int, c_out: int, tokens: float) -> Count:
    return Count(c_in * c_out * tokens, c_in * c_out + c_out)


def _attention(width: int, tokens: float) -> Count:
    """Multi-head self-attention: four linear maps, scores and their sums."""
    return Count((4 * width**2 + 2 * tokens * width) * tokens, 4 * width**2 + 4 * width)


def _norms(width: int, number: int) -> Count:
    return Count(0, 2 * width * number)


def _total(counts: Sequence[Count]) -> Count:
    return Count(sum(c.macs for c in counts), sum(c.parameters for c in counts))


Counted = tuple[int, int, Count]  # output channels, output size, count


def _conv_row(row: _Row) -> Counted:
    out, kernel, stride = row.scale.channels(row.arguments[0]), row.argument(1, 1), row.argument(2, 1)
    size = -(-row.size // stride)
    return out, size, _conv(row.channels, out, kernel, size, row.argument(4, 1) or 1)


def _depthwise_row(row: _Row) -> Counted:
    out, kernel, stride = row.scale.channels(row.arguments[0]), row.argument(1, 1), row.argument(2, 1)
    size = -(-row.size // stride)
    return out, size, _conv(row.channels, out, kernel, size, math.gcd(row.channels, out))


def _c2f_row(row: _Row) -> Counted:
    out, size, repeats = row.scale.channels(row.arguments[0]), row.size, row.repeats
    hidden = out // 2
    inner = 2 * repeats * [_conv(hidden, hidden, 3, size)]
    ends = [_conv(row.channels, 2 * hidden, 1, size), _conv((2 + repeats) * hidden, out, 1, size)]
    return out, size, _total(inner + ends)


def _sppf_row(row: _Row) -> Counted:
    out, size, hidden = row.scale.channels(row.arguments[0]), row.size, row.channels // 2
    return out, size, _conv(row.channels, hidden, 1, size) + _conv(4 * hidden, out, 1, size)


def _rep_c3_row(row: _Row) -> Counted:
    out, size = row.scale.channels(row.arguments[0]), row.size
    inner = row.repeats * [_conv(out, out, 3, size), _conv(out, out, 1, size)]
    return out, size, _total([*inner, *2 * [_conv(row.channels, out, 1, size)]])


def _stem_row(row: _Row) -> Counted:
    middle, out = row.arguments[0], row.arguments[1]
    half, quarter = row.size // 2, row.size // 4
    convolutions = [
        _conv(row.channels, middle, 3, half),
        _conv(middle, middle // 2, 2, half),
        _conv(middle // 2, middle, 2, half),
        _conv(2 * middle, middle, 3, quarter),
        _conv(middle, out, 1, quarter),
    ]
    return out, quarter, _total(convolutions)


def _hg_block_row(row: _Row) -> Counted:
    middle, out, kernel, light = row.arguments[0], row.arguments[1], row.argument(2, 3), row.argument(3, False)
    size, c_in = row.size, row.channels
    parts = []
    for i in range(row.repeats):
        first = c_in if i == 0 else middle
        if light:
            parts += [_conv(first, middle, 1, size), _conv(middle, middle, kernel, size, middle)]
        else:
            parts.append(_conv(first, middle, kernel, size))
    ends = [_conv(c_in + row.repeats * middle, out // 2, 1, size), _conv(out // 2, out, 1, size)]
    return out, size, _total(parts + ends)


def _aifi_row(row: _Row) -> Counted:
    width, forward = row.channels, row.argument(0, 2048)
    tokens = row.size**2
    count = _attention(width, tokens) + _linear(width, forward, tokens) + _linear(forward, width, tokens)
    return width, row.size, count + _norms(width, 2)


def _upsample_row(row: _Row) -> Counted:
    return row.channels, row.size * int(row.arguments[1]), NOTHING


def _concat_row(row: _Row) -> Counted:
    return sum(channels for channels, _ in row.inputs), row.size, NOTHING


def _detect_row(row: _Row) -> Counted:
    """YOLOv8's decoupled head: two 3×3 convolutions and a 1×1 each for boxes (4 sides in bins) and classes, a level."""
    first, bins = row.inputs[0][0], row.bins
    box, score = max(16, first // 4, 4 * bins), max(first, min(row.classes, 100))
    counts = []
    for channels, size in row.inputs:
        for width, outputs in ((box, 4 * bins), (score, row.classes)):
            counts += [_conv(channels, width, 3, size), _conv(width, width, 3, size), _linear(width, outputs, size**2)]
    return 0, 0, _total(counts) + Count(0, bins)


def _decoder_row(row: _Row) -> Counted:
    """RT-DETR's decoder at evaluation: query selection over all tokens, then layers over the queries."""
    given = dict(zip(("width", "queries", "points", "heads", "layers", "forward"), row.arguments[1:], strict=False))
    values = {"width": 256, "queries": 300, "points": 4, "heads": 8, "layers": 6, "forward": 1024} | given
    width, levels = values["width"], len(row.inputs)
    tokens = sum(size**2 for _, size in row.inputs)
    queries = min(values["queries"], tokens)
    samples = values["heads"] * levels * values["points"]
    projections = [_conv(channels, width, 1, size) for channels, size in row.inputs]
    selection = [_linear(width, width, tokens), _linear(width, row.classes, tokens), _norms(width, 1)]
    box_head = 2 * [_linear(width, width, queries)] + [_linear(width, 4, queries)]
    layer = [
        _attention(width, queries),
        _linear(width, 2 * samples, queries),
        _linear(width, samples, queries),
        _linear(width, width, tokens),
        _linear(width, width, queries),
        _linear(width, values["forward"], queries),
        _linear(values["forward"], width, queries),
        _norms(width, 3),
        *box_head,
    ]
    position = _linear(4, 2 * width, queries) + _linear(2 * width, width, queries)  # one map, used in every layer
    repeated = values["layers"] * layer + (values["layers"] - 1) * [Count(position.macs, 0)]
    scores = [_linear(width, row.classes, queries)] + (values["layers"] - 1) * [_linear(width, row.classes, 0)]
    embedding = Count(0, row.classes * width)
    return 0, 0, _total([*projections, *selection, *box_head, position, *repeated, *scores, embedding])


_COUNTERS: dict[str, Callable[[_Row], Counted]] = {
    "Conv": _conv_row,
    "DWConv": _depthwise_row,
    "C2f": _c2f_row,
    "SPPF": _sppf_row,
    "RepC3": _rep_c3_row,
    "HGStem": _stem_row,
    "HGBlock": _hg_block_row,
    "AIFI": _aifi_row,
    "nn.Upsample": _upsample_row,
    "Concat": _concat_row,
    "Detect": _detect_row,
    "RTDETRDecoder": _decoder_row,
}


def carried(layers: Sequence[Layer], position: int) -> tuple[int, ...]:
    """Layers before `position` whose outputs some layer from there on takes, ascending: what a boundary must keep."""
    return tuple(sorted({s for layer in layers[position:] for s in layer.sources if s < position}))
