"""Run a schedule through Ray Tune: a Searcher releases trials whose parent is done. The only file that imports ray.

Tune starts trials, gives them CPUs and GPUs, keeps worker processes warm (`reuse_actors`) and starts a trial again
whose worker died. What has been trained is known from our own store alone; Tune's restore is not used.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray import cloudpickle, tune
from ray.tune.search import Searcher

from study.documents import StudyError
from study.executors import Listener, worker_at
from study.schedule import Node, Schedule
from study.spec import Execution
from study.store import Store
from trainables.backbone_files import BackboneError
from trainables.data.index import DataError
from trainables.requests import Compute
from trainables.results import EpochRecord, TrainingError

log = logging.getLogger(__name__)
PROJECT = Path(__file__).resolve().parents[1]


class RayExecutor:
    """Trials on a Ray cluster: an existing one by address, or one that is started on this machine."""

    def __init__(self, execution: Execution, compute: Compute, *, address: str | None, verbose: bool) -> None:
        """Give a trial the CPUs and GPUs of `execution`."""
        self._execution = execution
        self._address = address
        self._verbose = verbose
        gpus = execution.gpus if execution.gpus is not None else (1.0 if compute.device == "cuda" else 0.0)
        self._resources = {"CPU": float(execution.cpus)} | ({"GPU": float(gpus)} if gpus else {})

    def run(self, schedule: Schedule, store: Store, listener: Listener) -> None:
        """See `study.executors.Executor`.

        Raises:
            StudyError: the cluster cannot be reached, or no node of it can hold a trial.
        """
        with _quiet(self._verbose), self._cluster():
            slots = self._slots()
            os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(slots)
            searcher = StageSearcher(schedule, store, listener, self._resources, self._execution.max_failures)
            tuner = tune.Tuner(
                TrialActor,
                tune_config=tune.TuneConfig(
                    search_alg=searcher,
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
                    callbacks=[_Errors(searcher)],
                    verbose=0,
                ),
            )
            tuner.fit()
        if not schedule.finished:
            raise StudyError(["Ray Tune ended before the study did; run the same command again to go on"])

    @contextmanager
    def _cluster(self) -> Iterator[None]:
        environment = {"PYTHONPATH": str(PROJECT)} | {n: v for n, v in os.environ.items() if n.startswith("HF_")}
        options: dict[str, Any] = {"runtime_env": {"env_vars": environment}, "log_to_driver": self._verbose}
        options |= {"logging_level": logging.INFO if self._verbose else logging.ERROR}
        if self._address is None:
            folder = tempfile.mkdtemp(prefix="ray")  # socket paths are limited to 107 bytes, so not in the storage
            options |= {"num_cpus": os.cpu_count(), "include_dashboard": None, "_temp_dir": folder}
        else:
            options |= {"address": self._address}
        try:
            ray.init(**options)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            where = self._address or "this machine"
            raise StudyError([f"--address {where}: Ray cannot be reached ({str(error).splitlines()[0]})"]) from error
        try:
            yield
        finally:
            ray.shutdown()
            if self._address is None and not self._verbose:
                shutil.rmtree(options["_temp_dir"], ignore_errors=True)

    def _slots(self) -> int:
        """How many trials fit on the cluster at once; what is missing is named instead of waited for."""
        wanted = self._resources
        slots = 0
        for node in ray.nodes():
            if node["Alive"]:
                slots += min(int(node["Resources"].get(name, 0.0) / amount) for name, amount in wanted.items())
        if slots == 0:
            have = {name: ray.cluster_resources().get(name, 0.0) for name in wanted}
            asked = ", ".join(f"{amount:g} {name}" for name, amount in wanted.items())
            total = ", ".join(f"{amount:g} {name}" for name, amount in have.items())
            raise StudyError(
                [
                    f"execution: a trial asks for {asked}, no node of the cluster has that (in all: {total}); "
                    "set execution.cpus or execution.gpus, or add nodes"
                ]
            )
        return slots


class StageSearcher(Searcher):
    """Suggests the next ready trial, None while all of them wait for a parent, FINISHED at the end."""

    def __init__(
        self, schedule: Schedule, store: Store, listener: Listener, resources: dict[str, float], max_failures: int
    ) -> None:
        super().__init__(metric="epoch", mode="max")
        self._schedule = schedule
        self._store = store
        self._resources = resources
        self._listener = listener
        self._nodes: dict[str, Node] = {}
        self._max_failures = max_failures
        self._failures: dict[Node, int] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """See `ray.tune.search.Searcher`."""
        node = self._schedule.next()
        if node is None:
            return Searcher.FINISHED if self._schedule.finished else None
        self._nodes[trial_id] = node
        self._listener.started(node)
        return {
            "name": node.name.replace("/", "-"),
            "request": cloudpickle.dumps(node.request),
            "storage": str(self._store.root),
            "caches": self._store.cache_folder() is not None,
            "resources": self._resources,
        }

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """An epoch of a trial."""
        self._hear(self._nodes[trial_id], result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """The end of a trial that its worker lived to see; `worker_died` hears of the others."""
        if error:
            return
        node = self._nodes.pop(trial_id)
        self._hear(node, result or {})
        failure = (result or {}).get("failure")
        if failure:
            self._schedule.failed(node, failure)
            self._listener.failed(node, failure)
        else:
            self._schedule.done(node)
            self._listener.finished(node)

    def worker_died(self, trial_id: str, reason: str) -> None:
        """Start the trial again, from its last saved epoch, a bounded number of times; each time is said."""
        node = self._nodes.pop(trial_id)
        self._failures[node] = self._failures.get(node, 0) + 1
        if self._failures[node] <= self._max_failures:
            self._schedule.again(node)
            self._listener.retried(node, reason)
        else:
            message = f"its worker died {self._failures[node]} times, last of: {reason}"
            self._schedule.failed(node, message)
            self._listener.failed(node, message)

    def __getstate__(self) -> dict[str, Any]:
        """Tune writes its searcher to disk for a restore that is never made; what is live here stays here."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: a new start plans again and skips what the store holds."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore, see `save`."""

    def _hear(self, node: Node, result: dict[str, Any]) -> None:
        """Pass an epoch on; it travels as JSON, because Tune flattens what searchers get to see."""
        if result.get("record"):
            self._listener.epoch(node, EpochRecord(**json.loads(result["record"])))


class _Errors(tune.Callback):
    """Tells the searcher why a worker died: Tune tells searchers only that it did."""

    def __init__(self, searcher: StageSearcher) -> None:
        self._searcher = searcher

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A worker died, or its code raised what is no `TrainingError`."""
        error = trial.get_pickled_error() or trial.get_error()
        lines = [line.strip() for line in str(error or "unknown").splitlines() if line.strip()]
        named = [line for line in lines if "Error" in line.split(":")[0] and not line.startswith("ray::")]
        self._searcher.worker_died(trial.trial_id, (named or lines)[-1])


