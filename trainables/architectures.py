"""The architectures that baselines are made of, as tables: blocks, widths, costs, pixel statistics. No torch, no timm.

An encoder is a stem, ordered blocks and a neck, and gives one vector an image. What counts as a block:

| architecture | blocks | one block |
|---|---|---|
| resnet50 | 16 | a bottleneck |
| densenet121 | 10 | up to six dense layers, as its first dense block has; a transition goes with those before it |
| inception_v3 | 11 | a module, Mixed_5b … Mixed_7c |
| vit_base_patch16_224, deit_base_patch16_224 | 12 | a transformer layer |

Each exists in its true size and *small*: the same blocks, narrow, with weights drawn from a fixed seed, for trying
where there is neither a network nor a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from trainables.conv_shapes import Part, Shape, Widths
from trainables.costs import Costs, units

Statistics = tuple[float, float, float]

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALVES = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))

DENSE_LAYERS = (6, 12, 24, 16)
RESNET_LAYERS = (3, 4, 6, 3)
VIT_PATCH, VIT_LAYERS = 16, 12
DENSE_BLOCK = 6  # dense layers a block


@dataclass(frozen=True)
class Parts:
    """An encoder's parts for an image of one size."""

    stem: Part
    blocks: tuple[Part, ...]
    neck_parameters: int
    features: int
    tokens: bool = False  # blocks give out tokens; else maps


@dataclass(frozen=True)
class Architecture:
    """One architecture.

    Attributes:
        name: timm's.
        family: 'resnet', 'densenet', 'inception' or 'vit'.
        hub: timm's tag of the weights that are meant where the study names none.
        image_size: side that these weights were trained with, px.
        statistics: mean and standard deviation of pixels in [0, 1] that they take.
        full, small: widths.
        least: smallest side that leaves the last map more than one place, px, full and small: so that batch norms have
            more than one value to go by even in a batch of one image.
    """

    name: str
    family: str
    hub: str
    image_size: int
    statistics: tuple[Statistics, Statistics]
    full: Widths
    small: Widths
    least: tuple[int, int]

    def widths(self, *, small: bool) -> Widths:
        """Of the true size or the small one."""
        return self.small if small else self.full

    def parts(self, image_size: int, *, small: bool) -> Parts:
        """Its parts for square images of a side.

        Raises:
            ValueError: images that are too small for it; says how large they have to be.
        """
        least = self.least[small]
        if image_size < least:
            raise ValueError(f"{self.name} needs images of at least {least} px, not {image_size}")
        return _PARTS[self.family](image_size, self.widths(small=small))

    def costs(self, image_size: int, *, small: bool, head_hidden: int, classes: int) -> Costs:
        """Costs with the two-layer MLP head.

        Raises:
            ValueError: images that are too small for it.
        """
        parts = self.parts(image_size, small=small)
        width = parts.features
        head = width * head_hidden + head_hidden**2 + head_hidden * classes
        return Costs(
            embedding=units(parts.stem.macs),
            blocks=tuple(units(block.macs) for block in parts.blocks),
            head=units(head),
            token_values=(parts.stem.values, *(block.values for block in parts.blocks)),
            feature_values=width,
            block_parameters=tuple(block.parameters for block in parts.blocks),
            head_parameters=head,
        )


# -- the families ----------------------------------------------------------------------------------------------------


def resnet_parts(image_size: int, widths: Widths) -> Parts:
    """ResNet with bottlenecks (He et al. 2016), the stride in the 3×3 convolution as in timm and torchvision."""
    shape = Shape(3, image_size, image_size)
    shape.conv_norm(64, 7, stride=2, pad=3)
    shape.pool(3, stride=2, pad=1)
    stem = shape.part()
    blocks = []
    for stage, layers in enumerate(RESNET_LAYERS):
        planes = widths.base * 2**stage
        for layer in range(layers):
            stride = 2 if stage and not layer else 1
            if not layer:
                with shape.branch() as shortcut:
                    shortcut.conv_norm(4 * planes, 1, stride=stride)
            shape.conv_norm(planes, 1)
            shape.conv_norm(planes, 3, stride=stride, pad=1)
            shape.conv_norm(4 * planes, 1)
            blocks.append(shape.part())
    return Parts(stem, tuple(blocks), 0, shape.channels)


