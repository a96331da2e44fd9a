"""Costs of SAM 2 on two-frame clips, from its config alone: multiply-accumulates of its linear maps and attentions.

An image is a clip: both frames go through the image encoder, the first one's masks through the memory encoder once a
structure; memory attention and the mask decoder run once a structure, the decoder once more for each prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, log
from typing import Any

from trainables.costs import Costs
from trainables.sam2_files import STRIDE, Sam2Files

MEMORY_VALUES = 64  # channels of a memory token


@dataclass(frozen=True)
class ClipShape:
    """What is computed for one image.

    Attributes:
        size: side of both frames, px.
        structures: masks an image.
        prompts: prompts a structure.
    """

    size: int
    structures: int
    prompts: int

    @property
    def tokens(self) -> int:
        """Tokens of memory attention, a structure."""
        return (self.size // STRIDE) ** 2


def sam2_costs(files: Sam2Files, clip: ClipShape) -> Costs:
    """Costs and activation sizes of a SAM 2 whose memory attention layers are the blocks."""
    config = files.config
    hidden = int(config["memory_attention_hidden_size"])
    layer, parameters = _memory_layer(config, clip.tokens)
    encoded = 2 * _image_encoder(config["vision_config"], clip.size) + clip.structures * _memory_encoder(config, clip)
    high = _high_resolution_values(hidden, clip.size)
    queries = clip.structures * clip.tokens * hidden
    memory = clip.structures * clip.tokens * MEMORY_VALUES
    return Costs(
        embedding=_units(encoded),
        blocks=(_units(clip.structures * layer),) * files.layers,
        head=_units(clip.structures * clip.prompts * _mask_decoder(config, clip)),
        token_values=(high + queries + memory,) * (files.layers + 1),
        feature_values=high + queries,
        pooled=False,
        block_parameters=(parameters,) * files.layers,
        head_parameters=_decoder_parameters(config["mask_decoder_config"]),
    )


def _high_resolution_values(hidden: int, size: int) -> int:
    """Numbers of the two feature maps that go around memory attention, strides 4 and 8."""
    return (size // 4) ** 2 * (hidden // 8) + (size // 8) ** 2 * (hidden // 4)


def _image_encoder(vision: Mapping[str, Any], size: int) -> float:
    """Hiera, its feature pyramid, and the projections of the two finer levels for the mask decoder."""
    hiera, fpn = vision["backbone_config"], int(vision["fpn_hidden_size"])
    kernel, stride = int(hiera["patch_kernel_size"][0]), int(hiera["patch_stride"][0])
    grid = size // stride
    total = float(grid**2 * kernel**2 * 3 * int(hiera["hidden_size"]))
    number, dim = 0, int(hiera["hidden_size"])
    window = int(hiera["window_size_per_stage"][0])
    for stage, blocks in enumerate(hiera["blocks_per_stage"]):
        wide = int(hiera["embed_dim_per_stage"][stage])
        for block in range(int(blocks)):
            pools = block == 0 and 0 < stage <= int(hiera["num_query_pool_stages"])
            at = 0 if number in hiera["global_attention_blocks"] else window  # a stage's first block has the last's
            total += _hiera_block(grid, dim, wide, at, 2 if pools else 1, float(hiera["mlp_ratio"]))
            grid, dim, number = grid // 2 if pools else grid, wide, number + 1
            window = int(hiera["window_size_per_stage"][stage])
        total += grid**2 * wide * fpn
    return total + (size // 4) ** 2 * fpn * (fpn // 8) + (size // 8) ** 2 * fpn * (fpn // 4)


def _hiera_block(grid: int, dim: int, wide: int, window: int, pooling: int, ratio: float) -> float:
    """One block on grid² tokens of width dim, which leave as (grid / pooling)² of width wide."""
    side = ceil(grid / window) * window if window else grid  # windows are padded
    keys = window**2 if window else grid**2
    pooled = (side // pooling) ** 2
    attention = side**2 * dim * 3 * wide + 2 * pooled * keys * wide + pooled * wide**2
    shortcut = grid**2 * dim * wide if dim != wide else 0
    return attention + shortcut + 2 * ratio * (grid // pooling) ** 2 * wide**2


def _memory_encoder(config: Mapping[str, Any], clip: ClipShape) -> float:
    """Mask downsampling, fusion with the image, projection to memory tokens."""
    stride, kernel = int(config["mask_downsampler_stride"]), int(config["mask_downsampler_kernel_size"])
    steps = round(log(int(config["mask_downsampler_total_stride"]), stride))
    widths = [stride ** (2 * step) for step in range(steps + 1)]
    sides = [clip.size // stride**step for step in range(1, steps + 1)]
    down = sum(side**2 * kernel**2 * a * b for side, (a, b) in zip(sides, pairwise(widths), strict=True))
    hidden, inner = int(config["memory_encoder_hidden_size"]), int(config["memory_fuser_intermediate_dim"])
    embed = int(config["memory_fuser_embed_dim"])
    fuse = int(config["memory_fuser_kernel_size"]) ** 2 * embed + 2 * embed * inner
    token = widths[-1] * int(config["mask_downsampler_embed_dim"]) + hidden**2 + hidden * MEMORY_VALUES
    return float(down + clip.tokens * (token + int(config["memory_fuser_num_layers"]) * fuse))


def _memory_layer(config: Mapping[str, Any], tokens: int) -> tuple[float, int]:
    """Multiply-accumulates of one memory attention layer, one structure, and its parameters."""
    hidden = int(config["memory_attention_hidden_size"])
    inner = hidden // int(config["memory_attention_downsample_rate"])
    feed_forward = 2 * hidden * int(config["memory_attention_feed_forward_hidden_size"])
    itself = 4 * hidden * inner
    memory = 2 * hidden * inner + 2 * MEMORY_VALUES * inner
    return tokens * (itself + memory + feed_forward) + 4.0 * tokens**2 * inner, itself + memory + feed_forward


def _mask_decoder(config: Mapping[str, Any], clip: ClipShape) -> float:
    """The two-way transformer and the upscaling of one prompt of one structure."""
    decoder = config["mask_decoder_config"]
    hidden = int(decoder["hidden_size"])
    inner = hidden // int(decoder["attention_downsample_rate"])
    few, many = int(decoder["num_multimask_outputs"]) + 3 + 3, clip.tokens  # object, IoU, masks; two points, padding
    across = 2 * hidden * inner * (few + many) + 2 * few * many * inner
    itself = 4 * few * hidden**2 + 2 * few**2 * hidden
    layer = itself + 2 * across + 2 * few * hidden * int(decoder["mlp_dim"])
    upscale = many * hidden * hidden + 4 * many * (hidden // 4) * (hidden // 8) * 4
    masks = (int(decoder["num_multimask_outputs"]) + 1) * 16 * many * (hidden // 8)
    return float(int(decoder["num_hidden_layers"]) * layer + across + upscale + masks)


def _decoder_parameters(decoder: Mapping[str, Any]) -> int:
    """Parameters of the mask decoder's linear maps."""
    hidden, masks = int(decoder["hidden_size"]), int(decoder["num_multimask_outputs"]) + 1
    inner = hidden // int(decoder["attention_downsample_rate"])
    layer = 4 * hidden**2 + 8 * hidden * inner + 2 * hidden * int(decoder["mlp_dim"])
    upscale = hidden * hidden + (hidden // 4) * (hidden // 8) * 4
    heads = masks * (2 * hidden**2 + hidden * (hidden // 8)) + 2 * hidden**2 + hidden
    iou = int(decoder["iou_head_hidden_dim"])
    heads += hidden * iou + (int(decoder["iou_head_depth"]) - 2) * iou**2 + iou * masks
    return int(decoder["num_hidden_layers"]) * layer + 4 * hidden * inner + upscale + heads


def _units(macs: float) -> int:
    return max(1, round(macs / 1000))