class TrialActor(tune.Trainable):
    """A worker process; `reuse_actors` keeps it, its imports and its open data set for the next trial."""

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> tune.PlacementGroupFactory:
        """CPUs and GPUs of a trial, fractions too."""
        return tune.PlacementGroupFactory([config["resources"]])

    def setup(self, config: dict[str, Any]) -> None:
        """Begin the first trial of this process."""
        logging.getLogger("trainables").setLevel(logging.WARNING)
        self._worker = worker_at(Path(config["storage"]), caches=config["caches"])
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Begin another trial in the same process."""
        self._begin(new_config)
        return True

    def _begin(self, config: dict[str, Any]) -> None:
        self._trial, self._failure = None, None
        try:
            self._trial = self._worker.begin(cloudpickle.loads(config["request"]))
        except (TrainingError, BackboneError, DataError) as error:
            self._failure = str(error)

    def step(self) -> dict[str, Any]:
        """One epoch, or the news that there is nothing left to train."""
        if self._trial is None:
            return {"epoch": 0, "done": True, "failure": self._failure, "record": None}
        if self._trial.done:
            return {"epoch": self._trial.epoch, "done": True, "record": None}
        try:
            record = self._trial.step()
        except TrainingError as error:
            return {"epoch": self._trial.epoch, "done": True, "failure": str(error), "record": None}
        return {"epoch": self._trial.epoch, "done": self._trial.done, "record": json.dumps(vars(record))}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """States are kept by our own store, at every epoch."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """A trial begins at the deepest state in the store, see `setup`."""


@contextmanager
def _quiet(verbose: bool) -> Iterator[None]:
    """Ray's and Tune's own output only with -v."""
    if verbose:
        yield
        return
    for name in ("ray", "ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # a dead worker is said by the searcher, once
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
