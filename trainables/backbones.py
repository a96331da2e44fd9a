"""Encoders and heads: a transformers ViT, the mean of its patch tokens, and the MLP head of the paper."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import Dinov2Model
from transformers.utils import logging as transformers_logging

from trainables.backbone_files import Backbone
from trainables.costs import IMAGES
from trainables.model_files import CONFIG, WEIGHTS, BackboneError
from trainables.settings import ModelSettings
from trainables.strategy import stream

transformers_logging.disable_progress_bar()  # a bar a load drowns our own display


def load_encoder(backbone: Backbone) -> Dinov2Model:
    """The pretrained encoder in float32.

    Raises:
        BackboneError: the files cannot be read, or the weights are not those of the folder's config.
    """
    if backbone.folder is None:
        raise BackboneError(f"backbone {backbone.name!r}: its weights are not downloaded")
    try:
        model, report = Dinov2Model.from_pretrained(
            backbone.folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise BackboneError(
            f"backbone {backbone.name!r}: {CONFIG} and {WEIGHTS} in {backbone.folder} cannot be loaded ({reason})"
        ) from error
    wrong = sorted([*report["missing_keys"], *report["unexpected_keys"], *map(str, report["mismatched_keys"])])
    if wrong:
        raise BackboneError(
            f"backbone {backbone.name!r}: weights and config disagree on {len(wrong)} tensors, first {wrong[0]!r}"
        )
    return model


def mlp_head(hidden: int, classes: int, settings: ModelSettings, seed: int) -> nn.Sequential:
    """LayerNorm → Linear → GELU → Dropout → Linear → GELU → Dropout → Linear, drawn from the seed alone."""
    width, rate = settings.head_hidden, settings.dropout
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream("head", seed))
        return nn.Sequential(
            nn.LayerNorm(hidden),
            nn.Linear(hidden, width),
            nn.GELU(),
            nn.Dropout(rate),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Dropout(rate),
            nn.Linear(width, classes),
        )


class PooledViT(nn.Module):
    """A DINOv2-like encoder and a head on the mean of its patch tokens (CLS removed)."""

    def __init__(self, encoder: Dinov2Model, classifier: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.classifier = classifier

    def base(self) -> Sequence[nn.Module]:
        """Patch and position embeddings, and the final norm."""
        return [self.encoder.embeddings, self.encoder.layernorm]

    def blocks(self) -> Sequence[nn.Module]:
        """Transformer layers, first to last."""
        return list(self.encoder.encoder.layer)

    def head(self) -> nn.Module:
        """The MLP."""
        return self.classifier

    def module(self) -> nn.Module:
        """The whole of it."""
        return self

    def advance(self, x: Tensor, start: int, stop: int) -> Tensor:
        """(B, 3, S, S) images, (B, T, H) tokens or (B, H) features, by position."""
        layers = self.encoder.encoder.layer
        if start == IMAGES and stop > IMAGES:
            x = self.encoder.embeddings(x)
        for layer in layers[max(start, 0) : min(max(stop, 0), len(layers))]:
            x = layer(x)
        if start <= len(layers) < stop:
            x = self.encoder.layernorm(x)[:, 1:].mean(dim=1)
        return x

    def predict(self, features: Tensor, side: None = None) -> Tensor:
        """(B, H) features → (B, C) logits."""
        logits: Tensor = self.classifier(features)
        return logits
