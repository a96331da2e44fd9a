"""Kill -9 and Ctrl-C at any moment: the same command goes on, to the same bits, and leaves nothing behind."""

from __future__ import annotations

import os
import random
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest
from fault_checks import EpochsSaved, every_run_once, prepared, same_results

from tests.launches import Launch, command_of, launched
from tests.studies_for_tests import ROOT, Ran


@dataclass(frozen=True)
class Point:
    """When to kill whom.

    Attributes:
        sign: a pattern; the moment has come when the storage has a file of it that was not there before.
        delay: seconds after that.
        victims: 'driver', 'worker' or 'both'.
        missed: whole studies in which the sign was not seen.
    """

    name: str
    sign: str | None
    executor: str = "local"
    delay: float = 0.0
    victims: str = "driver"
    missed: int = 0


STAGES = [  # in the order of a study's life
    Point("drawing the data", "phantoms/.*partial*/images/*"),
    Point("decoding the images", "images/*/pixels-*"),
    Point("making the ledger's database", ".mlflow.db.*/*"),
    Point("declaring the study in the ledger", "mlflow.db-journal"),
    Point("building a cache of activations", "activations/*/part/*"),
    Point("saving a state", "partial/*"),
    Point("a worker that trains", "states/*", "ray", 0.5, "worker"),
    Point("the driver, of whose workers one had died", "states/*", "ray", 1.0),
    Point("both, while they train", "states/*", "ray", 0.5, "both"),
    Point("writing a result", "results/*/*/result.json"),
    Point("writing a cell into the ledger", "mlartifacts/*/artifacts/*", "ray"),
    Point("a worker after a result", "results/*/*/result.json", "ray", 0.0, "worker"),
    Point("writing the report, through Ray", "ablation/report/*", "ray"),
    Point("writing the report", "ablation/report/.*"),
]


LENGTH_S = 25.0  # about what a whole study takes


def at_random(seed: int, length: float) -> list[Point]:
    """Points at random times within a run of this length, in seconds."""
    draw = random.Random(seed)
    executors = ["local", "local", "ray"] * 2
    return [Point(f"random {i}", None, name, draw.uniform(0.0, length)) for i, name in enumerate(executors)]


def once_more(points: list[Point]) -> list[Point]:
    """Points of which the first did not come in a whole study.

    A random one comes sooner next time. Of what lasts for milliseconds a busy machine may let the sign go by unseen.
    """
    first = points[0]
    if first.sign is None:
        return [replace(first, delay=first.delay / 2), *points[1:]]
    assert first.missed < 3, f"whole studies went by without a sign of {first.name}"
    return [replace(first, missed=first.missed + 1), *points[1:]]


class Story:
    """One storage, in which the same command is started again after each kill.

    A study that ends before the next kill gives way to another one.
    """

    def __init__(self, storage: Path) -> None:
        self.storage = storage
        self._saved = EpochsSaved(storage)
        self._launch: Launch | None = None

    def play(self, points: list[Point]) -> list[Point]:
        """Kill at these points; returns those that the study did not live to see."""
        for i, point in enumerate(points):
            if self._launch is None or point.executor not in self._launch.process.args:  # type: ignore[operator]
                self._strike("both")
                self._launch = Launch(self.storage, executor=point.executor)
            if not self._reached(point, self._launch):
                return points[i:]
            self._strike(point.victims)
        return []

    def _reached(self, point: Point, launch: Launch) -> bool:
        if point.sign is not None:
            before = set(self.storage.glob(point.sign))
            if not launch.until(lambda: bool(set(self.storage.glob(str(point.sign))) - before), 600, 0.003):
                return False
        end = (launch.started if point.sign is None else time.monotonic()) + point.delay
        launch.until(lambda: time.monotonic() >= end, 600)
        if point.victims == "worker":
            return launch.until(lambda: bool(launch.workers()), 600, pause=0.2)
        return launch.running

    def _strike(self, victims: str) -> None:
        if self._launch is None:
            return
        workers = self._launch.workers()
        busy = sorted(workers, key=lambda p: "train" not in p.name())
        if victims == "worker":
            kill(busy[:1])
            return
        kill([psutil.Process(self._launch.process.pid)] if self._launch.running else [])
        kill(workers if victims == "both" else [])
        assert self._launch.leaves_nothing_behind(within=90), [p.cmdline() for p in self._launch.processes()]
        self._launch = None

    def finish(self) -> dict[str, int]:
        """Let the study come to its end; key of an epoch → times it was saved."""
        if self._launch is None:
            self._launch = Launch(self.storage)
        assert self._launch.wait(900) == 0, self._launch.output
        return self._saved.stop()

    def end(self) -> None:
        """Nothing outlives a test that failed."""
        if self._launch is not None:
            self._launch.end()


def kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_study_killed_at_any_moment_ends_with_the_bits_of_an_undisturbed_one(
    undisturbed: Ran, tmp_path: Path
) -> None:
    points = [*STAGES, *at_random(seed=3, length=LENGTH_S)]
    waiting, number = points, 0
    while waiting:
        story, number = Story(tmp_path / f"storage {number}"), number + 1
        try:
            missed = story.play(waiting)
            waiting = missed if missed != waiting else once_more(missed)
            saved = story.finish()
        finally:
            story.end()
        same_results(story.storage, undisturbed)
        every_run_once(f"sqlite:///{story.storage / 'mlflow.db'}", undisturbed.plan)
        # An epoch is lost only before it is saved, and a stage saves each before it begins the next.
        assert set(saved) == {key[:40] for chain in undisturbed.plan.chains for key in chain.keys}, (
            "none was overlooked"
        )
        assert set(saved.values()) == {1}, "no saved epoch was trained again"
    assert len(points) >= 20 and sum(p.executor == "ray" for p in points) >= 6


# ---------------------------------------------------------------------------------------------------------- stopping


def stopped_by(launch: Launch, number: signal.Signals, *, group: bool) -> float:
    """Seconds until the launch and all that it started have ended."""
    before = time.monotonic()
    launch.send(number, group=group)
    assert launch.wait(60) == 128 + number, launch.output
    assert launch.leaves_nothing_behind(within=30)
    return time.monotonic() - before


def test_ctrl_c_while_data_is_prepared_stops_at_once_and_says_how_to_go_on(tmp_path: Path) -> None:
    with launched(tmp_path / "storage") as launch:
        assert launch.until(lambda: any((tmp_path / "storage").glob("phantoms/.*partial*/images/*")))
        assert stopped_by(launch, signal.SIGINT, group=True) < 10
    said = launch.output.strip().splitlines()[-2:]
    assert said == ["stopped by SIGINT; nothing that was finished is lost. To go on:", f"  {command_of(launch)}"]
    assert "Traceback" not in launch.output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("executor", "number", "group"),
    [
        ("ray", signal.SIGINT, True),
        ("ray", signal.SIGTERM, False),
    ],
)
def test_a_study_that_trains_stops_within_ten_seconds_and_leaves_no_process(
    executor: str, number: signal.Signals, group: bool, undisturbed: Ran, tmp_path: Path
) -> None:
    with launched(prepared(tmp_path / "storage", undisturbed), executor=executor) as launch:
        assert launch.until(lambda: any((tmp_path / "storage").glob("states/*")), 600)
        assert stopped_by(launch, number, group=group) < 10
    said = launch.output.strip().splitlines()[-2:]
    assert said == [
        f"stopped by {number.name}; nothing that was finished is lost. To go on:",
        f"  {command_of(launch)}",
    ]
    assert "Traceback" not in launch.output


@pytest.mark.slow
def test_a_signal_while_ray_starts_stops_as_well(tmp_path: Path) -> None:
    with launched(tmp_path / "storage", executor="ray") as launch:
        assert launch.until(lambda: len(launch.processes()) > 1, 600, pause=0.1)  # the head's first process
        assert stopped_by(launch, signal.SIGTERM, group=False) < 10
    assert "stopped by SIGTERM" in launch.output


@pytest.mark.slow
def test_the_command_that_a_stopped_study_names_brings_it_to_the_same_end(undisturbed: Ran, tmp_path: Path) -> None:
    with launched(prepared(tmp_path / "storage", undisturbed)) as launch:
        assert launch.until(lambda: any((tmp_path / "storage").glob("results/*/*/result.json")), 600)
        assert stopped_by(launch, signal.SIGINT, group=False) < 10
    named = shlex.split(launch.output.strip().splitlines()[-1])
    assert named[:2] == ["python", "study/launch.py"]
    again = subprocess.run([sys.executable, *named[1:]], cwd=ROOT, capture_output=True, timeout=600, check=False)
    assert again.returncode == 0, again.stdout
    same_results(tmp_path / "storage", undisturbed)
    every_run_once(f"sqlite:///{tmp_path / 'storage' / 'mlflow.db'}", undisturbed.plan)
