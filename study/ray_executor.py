"""Run a schedule through Ray Tune: a Searcher releases trials whose parent is done.

With `ray_cluster`, `ray_head` and `ray_dashboard` the only files that import ray. Tune starts trials, gives them CPUs
and GPUs, and keeps worker processes warm (`reuse_actors`). Which trials are ready, and which are started again because
their worker died or hung, is decided here; what has been trained is known from our own store alone; Tune's restore is
not used.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray import cloudpickle, tune
from ray.air.execution._internal.actor_manager import RayActorManager
from ray.train._internal.checkpoint_manager import _TrainingResult
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from study import garbage
from study.chains import Chain
from study.cluster import worker_faults
from study.cluster.gpu_shares import GpuShares
from study.cluster.ray_cluster import NODES_SECONDS, Resources, Room, cluster, first_line, require_slots, slots, survey
from study.cluster.ray_dashboard import Measured, named_tasks
from study.cluster.watchdog import Silence
from study.cluster.worker_faults import Fault
from study.documents import StudyError
from study.executors import Attempts, Listener, Worker, placed, worker_at
from study.schedule import Node, Schedule
from study.spec import Execution
from study.storage.places import Address
from study.store import Store
from trainables.requests import Compute
from trainables.results import CellResult, EpochRecord, MemoryRefusedError, TrainingError

log = logging.getLogger(__name__)
T = TypeVar("T")
KEPT = ("done", "epoch", "time_total_s", "node_ip", "pid", "trial_id")  # of what Tune keeps of a trial that has ended
UNBOUNDED = "100000"  # trials that Tune lets wait for room: the searcher gives out no more than there is


class RayExecutor:
    """Trials on a Ray cluster: an existing one by address, or one that is started on this machine."""

    def __init__(
        self,
        execution: Execution,
        compute: Compute,
        *,
        address: str | None,
        verbose: bool,
        timeout: float | None = None,
        known: Iterable[tuple[Chain, CellResult]] = (),
    ) -> None:
        """Give a trial the CPUs and GPUs of `execution`, and a step of it at most `timeout` seconds.

        Args:
            known: results that are there already: they tell what memory of a GPU trials take.
        """
        self._execution = execution
        self._address = address
        self._verbose = verbose
        self._timeout = timeout
        self._shares = GpuShares(execution.gpus, compute)
        self._shares.recall(known)
        self._resources = resources_of(float(execution.cpus), self._shares.most)

    def check(self, schedule: Schedule, store: Store) -> None:
        """See `study.executors.Executor`: the cluster answers, has room for a trial, and its nodes see what we see."""
        if self._address is None:
            return
        with cluster(self._address, schedule.studies, verbose=self._verbose):
            self._require_room()
            survey(schedule, store, self._resources)
            self._require_room()  # nodes may have died meanwhile

    def run(self, schedule: Schedule, store: Store, listener: Listener) -> None:
        """See `study.executors.Executor`.

        Raises:
            StudyError: the cluster cannot be reached, or no node of it can hold a trial.
        """
        with (
            cluster(self._address, schedule.studies, verbose=self._verbose),
            _dead_actors_are_known() as errors,
            named_tasks(),
            garbage.cleared_away(),
        ):
            listener = Measured(listener, schedule)
            self._require_room()
            os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = UNBOUNDED
            attempts = Attempts(schedule, listener, self._execution.max_failures)
            room = Room(self._execution.autoscale_to if self._address is not None else None)
            searcher = StageSearcher(schedule, store, listener, self._execution.cpus, self._shares, room, attempts)
            tuner = tune.Tuner(
                TrialActor,
                tune_config=tune.TuneConfig(
                    search_alg=searcher,
                    scheduler=_Turns(searcher),
                    num_samples=-1,
                    reuse_actors=True,
                    max_concurrent_trials=None,
                    trial_name_creator=lambda trial: str(trial.config["name"]),
                    trial_dirname_creator=lambda trial: str(trial.trial_id),
                ),
                run_config=tune.RunConfig(
                    name="trials",
                    storage_path=str(store.tune),
                    failure_config=tune.FailureConfig(max_failures=0),  # started again by the searcher
                    checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # the store has it
                    callbacks=[_Watch(searcher, self._resources, self._timeout, errors)],
                    verbose=0,
                ),
            )
            try:
                tuner.fit()
            except tune.TuneError:
                if searcher.interruption is not None:  # Tune keeps its text alone
                    raise searcher.interruption from None
                raise
        if not schedule.finished:
            raise StudyError(["Ray Tune ended before the study did; run the same command again to go on"])

    def _require_room(self) -> None:
        """Refuse what no node can hold, unless an autoscaler may bring one; there is none on this machine alone."""
        if self._address is None or self._execution.autoscale_to is None:
            require_slots(self._resources)


def resources_of(cpus: float, gpus: float) -> dict[str, float]:
    """What a trial asks Ray for."""
    return {"CPU": cpus} | ({"GPU": gpus} if gpus else {})


# -- the driver's side of Tune ---------------------------------------------------------------------------------------


class StageSearcher(Searcher):
    """Suggests the next ready trial, None while all of them wait for a parent or for room, FINISHED at the end.

    A trial is given out when there is room for it and not before, so that it is the longest of all that are ready by
    then; Tune starts at once what it is given, on the worker that has become free if there is one.

    Attributes:
        interruption: what the listener raised, if it did.
        outcomes: trial → FINISHED, PRUNED (its trajectory was ended after it) or FAILED, until Tune has been told.
    """

    def __init__(
        self,
        schedule: Schedule,
        store: Store,
        listener: Listener,
        cpus: float,
        shares: GpuShares,
        room: Room,
        attempts: Attempts,
    ) -> None:
        super().__init__(metric="epoch", mode="max")
        self.interruption: BaseException | None = None
        self.outcomes: dict[str, str] = {}
        self._schedule = schedule
        self._store = store
        self._cpus = float(cpus)
        self._shares = shares
        self._room = room
        self._listener = listener
        self._attempts = attempts
        self._nodes: dict[str, Node] = {}
        self._doing: dict[str, str] = {}
        self._asked: dict[str, Resources] = {}
        self._begun: set[str] = set()  # trials that have a worker
        self._free: str | None = None  # node of the worker that was freed last, and waits for another trial

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """See `ray.tune.search.Searcher`."""
        if self._nodes and not self._may_give_out():
            return None
        place = self._free if self._room.has_several_nodes else None
        node = self._tell(self._schedule.next, place)
        if node is None:
            return Searcher.FINISHED if self._schedule.finished else None
        self._free = None
        gpus = self._shares.of(node)
        self._asked[trial_id] = resources = resources_of(self._cpus, gpus)
        self._nodes[trial_id], self._doing[trial_id] = node, "set-up"
        self._tell(self._listener.started, node)
        return {
            "name": node.name.replace("/", "-"),
            "request": Packed(cloudpickle.dumps(replace(placed(node.request), gpu_share=gpus or 1.0))),
            "storage": str(self._store.root),
            "uri": self._store.address.uri or "",
            "caches": self._store.cache_folder() is not None,
            "resources": resources,
        }

    def _may_give_out(self) -> bool:
        """Whether there is room; also none for small trials while a larger one waits, which they would keep waiting."""
        waiting = [asked.get("GPU", 0.0) for trial, asked in self._asked.items() if trial not in self._begun]
        if waiting and max(waiting) > min(asked.get("GPU", 0.0) for asked in self._asked.values()):
            return False
        return self._room.takes_another(self._asked.values())

    @property
    def waits_for_nodes(self) -> bool:
        """Whether more was given out than fits on the nodes that there are."""
        return self._room.overflows(self._asked.values())

    def begun(self, trial_id: str) -> None:
        """A trial has a worker."""
        self._begun.add(trial_id)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """A step of a trial: its set-up or an epoch."""
        self._hear(self._nodes[trial_id], trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """The end of a trial that its worker lived to see; `lost` hears of the others."""
        if error:
            return
        assert result is not None, "Tune completes a trial with its last result"
        node = self._nodes[trial_id]
        self._hear(node, trial_id, result)
        self._forget(trial_id)
        self._free = self._free or result["node_ip"]  # Tune keeps one worker that has nothing to do, the first
        failure = result.get("failure")
        if failure and result.get("refused") and self._shares.refused(node):
            self._tell(self._attempts.once_more, node, f"on a part of a GPU {failure}; it is given a whole one")
            self.outcomes[trial_id] = "FAILED"
        elif failure:
            self._tell(self._attempts.stopped, node, Fault(failure, again=False))
            self.outcomes[trial_id] = "FAILED"
        else:
            self._schedule.done(node)
            self._tell(self._listener.finished, node)
            self.outcomes[trial_id] = "PRUNED" if node.pruned else "FINISHED"

    def at(self, trial_id: str) -> tuple[Node, str]:
        """A running trial and what its worker is doing."""
        return self._nodes[trial_id], self._doing[trial_id]

    def lost(self, trial_id: str, fault: Fault) -> None:
        """A trial's worker is gone: start it again from its last saved epoch, or give it up."""
        node = self._nodes[trial_id]
        self._forget(trial_id)
        self._room.look()  # its node may be gone with it
        self._tell(self._attempts.stopped, node, fault)

    def _forget(self, trial_id: str) -> None:
        self._begun.discard(trial_id)
        del self._doing[trial_id], self._nodes[trial_id], self._asked[trial_id]

    def __getstate__(self) -> dict[str, Any]:
        """Tune writes its searcher to disk for a restore that is never made; what is live here stays here."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: a new start plans again and skips what the store holds."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore, see `save`."""

    def _hear(self, node: Node, trial_id: str, result: dict[str, Any]) -> None:
        """Pass an epoch on; it travels as JSON, because Tune flattens what searchers get to see."""
        self._doing[trial_id] = f"epoch {result['epoch'] + 1}"
        self._schedule.placed(node, result["node_ip"])
        self._shares.hear(node, result["epoch"], result.get("gpu_peak", 0), result.get("gpu_card", 0))
        if result.get("record"):
            self._tell(self._listener.epoch, node, EpochRecord(**json.loads(result["record"])))

    def _tell(self, what: Callable[..., T], *arguments: Any) -> T:
        try:
            return what(*arguments)
        except BaseException as error:
            self.interruption = error
            raise


class _Turns(FIFOScheduler):
    """Which trial gets a worker that has become free: the new one, unless others wait for a node already.

    Tune's own would give it to a trial whose worker is being started, and end that process: where trials are shorter
    than a start, no second worker would ever be up.
    """

    def __init__(self, searcher: StageSearcher) -> None:
        super().__init__()
        self._searcher = searcher

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        """See `ray.tune.schedulers.TrialScheduler`; None leaves it to Tune to start what is new."""
        return super().choose_trial_to_run(tune_controller) if self._searcher.waits_for_nodes else None


class _Watch(tune.Callback):
    """Sees what Tune tells no searcher: why a worker died, that one has hung, that no node is left."""

    def __init__(
        self,
        searcher: StageSearcher,
        resources: dict[str, float],
        timeout: float | None,
        errors: dict[str, Exception],
    ) -> None:
        self._searcher = searcher
        self._errors = errors
        self._resources = resources
        self._timeout = timeout
        self._silence = Silence(math.inf if timeout is None else timeout)
        self._hung: dict[str, Fault] = {}
        self._working: dict[str, Any] = {}  # Tune's trials that have a worker, by id
        self._looked = time.monotonic()
        self._deserted = False

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial has got its worker."""
        self._working[trial.trial_id] = trial
        self._searcher.begun(trial.trial_id)

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any) -> None:
        """A trial has finished a step."""
        self._silence.heard(trial.trial_id)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Tune knows TERMINATED alone: what became of a trial stands in its last result, as `outcome`."""
        outcome = self._searcher.outcomes.pop(trial.trial_id)
        self._let_go(trial, outcome)

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """A turn of Tune's loop: end the workers of trials that have been silent for too long."""
        working = {name: t for name, t in self._working.items() if t.temporary_state.ray_actor is not None}
        for late in self._silence.turn(working):
            if late not in self._hung:
                node, doing = self._searcher.at(late)
                self._hung[late] = worker_faults.hung(node, doing, self._timeout)
                ray.kill(working[late].temporary_state.ray_actor)  # its node ends it, even where it is stopped
        if not working and time.monotonic() - self._looked > NODES_SECONDS:
            self._look_for_nodes()

    def _look_for_nodes(self) -> None:
        """Where nodes come and go, the last one may have gone: Tune waits for another one without a word."""
        self._looked = time.monotonic()
        deserted = slots(self._resources) == 0
        if deserted and not self._deserted:
            log.warning("no node is left that can hold a trial; waiting for one: Ctrl-C stops, and nothing is lost")
        self._deserted = deserted

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A worker died, or its code raised what is no `TrainingError`."""
        node, _ = self._searcher.at(trial.trial_id)
        fault = self._hung.pop(trial.trial_id, None) or self._fault(node, trial)
        self._let_go(trial, "FAILED")
        self._searcher.lost(trial.trial_id, fault)

    def _let_go(self, trial: Any, outcome: str) -> None:
        """Tune keeps its trials to the end, with statistics of all that they told: nobody asks for them any more."""
        self._working.pop(trial.trial_id, None)
        trial.config["request"].forget()
        told = trial.run_metadata
        kept = {name: told.last_result[name] for name in KEPT if name in told.last_result}
        told.last_result = {**kept, "outcome": outcome}
        told.metric_analysis.clear()
        told.metric_n_steps.clear()
        trial._default_result_or_future = None  # what it would say of itself before its first result, with its task
        garbage.clear_away()

    def _fault(self, node: Node, trial: Any) -> Fault:
        error = self._errors.pop(trial.trial_id)
        if isinstance(error, ray.exceptions.RayTaskError):
            return Fault(f"{type(error.cause).__name__}: {first_line(error.cause)}", again=True)
        if isinstance(error, _KilledForMemoryError):
            return worker_faults.killed_for_memory(node.request, str(error))
        return worker_faults.died(node.request, str(error))


class _KilledForMemoryError(ray.exceptions.RayActorError):
    """Ray's memory monitor has ended an actor."""


