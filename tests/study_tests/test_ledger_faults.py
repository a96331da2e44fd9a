"""The ledger in trouble: killed drivers, bad addresses, wrong calls, locks and lost answers."""

from __future__ import annotations

import http.server
import json
import logging
import os
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from analysis.records import find_runs, load
from analysis.tracking import _move_unless_taken, environment
from study.ledger import CellOutcome, Epoch, Ledger, LedgerError
from tests.ledger_samples import (
    ROWS,
    START_MS,
    Sample,
    cell_key,
    contents,
    new_database,
    opened,
    run_study,
    runs_of,
)


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return new_database(tmp_path)


# ------------------------------------------------------------------------------------------------ kills


def in_child(work: Callable[[], None]) -> int:
    """Exit status of a forked process that does the work; 0 where it was done."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
    return os.waitpid(child, 0)[1]


def killed_at(commit: int, counter: Path | None = None) -> None:
    """Kill this process with SIGKILL just before its n-th database commit; count the commits where n is 0."""
    import sqlalchemy

    count = 0

    def hook(connection: Any) -> None:
        nonlocal count
        count += 1
        if counter is not None:
            counter.write_text(str(count))
        if count == commit:
            os.kill(os.getpid(), signal.SIGKILL)

    sqlalchemy.event.listen(sqlalchemy.engine.Engine, "commit", hook)


def states_after_kills(folder: Path, sample: Sample, stride: int) -> list[Any]:
    """What a second driver leaves, for kills of the first at every `stride`-th commit."""
    counter = folder / "commits"

    def driver(uri: str, commit: int, count: Path | None = None) -> None:
        killed_at(commit, count)
        run_study(Ledger(uri), sample, folder)

    (folder / "whole").mkdir()
    whole = new_database(folder / "whole")
    assert in_child(lambda: driver(whole, 0, counter)) == 0
    states = [state(whole)]
    for commit in range(1, int(counter.read_text()) + 1, stride):
        (folder / str(commit)).mkdir()
        uri = new_database(folder / str(commit))
        assert in_child(lambda uri=uri, commit=commit: driver(uri, commit)) == signal.SIGKILL
        run_study(Ledger(uri), sample, folder)
        states.append(state(uri))
    return states


def state(uri: str) -> dict[str, Any]:
    """Everything but what names a run or tells when it was made."""
    ledger, records = Ledger(uri), load(uri, "ablation")
    runs = find_runs(ledger._client, ledger._client.get_experiment_by_name("ablation").experiment_id)
    assert all(path.is_file() for path in records.predictions.values())
    return {
        "runs": sorted((run.info.run_name, run.info.status) for run in runs),
        "metrics": sorted(
            (run.info.run_name, key, repr(value)) for run in runs for key, value in run.data.metrics.items()
        ),
        "params": sorted((run.info.run_name, *param) for run in runs for param in run.data.params.items()),
        "inputs": sorted((run.info.run_name, i.dataset.digest) for run in runs for i in run.inputs.dataset_inputs),
        "metric rows": [line for line in contents(uri) if line.startswith('INSERT INTO "metrics"')].__len__(),
        "header": records.header,
        "cells": records.cells.drop(columns="mlflow_run_id").to_csv(),
        "history": records.history.to_csv(),
        "predictions": len(records.predictions),
    }


def test_a_driver_killed_at_any_commit_is_made_good_by_the_next(tmp_path: Path) -> None:
    whole, *resumed = states_after_kills(tmp_path, Sample(rows=ROWS[:1], ending={(ROWS[0], 1): "FAILED"}), stride=10)
    assert len(resumed) > 4
    for found in resumed:
        assert found == whole


def test_a_cell_of_a_killed_driver_is_running_and_taken_over(uri: str) -> None:
    def driver() -> None:
        ledger = opened(uri)
        ledger.log_epochs(cell_key(), Sample().told_epochs(Sample().cell_headers()[0]))
        os.kill(os.getpid(), signal.SIGKILL)  # nothing was flushed

    assert in_child(driver) == signal.SIGKILL
    ledger = opened(uri)
    assert ledger.status_of(cell_key()) == "RUNNING"
    assert load(uri, "ablation").cells["status"].tolist() == ["RUNNING", "MISSING", "MISSING", "MISSING"]
    run_study(ledger, Sample())
    assert load(uri, "ablation").history.groupby(["row", "seed", "metric"]).size().eq(3).all()
    assert len(runs_of(ledger)) == 6


def test_a_kill_while_the_database_is_made_leaves_no_half_database(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"

    def driver() -> None:
        killed_at(1)
        Ledger(uri)

    assert in_child(driver) == signal.SIGKILL
    assert not (tmp_path / "mlflow.db").exists()
    opened(uri)
    assert load(uri, "ablation").cells["status"].eq("MISSING").all()


def test_a_database_that_another_driver_made_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    mine, theirs = tmp_path / "mine.db", tmp_path / "mlflow.db"
    mine.write_text("mine")
    theirs.write_text("theirs")
    _move_unless_taken(mine, theirs)
    assert theirs.read_text() == "theirs"


def test_two_drivers_that_find_no_database_make_one_that_both_write_to(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    samples = [Sample(name=name, rows=ROWS[:1]) for name in ("one", "other")]
    script = (
        "import sys; from pathlib import Path; from tests.ledger_samples import *\n"
        "run_study(Ledger(sys.argv[1]), Sample(name=sys.argv[2], rows=ROWS[:1]))\n"
    )
    root = Path(__file__).parents[2]
    drivers = [
        subprocess.Popen([sys.executable, "-c", script, uri, sample.name], cwd=root, stderr=subprocess.PIPE)
        for sample in samples
    ]
    said = [driver.communicate(timeout=300)[1] for driver in drivers]
    assert [driver.returncode for driver in drivers] == [0, 0], said
    for sample in samples:
        assert load(uri, sample.name).cells["status"].eq("FINISHED").all()


def test_an_empty_file_in_place_of_the_database_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").touch()
    run_study(Ledger(f"sqlite:///{tmp_path / 'mlflow.db'}"), Sample())
    assert load(f"sqlite:///{tmp_path / 'mlflow.db'}", "ablation").cells["status"].eq("FINISHED").all()


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("postgresql://host/db", r"no tracking URI: expected sqlite:///FILE or http\(s\)://SERVER"),
        ("mlruns", "no tracking URI"),
        ("sqlite:///:memory:", "names no file"),
        ("sqlite:///", "names no file"),
        (
            "http://127.0.0.1:9",
            r"the ledger at http://127\.0\.0\.1:9 cannot be used: .*refused; start the MLflow server",
        ),
    ],
)
def test_an_address_that_leads_nowhere_is_refused(address: str, message: str) -> None:
    with pytest.raises(LedgerError, match=message) as caught:
        Ledger(address)
    assert "\n" not in str(caught.value)


def test_a_server_that_accepts_and_never_answers_is_given_up_within_ten_seconds() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        before = time.monotonic()
        with pytest.raises(LedgerError, match="timed out"):
            Ledger(f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert time.monotonic() - before < 10


def test_a_server_that_is_no_mlflow_server_is_refused() -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        with pytest.raises(LedgerError, match="cannot be used"):
            Ledger(f"http://127.0.0.1:{other.server_port}")
        other.shutdown()


def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("not a database, but long enough to have a header of one hundred bytes" * 3)
    before = path.read_bytes()
    with pytest.raises(LedgerError, match=r"notes\.txt is not a usable SQLite database"):
        Ledger(f"sqlite:///{path}")
    assert path.read_bytes() == before


def test_a_database_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "other.db"
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE patients (id INTEGER)")
    before = path.read_bytes()
    with pytest.raises(LedgerError, match="not one of MLflow's"):
        Ledger(f"sqlite:///{path}")
    assert path.read_bytes() == before


def test_a_database_of_an_older_mlflow_names_the_upgrade(uri: str) -> None:
    with closing(sqlite3.connect(uri.removeprefix("sqlite:///"))) as database:
        database.execute("UPDATE alembic_version SET version_num = 'bda7b8c39065'")
        database.commit()
    with pytest.raises(LedgerError, match="mlflow db upgrade"):
        Ledger(uri)


@contextmanager
def ordinary_user() -> Iterator[None]:
    """Root may write anywhere: give that up for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_folder_and_a_database_that_are_read_only_are_refused() -> None:
    with tempfile.TemporaryDirectory() as name:  # not pytest's folder, which another user may not enter
        folder = Path(name)
        new_database(folder)
        (folder / "mlflow.db").chmod(0o444)
        folder.chmod(0o555)
        with ordinary_user():
            for path in (folder / "new.db", folder / "below" / "new.db", folder / "mlflow.db"):
                with pytest.raises(LedgerError, match=r"read-only|cannot create the folder"):
                    Ledger(f"sqlite:///{path}")
        folder.chmod(0o755)


def test_a_folder_in_place_of_the_database_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="is a folder: name a file"):
        Ledger(f"sqlite:///{tmp_path}")


def test_a_server_takes_no_artifact_root(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="only with a local store"):
        Ledger("http://127.0.0.1:9", tmp_path)


def test_a_deleted_study_names_how_to_restore_it(uri: str) -> None:
    ledger = opened(uri)
    ledger._client.delete_experiment(ledger._experiment_id)
    with pytest.raises(LedgerError, match="mlflow experiments restore"):
        opened(uri)


def test_a_contradicting_declaration_is_refused_with_all_its_problems(uri: str) -> None:
    sample, ledger = Sample(), Ledger(uri)
    cells = [
        *sample.cell_headers(),
        sample.cell_headers()[0],
        replace(sample.cell_headers()[1], key="k", row_key="none"),
    ]
    with pytest.raises(LedgerError, match=r"is used twice.*two cells for.*names an unknown row none"):
        ledger.open(sample.header(), sample.row_headers(), cells)
    assert ledger._client.get_experiment_by_name("ablation") is None, "nothing was written"


def test_a_parameter_that_changes_under_one_key_is_refused(uri: str) -> None:
    run_study(Ledger(uri), Sample())
    with pytest.raises(LedgerError, match=r"logged with other values of strategy\.depth: a parameter never changes"):
        opened(uri, Sample(params={"strategy.depth": "8"}))


