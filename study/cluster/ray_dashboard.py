"""What Ray's dashboard and Prometheus see of a study: names of the job, the workers and the tasks, and figures.

With `ray_executor`, `ray_cluster` and `ray_head` the only files that import ray.
"""

from __future__ import annotations

from collections.abc import Iterator
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


def job_of(study: Study) -> JobConfig:
    """The job as the dashboard lists it: its metadata name the study, its rows and its seeds."""
    facts = {
        "study": study.name,
        "rows": "; ".join(row.name for row in study.rows),
        "seeds": ", ".join(map(str, study.seeds)),
    }
    job = JobConfig(ray_namespace=study.name)
    for name, text in facts.items():
        job.set_metadata(name, text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…")
    return job


@contextmanager
def named_tasks() -> Iterator[None]:
    """Give each task of a trial the trial's name: the workers that carry them out go from one trial to the next.

    Tune calls the same method of an actor for every trial, by a manager that knows nothing of trials.
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
        if not current:
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
        tags = {"study": schedule.study.name}
        self._trials = Gauge("spft_trials", "Trials of the study by status.", tag_keys=("study", "status"))
        self._units = Gauge("spft_units", "Training units of this launch: planned, and done.", ("study", "kind"))
        self._epochs = Counter("spft_epochs", "Epochs trained by this launch.", ("study",))
        for metric in (self._trials, self._units, self._epochs):
            metric.set_default_tags(tags)
        self._done: dict[Node, float] = {}
        self._tell()

    def started(self, node: Node) -> None:
        """See `study.executors.Listener`."""
        self._listener.started(node)
        self._tell()

    def epoch(self, node: Node, record: EpochRecord) -> None:
        """See `study.executors.Listener`."""
        self._listener.epoch(node, record)
        first, last = node.request.first, node.request.last
        if record.epoch > first:
            self._epochs.inc()
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
        for status in STATUSES:
            self._trials.set(self._schedule.count(status), {"status": status})
        self._units.set(self._schedule.total_units, {"kind": "planned"})
        self._units.set(sum(self._done.values()), {"kind": "done"})
