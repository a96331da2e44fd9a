"""Baselines' encoders as chains of positions: timm's own modules, regrouped into stem, blocks and neck."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from timm.layers import ConvNormAct, resample_abs_pos_embed
from timm.models import densenet, resnet, vision_transformer
from timm.models.inception_v3 import InceptionA, InceptionB, InceptionC, InceptionD, InceptionE
from torch import Tensor, nn

from trainables.architectures import DENSE_LAYERS, RESNET_LAYERS, VIT_LAYERS, VIT_PATCH, dense_groups
from trainables.baseline_files import SEED, Baseline, encoder_tensors
from trainables.conv_shapes import Widths
from trainables.costs import IMAGES
from trainables.inception_layers import INPUTS, SMALL_STEM
from trainables.model_files import BackboneError
from trainables.strategy import stream

COUNTER = "num_batches_tracked"  # of a batch norm, used by nothing here; old files have none


class Chain(nn.Module):
    """An encoder of stem, blocks and neck, and a head on the mean of what the neck gives out.

    The mean is over the places of a map, or over patch tokens without the class token.
    """

    def __init__(self, stem: nn.Module, blocks: Sequence[nn.Module], neck: nn.Module, *, tokens: bool) -> None:
        super().__init__()
        self.stem = stem
        self.chain = nn.ModuleList(blocks)
        self.neck = neck
        self.classifier: nn.Module = nn.Identity()
        self._tokens = tokens

    def with_head(self, head: nn.Module) -> Chain:
        """Itself, with a head."""
        self.classifier = head
        return self

    def base(self) -> Sequence[nn.Module]:
        """Stem and neck."""
        return [self.stem, self.neck]

    def blocks(self) -> Sequence[nn.Module]:
        """Blocks, first to last."""
        return list(self.chain)

    def head(self) -> nn.Module:
        """The MLP."""
        return self.classifier

    def module(self) -> nn.Module:
        """The whole of it."""
        return self

    def advance(self, x: Tensor, start: int, stop: int) -> Tensor:
        """(B, 3, S, S) images, (B, C, H, W) maps or (B, T, H) tokens, or (B, H) features, by position."""
        if start == IMAGES and stop > IMAGES:
            x = self.stem(x)
        for block in self.blocks()[max(start, 0) : min(max(stop, 0), len(self.chain))]:
            x = block(x)
        if start <= len(self.chain) < stop:
            x = self.neck(x)
            x = x[:, 1:].mean(dim=1) if self._tokens else x.mean(dim=(2, 3))
        return x

    def predict(self, features: Tensor, side: None = None) -> Tensor:
        """(B, H) features → (B, C) logits."""
        logits: Tensor = self.classifier(features)
        return logits


def load_chain(baseline: Baseline, image_size: int) -> Chain:
    """The encoder with its pretrained weights, in float32; a small one with weights drawn from a fixed seed.

    Raises:
        BackboneError: the weights cannot be read, or are not this architecture's.
    """
    architecture = baseline.architecture
    widths = architecture.widths(small=baseline.small)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream(f"small {architecture.name}", SEED))
        network = _NETWORKS[architecture.family](image_size, widths)
    if not baseline.small:
        _load(network, baseline)
    return _CHAINS[architecture.family](network)


# -- networks --------------------------------------------------------------------------------------------------------


def _resnet(image_size: int, widths: Widths) -> nn.Module:
    channels = tuple(widths.base * 2**stage for stage in range(len(RESNET_LAYERS)))
    network: nn.Module = resnet.ResNet(
        resnet.Bottleneck, RESNET_LAYERS, num_classes=0, channels=channels, zero_init_last=not widths.small
    )
    return network


def _dense(image_size: int, widths: Widths) -> nn.Module:
    network: nn.Module = densenet.DenseNet(growth_rate=widths.base // 2, block_config=DENSE_LAYERS, num_classes=0)
    return network


def _vit(image_size: int, widths: Widths) -> nn.Module:
    heads = 3 if widths.small else 12
    network: nn.Module = vision_transformer.VisionTransformer(
        image_size, VIT_PATCH, embed_dim=widths.base, depth=VIT_LAYERS, num_heads=heads, num_classes=0
    )
    return network


def _inception(image_size: int, widths: Widths) -> nn.Module:
    if widths.small:
        return SmallInception(widths.base)
    network: nn.Module = timm.create_model("inception_v3", num_classes=0, aux_logits=False)
    return network


class SmallInception(nn.Module):
    """timm's modules of Inception v3 with all channels divided, behind a stem that keeps small images larger."""

    def __init__(self, by: int) -> None:
        super().__init__()
        conv = partial(_narrow, by, padding=0, norm_kwargs={"eps": 1e-3}, act_kwargs={"inplace": True})
        layers: list[nn.Module] = []
        channels = 3
        for layer in SMALL_STEM:
            if layer is None:
                layers.append(nn.MaxPool2d(3, stride=2))
                continue
            wide, kernel, stride, pad = layer
            layers.append(conv(channels, wide, kernel_size=kernel, stride=stride, padding=pad))
            channels = wide
        self.stem = nn.Sequential(*layers)
        for name, (kind, inputs, own) in INPUTS.items():
            self.add_module(name, _MODULES[kind](inputs, *([] if own is None else [own]), conv_block=conv))
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, nonlinearity="relu")  # timm's own scale is for wide layers


