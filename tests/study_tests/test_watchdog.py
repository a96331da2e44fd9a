"""When silence counts as a hang: by a clock of the test's own, and by real alarms around real waiting."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator

import pytest

from study.cluster.watchdog import HungError, Silence, time_limit


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def turns(silence: Silence, clock: Clock, working: list[str], seconds: float, each: float = 0.1) -> list[str]:
    """Turns of a driver's loop for so long; returns who was silent too long in the last one."""
    late: list[str] = []
    for _ in range(round(seconds / each)):
        clock.now += each
        late = silence.turn(working)
    return late


def test_a_trial_is_late_once_it_has_been_silent_for_longer_than_the_limit() -> None:
    clock = Clock()
    silence = Silence(5, clock)
    assert turns(silence, clock, ["a"], 5) == []
    assert turns(silence, clock, ["a"], 0.3) == ["a"]


def test_every_finished_step_begins_a_new_count_and_only_its_own() -> None:
    clock = Clock()
    silence = Silence(5, clock)
    turns(silence, clock, ["a", "b"], 4)
    silence.heard("a")
    assert turns(silence, clock, ["a", "b"], 2) == ["b"]


def test_a_trial_without_a_worker_is_not_counted_and_begins_anew_with_its_next() -> None:
    clock = Clock()
    silence = Silence(5, clock)
    turns(silence, clock, ["a"], 4)
    turns(silence, clock, [], 100)
    assert turns(silence, clock, ["a"], 4.5) == []


def test_a_driver_that_was_busy_or_suspended_for_long_accuses_nobody() -> None:
    clock = Clock()
    silence = Silence(5, clock)
    turns(silence, clock, ["a"], 3)
    clock.now += 3600
    assert silence.turn(["a"]) == []
    silence.heard("a")  # what it had said meanwhile is heard in the next turn
    assert turns(silence, clock, ["a"], 4) == []


def test_the_turn_in_which_a_trial_gets_its_worker_does_not_count() -> None:
    clock = Clock()
    silence = Silence(0.5, clock)
    clock.now += 0.9
    assert silence.turn(["a"]) == []


# ------------------------------------------------------------------------------------------------------------ alarms


def wait_for_ever() -> None:
    while True:
        try:
            time.sleep(0.05)
        except Exception:  # what swallows every exception must not swallow this one
            continue


def test_waiting_for_ever_is_interrupted_in_time_and_the_place_is_named() -> None:
    started = time.monotonic()
    with pytest.raises(HungError, match=r"test_watchdog.py, line \d+, in wait_for_ever"), time_limit(0.3):
        wait_for_ever()
    assert 0.3 <= time.monotonic() - started < 3


@pytest.fixture
def _no_alarm() -> Iterator[None]:
    """Put the alarm of a test runner aside."""
    left, _ = signal.setitimer(signal.ITIMER_REAL, 0)
    yield
    signal.setitimer(signal.ITIMER_REAL, left)


@pytest.mark.usefixtures("_no_alarm")
def test_after_the_body_no_alarm_is_left_and_the_handler_is_the_one_before() -> None:
    before = signal.getsignal(signal.SIGALRM)
    with time_limit(60):
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 50
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert signal.getsignal(signal.SIGALRM) is before


@pytest.mark.usefixtures("_no_alarm")
def test_an_alarm_that_somebody_set_before_rings_when_it_would_have() -> None:
    signal.setitimer(signal.ITIMER_REAL, 100)
    with time_limit(60):
        time.sleep(0.2)
    assert 99 < signal.getitimer(signal.ITIMER_REAL)[0] < 99.9


@pytest.mark.usefixtures("_no_alarm")
def test_without_a_limit_nothing_is_set() -> None:
    with time_limit(None):
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_a_limit_outside_the_main_thread_is_refused_instead_of_ignored() -> None:
    refused: list[RuntimeError] = []

    def attempt() -> None:
        try:
            with time_limit(1):
                pass
        except RuntimeError as error:
            refused.append(error)

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    assert "main thread" in str(refused[0])
