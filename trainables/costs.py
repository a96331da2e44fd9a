"""Integer costs of a model's parts, and of an epoch: the same counts for the plan and for the loop.

One unit is 1,000 multiply-accumulates of a forward pass of one image. Backward is twice the forward of each unfrozen
part. No torch here: a plan counts units from the encoder's config.json alone.
"""

from __future__ import annotations

from dataclasses import dataclass

IMAGES = -1  # position before the embedding: nothing computed yet


@dataclass(frozen=True)
class Costs:
    """Forward cost of one image, in units.

    Positions name what is computed already: IMAGES = −1 nothing, 0 the embedding, b the first b blocks, and
    `features` = len(blocks) + 1 everything but the head.
    """

    embedding: int
    blocks: tuple[int, ...]
    head: int
    token_values: tuple[int, ...] = ()  # numbers that one image's activations have at positions 0 … len(blocks)
    feature_values: int = 0  # … and at the head's input
    pooled: bool = True  # whether the head's input is one small vector, which is worth keeping for every image
    block_parameters: tuple[int, ...] = ()  # parameters that train with each block, about
    head_parameters: int = 0

    @property
    def features(self) -> int:
        """Position of the head's input."""
        return len(self.blocks) + 1

    def forward(self, start: int, stop: int) -> int:
        """Units from position `start` to position `stop`, one image; the head is not a position."""
        if stop <= start:
            return 0
        embedding = self.embedding if start == IMAGES else 0
        return embedding + sum(self.blocks[max(start, 0) : min(stop, len(self.blocks))])

    def frozen_position(self, unfrozen: int, base: bool) -> int:
        """The last position that no training of this phase changes."""
        if base:
            return IMAGES
        return self.features if unfrozen == 0 else len(self.blocks) - unfrozen

    def training(self, start: int, unfrozen: int, base: bool) -> int:
        """Units of one training image whose forward pass starts at position `start`."""
        trained = self.head + sum(self.blocks[len(self.blocks) - unfrozen :]) + (self.embedding if base else 0)
        return self.evaluation(start) + 2 * trained

    def values(self, position: int) -> int:
        """Numbers that one image's activations have at a position, 0 … `features`."""
        return self.feature_values if position == self.features else self.token_values[position]

    def trained_parameters(self, unfrozen: int) -> int:
        """Parameters of the head and of the top `unfrozen` blocks, about."""
        return self.head_parameters + sum(self.block_parameters[len(self.blocks) - unfrozen :])

    def worth_keeping(self, position: int) -> bool:
        """Whether activations there spare more than reading them back: a mere embedding of patches does not."""
        return position > 0 or (position == 0 and self.embedding > max(self.blocks))

    def evaluation(self, start: int) -> int:
        """Units of one image's prediction from position `start`."""
        return self.forward(start, self.features) + self.head


def vit_costs(
    *, hidden: int, layers: int, mlp_ratio: float, patch: int, image_size: int, head_hidden: int, classes: int
) -> Costs:
    """Costs of a ViT encoder with a pooled two-layer MLP head.

    A block of n tokens and width h: (4 + 2·mlp_ratio)·n·h² for its linear maps and 2·n²·h for attention.
    """
    patches = (image_size // patch) ** 2
    tokens = patches + 1
    block = (4 + 2 * mlp_ratio) * tokens * hidden**2 + 2 * tokens**2 * hidden
    head = hidden * head_hidden + head_hidden**2 + head_hidden * classes
    return Costs(
        embedding=units(patches * 3 * patch**2 * hidden),
        blocks=(units(block),) * layers,
        head=units(head),
        token_values=(tokens * hidden,) * (layers + 1),
        feature_values=hidden,
        block_parameters=(round((4 + 2 * mlp_ratio) * hidden**2),) * layers,
        head_parameters=head,
    )


def units(macs: float) -> int:
    """Multiply-accumulates as units, one at the least."""
    return max(1, round(macs / 1000))