@contextmanager
def _dead_actors_are_known() -> Iterator[dict[str, Exception]]:
    """Trial id → why its actor was lost, for as long as the body runs.

    Tune ends a whole run when an actor is lost in a way that it does not expect, such as to the memory monitor: Ray
    reports that by `OutOfMemoryError` and others, Tune knows `RayActorError` alone. It would also write errors as
    pickles and read them back, from a storage that others may write to: it is given their text alone.
    """
    errors: dict[str, Exception] = {}
    handle_error = Trial.handle_error

    def handled(self: Trial, exc: Exception | None = None) -> None:
        if exc is not None:
            errors[self.trial_id] = exc
        handle_error(self, tune.TuneError(str(exc)))

    originals = {name: getattr(RayActorManager, name) for name in ("_actor_task_failed", "_actor_start_failed")}
    for name, original in originals.items():

        def failed(self: Any, *lost: Any, exception: Exception, _original: Any = original, **named: Any) -> None:
            _original(self, *lost, exception=_as_actor_error(exception), **named)

        setattr(RayActorManager, name, failed)
    Trial.handle_error = handled
    try:
        yield errors
    finally:
        Trial.handle_error = handle_error
        for name, original in originals.items():
            setattr(RayActorManager, name, original)


def _as_actor_error(error: Exception) -> Exception:
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        return _KilledForMemoryError(error_msg=str(error))
    known = (ray.exceptions.RayActorError, ray.exceptions.RayTaskError)
    if isinstance(error, ray.exceptions.RayError) and not isinstance(error, known):
        lost: Exception = ray.exceptions.RayActorError(error_msg=str(error))
        return lost
    return error


# -- the worker's side -----------------------------------------------------------------------------------------------


class Packed:
    """A pickled request. Tune copies all that it is given, and makes names of it: this one is shared, and short."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def forget(self) -> None:
        """It has been answered."""
        self.data = b""

    def __deepcopy__(self, memo: dict[int, Any]) -> Packed:
        return self

    def __str__(self) -> str:
        return "request"


@cache
def _group_of(resources: tuple[tuple[str, float], ...]) -> tune.PlacementGroupFactory:
    """What Tune asks Ray for; one for all trials that ask for the same."""
    return tune.PlacementGroupFactory([dict(resources)])


class TrialActor(tune.Trainable):
    """A worker process; `reuse_actors` keeps it, its imports and its open data set for the next trial."""

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> tune.PlacementGroupFactory:
        """CPUs and GPUs of a trial, fractions too."""
        return _group_of(tuple(sorted(config["resources"].items())))

    def setup(self, config: dict[str, Any]) -> None:
        """Be there: all that may take long is left to the first step, which the driver watches."""
        logging.getLogger("trainables").setLevel(logging.WARNING)
        self._worker: Worker | None = None
        self._next: dict[str, Any] | None = config
        self._first = str(config["name"])

    def __repr__(self) -> str:
        """As the dashboard lists it: Ray asks once, so a worker goes by its first trial. Its tasks name the others."""
        return f"{self._first} (and what follows)"

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take another trial in the same process."""
        self._next = new_config
        return True

    def step(self) -> dict[str, Any]:
        """Set the trial up, or train an epoch."""
        if self._worker is None:
            assert self._next is not None
            storage = Address(Path(self._next["storage"]), self._next["uri"] or None)
            self._worker = worker_at(storage, caches=self._next["caches"])
        if self._next is not None:
            self._worker.take(cloudpickle.loads(self._next["request"].data))
            self._next = None
        try:
            record = self._worker.step()
        except TrainingError as error:
            refused = isinstance(error, MemoryRefusedError)
            said = {"failure": str(error), "refused": refused, "record": None}
            return {"epoch": self._worker.epoch, "done": True, **said}
        told = None if record is None else json.dumps(vars(record))
        peak, card = (self._worker.gpu_memory if record is not None else None) or (0, 0)  # set-up alone takes less
        measured = {"gpu_peak": peak, "gpu_card": card}
        return {"epoch": self._worker.epoch, "done": self._worker.done, "record": told, **measured}

    def save(self, checkpoint_dir: str | None = None) -> _TrainingResult:
        """Of a trial that gives way to another: how far Tune has counted alone, since our own store has its states.

        Tune's copy would go into the driver's folder, and nodes that do not have that folder fail there. What is given
        here Tune keeps to the end, so it is not the last result, which has the request in it.
        """
        return _TrainingResult(tune.Checkpoint("/kept-by-the-store"), {"training_iteration": self._iteration})

    def restore(self, checkpoint_path: _TrainingResult) -> None:
        """A trial begins at the deepest state in the store, see `step`; Tune counts on."""
        self._iteration = checkpoint_path.metrics["training_iteration"]
