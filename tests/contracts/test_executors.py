"""The contract that every executor keeps: the same suite over the in-process one and Ray Tune."""

from __future__ import annotations

import os
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

from study.documents import StudyError
from study.driver import RunOptions, Session, prepare_data, run_plan
from study.executors import LocalExecutor
from study.ledger import Ledger
from study.plan import Plan
from study.ray_environment import prepare_environment
from study.schedule import Node, Schedule
from study.store import Store
from tests.studies_for_tests import TINY, planned
from trainables.results import EpochRecord

ONE_SEED = {**TINY, "seeds": [0]}
EXECUTORS = ["local", pytest.param("ray", marks=pytest.mark.slow)]


class Heard:
    """A listener that writes down what it hears, and passes it on."""

    def __init__(self, inner: Session, on_epoch: Callable[[Node, EpochRecord], None] | None = None) -> None:
        self.inner = inner
        self.events: list[tuple[str, str]] = []
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
        self.inner.retried(node, reason)

    def failed(self, node: Node, error: str) -> None:
        self.events.append(("failed", node.name))
        self.inner.failed(node, error)


def execute(
    kind: str, plan: Plan, storage: Path, on_epoch: Callable[[Node, EpochRecord], None] | None = None
) -> tuple[Heard, Schedule, Session]:
    store = Store(storage)
    contents = prepare_data(plan, store, Console(quiet=True))
    session = Session(plan, store, Ledger(store.default_tracking_uri(), store.artifacts()), contents, "a test")
    session.open()
    schedule = session.schedule()
    heard = Heard(session, on_epoch)
    if kind == "local":
        LocalExecutor(plan.study.execution.max_failures).run(schedule, store, heard)
    else:
        prepare_environment(store.root, local=True)
        from study.ray_executor import RayExecutor

        RayExecutor(plan.study.execution, plan.compute, address=None, verbose=False).run(schedule, store, heard)
    return heard, schedule, session


@pytest.mark.parametrize("kind", EXECUTORS)
def test_every_trial_runs_once_after_its_parent_and_leaves_its_results(kind: str, tmp_path: Path) -> None:
    plan = planned(tmp_path, ONE_SEED)
    heard, schedule, session = execute(kind, plan, tmp_path)
    order = {event: i for i, event in reversed(list(enumerate(heard.events)))}
    assert schedule.finished
    for node in schedule.nodes:
        assert heard.events.count(("started", node.name)) == heard.events.count(("finished", node.name)) == 1
        assert heard.events.count(("epoch", node.name)) == node.request.last - node.request.first
        if node.parent is not None:
            assert order["finished", node.parent.name] < order["started", node.name]
    _, complete = session.close()
    assert complete


@pytest.mark.parametrize("kind", EXECUTORS)
def test_a_trial_that_cannot_train_fails_alone_and_says_where(kind: str, tmp_path: Path) -> None:
    rows = [
        {"name": "sound", "set": {"strategy.unfreezing": "none"}},
        {"name": "exploding", "set": {"optimiser.encoder_lr": 1e30, "optimiser.clip_norm": None}},
    ]
    plan = planned(tmp_path, {**ONE_SEED, "strategy.tune_epochs": 3, "rows": {"list": rows}})
    heard, _, session = execute(kind, plan, tmp_path)
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
    class Stopped(BaseException):
        pass

    def stop(node: Node, record: EpochRecord) -> None:
        if record.epoch == 2:
            raise Stopped

    plan = planned(tmp_path, ONE_SEED)
    with pytest.raises(BaseException):  # noqa: B017 - Ray wraps it
        execute(kind, plan, tmp_path, stop)
    heard, _, session = execute("local", plan, tmp_path)
    trained = sum(event == "epoch" for event, _ in heard.events)
    assert trained < 1 + 3 * 2  # the head stage, and what had been saved of stage 2, are there
    _, complete = session.close()
    assert complete


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_goes_on_from_its_last_epoch(tmp_path: Path) -> None:
    killed: list[int] = []

    def kill(node: Node, record: EpochRecord) -> None:
        if record.epoch == 2 and not killed:
            workers = [p for p in psutil.Process().children(recursive=True) if "TrialActor" in " ".join(_line(p))]
            os.kill(workers[0].pid, signal.SIGKILL)
            killed.append(workers[0].pid)

    plan = planned(tmp_path / "a", ONE_SEED)
    heard, _, session = execute("ray", plan, tmp_path / "a", kill)
    assert killed
    _, complete = session.close()
    assert complete
    assert sum(event == "retried" for event, _ in heard.events) == 1
    epochs = sum(event == "epoch" for event, _ in heard.events)
    assert epochs <= 1 + 3 * 2 + 1  # at most one epoch was trained twice
    _, _, other = execute("local", planned(tmp_path / "b", ONE_SEED), tmp_path / "b")
    assert {k: r.weights_sha256 for k, r in session.results.items()} == {
        k: r.weights_sha256 for k, r in other.results.items()
    }


@pytest.mark.slow
def test_both_slots_of_a_machine_are_busy_while_enough_trials_are_ready(tmp_path: Path) -> None:
    plan = planned(tmp_path, {**TINY, "dataset.images": 900, "strategy.tune_epochs": 4})
    heard, schedule, session = execute("ray", plan, tmp_path)
    _, complete = session.close()
    assert complete
    tuned = [node.name for node in schedule.nodes if not node.children]
    spans = [heard.spans[name] for name in tuned]
    begin, end = sorted(s[0] for s in spans)[1], sorted(s[1] for s in spans)[-2]  # two are ready from, and until
    busy = sum(max(0.0, min(stop, end) - max(start, begin)) for start, stop in spans)
    slots = min(2, os.cpu_count() or 1)
    assert busy / (slots * (end - begin)) > 0.8


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


def _line(process: psutil.Process) -> list[Any]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []
