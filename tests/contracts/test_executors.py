"""The contract that every executor keeps: the same suite over the in-process one and Ray Tune."""

from __future__ import annotations

import gc
import os
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from study.cluster.ray_environment import prepare_environment
from study.documents import StudyError
from study.driver import RunOptions, Session, run_plan
from study.executors import LocalExecutor
from study.ledger import Ledger
from study.plan import Plan
from study.preparing import prepare_data
from study.schedule import Node, Schedule
from study.store import Store
from tests.studies_for_tests import TINY, planned
from trainables.loop import Trajectory
from trainables.results import EpochRecord

ONE_SEED = {**TINY, "seeds": [0]}
# For set-ups and epochs of a second or two, also on a machine that is busy with other things: in this process, where
# several are waited for, and in workers, which have much to import.
HANG_SECONDS = 15
WORKER_HANG_SECONDS = 75
RATES = {"never": 1e-5, "once": 1e-6, "always": 1e-7}
ROOT = Path(__file__).resolve().parents[2]
EXECUTORS = ["local", pytest.param("ray", marks=pytest.mark.slow)]


class Heard:
    """A listener that writes down what it hears, and passes it on."""

    def __init__(self, inner: Session, on_epoch: Callable[[Node, EpochRecord], None] | None = None) -> None:
        self.inner = inner
        self.events: list[tuple[str, str]] = []
        self.reasons: list[str] = []
        self.spans: dict[str, list[float]] = {}
        self._on_epoch = on_epoch

    def started(self, node: Node) -> None:
        self.events.append(("started", node.name))
        self.spans.setdefault(node.name, []).append(time.monotonic())
        self.inner.started(node)

    def epoch(self, node: Node, record: EpochRecord) -> None:
        self.events.append(("epoch", node.name))
        self.inner.epoch(node, record)
        if self._on_epoch is not None:
            self._on_epoch(node, record)

    def finished(self, node: Node) -> None:
        self.events.append(("finished", node.name))
        self.spans[node.name].append(time.monotonic())
        self.inner.finished(node)

    def retried(self, node: Node, reason: str) -> None:
        self.events.append(("retried", node.name))
        self.reasons.append(reason)
        self.inner.retried(node, reason)

    def failed(self, node: Node, error: str) -> None:
        self.events.append(("failed", node.name))
        self.reasons.append(error)
        self.inner.failed(node, error)


def execute(
    kind: str,
    plan: Plan,
    storage: Path,
    on_epoch: Callable[[Node, EpochRecord], None] | None = None,
    timeout: float | None = None,
    kind_of_listener: type[Heard] = Heard,
) -> tuple[Heard, Schedule, Session]:
    store = Store(storage)
    contents = prepare_data(plan, store, Console(quiet=True))
    session = Session(plan, store, Ledger(store.default_tracking_uri(), store.artifacts()), contents, "a test")
    session.open()
    schedule = session.schedule()
    heard = kind_of_listener(session, on_epoch)
    if kind == "local":
        LocalExecutor(plan.study.execution.max_failures, timeout).run(schedule, store, heard)
    else:
        prepare_environment(store.root, local=True)
        from study.ray_executor import RayExecutor

        executor = RayExecutor(plan.study.execution, plan.compute, address=None, verbose=False, timeout=timeout)
        executor.run(schedule, store, heard)
    return heard, schedule, session


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What an undisturbed run in this process ends with."""
    folder = tmp_path_factory.mktemp("reference")
    return digests(execute("local", planned(folder, ONE_SEED), folder)[2])


@pytest.mark.parametrize("kind", EXECUTORS)
def test_every_trial_runs_once_after_its_parent_and_leaves_its_results(kind: str, tmp_path: Path) -> None:
    """Through Ray besides: both slots of a machine are busy while enough trials are ready, and nothing piles up."""
    long = {**TINY, "dataset.images": 900, "strategy.tune_epochs": 4}
    plan = planned(tmp_path, long if kind == "ray" else ONE_SEED)
    held: list[Counter[str]] = []
    heard, schedule, session = execute(kind, plan, tmp_path, lambda node, record: held.append(held_of_trials()))
    order = {event: i for i, event in reversed(list(enumerate(heard.events)))}
    assert schedule.finished
    for node in schedule.nodes:
        assert heard.events.count(("started", node.name)) == heard.events.count(("finished", node.name)) == 1
        assert heard.events.count(("epoch", node.name)) == node.request.last - node.request.first
        if node.parent is not None:
            assert order["finished", node.parent.name] < order["started", node.name]
    _, complete = session.close()
    assert complete
    if kind == "ray":
        assert busy_share(heard, schedule) > 0.8
        # Of a running trial: its request, one more in its last result, and the references to what its tasks returned.
        assert held[0]["Packed"] > 0 and held[0]["ObjectRef"] > 0
        assert max(one["Packed"] for one in held) <= 2 * (os.cpu_count() or 1) + 1 < len(schedule.nodes)
        assert held[-1]["ObjectRef"] <= max(one["ObjectRef"] for one in held[: len(held) // 3])


def held_of_trials() -> Counter[str]:
    """How many requests, and references to results of Ray's tasks, this process holds."""
    held = Counter(type(o).__name__ for o in gc.get_objects() if type(o).__name__ in ("Packed", "ObjectRef"))
    held["Packed"] -= sum(type(o).__name__ == "Packed" and not o.data for o in gc.get_objects())
    return held


