"""The command line as a user starts it: in a process group of its own, with every process that it brings along."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil

from tests.studies_for_tests import ROOT, TINY

MARK = "SPFT_TEST_LAUNCH"  # inherited by all that a launch starts, whoever becomes its parent


class Launch:
    """A running `python study/launch.py …`."""

    def __init__(
        self,
        storage: Path | str,
        *options: str,
        study: str = "ablation",
        overrides: Mapping[str, Any] = TINY,
        executor: str = "local",
        environment: Mapping[str, str] | None = None,
        before: Sequence[str] = (),
    ) -> None:
        """Start it.

        Args:
            storage: a folder, or a URI.
            options: further arguments.
            overrides: passed on as `-o KEY=VALUE`.
            before: what the command line begins with, such as a change of name space.
        """
        given = [f"-o{key}={_typed(value)}" for key, value in overrides.items()]
        where = ["--storage", str(storage), "--executor", executor]
        command = [*before, sys.executable, "study/launch.py", study, *given, *where, *options]
        self.mark = uuid4().hex
        # Not in the storage, whose disk may be full.
        self._printed = tempfile.NamedTemporaryFile(prefix="launch-")  # noqa: SIM115 - lives as long as the launch
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **(environment or {}), MARK: self.mark, "COLUMNS": "200"},
            stdin=subprocess.DEVNULL,
            stdout=self._printed,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_interruptible,  # noqa: PLW1509 - no other thread of the tests runs by then
        )
        self.started = time.monotonic()

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return Path(self._printed.name).read_text(encoding="utf-8", errors="replace")

    @property
    def running(self) -> bool:
        """Whether the driver lives."""
        return self.process.poll() is None

    def processes(self) -> list[psutil.Process]:
        """All that live of what it started, itself included, also when their parents are dead."""
        return [p for p in psutil.process_iter() if _marked(p, self.mark)]

    def workers(self) -> list[psutil.Process]:
        """Ray's processes that hold a trial."""
        return [p for p in self.processes() if "TrialActor" in " ".join(_line(p))]

    def until(self, condition: Callable[[], bool], timeout: float = 240, pause: float = 0.02) -> bool:
        """Wait for a condition; False if the driver ended before it was met."""
        give_up = time.monotonic() + timeout
        while not condition():
            if not self.running:
                return condition()
            assert time.monotonic() < give_up, f"waited {timeout} s in vain:\n{self.output}"
            time.sleep(pause)
        return True

    def send(self, number: signal.Signals, *, group: bool = False) -> None:
        """Send a signal to the driver, or to its process group as a terminal does."""
        (os.killpg if group else os.kill)(self.process.pid, number)

    def wait(self, timeout: float = 300) -> int:
        """Exit status."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout} s:\n{self.output}") from None

    def leaves_nothing_behind(self, within: float = 10) -> bool:
        """Whether every process of it has ended, or does so in time."""
        give_up = time.monotonic() + within
        while self.processes():
            if time.monotonic() > give_up:
                return False
            time.sleep(0.1)
        return True

    def end(self) -> None:
        """Kill whatever is left, each process by its id."""
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(30)


@contextmanager
def launched(storage: Path | str, *options: str, **how: Any) -> Iterator[Launch]:
    """A launch of which nothing outlives the context."""
    launch = Launch(storage, *options, **how)
    try:
        yield launch
    finally:
        launch.end()


def completed(storage: Path | str, *options: str, **how: Any) -> Launch:
    """A launch that has ended."""
    with launched(storage, *options, **how) as launch:
        launch.wait()
    return launch


def command_of(launch: Launch) -> str:
    """The command as the launch itself gives it."""
    arguments = launch.process.args
    assert isinstance(arguments, list)
    return "python study/launch.py " + shlex.join(arguments[arguments.index("study/launch.py") + 1 :])


def _typed(value: Any) -> str:
    return str(value).replace(" ", "")


def _interruptible() -> None:
    """Tests that run in the background ignore Ctrl-C, and would hand that on."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _marked(process: psutil.Process, mark: str) -> bool:
    try:
        return process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _line(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []
