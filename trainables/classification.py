"""Image classification: multi-label (ChestX-ray14) and single-label (HAM10000, one-hot)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional
from transformers import Dinov2Model

from trainables.backbone_files import Backbone
from trainables.backbones import PooledViT, load_encoder, mlp_head
from trainables.baseline_files import Baseline
from trainables.costs import Costs, vit_costs
from trainables.data.images import ImageCache
from trainables.data.index import UNLABELLED, Index
from trainables.metrics import class_aucs, macro, undefined
from trainables.model_files import CONFIG, file_sha256
from trainables.pretrained import copy_of
from trainables.settings import Settings
from trainables.task import Rows, Scores, StagedModel
from trainables.transforms import image_transforms
from trainables.views import Views

if TYPE_CHECKING:
    from trainables.baseline_models import Chain


def classification_costs(backbone: Backbone | Baseline, settings: Settings, classes: int) -> Costs:
    """Units of the encoder's parts and of the head, from the config or the table of architectures alone."""
    if isinstance(backbone, Baseline):
        return backbone.architecture.costs(
            settings.dataset.image_size,
            small=backbone.small,
            head_hidden=settings.model.head_hidden,
            classes=classes,
        )
    return vit_costs(
        hidden=backbone.hidden,
        layers=backbone.layers,
        mlp_ratio=backbone.mlp_ratio,
        patch=backbone.patch,
        image_size=settings.dataset.image_size,
        head_hidden=settings.model.head_hidden,
        classes=classes,
    )


class Classification:
    """The task of `settings.task = 'classification'`; see `trainables.task.Task`."""

    main_metric = "macro_auc"

    def __init__(self, settings: Settings, index: Index, images: ImageCache, backbone: Backbone | Baseline) -> None:
        self._settings = settings
        self._index = index
        self._images = images
        self._backbone = backbone
        self.views = Views(len(index), settings.dataset.flips)
        self.classes = index.classes
        self.costs = classification_costs(backbone, settings, len(index.classes))
        self._labels = torch.from_numpy(index.labels.astype(np.float32))
        self._masked = bool((index.labels == UNLABELLED).any())
        model = settings.model
        self._mean = torch.tensor(model.mean or backbone.mean).view(1, -1, 1, 1)
        self._std = torch.tensor(model.std or backbone.std).view(1, -1, 1, 1)

    def build(self, seed: int) -> StagedModel:
        """Pretrained encoder and a head drawn from the seed."""
        head = mlp_head(self.costs.feature_values, len(self.classes), self._settings.model, seed)
        if isinstance(self._backbone, Baseline):
            return self._chain(self._backbone).with_head(head)
        return PooledViT(self._encoder(self._backbone), head)

    def _encoder(self, backbone: Backbone) -> Dinov2Model:
        config = None if backbone.folder is None else file_sha256(backbone.folder / CONFIG)
        return copy_of("encoder", (backbone, config, backbone.weights_digest()), lambda: load_encoder(backbone))

    def _chain(self, baseline: Baseline) -> Chain:
        from trainables.baseline_models import load_chain

        size = self._settings.dataset.image_size
        identity = (baseline, baseline.weights_digest(), size)
        return copy_of("baseline", identity, lambda: load_chain(baseline, size))

    def rows(self, split: str) -> Rows:
        """Rows of a split, ascending."""
        return self._index.rows(split)

    def inputs(self, rows: Rows, device: torch.device) -> Tensor:
        """(B, 3, S, S): pixels / 255, grey repeated to three channels, minus mean, over std."""
        pixels = torch.from_numpy(self.views.pixels(self._images.pixels, rows)).to(device, non_blocking=True)
        x = pixels.permute(0, 3, 1, 2).to(torch.float32).div_(255.0).expand(-1, 3, -1, -1)
        return (x - self._mean.to(device)) / self._std.to(device)

    def side_inputs(self, rows: Rows, device: torch.device, *, training: bool) -> None:
        """Nothing."""

    def class_counts(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Positives and negatives of each class in the training split, over the images labelled for it."""
        return self._index.class_counts("train")

    def loss(self, outputs: Tensor, rows: Rows, class_weights: Tensor | None) -> Tensor:
        """Binary cross-entropy with logits; weights multiply the positive term.

        L = −(1/M) Σ over labelled (b, c) of [ w_c · y · log σ(z) + (1 − y) · log(1 − σ(z)) ], M the number of labelled
        pairs of image and class in the batch (B · C where all are); 0 where none is.
        """
        targets = self._labels[torch.from_numpy(self.views.image(rows))].to(outputs.device, non_blocking=True)
        if not self._masked:
            return functional.binary_cross_entropy_with_logits(outputs.float(), targets, pos_weight=class_weights)
        labelled = (targets != UNLABELLED).float()
        losses = functional.binary_cross_entropy_with_logits(
            outputs.float(), targets.clamp(min=0), pos_weight=class_weights, reduction="none"
        )
        return (losses * labelled).sum() / labelled.sum().clamp(min=1)

    def predictions(self, outputs: Tensor) -> npt.NDArray[np.float32]:
        """(B, C) probabilities."""
        return torch.sigmoid(outputs.float()).cpu().numpy()

    def score(self, predictions: npt.NDArray[np.float32], rows: Rows) -> Scores:
        """AUC of each class and their macro over the defined ones."""
        aucs = class_aucs(self._index.labels[rows], predictions)
        metrics = {"macro_auc": macro(aucs)}
        metrics |= {f"auc/{name}": float(a) for name, a in zip(self.classes, aucs, strict=True) if np.isfinite(a)}
        return Scores(metrics, aucs, undefined(aucs, self.classes))

    def describe(self, predictions: npt.NDArray[np.float32], rows: Rows) -> Mapping[str, npt.NDArray[np.generic]]:
        """Names, groups, labels, scores and classes of a split."""
        return {
            "names": self._index.names[rows],
            "groups": self._index.groups[rows],
            "labels": self._index.labels[rows],
            "scores": predictions,
            "classes": np.array(self.classes),
        }

    def transforms(self) -> dict[str, object]:
        """Size, fit and normalisation as applied."""
        return image_transforms(self._images, self._settings.dataset.fit, self._mean, self._std, self.views)