def test_calls_that_make_no_sense_are_refused(uri: str, tmp_path: Path) -> None:
    sample, ledger = Sample(), opened(uri)
    cell = sample.cell_headers()[0]
    with pytest.raises(LedgerError, match="no cell unheard-of"):
        ledger.log_epochs("unheard-of", sample.told_epochs(cell))
    with pytest.raises(LedgerError, match="cannot end as 'RUNNING'"):
        ledger.finish(cell.key, CellOutcome("RUNNING", START_MS))
    with pytest.raises(LedgerError, match=r"gone\.npz cannot be read"):
        ledger.finish(cell.key, replace(sample.outcome(cell), predictions=tmp_path / "gone.npz"))
    assert ledger.status_of(cell.key) is None
    with pytest.raises(LedgerError, match="longer than MLflow's 250 characters"):
        ledger.log_epochs(cell.key, [Epoch(1, START_MS, {"val/" + "x" * 250: 1.0})])
    ledger.finish(cell.key, sample.outcome(cell))
    with pytest.raises(LedgerError, match="log its epochs before"):
        ledger.log_epochs(cell.key, sample.told_epochs(cell))
    with pytest.raises(LedgerError, match=r"tag spft\.changes has .* characters; MLflow takes 8000"):
        ledger.open(sample.header(), [replace(r, changes={"a": "b" * 9000}) for r in sample.row_headers()], [])


# ------------------------------------------------------------------------------------------------ locks, noise, speed


@contextmanager
def locked(uri: str, seconds: float) -> Iterator[threading.Thread]:
    """Another writer holds the database."""
    ready = threading.Event()

    def hold() -> None:
        with closing(sqlite3.connect(uri.removeprefix("sqlite:///"), isolation_level=None)) as database:
            database.execute("BEGIN EXCLUSIVE")
            ready.set()
            time.sleep(seconds)
            database.execute("ROLLBACK")

    thread = threading.Thread(target=hold)
    thread.start()
    ready.wait()
    yield thread
    thread.join()


def test_a_database_locked_for_a_while_is_waited_for_and_nothing_is_lost(uri: str) -> None:
    ledger, sample = opened(uri), Sample()
    with locked(uri, 1.5):
        for cell in sample.cell_headers():
            ledger.log_epochs(cell.key, sample.told_epochs(cell))
        ledger.flush()
    assert load(uri, "ablation").history.groupby(["row", "seed", "metric"]).size().eq(3).all()


def test_a_locked_database_is_waited_for_at_the_start_too(uri: str, caplog: pytest.LogCaptureFixture) -> None:
    with locked(uri, 2.0), caplog.at_level(logging.WARNING):
        Ledger(uri)
    assert "locked by another process" in caplog.text


@pytest.mark.slow
def test_a_lock_longer_than_all_patience_is_told_and_what_waited_is_written_later(uri: str) -> None:
    ledger, sample = opened(uri), Sample()
    cell = sample.cell_headers()[0]
    ledger.log_epochs(cell.key, sample.told_epochs(cell))
    ledger.flush()
    ledger.PATIENCE_S = 1
    ledger.log_epochs(cell.key, [Epoch(4, START_MS + 4000, {"val/macro_auc": 0.5})])
    with locked(uri, 25), pytest.raises(LedgerError, match="end the process that locks"):
        ledger.flush()
    ledger.flush()
    history = load(uri, "ablation").history
    assert history.loc[history["metric"] == "val/macro_auc", "epoch"].tolist() == [1, 2, 3, 4], "nothing was lost"


