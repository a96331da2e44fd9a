"""Run a schedule of trials: the interface that every executor keeps, and the one that runs in this process."""

from __future__ import annotations

import logging
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from study.schedule import Node, Schedule

if TYPE_CHECKING:
    from study.store import Store
    from trainables.requests import TrialRequest
    from trainables.results import EpochRecord
    from trainables.trial import Trial

log = logging.getLogger(__name__)


class Listener(Protocol):
    """Hears what happens to trials, in the driver's process and main thread."""

    def started(self, node: Node) -> None:
        """A trial was given to a worker."""

    def epoch(self, node: Node, record: EpochRecord) -> None:
        """A trial has finished an epoch."""

    def finished(self, node: Node) -> None:
        """A trial has ended well; its results are in the store."""

    def retried(self, node: Node, reason: str) -> None:
        """A trial's worker died; it is started again from its last saved epoch."""

    def failed(self, node: Node, error: str) -> None:
        """A trial cannot be finished."""


class Executor(Protocol):
    """Runs every trial of a schedule, each after its parent."""

    def run(self, schedule: Schedule, store: Store, listener: Listener) -> None:
        """Return when the schedule is finished; a failed trial takes its descendants with it and nothing else."""


class LocalExecutor:
    """One trial after another in this process: for debugging, and as the reference that Ray must equal."""

    def __init__(self, max_failures: int = 0) -> None:
        """Start a trial again up to `max_failures` times after an error that is not the training's own."""
        self._max_failures = max_failures

    def run(self, schedule: Schedule, store: Store, listener: Listener) -> None:
        """See `Executor`."""
        from trainables.results import TrainingError

        worker = Worker(store)
        failures: dict[Node, int] = {}
        while (node := schedule.next()) is not None:
            listener.started(node)
            try:
                trial = worker.begin(node.request)
                while not trial.done:
                    listener.epoch(node, trial.step())
            except TrainingError as error:
                schedule.failed(node, str(error))
                listener.failed(node, str(error))
                continue
            except Exception as error:
                failures[node] = failures.get(node, 0) + 1
                log.info("%s: %s", node.name, traceback.format_exc())
                message = f"{type(error).__name__}: {error}"
                if failures[node] <= self._max_failures:
                    schedule.again(node)
                    listener.retried(node, message)
                    continue
                schedule.failed(node, message)
                listener.failed(node, message)
                continue
            schedule.done(node)
            listener.finished(node)


class Worker:
    """What a worker process keeps between trials: the store and the open data set."""

    def __init__(self, store: Store) -> None:
        from trainables.data.opened import Folders
        from trainables.workbench import Workbench

        self._store = store
        self._bench = Workbench(Folders(store.phantoms, store.images, store.splits))

    def begin(self, request: TrialRequest) -> Trial:
        """A trial at the deepest state that the store holds."""
        from trainables.trial import Trial

        task, provenance = self._bench.task(request.settings)
        return Trial(request, task, self._store, provenance)


def worker_at(root: Path, *, caches: bool) -> Worker:
    """A worker over a storage folder, for another process."""
    from study.store import Store

    return Worker(Store(root, caches=caches))
