"""The ledger's writing thread: nobody waits for it, nothing is lost, and what waiting cannot mend is told at once."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from analysis.records import load
from analysis.tracking import LedgerError
from study.interrupts import Halt, Interrupted, answered_signals
from study.ledger import Ledger
from study.ledger_writer import LedgerWriter
from tests.ledger_samples import ROWS, Sample, contents, new_database, run_study

HOLD = """
import sqlite3, sys, time
database = sqlite3.connect(sys.argv[1], isolation_level=None)
database.execute("BEGIN EXCLUSIVE")
print("held", flush=True)
time.sleep(float(sys.argv[2]))
database.execute("ROLLBACK")
"""


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return new_database(tmp_path)


@contextmanager
def locked(uri: str, seconds: float) -> Iterator[None]:
    """Another process holds the database for some seconds."""
    command = [sys.executable, "-c", HOLD, uri.removeprefix("sqlite:///"), str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        yield
        holder.kill()


def is_locked(uri: str) -> bool:
    with closing(sqlite3.connect(uri.removeprefix("sqlite:///"), timeout=0)) as database:
        try:
            database.execute("SELECT count(*) FROM runs")
        except sqlite3.OperationalError as error:
            return "locked" in str(error)
    return False


def failed(error: Exception) -> None:
    raise AssertionError(f"the study was stopped: {error}")


def opened(uri: str, sample: Sample, halt: Halt | None = None) -> tuple[LedgerWriter, list[str]]:
    said: list[str] = []
    writer = LedgerWriter(Ledger(uri), said.append, halt or failed)
    writer.open(sample.header(), sample.row_headers(), sample.cell_headers())
    return writer, said


def tell(writer: LedgerWriter, sample: Sample, folder: Path | None = None) -> None:
    """All that a study's cells have to say."""
    for cell in sample.cell_headers():
        for epoch in sample.told_epochs(cell):
            writer.log_epochs(cell.key, [epoch])
        writer.finish(cell.key, sample.outcome(cell, folder))


def same_ledgers(a: str, b: str) -> None:
    ours, theirs = load(a, "ablation"), load(b, "ablation")
    assert ours.header == theirs.header
    assert ours.cells.drop(columns="mlflow_run_id").equals(theirs.cells.drop(columns="mlflow_run_id"))
    assert ours.history.equals(theirs.history)


def test_what_is_written_by_the_thread_is_what_the_ledger_itself_writes(uri: str, tmp_path: Path) -> None:
    sample = Sample(ending={(ROWS[0], 1): "FAILED"})
    writer, said = opened(uri, sample)
    tell(writer, sample, tmp_path)
    writer.close(sample.header(executed=58))
    (tmp_path / "direct").mkdir()
    direct = new_database(tmp_path / "direct")
    run_study(Ledger(direct), sample, tmp_path)
    same_ledgers(uri, direct)
    assert said == []


def test_a_locked_database_makes_nobody_wait_and_loses_nothing(uri: str, tmp_path: Path) -> None:
    sample = Sample()
    writer, _ = opened(uri, sample)
    longest = 0.0
    with locked(uri, 3):
        for cell in sample.cell_headers():
            before = time.monotonic()
            for epoch in sample.told_epochs(cell):
                writer.log_epochs(cell.key, [epoch])
            writer.finish(cell.key, sample.outcome(cell))
            longest = max(longest, time.monotonic() - before)
            time.sleep(0.2)
        assert is_locked(uri), "all the time"
    writer.close(sample.header(executed=58))
    assert longest < 0.5, "the calls put things in a queue"
    (tmp_path / "direct").mkdir()
    direct = new_database(tmp_path / "direct")
    run_study(Ledger(direct), sample)
    same_ledgers(uri, direct)


def test_a_cell_that_the_ledger_has_as_finished_is_not_even_asked_for(uri: str) -> None:
    sample = Sample(rows=ROWS[:1], seeds=(0,))
    run_study(Ledger(uri), sample)
    before = contents(uri)
    writer, _ = opened(uri, sample)
    writer.record(sample.cell_headers()[0].key, lambda: pytest.fail("its epochs were asked for"))
    writer.close(sample.header(executed=58))
    assert contents(uri) == before


def test_what_was_logged_reaches_the_ledger_within_seconds_though_nothing_follows(uri: str) -> None:
    sample = Sample()
    writer, _ = opened(uri, sample)
    cell = sample.cell_headers()[0]
    writer.log_epochs(cell.key, sample.told_epochs(cell))
    give_up = time.monotonic() + 30
    while not len(load(uri, "ablation").history) and time.monotonic() < give_up:
        time.sleep(0.5)
    assert load(uri, "ablation").history["epoch"].max() == sample.epochs
    writer.abandon()


