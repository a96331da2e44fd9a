"""What Ray's dashboard and Prometheus see of a study: names of the job, the workers and the tasks, and figures.

With `ray_executor`, `ray_cluster` and `ray_head` the only files that import ray.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ray.air.execution._internal.actor_manager import RayActorManager
from ray.job_config import JobConfig
from ray.tune.execution.tune_controller import TuneController
from ray.util.metrics import Counter, Gauge

if TYPE_CHECKING:
    from study.executors import Listener
    from study.schedule import Node, Schedule, Status
    from study.spec import Study
    from trainables.results import EpochRecord

STATUSES: tuple[Status, ...] = ("waiting", "running", "done", "skipped", "failed")
LONGEST = 500  # characters of a job's metadata: a search has as many rows as trials


def job_of(studies: Sequence[Study]) -> JobConfig:
    """The job as the dashboard lists it: its metadata name the study, or studies, their rows and seeds."""
    facts = {
        "study": names_of(studies),
        "rows": "; ".join(dict.fromkeys(row.name for study in studies for row in study.rows)),
        "seeds": ", ".join(dict.fromkeys(str(seed) for study in studies for seed in study.seeds)),
    }
    job = JobConfig(ray_namespace=facts["study"])
    for name, text in facts.items():
        job.set_metadata(name, text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…")
    return job


def names_of(studies: Sequence[Study]) -> str:
    """Name of a study, or of several that run together."""
    return " + ".join(study.name for study in studies)


@contextmanager
def named_tasks() -> Iterator[None]:
    """Give each step of a trial the trial's name: the workers that carry them out go from one trial to the next.

    Tune calls the same method of an actor for every trial, by a manager that knows nothing of trials. Steps alone are
    named: Ray keeps figures of every name that it has heard, in the driver too, and other tasks take no time.
    """
    schedule_trial_task = TuneController._schedule_trial_task
    schedule_on_actor = RayActorManager._schedule_tracked_actor_task
    current: list[str] = []

    def of_trial(self: Any, trial: Any, method_name: str, *rest: Any, **named: Any) -> Any:
        current.append(str(trial))
        try:
            return schedule_trial_task(self, trial, method_name, *rest, **named)
        finally:
            current.pop()

    def on_actor(self: Any, tracked_actor_task: Any, method_name: str, *rest: Any, **named: Any) -> Any:
        if not current or method_name != "train":
            return schedule_on_actor(self, tracked_actor_task, method_name, *rest, **named)
        live = self._live_actors_to_ray_actors_resources
        key = tracked_actor_task._tracked_actor
        actor, resources = live[key]
        live[key] = (_Named(actor, method_name, current[-1]), resources)
        try:
            return schedule_on_actor(self, tracked_actor_task, method_name, *rest, **named)
        finally:
            live[key] = (actor, resources)

    TuneController._schedule_trial_task = of_trial
    RayActorManager._schedule_tracked_actor_task = on_actor
    try:
        yield
    finally:
        TuneController._schedule_trial_task = schedule_trial_task
        RayActorManager._schedule_tracked_actor_task = schedule_on_actor


class _Named:
    """An actor whose one method is called as a task with a name; begins as Ray would call it, as process titles do."""

    def __init__(self, actor: Any, method: str, trial: str) -> None:
        task = getattr(actor, method).options(name=f"TrialActor.{method} · {trial}")
        setattr(self, method, task)


class Measured:
    """Passes on what happens to trials, and counts it for Prometheus.

    Ray exports the figures, with its own, on the metrics port of the driver's node (docs/dashboards.md):
    `ray_spft_trials` by status, `ray_spft_units` planned and done, and `ray_spft_epochs_total`.
    """

    def __init__(self, listener: Listener, schedule: Schedule) -> None:
        """Wrap a listener; a cluster must be connected."""
        self._listener = listener
        self._schedule = schedule
        self._trials = Gauge("spft_trials", "Trials of the study by status.", tag_keys=("study", "status"))
        self._units = Gauge("spft_units", "Training units of this launch: planned, and done.", ("study", "kind"))
        self._epochs = Counter("spft_epochs", "Epochs trained by this launch.", ("study",))
        self._done: dict[Node, float] = {}
        self._tell()

    def started(self, node: Node) -> None:
        """See `study.executors.Listener`."""
        self._listener.started(node)
        self._tell()

    def epoch(self, node: Node, record: EpochRecord) -> None:
        """See `study.executors.Listener`."""
        self._listener.epoch(node, record)
        first, last = node.first, node.last
        if record.epoch > first:
            self._epochs.inc(tags={"study": node.plan.study.name})
            self._done[node] = node.units * (record.epoch - first) / (last - first)
        self._tell()

    def finished(self, node: Node) -> None:
        """See `study.executors.Listener`."""
        self._listener.finished(node)
        self._done[node] = float(node.units)
        self._tell()

    def retried(self, node: Node, reason: str) -> None:
        """See `study.executors.Listener`."""
        self._listener.retried(node, reason)
        self._tell()

    def failed(self, node: Node, error: str) -> None:
        """See `study.executors.Listener`."""
        self._listener.failed(node, error)
        self._tell()

    def _tell(self) -> None:
        done: dict[str, float] = defaultdict(float)
        for node, units in self._done.items():
            done[node.plan.study.name] += units
        for part in self._schedule.parts:
            study = part.plan.study.name
            for status in STATUSES:
                self._trials.set(part.count(status), {"study": study, "status": status})
            self._units.set(part.total_units, {"study": study, "kind": "planned"})
            self._units.set(done[study], {"study": study, "kind": "done"})