def busy_share(heard: Heard, schedule: Schedule) -> float:
    """How much of two slots' time was used, from when two trials are ready until fewer are left."""
    spans = [heard.spans[node.name] for node in schedule.nodes if not node.children]
    begin, end = sorted(s[0] for s in spans)[1], sorted(s[1] for s in spans)[-2]
    busy = sum(max(0.0, min(stop, end) - max(start, begin)) for start, stop in spans)
    return busy / (min(2, os.cpu_count() or 1) * (end - begin))


def test_a_trial_that_cannot_train_fails_alone_and_says_where(tmp_path: Path) -> None:
    """Through Ray: tests/end_to_end/test_training_faults.py."""
    rows = [
        {"name": "sound", "set": {"strategy.unfreezing": "none"}},
        {"name": "exploding", "set": {"optimiser.encoder_lr": 1e30, "optimiser.clip_norm": None}},
    ]
    plan = planned(tmp_path, {**ONE_SEED, "strategy.tune_epochs": 3, "rows": {"list": rows}})
    heard, _, session = execute("local", plan, tmp_path)
    _, complete = session.close()
    assert not complete
    statuses = Counter(kind for kind, _ in heard.events)
    assert statuses["failed"] == 1
    from analysis.records import load

    cells = load(f"sqlite:///{tmp_path.resolve() / 'mlflow.db'}", "ablation").cells.set_index("row")
    assert cells.loc["sound", "status"] == "FINISHED"
    assert cells.loc["exploding", "status"] == "FAILED"
    assert "epoch" in cells.loc["exploding", "error"] and "step" in cells.loc["exploding", "error"]


@pytest.mark.parametrize("kind", EXECUTORS)
def test_what_the_store_holds_is_not_trained_again(kind: str, tmp_path: Path) -> None:
    """What a listener raises comes through as it was."""

    class RefusedError(Exception):
        pass

    def refuse(node: Node, record: EpochRecord) -> None:
        if record.epoch == 2:
            raise RefusedError("the ledger refuses")

    plan = planned(tmp_path, ONE_SEED)
    with pytest.raises(RefusedError, match="the ledger refuses"):
        execute(kind, plan, tmp_path, refuse)
    heard, _, session = execute("local", plan, tmp_path)
    trained = sum(event == "epoch" for event, _ in heard.events)
    assert trained < 1 + 3 * 2  # the head stage, and what had been saved of stage 2, are there
    _, complete = session.close()
    assert complete


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_goes_on_from_its_last_epoch(reference: dict[str, str], tmp_path: Path) -> None:
    killed: list[int] = []

    def kill(node: Node, record: EpochRecord) -> None:
        if record.epoch == 2 and not killed:
            workers = [p for p in psutil.Process().children(recursive=True) if "TrialActor" in " ".join(_line(p))]
            os.kill(workers[0].pid, signal.SIGKILL)
            killed.append(workers[0].pid)

    plan = planned(tmp_path, ONE_SEED)
    heard, _, session = execute("ray", plan, tmp_path, kill)
    assert killed
    _, complete = session.close()
    assert complete
    assert len(heard.reasons) == 1
    assert re.search(
        r"^its worker process on \S+ was killed or crashed.*a batch is 32 images of 64 px", heard.reasons[0]
    )
    epochs = sum(event == "epoch" for event, _ in heard.events)
    assert epochs <= 1 + 3 * 2 + 1  # at most one epoch was trained twice
    assert digests(session) == reference


