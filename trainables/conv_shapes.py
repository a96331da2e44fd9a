"""Arithmetic of convolutional networks: what a part costs, holds and gives out, from its layers alone. No torch.

A part is told as the layers that an image passes; `Shape` follows channels and side of a square map through them and
adds up multiply-accumulates and parameters. Batch norms, activations and pooling cost next to nothing and count as
nothing; a batch norm's two parameters a channel count.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

Pair = tuple[int, int]


@dataclass(frozen=True)
class Widths:
    """How wide a network is built.

    Attributes:
        base: channels of ResNet's and DenseNet's first stage (64), DenseNet's growth being half of it; what Inception's
            channels are divided by; a ViT's hidden width.
        small: of the small form.
    """

    base: int
    small: bool


@dataclass(frozen=True)
class Part:
    """What one part of a network comes to.

    Attributes:
        macs: multiply-accumulates of a forward pass of one image.
        parameters: trained numbers.
        values: numbers that it gives out for one image.
    """

    macs: int
    parameters: int
    values: int


@dataclass
class Shape:
    """A map of `channels` × (height, width) on its way through a network.

    Raises:
        ValueError: a window that is larger than the map; names both.
    """

    channels: int
    height: int
    width: int
    _macs: int = field(default=0, repr=False)
    _parameters: int = field(default=0, repr=False)

    def conv(self, channels: int, kernel: int | Pair, *, stride: int = 1, pad: int | Pair = 0) -> None:
        """A convolution without bias."""
        tall, wide = _pair(kernel)
        inputs = self.channels
        self._window(_pair(kernel), stride, _pair(pad))
        self._parameters += inputs * channels * tall * wide
        self._macs += inputs * channels * tall * wide * self.height * self.width
        self.channels = channels

    def norm(self) -> None:
        """A batch norm."""
        self._parameters += 2 * self.channels

    def conv_norm(self, channels: int, kernel: int | Pair, *, stride: int = 1, pad: int | Pair = 0) -> None:
        """A convolution and its batch norm."""
        self.conv(channels, kernel, stride=stride, pad=pad)
        self.norm()

    def pool(self, kernel: int, *, stride: int, pad: int = 0) -> None:
        """A pooling window."""
        self._window((kernel, kernel), stride, (pad, pad))

    @contextmanager
    def branch(self) -> Iterator[Shape]:
        """A path beside this one, from here: what it costs is added, where it leads is its own affair."""
        other = Shape(self.channels, self.height, self.width)
        yield other
        self._macs += other._macs
        self._parameters += other._parameters

    def go(self, channels: int, like: Shape) -> None:
        """The paths beside have met: so many channels, as large as one of them."""
        self.channels, self.height, self.width = channels, like.height, like.width

    def part(self) -> Part:
        """What was passed since the last call."""
        part = Part(self._macs, self._parameters, self.channels * self.height * self.width)
        self._macs = self._parameters = 0
        return part

    def _window(self, kernel: Pair, stride: int, pad: Pair) -> None:
        tall, wide = self.height + 2 * pad[0] - kernel[0], self.width + 2 * pad[1] - kernel[1]
        if tall < 0 or wide < 0:
            raise ValueError(f"a window of {kernel[0]}×{kernel[1]} on a map of {self.height}×{self.width}")
        self.height, self.width = tall // stride + 1, wide // stride + 1


def _pair(value: int | Pair) -> Pair:
    return value if isinstance(value, tuple) else (value, value)
