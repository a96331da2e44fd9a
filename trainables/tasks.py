"""The tasks by name. A new task is one file with its kind and one line here; imports no torch."""

from __future__ import annotations

from trainables.classification_kind import CLASSIFICATION
from trainables.detection_kind import DETECTION
from trainables.segmentation_kind import SEGMENTATION
from trainables.settings import Task
from trainables.task_kind import TaskKind

TASKS: dict[Task, TaskKind] = {
    "classification": CLASSIFICATION,
    "segmentation": SEGMENTATION,
    "detection": DETECTION,
}