_MODULES: dict[str, Any] = {
    "InceptionA": InceptionA,
    "InceptionB": InceptionB,
    "InceptionC": InceptionC,
    "InceptionD": InceptionD,
    "InceptionE": InceptionE,
}


def _narrow(by: int, inputs: int, outputs: int, **layer: Any) -> nn.Module:
    narrow: nn.Module = ConvNormAct(inputs if inputs == 3 else inputs // by, outputs // by, **layer)
    return narrow


_NETWORKS = {"resnet": _resnet, "densenet": _dense, "vit": _vit, "inception": _inception}


# -- chains ----------------------------------------------------------------------------------------------------------


class DenseGroup(nn.Module):
    """Dense layers one after another, each adding to the map that all later ones read, and a transition."""

    def __init__(self, layers: Sequence[nn.Module], transition: nn.Module | None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.transition = nn.Identity() if transition is None else transition

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C', H', W')."""
        for layer in self.layers:
            x = torch.cat([x, layer(x)], dim=1)
        narrowed: Tensor = self.transition(x)
        return narrowed


class VitStem(nn.Module):
    """Patches as tokens behind a class token, with their positions."""

    def __init__(self, network: vision_transformer.VisionTransformer) -> None:
        super().__init__()
        self.patch_embed = network.patch_embed
        self.cls_token = network.cls_token
        self.pos_embed = network.pos_embed

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, S, S) → (B, T, H)."""
        patches = self.patch_embed(x)
        tokens: Tensor = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1) + self.pos_embed
        return tokens


def _resnet_chain(network: Any) -> Chain:
    stem = nn.Sequential(network.conv1, network.bn1, network.act1, network.maxpool)
    stages = (network.layer1, network.layer2, network.layer3, network.layer4)
    return Chain(stem, [block for stage in stages for block in stage], nn.Identity(), tokens=False)


def _dense_chain(network: Any) -> Chain:
    parts = network.features
    blocks = []
    for dense_block, layers, transition in dense_groups():
        whole = list(getattr(parts, f"denseblock{dense_block + 1}").values())
        narrowing = getattr(parts, f"transition{dense_block + 1}") if transition else None
        blocks.append(DenseGroup([whole[layer] for layer in layers], narrowing))
    return Chain(nn.Sequential(parts.conv0, parts.norm0, parts.pool0), blocks, parts.norm5, tokens=False)


def _vit_chain(network: Any) -> Chain:
    return Chain(VitStem(network), list(network.blocks), network.norm, tokens=True)


def _inception_chain(network: Any) -> Chain:
    modules = [getattr(network, name) for name in INPUTS]
    if isinstance(network, SmallInception):
        return Chain(network.stem, modules, nn.Identity(), tokens=False)
    names = network.layer_names[: network.layer_names.index(next(iter(INPUTS)))]
    return Chain(nn.Sequential(*(getattr(network, name) for name in names)), modules, nn.Identity(), tokens=False)


_CHAINS = {"resnet": _resnet_chain, "densenet": _dense_chain, "vit": _vit_chain, "inception": _inception_chain}


# -- weights ---------------------------------------------------------------------------------------------------------


def _load(network: nn.Module, baseline: Baseline) -> None:
    if baseline.file is None:
        raise BackboneError(f"backbone {baseline.name!r}: its weights are not downloaded")
    stored = encoder_tensors(_read(baseline.file))
    if isinstance(network, vision_transformer.VisionTransformer) and "pos_embed" in stored:
        grid = network.patch_embed.grid_size
        if stored["pos_embed"].shape[1] != 1 + grid[0] * grid[1]:
            stored["pos_embed"] = resample_abs_pos_embed(stored["pos_embed"].float(), new_size=list(grid))
    wanted = network.state_dict()
    wrong = {k for k in wanted.keys() ^ stored.keys() if not k.endswith(COUNTER)}
    wrong |= {k for k in wanted.keys() & stored.keys() if wanted[k].shape != stored[k].shape}
    if wrong:
        raise BackboneError(
            f"backbone {baseline.name!r}: {baseline.file} and {baseline.architecture.name} disagree on {len(wrong)} "
            f"tensors, first {min(wrong)!r}"
        )
    network.load_state_dict(stored, strict=False)


def _read(file: Path) -> dict[str, Tensor]:
    """Tensors of a weights file by name; a checkpoint's are under 'model' or 'state_dict', or it is they."""
    try:
        if file.suffix == ".safetensors":
            return dict(load_file(file))
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle raises whatever a damaged or foreign file makes it raise
        raise _unreadable(file, error) from error
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise BackboneError(f"{file}: no tensors by name in it; expected a state dict, alone or under 'model'")
    return {_plain(name): tensor for name, tensor in content.items()}


def _unreadable(file: Path, error: Exception) -> BackboneError:
    reason = str(error).strip().partition("\n")[0][:200]
    return BackboneError(
        f"{file}: cannot be read as weights alone ({reason}); nothing else in a file is run: save its tensors again "
        "with safetensors"
    )


def _plain(name: str) -> str:
    """Name in timm of a tensor that torchvision or DistributedDataParallel calls otherwise."""
    name = name.removeprefix("module.")
    return re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", name)
