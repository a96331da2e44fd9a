"""Where a SAM 2 lies and what its config.json says, without loading it: no torch, no transformers.

`tiny-sam2` is a small SAM 2 whose weights are drawn, the mask decoder's from the training seed and all others from a
fixed one: it has learnt nothing, and is for trying and testing. Anything else is a folder in transformers' layout
(`Sam2VideoModel.save_pretrained`), or a hub id such as facebook/sam2.1-hiera-tiny.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainables.model_files import CONFIG, WEIGHTS, BackboneError, file_sha256, find_model, pixel_statistics

DRAWN = {"tiny-sam2": Path(__file__).parent / "tiny_sam2"}
DRAWN_SEED = 0  # the same frozen parts for every training seed, as with pretrained weights
ARCHITECTURE = "sam2_video"

# What a config.json that leaves a key out means: transformers writes only what differs from these.
_DEFAULTS: dict[str, Any] = {
    "memory_attention_hidden_size": 256,
    "memory_attention_num_layers": 4,
    "memory_attention_downsample_rate": 1,
    "memory_attention_feed_forward_hidden_size": 2048,
    "memory_encoder_hidden_size": 256,
    "memory_encoder_output_channels": 64,
    "memory_fuser_num_layers": 2,
    "memory_fuser_embed_dim": 256,
    "memory_fuser_intermediate_dim": 1024,
    "memory_fuser_kernel_size": 7,
    "mask_downsampler_embed_dim": 256,
    "mask_downsampler_kernel_size": 3,
    "mask_downsampler_stride": 2,
    "mask_downsampler_total_stride": 16,
    "mask_decoder_config": {
        "hidden_size": 256,
        "mlp_dim": 2048,
        "num_hidden_layers": 2,
        "attention_downsample_rate": 2,
        "num_multimask_outputs": 3,
        "iou_head_hidden_dim": 256,
        "iou_head_depth": 3,
    },
    "prompt_encoder_config": {"hidden_size": 256, "patch_size": 16},
    "vision_config": {
        "backbone_channel_list": [768, 384, 192, 96],
        "fpn_hidden_size": 256,
        "backbone_config": {
            "hidden_size": 96,
            "patch_kernel_size": [7, 7],
            "patch_stride": [4, 4],
            "query_stride": [2, 2],
            "num_query_pool_stages": 3,
            "blocks_per_stage": [1, 2, 7, 2],
            "embed_dim_per_stage": [96, 192, 384, 768],
            "num_attention_heads_per_stage": [1, 2, 4, 8],
            "window_size_per_stage": [8, 4, 14, 7],
            "global_attention_blocks": [5, 7, 9],
            "mlp_ratio": 4.0,
        },
    },
}
STRIDE = 16  # px of the image a token of memory attention stands for
_COARSEST = 32  # … and a token of the image encoder's last stage


@dataclass(frozen=True)
class Sam2Files:
    """What the plan needs to know of a SAM 2.

    Attributes:
        name: as the study says it.
        folder: where its config lies, and its weights unless they are drawn; None for a hub id whose weights are not
            downloaded yet.
        drawn: the weights are drawn from `DRAWN_SEED`: the model has learnt nothing.
        config: config.json with the keys that it leaves out filled in.
        config_digest: sha256 of config.json.
        mean, std: pixel statistics it was trained with, 3 values in [0, 1].
    """

    name: str
    folder: Path | None
    drawn: bool
    config: Mapping[str, Any]
    config_digest: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def weights_digest(self) -> str:
        """sha256 of the weights file or of what the weights are drawn from, or a placeholder while there are none."""
        if self.folder is None:
            return f"not downloaded: {self.name}"
        if self.drawn:
            return hashlib.sha256(f"drawn from seed {DRAWN_SEED}: {self.config_digest}".encode()).hexdigest()
        return file_sha256(self.folder / WEIGHTS)

    @property
    def layers(self) -> int:
        """Layers of memory attention: the blocks that are unfrozen."""
        return int(self.config["memory_attention_num_layers"])

    def check_image_size(self, size: int) -> None:
        """Refuse a side that the image encoder's windows do not tile.

        Raises:
            BackboneError: with the sides that would do.
        """
        hiera = self.config["vision_config"]["backbone_config"]
        unit = math.lcm(_COARSEST, int(hiera["patch_stride"][0]) * int(hiera["window_size_per_stage"][0]))
        if size % unit:
            raise BackboneError(
                f"dataset.image_size: {size} px; backbone {self.name!r} takes multiples of {unit} px, such as "
                f"{max(unit, round(size / unit) * unit)}"
            )


def find_sam2(name: str, *, download: bool = False) -> Sam2Files:
    """Read a SAM 2's description.

    Args:
        name: `tiny-sam2`, a folder, or a hub id 'owner/name'.
        download: fetch a hub id's weights when they are not in the local cache.

    Raises:
        BackboneError: no such folder, missing or unreadable files, another architecture, a shape that this cannot
            train, or a hub id that can be neither found in the cache nor fetched.
    """
    files = find_model(name, DRAWN, download=download, architectures=(ARCHITECTURE,), weights=name not in DRAWN)
    mean, std = pixel_statistics(name, files.processor)
    config = _filled(_DEFAULTS, files.config)
    if config["memory_encoder_output_channels"] != 64:  # fixed in transformers' memory attention
        raise BackboneError(
            f"backbone {name!r}: memory_encoder_output_channels is {config['memory_encoder_output_channels']} in "
            f"{CONFIG}; memory attention takes 64"
        )
    return Sam2Files(name, files.folder, name in DRAWN, config, file_sha256(files.config_file), mean, std)


def _filled(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults overwritten by what is given, group by group; keys that no cost depends on come along."""
    merged = {**defaults, **{key: value for key, value in given.items() if value is not None}}
    return {
        key: _filled(defaults[key], value) if isinstance(defaults.get(key), dict) else value
        for key, value in merged.items()
    }
