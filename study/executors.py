"""Run a schedule of trials: the interface that every executor keeps, and the one that runs in this process."""

from __future__ import annotations

import logging
import socket
import traceback
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from study.cluster import worker_faults
from study.cluster.watchdog import HungError, time_limit
from study.cluster.worker_faults import Fault
from study.schedule import Node, Schedule

if TYPE_CHECKING:
    from study.storage.places import Address
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
        """A trial lost its worker; it is started again from its last saved epoch."""

    def failed(self, node: Node, error: str) -> None:
        """A trial cannot be finished."""


class Executor(Protocol):
    """Runs every trial of a schedule, each after its parent."""

    def check(self, schedule: Schedule, store: Store) -> None:
        """Find out before anything expensive whether trials can run at all.

        Raises:
            StudyError: with everything that is in the way.
        """

    def run(self, schedule: Schedule, store: Store, listener: Listener) -> None:
        """Return when the schedule is finished; a failed trial takes its descendants with it and nothing else."""


class Attempts:
    """What becomes of trials that stopped: started again a bounded number of times, else failed. Both are said."""

    def __init__(self, schedule: Schedule, listener: Listener, max_failures: int) -> None:
        """Start a trial again up to `max_failures` times."""
        self._schedule = schedule
        self._listener = listener
        self._max_failures = max_failures
        self._lost: Counter[Node] = Counter()

    def stopped(self, node: Node, fault: Fault) -> None:
        """A trial has stopped before its end."""
        if not fault.again:
            self._fail(node, fault.reason)
            return
        self._lost[node] += 1
        if self._lost[node] <= self._max_failures:
            self._schedule.again(node)
            self._listener.retried(node, fault.reason)
        else:
            times = f" (given up after {self._lost[node]} attempts)" if self._lost[node] > 1 else ""
            self._fail(node, fault.reason + times)

    def once_more(self, node: Node, reason: str) -> None:
        """Start a trial again that nothing happened to but that it was given too little; its attempts do not count."""
        self._schedule.again(node)
        self._listener.retried(node, reason)

    def _fail(self, node: Node, reason: str) -> None:
        self._schedule.failed(node, reason)
        self._listener.failed(node, reason)


class LocalExecutor:
    """One trial after another in this process: for debugging, and as the reference that Ray must equal."""

    def __init__(self, max_failures: int = 0, timeout: float | None = None) -> None:
        """Start a trial again up to `max_failures` times after an error that is not the training's own.

        Args:
            timeout: seconds that a step of a trial may take, its set-up or an epoch; None: any time.
        """
        self._max_failures = max_failures
        self._timeout = timeout

    def check(self, schedule: Schedule, store: Store) -> None:
        """See `Executor`: this process can do what it can do."""

    def run(self, schedule: Schedule, store: Store, listener: Listener) -> None:
        """See `Executor`."""
        attempts = Attempts(schedule, listener, self._max_failures)
        worker = Worker(store)
        while (node := schedule.next()) is not None:
            listener.started(node)
            worker.take(node.request)
            fault = self._train(node, worker, listener)
            if fault is None:
                schedule.done(node)
                listener.finished(node)
            else:
                if fault.again:
                    worker = Worker(store)  # the old one was left in the middle of something
                attempts.stopped(node, fault)

    def _train(self, node: Node, worker: Worker, listener: Listener) -> Fault | None:
        from trainables.results import TrainingError

        while not worker.done:
            try:
                with time_limit(self._timeout):
                    record = worker.step()
            except TrainingError as error:
                return Fault(str(error), again=False)
            except HungError as error:
                return worker_faults.hung(node, worker.doing, self._timeout, str(error))
            except Exception as error:
                log.info("%s: %s", node.name, traceback.format_exc())
                return Fault(f"{type(error).__name__}: {error}", again=True)
            if record is not None:
                listener.epoch(node, record)
        return None