def test_a_failure_that_waiting_cannot_mend_stops_the_study_wherever_its_thread_is(uri: str) -> None:
    """The database loses a table meanwhile, as when somebody puts another file in its place."""
    sample, halt = Sample(), Halt()
    with answered_signals():
        writer, said = opened(uri, sample, halt)
        with closing(sqlite3.connect(uri.removeprefix("sqlite:///"))) as database:
            database.execute("ALTER TABLE metrics RENAME TO gone")
            database.commit()
        tell(writer, sample)
        before = time.monotonic()
        with pytest.raises(Interrupted):
            time.sleep(60)
        assert time.monotonic() - before < 30
        writer.abandon()
    assert isinstance(halt.reason, LedgerError)
    assert "(sqlite3.OperationalError) no such table" in str(halt.reason)
    assert "nothing is lost" in str(halt.reason)
    assert "\n" not in str(halt.reason)
    assert said == [], "it was not waited for"


def test_after_the_ledger_has_failed_the_end_says_so_and_the_next_start_makes_it_good(uri: str, tmp_path: Path) -> None:
    sample = Sample()
    writer = LedgerWriter(Ledger(uri), failed, lambda error: None)
    writer.open(sample.header(), sample.row_headers(), sample.cell_headers())
    database = sqlite3.connect(uri.removeprefix("sqlite:///"))
    with closing(database):
        database.execute("ALTER TABLE latest_metrics RENAME TO gone")
        database.commit()
        tell(writer, sample)
        with pytest.raises(LedgerError, match="the same command brings the ledger up to date"):
            writer.close(sample.header(executed=58))
        database.execute("ALTER TABLE gone RENAME TO latest_metrics")
        database.commit()
    again, _ = opened(uri, sample)
    tell(again, sample)
    again.close(sample.header(executed=58))
    (tmp_path / "direct").mkdir()
    direct = new_database(tmp_path / "direct")
    run_study(Ledger(direct), sample)
    same_ledgers(uri, direct)


def test_letting_go_of_a_locked_ledger_takes_seconds(uri: str) -> None:
    sample = Sample()
    writer, _ = opened(uri, sample)
    with locked(uri, 30):
        tell(writer, sample)
        before = time.monotonic()
        writer.abandon()
        assert time.monotonic() - before < 5


@pytest.mark.slow
def test_a_lock_beyond_sqlites_own_patience_is_said_once_and_so_is_its_end(uri: str) -> None:
    sample = Sample()
    writer, said = opened(uri, sample)
    with locked(uri, 28):
        tell(writer, sample)
        writer.close(sample.header(executed=58))
    assert len(said) == 2
    assert said[0].startswith("the ledger is away (") and "locked" in said[0] and "training goes on" in said[0]
    assert said[1].startswith("the ledger is back after ")
    assert load(uri, "ablation").cells["status"].eq("FINISHED").all()


@pytest.mark.slow
def test_at_the_end_the_ledger_is_waited_for_as_long_as_its_patience(uri: str) -> None:
    sample = Sample()
    ledger = Ledger(uri)
    said: list[str] = []
    ledger.END_PATIENCE_S = 1
    writer = LedgerWriter(ledger, said.append, failed)
    writer.open(sample.header(), sample.row_headers(), sample.cell_headers())
    with locked(uri, 80):
        tell(writer, sample)
        before = time.monotonic()
        with pytest.raises(LedgerError, match=r"is away \(.*locked.*nothing is lost") as caught:
            writer.close(sample.header(executed=58))
        assert time.monotonic() - before < 60
    assert "end the process that locks its database" in str(caught.value)
    assert said[0].startswith("the ledger is away (")
    assert said[1:] in ([], ["all is trained; waiting up to 1 s for the ledger"])  # where it was known before the end


# ------------------------------------------------------------------------------------------ signals and the study's end


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_are_answered_by_the_status_that_shells_expect(number: signal.Signals, status: int) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as caught, answered_signals():
        signal.raise_signal(number)
    assert caught.value.status == status
    assert signal.getsignal(number) is before


def test_an_interrupt_that_a_library_raises_in_place_of_ours_keeps_its_signal() -> None:
    with pytest.raises(Interrupted) as caught, answered_signals():
        try:
            signal.raise_signal(signal.SIGTERM)
        except Interrupted:
            raise KeyboardInterrupt from None  # as Ray does
    assert caught.value.status == 143


def test_a_study_outside_of_the_main_thread_is_stopped_at_its_next_event() -> None:
    found: list[type[BaseException]] = []

    def study() -> None:
        halt = Halt()
        stopper = threading.Thread(target=halt, args=(LedgerError("gone"),))
        stopper.start()
        stopper.join()
        try:
            halt.check()
        except BaseException as error:
            found.append(type(error))

    thread = threading.Thread(target=study)
    thread.start()
    thread.join()
    assert found == [Interrupted]
