"""Classification as the plan sees it: an encoder's shape from its config.json or a table, every class of the index."""

from __future__ import annotations

from functools import cache
from importlib.metadata import version
from typing import TYPE_CHECKING

from trainables.backbone_files import Backbone, find_backbone
from trainables.baseline_files import Baseline, find_baseline, is_baseline
from trainables.costs import vit_costs
from trainables.data.index import Index
from trainables.model_files import CONFIG, file_sha256
from trainables.settings import Settings
from trainables.task_kind import Classes, ModelError, ModelFacts, TaskKind

if TYPE_CHECKING:
    from trainables.classification import Classification
    from trainables.data.opened import Data


def encoder_facts(settings: Settings, classes: Classes, download: bool) -> ModelFacts:
    """Facts of an encoder with the MLP head.

    Raises:
        BackboneError: the encoder cannot be found or read.
        ModelError: images that are too small for it.
    """
    if is_baseline(settings.model.backbone):
        return baseline_facts(settings, classes, download)
    return vit_facts(settings, classes, download)


def baseline_facts(settings: Settings, classes: Classes, download: bool) -> ModelFacts:
    """Facts of one of timm's encoders, from the table of architectures.

    Raises:
        BackboneError: an architecture that is not known, or weights that cannot be used.
        ModelError: images that are too small for it.
    """
    baseline = find_baseline(settings.model, download=download)
    model, size = settings.model, settings.dataset.image_size
    try:
        costs = baseline.architecture.costs(
            size, small=baseline.small, head_hidden=model.head_hidden, classes=len(classes)
        )
    except ValueError as error:
        raise ModelError(f"dataset.image_size: {error}") from error
    return ModelFacts(
        name=f"{baseline.name} (small)" if baseline.small else baseline.name,
        weights_digest=baseline.weights_digest(),
        shape_digest=f"{baseline.architecture.name} small={baseline.small} timm {version('timm')}",
        mean=baseline.mean,
        std=baseline.std,
        costs=costs,
    )


def vit_facts(settings: Settings, classes: Classes, download: bool) -> ModelFacts:
    """Facts of a DINOv2-like encoder with the MLP head.

    Raises:
        BackboneError: the encoder cannot be found or read.
        ModelError: an image smaller than one patch.
    """
    backbone = _backbone(settings.model.backbone, download)
    size = settings.dataset.image_size
    if size < backbone.patch:
        raise ModelError(f"dataset.image_size: {size} px is below one {backbone.patch} px patch")
    return ModelFacts(
        name=backbone.name,
        weights_digest=backbone.weights_digest(),
        shape_digest="" if backbone.folder is None else file_sha256(backbone.folder / CONFIG),
        mean=backbone.mean,
        std=backbone.std,
        costs=vit_costs(
            hidden=backbone.hidden,
            layers=backbone.layers,
            mlp_ratio=backbone.mlp_ratio,
            patch=backbone.patch,
            image_size=size,
            head_hidden=settings.model.head_hidden,
            classes=len(classes),
        ),
    )


@cache
def _backbone(name: str, download: bool) -> Backbone:
    return find_backbone(name, download=download)


def _every_class(settings: Settings, index: Index) -> Classes:
    return index.classes


def _labels_alone(settings: Settings, index: Index) -> str:
    return ""  # the index's digest covers its labels


def _notes(settings: Settings) -> tuple[str, ...]:
    name = settings.model.backbone
    if not (settings.model.small and is_baseline(name)):
        return ()
    return (
        f"{name} is a narrow form of the architecture, its weights drawn from a fixed seed: no evidence about the "
        "architecture.",
    )


def _open(settings: Settings, data: Data) -> Classification:
    from trainables.classification import Classification

    return Classification(settings, data.index, data.images, _encoder(settings))


def _encoder(settings: Settings) -> Backbone | Baseline:
    """The encoder's files, fetched if need be."""
    if is_baseline(settings.model.backbone):
        return find_baseline(settings.model, download=True)
    return find_backbone(settings.model.backbone, download=True)


CLASSIFICATION = TaskKind(
    main_metric="macro_auc",
    metric_label="macro AUC",
    classes=_every_class,
    facts=encoder_facts,
    targets_digest=_labels_alone,
    notes=_notes,
    open=_open,
    libraries=("timm",),
    labels_learnt=True,
)
