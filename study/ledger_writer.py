"""The ledger's writes, in order, in one thread of the driver, so that training never waits for a lock or a server.

What cannot be written yet is kept in memory for as long as training runs. Losing it costs nothing: whatever a cell's
run holds is in the store as well, and the next start writes what is missing.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from analysis.schema import StudyHeader
from analysis.tracking import LedgerAwayError, LedgerError, environment
from study.ledger import Ledger
from study.ledger_entries import CellHeader, CellOutcome, Epoch, RowHeader
from study.storage.places import AwayError

log = logging.getLogger(__name__)

FLUSH_S = 5.0  # metrics of running cells reach the ledger at least this often
PAUSE_S, LONGEST_PAUSE_S = 0.2, 5.0  # between attempts while the ledger is away
FAREWELL_S = 3.0  # for what is waiting when the study is stopped
ANSWER_S = 30  # how long a server may take over one request
MENDED = (
    "nothing is lost: the results are in the storage, and the same command brings the ledger up to date without "
    "training them again"
)

Write = Callable[[], None]


class LedgerWriter:
    """A `Ledger` whose calls return at once; its failures reach `halt`, from the writing thread.

    `open` waits as the ledger does, so that a study without a usable ledger never starts; `close` waits until all is
    written, or until nothing could be written for the ledger's `END_PATIENCE_S`.
    """

    def __init__(self, ledger: Ledger, say: Callable[[str], None], halt: Callable[[Exception], None]) -> None:
        """Stand in front of a ledger that nobody else writes to.

        Args:
            ledger: not opened yet.
            say: takes one line when the ledger goes away, and one when it is back.
            halt: takes the error that waiting cannot mend.
        """
        self._ledger = ledger
        self._say = say
        self._halt = halt
        self._patience_s = ledger.END_PATIENCE_S
        self._environment = ExitStack()
        self._thread = threading.Thread(target=self._run, name="ledger writer", daemon=True)
        self._flushed_at = time.monotonic()
        self._changed = threading.Condition()
        # Guarded by the condition:
        self._waiting: deque[Write] = deque()
        self._ending = self._away = False
        self._give_up_s: float | None = None  # seconds without a write after which it stops trying; None: never
        self._error: Exception | None = None
        self._written_at = time.monotonic()

    # -- what a session calls -----------------------------------------------------------------------------------------

    def open(self, header: StudyHeader, rows: Sequence[RowHeader], cells: Sequence[CellHeader]) -> None:
        """Declare the study, at once, and begin to write.

        Raises:
            LedgerError: see `Ledger.open`; nothing has begun.
        """
        self._ledger.open(header, rows, cells)
        self._ledger.PATIENCE_S = 0  # from now on waiting is done here, where it can be said and ended
        # Set before the thread starts, since the environment must not change under the threads of training.
        quick = environment(MLFLOW_HTTP_REQUEST_MAX_RETRIES="0", MLFLOW_HTTP_REQUEST_TIMEOUT=str(ANSWER_S))
        self._environment.enter_context(quick)
        self._thread.start()

    def log_epochs(self, cell_key: str, epochs: Sequence[Epoch]) -> None:
        """See `Ledger.log_epochs`."""
        self._put(lambda: self._ledger.log_epochs(cell_key, epochs))

    def extend(self, header: StudyHeader, cells: Sequence[CellHeader]) -> None:
        """See `Ledger.extend`."""
        self._put(lambda: self._ledger.extend(header, cells))

    def attach(self, key: str, file: Path, folder: str) -> None:
        """See `Ledger.attach`."""
        self._put(lambda: self._ledger.attach(key, file, folder))

    def finish(self, cell_key: str, outcome: CellOutcome) -> None:
        """See `Ledger.finish`."""
        self._put(lambda: self._ledger.finish(cell_key, outcome))

    def record(self, cell_key: str, told: Callable[[], tuple[Sequence[Epoch], CellOutcome]]) -> None:
        """Write a finished cell as a whole, unless the ledger has it as finished already; `told` is asked then only."""

        def write() -> None:
            if self._ledger.status_of(cell_key) != "FINISHED":
                epochs, outcome = told()
                self._ledger.log_epochs(cell_key, epochs)
                self._ledger.finish(cell_key, outcome)

        self._put(write)

    def close(self, header: StudyHeader) -> None:
        """Write what is waiting and the study's end.

        Raises:
            LedgerError: the ledger stayed away, or refused; says that nothing is lost.
        """
        self._put(lambda: self._ledger.close(header))
        if self._end(self._patience_s):
            self._say(f"all is trained; waiting up to {self._patience_s:.0f} s for the ledger")
        while self._thread.is_alive() and self._silence_s() < self._patience_s + ANSWER_S:
            self._thread.join(timeout=0.1)
        if self._thread.is_alive():
            raise LedgerError(f"the ledger {self._ledger.tracking_uri} does not answer; {MENDED}")
        self._environment.close()
        if self._error is not None:
            raise self._error

    def abandon(self) -> None:
        """Stop within `FAREWELL_S`, whatever is still waiting; after `close` there is nothing left to stop."""
        if self._thread.is_alive() and not self._ending:
            self._end(0)
            self._thread.join(timeout=FAREWELL_S)
        if not self._thread.is_alive():
            self._environment.close()

    def ui_path(self) -> str:
        """See `Ledger.ui_path`."""
        return self._ledger.ui_path()

    # -- the two sides of the queue -----------------------------------------------------------------------------------

    def _put(self, write: Write) -> None:
        with self._changed:
            self._waiting.append(write)
            self._changed.notify_all()

    def _end(self, patience_s: float) -> bool:
        """Let the thread end once all is written, or nothing could be for `patience_s`; whether the ledger is away."""
        with self._changed:
            self._ending, self._give_up_s = True, patience_s
            self._written_at = time.monotonic()
            self._changed.notify_all()
            return self._away

    def _silence_s(self) -> float:
        with self._changed:
            return time.monotonic() - self._written_at

    def _run(self) -> None:
        try:
            while (write := self._next()) is not None:
                self._persist(write)
                with self._changed:
                    self._waiting.popleft()
            self._persist(self._ledger.flush)
        except Exception as error:
            self._error = self._explained(error)
            if not self._ending:  # then `close` raises it
                self._halt(self._error)

    def _next(self) -> Write | None:
        """The oldest write, once it is there; None at the end. What the ledger buffers meanwhile is flushed in time."""
        while True:
            if time.monotonic() - self._flushed_at > FLUSH_S:
                self._persist(self._ledger.flush)
                self._flushed_at = time.monotonic()
            with self._changed:
                if self._waiting:
                    return self._waiting[0]
                if self._ending:
                    return None
                self._changed.wait(timeout=FLUSH_S)

    # -- one write --------------------------------------------------------------------------------------------------

    def _persist(self, write: Write) -> None:
        """Repeat a write until the ledger takes it; says once that it is away, and once that it is back."""
        away_since, pause_s = None, PAUSE_S
        while True:
            try:
                write()
            except LedgerAwayError as error:
                if away_since is None:
                    away_since = time.monotonic()
                    with self._changed:
                        self._away = True
                    self._say(f"the ledger is away ({error.reason}): training goes on, records wait for it")
                if self._given_up():
                    raise
                self._pause(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            else:
                break
        with self._changed:
            self._written_at, self._away, waiting = time.monotonic(), False, len(self._waiting)
        if away_since is not None:
            self._say(f"the ledger is back after {self._written_at - away_since:.0f} s; {waiting} records were waiting")

    def _given_up(self) -> bool:
        with self._changed:
            return self._give_up_s is not None and time.monotonic() - self._written_at > self._give_up_s

    def _pause(self, seconds: float) -> None:
        """Wait, but no longer than until the end is announced."""
        with self._changed:
            if not self._ending:
                self._changed.wait_for(lambda: self._ending, timeout=seconds)
                return
        time.sleep(min(seconds, 0.5))

    def _explained(self, error: Exception) -> Exception:
        if isinstance(error, AwayError):  # the storage, whose files are told
            return error
        if isinstance(error, LedgerAwayError):
            where = f"the ledger {self._ledger.tracking_uri} is away ({error.reason})"
            remedy = "start its server, or end the process that locks its database, and run the same command again"
            return LedgerError(f"{where}: {remedy}; {MENDED}")
        if isinstance(error, OSError):
            return LedgerError(f"writing to the ledger {self._ledger.tracking_uri} failed: {error}; {MENDED}")
        return LedgerError(f"{error}; {MENDED}") if isinstance(error, LedgerError) else error
