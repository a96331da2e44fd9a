"""From settings to a task on this machine: index, images, decoded cache, model. One process keeps what it has."""

from __future__ import annotations

import os

from trainables.data.opened import Data, Folders, open_away, open_data
from trainables.settings import Settings
from trainables.task import Task
from trainables.tasks import TASKS

ALL = os.cpu_count() or 1  # for images that a machine has to decode first: every trial on it waits for them


class Workbench:
    """Builds tasks, and keeps the last data set of each kind of task open: most trials of a worker use the same."""

    def __init__(self, folders: Folders) -> None:
        self._folders = folders
        self._data: dict[str, tuple[str, Data]] = {}  # by task: studies of several may run beside each other
        self._away: tuple[str, Data] | None = None

    def data(self, settings: Settings) -> Data:
        """The data set of these settings."""
        at = settings.dataset.model_dump_json(exclude={"flips"})  # all views are of the same pixels
        opened = self._data.get(settings.task)
        if opened is None or opened[0] != at:
            labels = TASKS[settings.task].labels_learnt
            opened = at, open_data(settings.dataset, self._folders, workers=ALL, labels_learnt=labels)
            self._data[settings.task] = opened
        return opened[1]

    def task(self, settings: Settings) -> tuple[Task, dict[str, str]]:
        """The task, and the provenance of its images."""
        data = self.data(settings)
        kind = TASKS[settings.task]
        provenance = {"contents_digest": kind.contents(settings, data), "index_digest": data.index.digest()}
        return kind.open(settings, data), provenance

    def away(self, settings: Settings) -> tuple[Task, str]:
        """The task on the test images of `dataset.test_on`, and the digest of their contents."""
        at = settings.dataset.model_dump_json(exclude={"flips"})
        if self._away is None or self._away[0] != at:
            self._away = (at, open_away(settings.dataset, self._folders, workers=ALL))
        data = self._away[1]
        kind = TASKS[settings.task]
        return kind.open(settings, data), kind.contents(settings, data)
