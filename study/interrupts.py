"""How a running study is asked to stop: by Ctrl-C, by a scheduler's SIGTERM, or by itself from another thread."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A signal asked this process to stop. Libraries let it pass as they do Ctrl-C.

    `status`: exit status by which shells and schedulers know the signal: 130 after Ctrl-C, 143 after SIGTERM.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


class StudyHaltedError(RuntimeError):
    """A study that had begun cannot go on: storage or ledger fail. Nothing that was finished is lost."""


class ClusterLostError(StudyHaltedError):
    """The cluster that a study runs on is gone; the same command goes on once it is there again."""


class Halt:
    """Stops the study's thread, from any thread, because of something that it cannot go on with."""

    def __init__(self) -> None:
        """The thread that makes it is the one that it stops."""
        self._thread = threading.current_thread()
        self.reason: Exception | None = None

    def __call__(self, reason: Exception) -> None:
        """Stop because of `reason`; the first one counts. Called by the study's own thread, it raises at once."""
        self.reason = self.reason or reason
        if threading.current_thread() is self._thread:
            self.check()
        elif self._thread is threading.main_thread() and isinstance(signal.getsignal(signal.SIGTERM), _Answer):
            # Wakes it also where it waits for the system, such as for Ray's workers.
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    def check(self) -> None:
        """Raise if there was a reason to stop: for threads that no signal reaches, and signals that got lost."""
        if self.reason is not None:
            raise Interrupted(signal.SIGTERM)


class _Answer:
    """Handler of signals; remembers which one came, since Ray raises a KeyboardInterrupt of its own in its place."""

    number: int = signal.SIGINT

    def __call__(self, number: int, frame: FrameType | None) -> NoReturn:
        self.number = number
        raise Interrupted(number)


@contextmanager
def answered_signals() -> Iterator[None]:
    """SIGINT and SIGTERM raise `Interrupted` in the main thread; elsewhere nothing changes.

    A SIGINT that this process was started to ignore, as shells do for jobs in the background, stays ignored.
    """
    answer = _Answer()
    with ExitStack() as before:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                handler = signal.getsignal(number)
                if handler is not signal.SIG_IGN:
                    before.callback(signal.signal, number, handler or signal.SIG_DFL)
                    signal.signal(number, answer)
        try:
            yield
        except Interrupted:
            raise
        except KeyboardInterrupt:
            raise Interrupted(answer.number) from None


@contextmanager
def kept_signals() -> Iterator[None]:
    """Undo what a library does to the handler of SIGTERM: Ray's ends the process with a status of its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit as ended:
        if isinstance(handler, _Answer) and ended.code == signal.SIGTERM:
            raise Interrupted(signal.SIGTERM) from None
        raise
    finally:
        signal.signal(signal.SIGTERM, handler or signal.SIG_DFL)
