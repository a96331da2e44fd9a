"""One driver a study on an object store: who is let in, who is told to wait, and when the dead may be followed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from study.documents import StudyError
from study.interrupts import StudyHaltedError
from study.storage import lease
from study.storage.lease import leased
from study.storage.object_store import ObjectStore
from tests.object_stores import Store, object_store
from tests.studies_for_tests import ROOT

COMMAND = "python study/launch.py ablation"
HOLDER = """
import sys, time
from pathlib import Path
from study.storage import lease
from study.storage.object_store import ObjectStore
lease.BEAT_S = float(sys.argv[4])
with lease.leased(ObjectStore(sys.argv[1], Path(sys.argv[2])), Path(sys.argv[3]), "ablation", sys.argv[5], print):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Store]:
    with object_store(tmp_path / "own") as store:
        yield store


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.2)
    monkeypatch.setattr(lease, "LEASE_S", 6.0)


def machine(folder: Path, name: str) -> Path:
    """The lock's file of a machine: another file stands for another machine."""
    path = folder / f"{name}.lock"
    path.touch()
    return path


def store_of(server: Store, folder: Path) -> ObjectStore:
    return ObjectStore(server.uri, folder)


def never(error: Exception) -> None:
    raise AssertionError(error)


@contextmanager
def holder(server: Store, folder: Path, lock: Path, beat_s: float = 0.2) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that runs the study."""
    command = [sys.executable, "-c", HOLDER, server.uri, str(folder), str(lock), str(beat_s), COMMAND]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_a_second_driver_on_another_machine_is_told_who_runs_the_study_and_what_to_do(
    server: Store, tmp_path: Path
) -> None:
    with holder(server, tmp_path, machine(tmp_path, "one")) as other:
        time.sleep(1.2 * lease.LEASE_S)  # it lives, and says so
        started = time.monotonic()
        store, lock = store_of(server, tmp_path), machine(tmp_path, "two")
        with pytest.raises(StudyError) as caught, leased(store, lock, "ablation", "mine", never):
            raise AssertionError("both run it")
        assert time.monotonic() - started < 3
        with leased(store, machine(tmp_path, "two"), "depth", "mine", never):
            pass  # another study of the storage
    (said,) = caught.value.problems
    assert f"by process {other.pid} on {socket.gethostname()} since {time.strftime('%Y-')}" in said
    assert f"({COMMAND})" in said and "another --storage" in said
    assert "if that machine is gone, its claim ends 6 s after its last sign of life" in said


@pytest.mark.slow
def test_a_driver_that_was_killed_is_followed_on_its_machine_at_once_and_elsewhere_when_its_lease_ends(
    server: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = machine(tmp_path, "one"), machine(tmp_path, "two")
    for lock, waits in ((one, False), (two, True)):
        with holder(server, tmp_path, one) as other:
            os.kill(other.pid, signal.SIGKILL)
            other.wait()
        if waits:
            monkeypatch.setattr(lease, "LEASE_S", 600.0)  # however long a busy machine took to get here
            with pytest.raises(StudyError), leased(store_of(server, tmp_path), lock, "ablation", "mine", never):
                raise AssertionError("it may only be cut off")
            monkeypatch.setattr(lease, "LEASE_S", 3.0)
            time.sleep(lease.LEASE_S + 1.1)  # stores count whole seconds
        with leased(store_of(server, tmp_path), lock, "ablation", "mine", never):
            pass


def test_a_claim_that_was_given_back_is_free_at_once_and_leaves_one_small_object(server: Store, tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        with leased(store_of(server, tmp_path), machine(tmp_path, name), "ablation", "mine", never):
            pass
    assert list(server.objects("claims")) == ["claims/ablation/00000003.json"]


def test_of_many_who_try_at_once_one_is_let_in(server: Store, tmp_path: Path) -> None:
    held, refused, end = [], [], threading.Event()
    start = threading.Barrier(6)

    def drive(number: int) -> None:
        start.wait()
        try:
            with leased(store_of(server, tmp_path), machine(tmp_path, str(number)), "ablation", "mine", never):
                held.append(number)
                end.wait(30)
        except StudyError:
            refused.append(number)
            if len(refused) == 5:
                end.set()

    threads = [threading.Thread(target=drive, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(held), len(refused)) == (1, 5)


def test_who_was_asleep_between_looking_and_taking_does_not_take_a_number_that_was_passed(
    server: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it slept another one took the number and gave it back, and a third holds the next."""
    with leased(store_of(server, tmp_path), machine(tmp_path, "zero"), "ablation", "zero", never):
        pass
    create = ObjectStore.create
    with ExitStack() as third:

        def late(store: ObjectStore, name: str, data: bytes) -> bool:
            if b'"sleeper"' in data and not overtaken:
                overtaken.append(name)
                with leased(store_of(server, tmp_path), machine(tmp_path, "one"), "ablation", "one", never):
                    pass
                third.enter_context(
                    leased(store_of(server, tmp_path), machine(tmp_path, "two"), "ablation", "two", never)
                )
            return create(store, name, data)

        overtaken: list[str] = []
        monkeypatch.setattr(ObjectStore, "create", late)
        with (
            pytest.raises(StudyError, match=r"\(two\)"),
            leased(store_of(server, tmp_path), machine(tmp_path, "three"), "ablation", "sleeper", never),
        ):
            raise AssertionError("both run it")


@pytest.mark.slow
def test_a_driver_that_was_cut_off_while_another_took_over_is_stopped_when_it_is_back(
    server: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Exception] = []
    renew, cut_off = lease._Lease.renew, threading.Event()

    def renewed(held: lease._Lease) -> None:
        if held._facts["command"] != "first" or not cut_off.is_set():
            renew(held)

    monkeypatch.setattr(lease._Lease, "renew", renewed)
    one, two = (store_of(server, tmp_path) for _ in range(2))
    with leased(one, machine(tmp_path, "one"), "ablation", "first", told.append):
        cut_off.set()
        time.sleep(lease.LEASE_S + 1.2)
        with leased(two, machine(tmp_path, "two"), "ablation", "second", never):
            assert not told
            cut_off.clear()
            deadline = time.monotonic() + 10
            while not told and time.monotonic() < deadline:
                time.sleep(0.05)
    (error,) = told
    assert isinstance(error, StudyHaltedError)
    assert f"ablation was taken over in {server.uri}, by process {os.getpid()} on " in str(error)
    assert "(second)" in str(error) and "nothing that was finished is lost" in str(error)


def test_a_store_that_is_away_for_less_than_the_lease_costs_nobody_the_claim(server: Store, tmp_path: Path) -> None:
    with leased(store_of(server, tmp_path), machine(tmp_path, "one"), "ablation", "mine", never):
        server.refuses = 503
        time.sleep(0.6)
        server.refuses = None
        time.sleep(0.8)
        with (
            pytest.raises(StudyError),
            leased(store_of(server, tmp_path), machine(tmp_path, "two"), "ablation", "mine", never),
        ):
            raise AssertionError("both run it")


def test_a_store_that_does_not_heed_conditions_is_said_to_keep_nobody_away(
    server: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.conditional = False
    with leased(store_of(server, tmp_path), machine(tmp_path, "one"), "ablation", "mine", never):
        pass
    (said,) = [record.message for record in caplog.records]
    assert "the store lets an object be created twice" in said and "are not kept away" in said
