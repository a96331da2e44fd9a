"""Classification as the plan sees it: a ViT's shape from its config.json, every class of the index."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from trainables.backbone_files import Backbone, find_backbone
from trainables.costs import vit_costs
from trainables.data.index import Index
from trainables.model_files import CONFIG, file_sha256
from trainables.settings import Settings
from trainables.task_kind import Classes, ModelError, ModelFacts, TaskKind

if TYPE_CHECKING:
    from trainables.classification import Classification
    from trainables.data.opened import Data


def vit_facts(settings: Settings, classes: Classes, download: bool) -> ModelFacts:
    """Facts of an encoder with the MLP head.

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


def _no_notes(settings: Settings) -> tuple[str, ...]:
    return ()


def _open(settings: Settings, data: Data) -> Classification:
    from trainables.classification import Classification

    backbone = find_backbone(settings.model.backbone, download=True)
    return Classification(settings, data.index, data.images, backbone)


CLASSIFICATION = TaskKind(
    main_metric="macro_auc",
    metric_label="macro AUC",
    classes=_every_class,
    facts=vit_facts,
    targets_digest=_labels_alone,
    notes=_no_notes,
    open=_open,
)
