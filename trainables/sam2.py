"""SAM 2 on two-frame clips: what a segmenter trains, in the parts that the strategy unfreezes.

The first frame is another image, whose masks are its memory; the second is the image to segment, conditioned on that
memory by memory attention, one structure at a time. transformers' own modules do all of it; only the way through them
is ours, since `Sam2VideoModel.forward` runs under inference mode and cannot train.

Parts: the image encoder, the prompt encoder and the memory encoder are the base; the layers of memory attention are
the blocks, its final norm going with the last one; the mask decoder is the head. The two projections of the finer
feature maps (conv_s0, conv_s1) lie in transformers' mask decoder and are counted to the image encoder here: SAM 2 runs
them there, once an image, and their frozen outputs are an eighth of what they take in.

Left out, and why: object pointers (the mask decoder makes them of the memory frame, so the memory would change while
the decoder trains), the score of whether there is an object (untrained by our loss, it would blank masks), and the
choice among several masks by predicted IoU (the loss trains the one mask of token 0, so that one is evaluated).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import Sam2VideoConfig, Sam2VideoModel

from trainables.costs import IMAGES
from trainables.model_files import CONFIG, WEIGHTS, BackboneError
from trainables.sam2_files import DRAWN_SEED, STRIDE, Sam2Files
from trainables.strategy import stream


def load_sam2(files: Sam2Files, image_size: int) -> Sam2VideoModel:
    """The model in float32 at an image size, with its pretrained weights, or with weights drawn from a fixed seed.

    Raises:
        BackboneError: the files cannot be read, or the weights are not those of the folder's config.
    """
    if files.folder is None:
        raise BackboneError(f"backbone {files.name!r}: its weights are not downloaded")
    try:
        config = _sized(Sam2VideoConfig.from_pretrained(files.folder, local_files_only=True), image_size)
        if files.drawn:
            return _drawn(config)
        model, report = Sam2VideoModel.from_pretrained(
            files.folder, config=config, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    except (OSError, RuntimeError, ValueError, TypeError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise BackboneError(
            f"backbone {files.name!r}: {CONFIG} and {WEIGHTS} in {files.folder} cannot be loaded ({reason})"
        ) from error
    wrong = sorted([*report["missing_keys"], *report["unexpected_keys"], *map(str, report["mismatched_keys"])])
    if wrong:
        raise BackboneError(
            f"backbone {files.name!r}: weights and config disagree on {len(wrong)} tensors, first {wrong[0]!r}"
        )
    return model


def _sized(config: Sam2VideoConfig, image_size: int) -> Sam2VideoConfig:
    """The config at another image size: no weight depends on it, position embeddings are computed or resampled."""
    grid = image_size // STRIDE
    config.image_size = image_size
    config.prompt_encoder_config.image_size = image_size
    config.vision_config.backbone_config.image_size = [image_size, image_size]
    config.vision_config.backbone_feature_sizes = [[scale * grid] * 2 for scale in (4, 2, 1)]
    config.memory_attention_rope_feat_sizes = [grid, grid]
    return config


def _drawn(config: Sam2VideoConfig) -> Sam2VideoModel:
    """A model whose weights are drawn from the fixed seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream("tiny-sam2", DRAWN_SEED))
        model = Sam2VideoModel(config)
        _draw_weights(model)
    model.prompt_encoder.shared_embedding.positional_embedding.copy_(model.shared_image_embedding.positional_embedding)
    return model


def draw_head(head: nn.Module, seed: int) -> None:
    """Draw a mask decoder that has no pretrained weights from the training seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream("head", seed))
        _draw_weights(head)


def _draw_weights(module: nn.Module) -> None:
    """Weights scaled so that no layer shrinks what passes through it, embeddings as large as the positions beside them.

    transformers' own initial scale of 0.02 would leave frozen parts with next to constant outputs, and all kinds of
    tokens next to alike.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(part.weight, nonlinearity="linear")
        elif isinstance(part, nn.Embedding):
            nn.init.normal_(part.weight)


class ImageSide(nn.Module):
    """Image encoder and the projections of its two finer levels."""

    def __init__(self, sam: Sam2VideoModel) -> None:
        super().__init__()
        self.vision_encoder = sam.vision_encoder
        self.conv_s0, self.conv_s1 = sam.mask_decoder.conv_s0, sam.mask_decoder.conv_s1
        del sam.mask_decoder.conv_s0, sam.mask_decoder.conv_s1  # each parameter has one place

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(B, 3, S, S) → features at strides 4, 8 and 16, (B, D/8 | D/4 | D, ·, ·), and the positions of the last."""
        seen = self.vision_encoder(images, return_dict=True)
        fine, middle, coarse = seen.fpn_hidden_states
        return self.conv_s0(fine), self.conv_s1(middle), coarse, seen.fpn_position_encoding[-1]


class MemorySide(nn.Module):
    """Memory encoder, and everything of memory attention that is not one of its layers."""

    def __init__(self, sam: Sam2VideoModel) -> None:
        super().__init__()
        self.encoder = sam.memory_encoder
        self.temporal_positions = sam.memory_temporal_positional_encoding
        self.rotary = sam.memory_attention.rotary_emb
        self.register_buffer("grid", sam.memory_attention.position_ids, persistent=False)
        self._scale = float(sam.config.sigmoid_scale_for_mem_enc)
        self._bias = float(sam.config.sigmoid_bias_for_mem_enc)

    def forward(self, features: Tensor, masks: Tensor) -> Tensor:
        """(B, D, h, w) features of frames and their (B, C, S, S) masks → (B, C, h·w, 64) memory, one a structure."""
        batch, structures = masks.shape[:2]
        stretched = masks.flatten(0, 1).unsqueeze(1) * self._scale + self._bias
        encoded, _ = self.encoder(features.repeat_interleave(structures, dim=0), stretched)
        memory: Tensor = encoded.flatten(2).transpose(1, 2)
        return memory.reshape(batch, structures, *memory.shape[1:])

    def positions(self, memory: Tensor) -> Tensor:
        """(1, 1, h·w, 64) positions of memory tokens: where, and that they come from the frame that was given."""
        side = int(memory.shape[-2] ** 0.5)
        where = self.encoder.position_encoding((1, memory.shape[-1], side, side), memory.device, memory.dtype)
        positions: Tensor = where.flatten(2).transpose(1, 2).unsqueeze(0) + self.temporal_positions[-1]
        return positions

    def rotations(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines that turn queries and keys."""
        cos, sin = self.rotary(like, self.grid)
        return cos, sin


class MemoryBlock(nn.Module):
    """A layer of memory attention; the last one has the final norm."""

    def __init__(self, layer: nn.Module, norm: nn.Module | None) -> None:
        super().__init__()
        self.layer = layer
        self.norm = norm if norm is not None else nn.Identity()

    def forward(self, queries: Tensor, memory: Tensor, positions: Tensor, rotations: tuple[Tensor, Tensor]) -> Tensor:
        """(B·C, 1, h·w, D) queries, conditioned on (B·C, 1, h·w, 64) memory."""
        out: Tensor = self.norm(
            self.layer(queries=queries, keys=memory, key_point_embedding=positions, rope_position_embeddings=rotations)
        )
        return out


class Packed:
    """Several maps of an image in one flat row, so that a position has one tensor: (B, Σ sizes)."""

    def __init__(self, *shapes: tuple[int, ...]) -> None:
        self.shapes = shapes
        self.sizes = [prod(shape) for shape in shapes]

    def join(self, *maps: Tensor) -> Tensor:
        """Maps of B images → (B, Σ sizes) float32."""
        return torch.cat([part.reshape(len(part), -1).float() for part in maps], dim=1)

    def split(self, x: Tensor) -> list[Tensor]:
        """(B, Σ sizes) → the maps."""
        parts = torch.split(x, self.sizes, dim=1)
        return [part.reshape(-1, *shape) for part, shape in zip(parts, self.shapes, strict=True)]


class ClipSegmenter(nn.Module):
    """SAM 2 as a chain of positions: image features with a memory, memory attention layer by layer, masks."""

    def __init__(self, sam: Sam2VideoModel, structures: int) -> None:
        """Take a SAM 2 apart, which is no whole model any more afterwards, for C `structures` an image."""
        super().__init__()
        self.image_side = ImageSide(sam)
        self.memory_side = MemorySide(sam)
        self.prompt_encoder = sam.prompt_encoder
        self.image_positions = sam.shared_image_embedding
        attention = sam.memory_attention
        last = len(attention.layers) - 1
        self.memory_blocks = nn.ModuleList(
            MemoryBlock(layer, attention.layer_norm if i == last else None) for i, layer in enumerate(attention.layers)
        )
        self.mask_decoder = sam.mask_decoder
        self.mask_decoder.dynamic_multimask_via_stability = False  # would choose masks that no loss trains
        self._layout(int(sam.config.image_size), int(sam.config.memory_attention_hidden_size), structures)

    def _layout(self, size: int, hidden: int, structures: int) -> None:
        grid = size // STRIDE
        high = (hidden // 8, 4 * grid, 4 * grid), (hidden // 4, 2 * grid, 2 * grid)
        queries, memory = (structures, grid**2, hidden), (structures, grid**2, 64)
        self.clip = Packed((3, size, size), (3, size, size), (structures, size, size))
        self.conditioning = Packed(*high, queries, memory)
        self.conditioned = Packed(*high, queries)

    def base(self) -> Sequence[nn.Module]:
        """Image encoder, memory encoder, prompt encoder, positions."""
        return [self.image_side, self.memory_side, self.prompt_encoder, self.image_positions]

    def blocks(self) -> Sequence[nn.Module]:
        """Layers of memory attention, first to last."""
        return list(self.memory_blocks)

    def head(self) -> nn.Module:
        """The mask decoder."""
        decoder: nn.Module = self.mask_decoder
        return decoder

    def module(self) -> nn.Module:
        """The whole of it."""
        return self

    def advance(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Clips (B, 6 + C, S, S) at IMAGES; packed rows of `conditioning` at 0 … n, of `conditioned` at n + 1."""
        if stop <= start:
            return x
        if start == IMAGES:
            x = self._embed(x)
        layers = list(self.memory_blocks)[max(start, 0) : min(stop, len(self.memory_blocks))]
        if layers:
            x = self._condition(x, layers)
        if stop > len(self.memory_blocks):
            x = self.conditioned.join(*self.conditioning.split(x)[:3])
        return x

    def _embed(self, clips: Tensor) -> Tensor:
        """Both frames through the image encoder; the memory frame's masks into memory tokens."""
        image, frame, masks = self.clip.split(clips.flatten(1))
        fine, middle, coarse, positions = self.image_side(torch.cat([image, frame]))
        batch = len(image)
        memory = self.memory_side(coarse[batch:], masks)
        tokens = (coarse[:batch] + 0.1 * positions[:batch]).flatten(2).transpose(1, 2)  # 0.1: as SAM 2 was trained
        queries = tokens.unsqueeze(1).expand(-1, masks.shape[1], -1, -1)
        return self.conditioning.join(fine[:batch], middle[:batch], queries, memory)

    def _condition(self, x: Tensor, layers: Iterable[nn.Module]) -> Tensor:
        fine, middle, queries, memory = self.conditioning.split(x)
        tokens, keys = queries.flatten(0, 1).unsqueeze(1), memory.flatten(0, 1).unsqueeze(1)
        positions, rotations = self.memory_side.positions(memory), self.memory_side.rotations(tokens)
        for layer in layers:
            tokens = layer(tokens, keys, positions, rotations)
        return self.conditioning.join(fine, middle, tokens.reshape(queries.shape), memory)

    def predict(self, features: Tensor, side: Any = None) -> Tensor:
        """Mask logits (B, C, P, S/4, S/4) from packed features and prompts (B, C, P, 2, 3): x, y in px and label."""
        fine, middle, queries = self.conditioned.split(features)
        batch, structures = queries.shape[:2]
        grid = middle.shape[-1] // 2
        prompts = side.flatten(0, 1)
        sparse, dense = self.prompt_encoder(
            input_points=prompts[..., :2], input_labels=prompts[..., 2].long(), input_boxes=None, input_masks=None
        )
        masks, _, _, _ = self.mask_decoder(
            image_embeddings=queries.flatten(0, 1).transpose(1, 2).reshape(batch * structures, -1, grid, grid),
            image_positional_embeddings=self._image_wide_positions(grid).repeat(batch * structures, 1, 1, 1),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
            high_resolution_features=[
                fine.repeat_interleave(structures, dim=0),
                middle.repeat_interleave(structures, dim=0),
            ],
        )
        logits: Tensor = masks.reshape(batch, structures, *masks.shape[1:2], *masks.shape[-2:])
        return logits

    def _image_wide_positions(self, side: int) -> Tensor:
        """(1, D, side, side) positions of the image's tokens, as the prompt encoder places points."""
        at = (torch.arange(side, device=next(self.parameters()).device) + 0.5) / side
        y, x = torch.meshgrid(at, at, indexing="ij")
        positions: Tensor = self.image_positions(torch.stack([x, y], dim=-1))
        return positions.permute(2, 0, 1).unsqueeze(0)