@pytest.mark.slow
def test_a_worker_that_is_stopped_is_ended_in_time_and_another_one_goes_on(
    reference: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is stopped can do nothing for itself, not even end: the driver must notice."""
    from study.ray_executor import StageSearcher

    stopped: list[str] = []
    told_by: list[int] = []
    hear = StageSearcher.on_trial_result

    def heard_from(self: StageSearcher, trial_id: str, result: dict[str, Any]) -> None:
        told_by.append(result["pid"])
        hear(self, trial_id, result)

    monkeypatch.setattr(StageSearcher, "on_trial_result", heard_from)

    def stop(node: Node, record: EpochRecord) -> None:
        if record.epoch == 2 and not stopped:
            os.kill(told_by[-1], signal.SIGSTOP)
            stopped.append(node.name)

    plan = planned(tmp_path, {**ONE_SEED, "execution.max_failures": 5})
    heard, _, session = execute("ray", plan, tmp_path, stop, timeout=WORKER_HANG_SECONDS)
    _, complete = session.close()
    assert complete
    since, again = heard.events.index(("epoch", stopped[0])), heard.events.index(("retried", stopped[0]))
    assert any(event == "epoch" and name != stopped[0] for event, name in heard.events[since:again])  # siblings went on
    hung = [reason for reason in heard.reasons if reason.startswith(f"epoch 3 of {stopped[0]!r} was not finished")]
    assert hung and f"within {WORKER_HANG_SECONDS} s and counts as hung" in hung[0] and "--timeout" in hung[0]
    assert digests(session) == reference


@pytest.mark.slow
def test_an_epoch_that_waits_for_ever_in_this_process_is_interrupted_where_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row waits for ever in every attempt, another one once: the first fails and says where, the rest finish."""
    train_epoch = Trajectory.train_epoch
    waited: list[float] = []

    def wait_for_ever(self: Trajectory) -> EpochRecord:
        rate = self.settings.optimiser.encoder_lr
        if self.epoch == 1 and (rate == 1e-7 or (rate == 1e-6 and rate not in waited)):
            waited.append(rate)
            while True:
                time.sleep(0.1)
        return train_epoch(self)

    monkeypatch.setattr(Trajectory, "train_epoch", wait_for_ever)
    rows = [{"name": name, "set": {"optimiser.encoder_lr": rate}} for name, rate in RATES.items()]
    one_epoch = {**ONE_SEED, "strategy.tune_epochs": 1, "execution.max_failures": 1, "rows": {"list": rows}}
    heard, schedule, session = execute("local", planned(tmp_path, one_epoch), tmp_path, timeout=HANG_SECONDS)
    assert Counter(waited) == {1e-7: 2, 1e-6: 1}
    _, complete = session.close()
    assert not complete
    assert [node.status for node in schedule.nodes if not node.children] == ["done", "done", "failed"]
    assert heard.reasons[-1].startswith("epoch 2 of 'ablation: always")
    assert re.search(r"test_executors.py, line \d+, in .*wait_for_ever", heard.reasons[-1])
    assert heard.reasons[-1].endswith("(given up after 2 attempts)")


@pytest.mark.slow
def test_missing_resources_are_named_instead_of_waited_for(tmp_path: Path) -> None:
    plan = planned(tmp_path, {**ONE_SEED, "execution.gpus": 3, "execution.device": "cpu"})
    done: list[StudyError] = []

    def attempt() -> None:
        try:
            run_plan(plan, RunOptions(tmp_path, "a test", executor="ray"), Console(quiet=True))
        except StudyError as error:
            done.append(error)

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join(timeout=60)
    assert done and "3 GPU" in str(done[0])


def digests(session: Session) -> dict[str, str]:
    """Cell → digest of the weights that were evaluated."""
    return {key: result.weights_sha256 for key, result in session.results.items()}


def _line(process: psutil.Process) -> list[Any]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []
