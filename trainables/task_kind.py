"""What the plan and the driver need to know of a task without torch: its metric, its classes, its models' costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from trainables.costs import Costs
from trainables.data.index import Index
from trainables.settings import Settings

if TYPE_CHECKING:
    from trainables.data.opened import Data
    from trainables.task import Task

Classes = tuple[str, ...]


class ModelError(ValueError):
    """The model cannot be used; the message names the file or setting and the remedy."""


@dataclass(frozen=True)
class ModelFacts:
    """A model by name, without building it.

    Attributes:
        name: as the study says it.
        weights_digest: sha256 of the initial weights (or of what they are drawn from), or a placeholder that no
            finished stage can have while they are not on this machine.
        shape_digest: sha256 of what else the activations of frozen parts depend on: the architecture.
        mean, std: pixel statistics the model takes, in [0, 1], unless the settings say others.
        costs: of its parts, in the order of `StagedModel.blocks`; blocks may differ in cost.
    """

    name: str
    weights_digest: str
    shape_digest: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    costs: Costs


def images_alone(settings: Settings, data: Data) -> str:
    """Digest of the decoded images: all that is decoded where boxes or labels are read from tables."""
    return data.images.contents_digest


def every_image(settings: Settings, index: Index) -> None:
    """All images of the index take part."""


@dataclass(frozen=True)
class TaskKind:
    """One of the tasks that the strategy serves.

    Attributes:
        main_metric: the metric that epochs are chosen by and rows are compared by; higher is better.
        metric_label: as a table's heading shows it.
        classes: (settings, index) → what is predicted, measured and weighted, in order; raises DataError where the
            data set has nothing for this task.
        facts: (settings, classes, download) → the model's facts; `download` fetches weights that are on a hub alone.
            Raises ModelError or BackboneError, also for settings that do not go with the model.
        targets_digest: (settings, index) → digest of the boxes or masks, which the index's own digest does not cover.
        notes: settings → what a reader of a table must know about how the task is measured.
        open: (settings, data) → the task, ready to train; imports torch.
        annotated: (settings, index) → (N,) whether an image has what the task learns from and is measured by; images
            without take no part. None: all have.
        labels_learnt: whether the index's labels are what is learnt and measured, so that a class without a positive or
            a negative in some split is refused; tasks of boxes or masks ask in `classes` for what they need.
        libraries: distributions that this task alone computes with, whose versions are recorded.
        contents: (settings, data) → digest of all that is decoded once, masks too where the task has them; decodes what
            is not yet, and raises DataError for files that cannot be used.
    """

    main_metric: str
    metric_label: str
    classes: Callable[[Settings, Index], Classes]
    facts: Callable[[Settings, Classes, bool], ModelFacts]
    targets_digest: Callable[[Settings, Index], str]
    notes: Callable[[Settings], tuple[str, ...]]
    open: Callable[[Settings, Data], Task]
    contents: Callable[[Settings, Data], str] = images_alone
    annotated: Callable[[Settings, Index], npt.NDArray[np.bool_] | None] = every_image
    labels_learnt: bool = False
    libraries: tuple[str, ...] = ()