def test_a_creation_whose_answer_was_lost_is_found_and_not_repeated(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.exceptions import MlflowException

    ledger, lost = Ledger(uri), []

    def losing(create: Callable[..., Any]) -> Callable[..., Any]:
        def and_lose(*args: Any) -> Any:
            made = create(*args)
            lost.append(create.__name__)
            if lost.count(create.__name__) > 1:
                return made
            raise MlflowException("API request to http://server failed with exception: connection lost")

        return and_lose

    for name in ("create_experiment", "create_run"):
        monkeypatch.setattr(ledger._client, name, losing(getattr(ledger._client, name)))
    run_study(ledger, Sample(rows=ROWS[:1], seeds=(0,)))
    assert lost == ["create_experiment", "create_run", "create_run"], "one of them for the row, one for its cell"
    assert sorted(run.info.run_name for run in runs_of(ledger)) == [ROWS[0], f"{ROWS[0]} · seed 0"]


def test_a_full_disk_or_a_wrong_argument_is_not_waited_for(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger, sample = opened(uri), Sample()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ledger._client, "log_text", full)
    before = time.monotonic()
    with pytest.raises(LedgerError, match=r"writing effective\.json.*No space left on device"):
        ledger.finish(cell_key(), sample.outcome(sample.cell_headers()[0]))
    assert time.monotonic() - before < 5
    monkeypatch.undo()
    assert ledger.status_of(cell_key()) == "RUNNING"
    ledger.finish(cell_key(), sample.outcome(sample.cell_headers()[0]))
    assert ledger.status_of(cell_key()) == "FINISHED"


def test_a_whole_study_prints_nothing_and_writes_nothing_outside_its_storage(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from tests.ledger_samples import *\n"
        "from analysis.records import load\n"
        "ledger = Ledger(sys.argv[1]); run_study(ledger, Sample(), Path(sys.argv[2]))\n"
        "records = load(sys.argv[1], 'ablation'); assert len(list(records.predictions.values())) == 4\n"
    )
    root = Path(__file__).parents[2]
    (tmp_path / "cwd").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", script, f"sqlite:///{tmp_path / 'storage' / 'mlflow.db'}", str(tmp_path)],
        cwd=tmp_path / "cwd",
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list((tmp_path / "cwd").iterdir()) == []
    assert {path.name for path in (tmp_path / "storage").iterdir()} == {"mlflow.db", "artifacts"}


def test_a_variable_that_has_its_value_already_is_not_touched_while_other_threads_read_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put, written = os.putenv, []

    def counted(name: bytes, value: bytes) -> None:
        written.append(name)
        put(name, value)

    monkeypatch.setenv("SPFT_OUTER", "1")
    monkeypatch.delenv("SPFT_INNER", raising=False)
    monkeypatch.setattr(os, "putenv", counted)
    with environment(SPFT_OUTER="1"):
        assert os.environ["SPFT_OUTER"] == "1"
    assert written == []
    with environment(SPFT_OUTER="2", SPFT_INNER="3"):
        assert (os.environ["SPFT_OUTER"], os.environ["SPFT_INNER"]) == ("2", "3")
    assert written == [b"SPFT_OUTER", b"SPFT_INNER", b"SPFT_OUTER"], "the last one put back, the other removed"
    assert os.environ["SPFT_OUTER"] == "1"
    assert "SPFT_INNER" not in os.environ


def test_telemetry_is_off(uri: str) -> None:
    Ledger(uri)
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"


def test_the_ui_command_names_the_store(uri: str, tmp_path: Path) -> None:
    ledger = opened(uri)
    assert ledger.ui_command() == f"mlflow ui --backend-store-uri {uri}"
    assert ledger.ui_path() == f"/#/experiments/{ledger._experiment_id}/runs?viewStateShareKey=spft"
    view = json.loads(ledger._client.get_experiment(ledger._experiment_id).tags["mlflow.sharedViewState.spft"])
    assert view["selectedColumns"][0] == "metrics.`test/macro_auc/mean`"


def test_no_run_ends_before_it_began_though_its_cells_come_from_the_store(uri: str) -> None:
    ledger = Ledger(uri)
    run_study(ledger, Sample())  # told as trained long ago
    assert all(run.info.end_time >= run.info.start_time for run in runs_of(ledger))


@pytest.mark.slow
def test_a_metric_costs_at_most_150_microseconds_of_processor_time_in_bulk(uri: str) -> None:
    sample = Sample(seeds=tuple(range(10)), epochs=50, metrics=tuple(f"val/m{i}" for i in range(17)))
    ledger = opened(uri, sample)
    costs = []
    for cell in sample.cell_headers():
        epochs = sample.told_epochs(cell)
        ledger.log_epochs(cell.key, [Epoch(0, START_MS, {"train/loss": 1.0})])
        ledger.flush()
        before = time.process_time()
        ledger.log_epochs(cell.key, epochs)
        ledger.flush()
        costs.append((time.process_time() - before) / 1000)
    print(f"{1e6 * statistics.median(costs):.0f} µs a metric")
    assert min(costs) < 150e-6, "the one that was disturbed least by what else runs"
