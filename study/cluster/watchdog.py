"""When a trial that says nothing counts as hung: silence measured by the driver, and an alarm within this process."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

LONGEST_TURN = 1.0  # seconds of a driver's turn that count; what it was busy for itself is no trial's silence


class Silence:
    """For how long each trial has said nothing, as far as the driver was there to hear it.

    A driver that writes to its ledger, or that was suspended, hears of nobody meanwhile; so a turn of its loop counts
    for `LONGEST_TURN` at most.
    """

    def __init__(self, limit: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Trials may be silent for `limit` seconds by `clock`."""
        self._limit = limit
        self._clock = clock
        self._turned = clock()
        self._silent: dict[str, float] = {}

    def turn(self, working: Iterable[str]) -> list[str]:
        """One turn of the driver's loop while these trials have a worker; returns those that are silent too long."""
        now = self._clock()
        passed, self._turned = min(now - self._turned, LONGEST_TURN), now
        self._silent = {trial: self._silent.get(trial, -passed) + passed for trial in working}
        return [trial for trial, silent in self._silent.items() if silent > self._limit]

    def heard(self, trial: str) -> None:
        """A trial has finished a step."""
        self._silent[trial] = 0.0


class HungError(BaseException):
    """A step took too long. No Exception: nothing between the step and its executor may take it for its own."""


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Interrupt what runs in the body after so many seconds, saying where it was; None: never.

    Python code is interrupted wherever it stands. Code in C is interrupted when it comes back to Python: what never
    does can only be ended with its process.

    Raises:
        HungError: with file, line and function.
        RuntimeError: called outside the main thread, which alone hears alarms.
    """
    if seconds is None:
        yield
        return
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("a time limit works in the main thread alone")
    handler = signal.signal(signal.SIGALRM, _interrupt)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    started = time.monotonic()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if left:  # somebody else's alarm was set before: it rings when it would have, or at once
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - started), 1e-3), interval)


def _interrupt(number: int, frame: FrameType | None) -> None:
    assert frame is not None, "Python handles signals between two steps of some frame"
    code = frame.f_code
    raise HungError(f"{Path(code.co_filename).name}, line {frame.f_lineno}, in {code.co_qualname}")
