"""The training of one cell as a plain PyTorch script would write it: what our loop and plain Ray Tune are held against.

Same model, images, batches, dropout, AdamW, schedules, class weights, averaging, validation, patience and choice of
epoch as the project's loop; nothing of the loop itself is used. It ends with the same weights to the bit, which a test
holds: so both do equal work.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional

from trainables.backbone_files import find_backbone
from trainables.backbones import PooledViT, load_encoder, mlp_head
from trainables.data.opened import Data
from trainables.settings import Settings
from trainables.strategy import phase, stream, total_epochs


@dataclass
class PlainEpoch:
    """What a script would print after an epoch."""

    loss: float
    val_auc: float
    averaged_val_auc: float | None


class PlainTraining:
    """One cell of a study on the CPU: `train_epoch` until `done`, then `test`."""

    def __init__(self, settings: Settings, data: Data, seed: int) -> None:
        """Build the model with pretrained encoder and fresh head."""
        self.settings = settings
        self.seed = seed
        self.epoch = 0
        backbone = find_backbone(settings.model.backbone)
        self.images = data.images.pixels
        self.classes = data.index.classes
        self.labels = torch.from_numpy(data.index.labels.astype(np.float32))
        self.rows = {split: data.index.rows(split) for split in ("train", "val", "test")}
        self.mean = torch.tensor(settings.model.mean or backbone.mean).view(1, -1, 1, 1)
        self.std = torch.tensor(settings.model.std or backbone.std).view(1, -1, 1, 1)
        self.encoder = load_encoder(backbone)
        self.head = mlp_head(backbone.hidden, self.labels.shape[1], settings.model, seed)
        self.layers = self.encoder.encoder.layer
        optimiser = settings.optimiser
        self.optimiser = torch.optim.AdamW(
            [{"params": list(self.encoder.parameters())}, {"params": list(self.head.parameters())}],
            lr=0.0,
            weight_decay=optimiser.weight_decay,
            fused=True,
        )
        self.class_weights: npt.NDArray[np.float64] | None = None
        self.averaged: dict[str, Tensor] = {}
        self.average_steps = 0
        self.best: tuple[float, int, dict[str, Tensor]] | None = None
        self.waited = 0

    @property
    def done(self) -> bool:
        """All epochs are over, or patience is."""
        patience = self.settings.stopping.patience
        return self.epoch >= total_epochs(self.settings.strategy) or (patience is not None and self.waited >= patience)

    def train_epoch(self) -> PlainEpoch:
        """Train and validate one epoch, keep the best weights."""
        now = phase(self.settings.strategy, len(self.layers), self.epoch)
        tuning = now.segment == "tune"
        self._freeze(now.unfrozen, now.base)
        if tuning and self.settings.weighting.enabled and self.class_weights is None:
            self.class_weights = self._initial_weights()
        size = self.settings.optimiser.batch_size
        order = np.random.default_rng(stream("order", self.seed, self.epoch)).permutation(self.rows["train"])
        batches = [order[i : i + size] for i in range(0, len(order), size)]
        if tuning and self.settings.ema.enabled:
            for name, tensor in self._trained().items():
                self.averaged.setdefault(name, tensor.detach().clone())
        losses = [self._step(rows, step, len(batches), now.segment_start) for step, rows in enumerate(batches)]
        total = sum(float(loss) * len(rows) for loss, rows in zip(losses, batches, strict=True))
        aucs = self._aucs("val")
        averaged = None
        if self.averaged:
            raw = self._swap(self.averaged)
            averaged = float(np.nanmean(self._aucs("val")))
            self._swap(raw)
        if self.class_weights is not None:
            self.class_weights = self._refined(self.class_weights, aucs)
        self.epoch += 1
        told = PlainEpoch(total / len(order), float(np.nanmean(aucs)), averaged)
        if tuning:
            self._keep_best(told.val_auc if averaged is None else averaged)
        return told

    def test(self) -> float:
        """Macro AUC of the chosen epoch's weights on the test split."""
        assert self.best is not None, "no epoch of stage 2 has been trained"
        raw = self._swap(self.best[2])
        auc = float(np.nanmean(self._aucs("test")))
        self._swap(raw)
        return auc

    def named_tensors(self) -> dict[str, Tensor]:
        """All weights by the names that the project's model gives them."""
        return dict(PooledViT(self.encoder, self.head).state_dict())

    # -- a step -----------------------------------------------------------------------------------------------------

    def _step(self, rows: npt.NDArray[np.intp], step: int, steps: int, segment_start: int) -> Tensor:
        s = self.settings
        now = phase(s.strategy, len(self.layers), self.epoch)
        t = ((self.epoch - segment_start) * steps + step) / (now.segment_epochs * steps)
        factor = 0.5 * (1.0 + math.cos(math.pi * t)) if s.optimiser.schedule == "cosine" else 1.0 - t
        peak = s.optimiser.head_lr
        if now.segment == "tune" and s.optimiser.tune_head_lr is not None:
            peak = s.optimiser.tune_head_lr
        encoder, head = self.optimiser.param_groups
        encoder["lr"], head["lr"] = s.optimiser.encoder_lr * factor if now.unfrozen else 0.0, peak * factor
        weights = None
        if self.class_weights is not None:
            clip = s.weighting.clip
            clipped = self.class_weights if clip is None else np.clip(self.class_weights, *clip)
            weights = torch.tensor(clipped, dtype=torch.float32)
        torch.manual_seed(stream("dropout", self.seed, self.epoch, step))
        self.optimiser.zero_grad(set_to_none=True)
        targets = self.labels[torch.from_numpy(rows)]
        loss = functional.binary_cross_entropy_with_logits(self._logits(rows), targets, pos_weight=weights)
        loss.backward()  # type: ignore[no-untyped-call]
        if s.optimiser.clip_norm is not None:
            trained = [p for group in self.optimiser.param_groups for p in group["params"] if p.grad is not None]
            torch.nn.utils.clip_grad_norm_(trained, s.optimiser.clip_norm)
        self.optimiser.step()
        if self.averaged:
            self._update_average()
        return loss.detach()

    def _logits(self, rows: npt.NDArray[np.intp]) -> Tensor:
        pixels = torch.from_numpy(self.images[rows]).permute(0, 3, 1, 2).to(torch.float32).div_(255.0)
        x = (pixels.expand(-1, 3, -1, -1) - self.mean) / self.std
        logits: Tensor = self.head(self.encoder(x).last_hidden_state[:, 1:].mean(dim=1))
        return logits

    def _update_average(self) -> None:
        self.average_steps += 1
        decay = self.settings.ema.decay * (1.0 - math.exp(-self.average_steps / self.settings.ema.tau))
        live = self._tensors()
        with torch.no_grad():
            for name, tensor in self.averaged.items():
                tensor.lerp_(live[name], 1.0 - decay)

    # -- what trains ------------------------------------------------------------------------------------------------

    def _freeze(self, unfrozen: int, base: bool) -> None:
        self.encoder.eval().requires_grad_(False)
        parts: list[nn.Module] = [*self.layers[len(self.layers) - unfrozen :]] if unfrozen else []
        if base:
            parts += [self.encoder.embeddings, self.encoder.layernorm]
        for part in (*parts, self.head):
            part.train().requires_grad_(True)

    def _tensors(self) -> dict[str, Tensor]:
        named = {f"encoder.{name}": p for name, p in self.encoder.named_parameters()}
        return named | {f"classifier.{name}": p for name, p in self.head.named_parameters()}

    def _trained(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self._tensors().items() if tensor.requires_grad}

    def _swap(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Put tensors in place of the model's; what was there before comes back."""
        live = self._tensors()
        before = {name: live[name].data for name in tensors}
        for name, tensor in tensors.items():
            live[name].data = tensor
        return before

    # -- validation -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _aucs(self, split: str) -> npt.NDArray[np.float64]:
        self.encoder.eval()
        self.head.eval()
        rows, size = self.rows[split], self.settings.optimiser.batch_size
        scores = [torch.sigmoid(self._logits(rows[i : i + size])).numpy() for i in range(0, len(rows), size)]
        labels, predicted = self.labels[torch.from_numpy(rows)].numpy(), np.concatenate(scores)
        defined = [c for c in range(labels.shape[1]) if 0 < labels[:, c].sum() < len(labels)]
        aucs = np.full(labels.shape[1], np.nan)
        aucs[defined] = [roc_auc_score(labels[:, c], predicted[:, c]) for c in defined]
        return aucs

    def _keep_best(self, auc: float) -> None:
        if math.isnan(auc) or (self.best is not None and auc <= self.best[0]):
            self.waited += 1
            return
        self.waited = 0
        chosen = self._tensors() | self.averaged if self.averaged else self._tensors()
        self.best = (auc, self.epoch, {name: tensor.detach().clone() for name, tensor in chosen.items()})

    def _initial_weights(self) -> npt.NDArray[np.float64]:
        labels = self.labels[torch.from_numpy(self.rows["train"])].numpy().astype(np.float64)
        positives = labels.sum(axis=0)
        boosts = np.array([self.settings.weighting.boosts.get(name, 1.0) for name in self.classes])
        weights: npt.NDArray[np.float64] = (len(labels) - positives) / (positives + 1e-6) * boosts
        return weights / weights.mean() if self.settings.weighting.normalise else weights

    def _refined(self, weights: npt.NDArray[np.float64], aucs: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        if self.settings.weighting.eta == 0.0:
            return weights
        gap = np.nan_to_num(np.maximum(0.0, np.nanmean(aucs) - aucs))
        raised = weights * (1.0 + self.settings.weighting.eta * gap)
        return raised / raised.mean() if self.settings.weighting.normalise else raised


def checkpoint_of(training: PlainTraining) -> dict[str, Any]:
    """What a script would save to go on later."""
    return {
        "epoch": training.epoch,
        "encoder": training.encoder.state_dict(),
        "head": training.head.state_dict(),
        "optimiser": training.optimiser.state_dict(),
        "averaged": training.averaged,
        "average_steps": training.average_steps,
        "class_weights": training.class_weights,
        "best": copy.copy(training.best),
        "waited": training.waited,
    }