class Worker:
    """What a worker process does and keeps: the store, the open data set, and one trial at a time, step by step."""

    def __init__(self, store: Store) -> None:
        from trainables.data.opened import Folders
        from trainables.workbench import Workbench

        self._store = store
        self._bench = Workbench(Folders(store.phantoms, store.images, store.splits))
        self._request: TrialRequest | None = None
        self._trial: Trial | None = None

    def take(self, request: TrialRequest) -> None:
        """Go over to another trial; its set-up is its first step."""
        self._request, self._trial = request, None

    @property
    def done(self) -> bool:
        """Whether the trial has nothing left to train."""
        return self._trial is not None and self._trial.done

    @property
    def doing(self) -> str:
        """What the next step is, or the one that runs."""
        return "set-up" if self._trial is None else f"epoch {self._trial.epoch + 1}"

    @property
    def epoch(self) -> int:
        """Epochs completed."""
        return 0 if self._trial is None else self._trial.epoch

    @property
    def gpu_memory(self) -> tuple[int, int] | None:
        """See `trainables.trial.Trial.gpu_memory`; None before there is a trial."""
        return None if self._trial is None else self._trial.gpu_memory

    def step(self) -> EpochRecord | None:
        """Set the trial up, at the deepest state that the store holds, or train its next epoch.

        Raises:
            TrainingError: what another try would meet again: data, encoder, settings, memory.
            MemoryRefusedError: it is memory.
        """
        from trainables.data.index import DataError
        from trainables.device import memory_left, memory_refused, release_memory
        from trainables.model_files import BackboneError
        from trainables.results import MemoryRefusedError, TrainingError

        assert self._request is not None, "a worker takes a trial before it works"
        try:
            if self._trial is not None:
                record = self._trial.step()
                if self._trial.done:
                    self._store.note_caches()
                return record
            self._trial = self._begin(self._request)
            return None
        except (BackboneError, DataError) as error:
            raise TrainingError(str(error)) from error
        except (MemoryError, RuntimeError, OSError) as error:
            if isinstance(error, TrainingError) or not memory_refused(error):
                raise
            refused = f"out of memory in {self.doing}: {worker_faults.lighter(self._request)}"
            refused += f"; {memory_left(self._request.compute)} ({_first_line(error)})"
        self._trial = None
        release_memory()  # not before here: while it was handled, the error held the frames that hold the batch
        raise MemoryRefusedError(refused)

    def _begin(self, request: TrialRequest) -> Trial:
        from trainables.device import release_memory, settle
        from trainables.results import TrainingError
        from trainables.trial import Trial

        release_memory()  # of the trial before
        task, provenance = self._bench.task(request.settings)
        settle(request.settings.task)
        if request.index and provenance["index_digest"] != request.index:
            raise TrainingError(
                f"{request.settings.dataset.name}: its table or split on {socket.gethostname()} is not the one that "
                "the study was planned with; give all nodes the same files"
            )
        return Trial(request, task, self._store, provenance, partial(self._bench.away, request.settings))


def worker_at(storage: Address, *, caches: bool) -> Worker:
    """A worker over a storage, for another process on this machine or another one."""
    from study.store import Store

    store = Store(storage.here(), caches=caches)
    store.bring_splits()
    return Worker(store)


def placed(request: TrialRequest) -> TrialRequest:
    """The request with folders as this process means them, for processes whose working folder is another one."""
    settings = request.settings
    data, model = settings.dataset, settings.model
    if data.root is not None:
        data = data.model_copy(update={"root": str(Path(data.root).absolute())})
    if data.test_on is not None and data.test_on.root is not None:
        away = data.test_on.model_copy(update={"root": str(Path(data.test_on.root).absolute())})
        data = data.model_copy(update={"test_on": away})
    if Path(model.backbone).is_dir():
        model = model.model_copy(update={"backbone": str(Path(model.backbone).absolute())})
    weights = {name: str(Path(told).expanduser().absolute()) for name, told in model.weights.items()}
    model = model.model_copy(update={"weights": weights})
    return replace(request, settings=settings.model_copy(update={"dataset": data, "model": model}))


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