def dense_groups() -> Iterator[tuple[int, range, bool]]:
    """DenseNet's blocks in order: (dense block from 0, its layers from 0, whether a transition follows)."""
    for dense_block, layers in enumerate(DENSE_LAYERS):
        for first in range(0, layers, DENSE_BLOCK):
            group = range(first, min(first + DENSE_BLOCK, layers))
            yield dense_block, group, group.stop == layers and dense_block + 1 < len(DENSE_LAYERS)


def dense_parts(image_size: int, widths: Widths) -> Parts:
    """DenseNet-121 (Huang et al. 2017): every dense layer adds its growth to what it reads."""
    growth = widths.base // 2
    shape = Shape(3, image_size, image_size)
    shape.conv_norm(widths.base, 7, stride=2, pad=3)
    shape.pool(3, stride=2, pad=1)
    stem = shape.part()
    blocks = []
    for _, layers, transition in dense_groups():
        for _ in layers:
            with shape.branch() as new:
                new.norm()
                new.conv_norm(4 * growth, 1)
                new.conv(growth, 3, pad=1)
            shape.channels += growth
        if transition:
            shape.norm()
            shape.conv(shape.channels // 2, 1)
            shape.pool(2, stride=2)
        blocks.append(shape.part())
    return Parts(stem, tuple(blocks), 2 * shape.channels, shape.channels)


def vit_parts(image_size: int, widths: Widths) -> Parts:
    """ViT with patches of 16 px (Dosovitskiy et al. 2021): a class token, learnt positions, a final norm."""
    hidden, patches = widths.base, (image_size // VIT_PATCH) ** 2
    tokens = patches + 1
    patch_values = 3 * VIT_PATCH**2
    embedding = Part(patches * patch_values * hidden, (patch_values + 1 + tokens + 1) * hidden, tokens * hidden)
    linear = 12 * hidden**2  # query, key, value, projection, and an MLP of four times the width
    block = Part(tokens * linear + 2 * tokens**2 * hidden, linear + 13 * hidden, tokens * hidden)
    return Parts(embedding, (block,) * VIT_LAYERS, 2 * hidden, hidden, tokens=True)


def inception_parts(image_size: int, widths: Widths) -> Parts:
    """Inception v3 (Szegedy et al. 2016) without its auxiliary head."""
    from trainables.inception_layers import inception_stem, mixed_modules

    shape = Shape(3, image_size, image_size)
    inception_stem(shape, widths)
    stem = shape.part()
    blocks = []
    for module in mixed_modules():
        module(shape, widths.base)
        blocks.append(shape.part())
    return Parts(stem, tuple(blocks), 0, shape.channels)


_PARTS: dict[str, Callable[[int, Widths], Parts]] = {
    "resnet": resnet_parts,
    "densenet": dense_parts,
    "inception": inception_parts,
    "vit": vit_parts,
}


def _vit(name: str, hub: str, image_size: int, statistics: tuple[Statistics, Statistics]) -> Architecture:
    widths = Widths(768, small=False), Widths(48, small=True)
    return Architecture(name, "vit", hub, image_size, statistics, *widths, least=(VIT_PATCH, VIT_PATCH))


def _cnn(
    name: str,
    family: str,
    image_size: int,
    statistics: tuple[Statistics, Statistics],
    base: int,
    least: tuple[int, int],
) -> Architecture:
    widths = Widths(base, small=False), Widths(8, small=True)
    return Architecture(name, family, "tv_in1k", image_size, statistics, *widths, least=least)


ARCHITECTURES: dict[str, Architecture] = {
    architecture.name: architecture
    for architecture in (
        _cnn("resnet50", "resnet", 224, IMAGENET, 64, (33, 33)),
        _cnn("densenet121", "densenet", 224, IMAGENET, 64, (64, 64)),
        _cnn("inception_v3", "inception", 299, HALVES, 1, (107, 47)),
        _vit("vit_base_patch16_224", "augreg2_in21k_ft_in1k", 224, HALVES),
        _vit("deit_base_patch16_224", "fb_in1k", 224, IMAGENET),
    )
}
# The image encoder of ALBEF (Li et al. 2021): a ViT-B/16, pretrained with images of 256 px under CLIP's statistics.
ALBEF = _vit("albef", "", 256, CLIP)
