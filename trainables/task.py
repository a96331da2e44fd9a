"""What a task supplies to the one training loop.

A task differs from another through this protocol, never by a loop of its own. Its model is a chain of *positions*
(see `trainables.costs`): embedding, ordered blocks, neck, head. Every parameter belongs to exactly one of base
(embedding and neck), one block, or the head.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from trainables.costs import Costs
from trainables.strategy import Phase
from trainables.views import Views

Rows = npt.NDArray[np.intp]
Outputs = Any  # a head's raw outputs: a tensor, or whatever of tensors the task's own loss and predictions take
SideInputs = Any  # what a head takes beside activations; None where it takes nothing


class StagedModel(Protocol):
    """A model as a chain of positions, with its parts named."""

    def base(self) -> Sequence[nn.Module]:
        """Modules that train only with K = 'all': embedding and neck."""

    def blocks(self) -> Sequence[nn.Module]:
        """Encoder blocks in order, the last one nearest to the head."""

    def head(self) -> nn.Module:
        """The module that always trains."""

    def module(self) -> nn.Module:
        """The whole model."""

    def advance(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Activations at position `stop` from those at position `start` (images at IMAGES = −1).

        Activations are one tensor, a row an image; where later parts need several maps, they are packed into it.
        """

    def predict(self, features: Tensor, side: SideInputs = None) -> Outputs:
        """The head's raw outputs from the activations at position `features` and the task's side inputs."""


@dataclass(frozen=True)
class Scores:
    """Quality of predictions on one split.

    Attributes:
        metrics: name → value, the main metric and one a class among them; undefined classes are left out.
        quality: (C,) quality that class weights are refined by, NaN where undefined.
        undefined: classes that the split cannot measure.
    """

    metrics: dict[str, float]
    quality: npt.NDArray[np.float64]
    undefined: tuple[str, ...]


class Task(Protocol):
    """Data, model, loss and metrics of one task."""

    main_metric: str  # the metric that epochs are chosen by; higher is better
    classes: tuple[str, ...]
    costs: Costs
    views: Views  # of training images; `inputs`, `side_inputs` and `loss` take rows in views, all else rows of images

    def build(self, seed: int) -> StagedModel:
        """The model with its initial weights: pretrained encoder, head drawn from the seed alone."""

    def rows(self, split: str) -> Rows:
        """Rows of a split, ascending."""

    def inputs(self, rows: Rows, device: torch.device) -> Tensor:
        """Images as the model takes them, (B, 3, S, S) float32, normalised; a task may add channels of its own."""

    def side_inputs(self, rows: Rows, device: torch.device, *, training: bool) -> SideInputs:
        """What the head takes beside activations: prompts, the truth that denoising queries start from; else None.

        At evaluation (`training` false) nothing in it may come from what is to be predicted, unless the task's notes
        say so.
        """

    def class_counts(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """(C,) positives and (C,) negatives of the training split."""

    def loss(self, outputs: Outputs, rows: Rows, class_weights: Tensor | None) -> Tensor:
        """Mean loss of a batch; class_weights (C,) or None."""

    def predictions(self, outputs: Outputs) -> npt.NDArray[np.float32]:
        """What is kept of a batch's outputs, finite numbers of one shape an image."""

    def score(self, predictions: npt.NDArray[np.float32], rows: Rows) -> Scores:
        """Metrics of a split's predictions."""

    def describe(self, predictions: npt.NDArray[np.float32], rows: Rows) -> Mapping[str, npt.NDArray[np.generic]]:
        """Arrays to keep beside the predictions, so that the metrics can be computed again from the file."""

    def transforms(self) -> dict[str, object]:
        """The image transforms in force, for the record."""


def trained_modules(model: StagedModel, now: Phase) -> list[nn.Module]:
    """Modules that train in a phase: head, the top k blocks, and the base with K = 'all'."""
    blocks = model.blocks()
    modules = [model.head(), *blocks[len(blocks) - now.unfrozen :]]
    return [*modules, *model.base()] if now.base else modules


def set_phase(model: StagedModel, now: Phase) -> None:
    """Make exactly the phase's modules trainable; everything frozen is in eval mode and has no gradient."""
    module = model.module()
    module.eval().requires_grad_(False)
    for trained in trained_modules(model, now):
        trained.train().requires_grad_(True)
    for parameter in module.parameters():
        if not parameter.requires_grad:
            parameter.grad = None


def trained_tensors(model: StagedModel, now: Phase) -> dict[str, Tensor]:
    """Parameters and buffers that the phase may change, by the model's names, sorted."""
    ids = {id(t) for m in trained_modules(model, now) for t in (*m.parameters(), *m.buffers())}
    return {name: t for name, t in named_tensors(model) if id(t) in ids}


def named_tensors(model: StagedModel) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer with its name, sorted by name."""
    module = model.module()
    yield from sorted([*module.named_parameters(), *module.named_buffers()])


def weights_sha256(model: StagedModel) -> str:
    """Digest of all parameters and buffers: sorted names, dtypes, shapes and bytes."""
    h = hashlib.sha256()
    for name, tensor in named_tensors(model):
        array = tensor.detach().to("cpu").contiguous()
        h.update(f"{name}|{array.dtype}|{tuple(array.shape)}|".encode())
        h.update(array.view(-1).view(torch.uint8).numpy().data)
    return h.hexdigest()
