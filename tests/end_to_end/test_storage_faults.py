"""Storage and ledger in trouble, for real: full and read-only disks, damaged files, absent servers, two drivers."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from fault_checks import EpochsSaved, every_run_once, prepared, same_results

from study.documents import StudyError
from tests.launches import Launch, completed, launched
from tests.mlflow_servers import Server
from tests.postgres_servers import PASSWORD, postgres
from tests.postgres_servers import why_not as no_postgres
from tests.studies_for_tests import ROOT, Ran, run_study
from trainables.data.index import DataError

HOLD = """
import sqlite3, sys, time
database = sqlite3.connect(sys.argv[1], isolation_level=None)
database.execute("PRAGMA busy_timeout = 60000")
database.execute("BEGIN EXCLUSIVE")
print("held", flush=True)
time.sleep(float(sys.argv[2]))
database.execute("ROLLBACK")
"""


def trains(storage: Path) -> Callable[[], bool]:
    """Whether the first state of a trajectory has been saved."""
    return lambda: any(storage.glob("states/*"))


def said_once(output: str, *parts: str) -> None:
    """One line has all the parts, and there is no traceback."""
    lines = [line for line in output.splitlines() if all(part in line for part in parts)]
    assert len(lines) == 1, f"{len(lines)} lines with {parts} in:\n{output}"
    assert "Traceback" not in output


# ------------------------------------------------------------------------------------------------------- full disks


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 40 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(folder)], check=False)
    if mounted.returncode != 0:
        pytest.skip("mounting a small file system needs the right to do so, as root has it")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path, leave: int = 0) -> Path:
    """Take what is free, but for some bytes; whoever writes at the same time may be quicker, so try again."""
    ballast = disk / "ballast"
    with ballast.open("ab", buffering=0) as file:
        for _ in range(100):
            free = shutil.disk_usage(disk).free - leave
            try:
                os.posix_fallocate(file.fileno(), 0, max(4096, file.tell() + free - 4096))
                break
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
    return ballast


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["local", "ray"])
def test_a_disk_that_fills_up_stops_the_study_with_one_message_and_it_goes_on_with_room(
    executor: str, undisturbed: Ran, disk: Path
) -> None:
    storage = prepared(disk / "storage", undisturbed)
    with launched(storage, executor=executor) as launch:
        assert launch.until(trains(storage), 600)
        ballast = fill(disk)
        assert launch.wait(300) == 1, launch.output
        assert launch.leaves_nothing_behind(within=30)
    said_once(
        launch.output, f"--storage {storage}", "No space left on device", "make room", "run the same command again"
    )
    ballast.unlink()
    again = completed(storage, executor=executor)
    assert again.process.returncode == 0, again.output
    assert "damaged" not in again.output
    same_results(storage, undisturbed)
    every_run_once(f"sqlite:///{storage / 'mlflow.db'}", undisturbed.plan)


def test_a_disk_that_is_full_from_the_start_is_refused_before_anything_is_drawn(disk: Path) -> None:
    fill(disk)
    started = time.monotonic()
    launch = completed(disk / "storage")
    assert launch.process.returncode == 2
    assert time.monotonic() - started < 30
    said_once(launch.output, "--storage", "No space left on device", "make room")


@pytest.mark.slow
@pytest.mark.parametrize("leave", [13_000_000], ids=["decoding"])
def test_a_disk_that_fills_up_while_data_is_prepared_is_one_message(leave: int, undisturbed: Ran, disk: Path) -> None:
    ballast = fill(disk, leave)
    launch = completed(disk / "storage")
    assert launch.process.returncode == 2, launch.output
    said_once(launch.output, str(disk / "storage"), "make room")
    ballast.unlink()
    assert completed(disk / "storage").process.returncode == 0
    same_results(disk / "storage", undisturbed)


@pytest.mark.slow
def test_a_report_that_finds_no_room_says_that_the_results_are_safe_and_how_to_write_it(
    undisturbed: Ran, disk: Path
) -> None:
    storage = disk / "storage"
    shutil.copytree(undisturbed.storage, storage)
    shutil.rmtree(storage / "ablation", ignore_errors=True)
    command = [sys.executable, "study/launch.py", "report", "ablation", "--storage", str(storage)]
    ballast = fill(disk, leave=20_000)
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert told.returncode == 1, told.stdout + told.stderr
    said_once(told.stderr, "report", "make room", f"python study/launch.py report ablation --storage {storage}")
    ballast.unlink()
    assert subprocess.run(command, cwd=ROOT, capture_output=True, timeout=300, check=False).returncode == 0
    assert (storage / "ablation" / "report" / "report.html").stat().st_size > 1000


@pytest.mark.slow
def test_a_full_folder_for_rays_own_files_is_named_instead_of_hanging(disk: Path, tmp_path: Path) -> None:
    launch = completed(tmp_path / "storage", executor="ray", environment={"TMPDIR": str(disk)})
    assert launch.process.returncode == 2, launch.output
    said_once(launch.output, str(disk), "Ray's logs and sockets", "TMPDIR")


def test_a_read_only_storage_is_refused_before_training(disk: Path) -> None:
    storage = disk / "storage"
    storage.mkdir()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    started = time.monotonic()
    launch = completed(storage)
    assert launch.process.returncode == 2
    assert time.monotonic() - started < 30  # 10 s on a machine that does nothing else
    said_once(launch.output, f"--storage {storage}", "read-only file system", "give a writable folder")


# -------------------------------------------------------------------------------------------------------- damage


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[2 * len(data) // 3] ^= 16
    path.write_bytes(data)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "patterns", "said"),
    [
        (cut, ["states/{0}*/tensors.safetensors", "states/{1}*/state.json"], ["the state {0}", "the state {1}"]),
        (
            flip,
            ["images/*/pixels-*.u8", "activations/*/data.npy"],
            ["decoding", "of the cache|the cache .* is damaged"],
        ),
        (cut, ["images/*/state.npz", "activations/*/rows.npz"], ["decoding", "the cache .* is damaged"]),
    ],
    ids=["states", "caches", "indices of caches"],
)
def test_damage_to_what_training_starts_from_is_said_and_made_good(
    damage: Callable[[Path], None],
    patterns: list[str],
    said: list[str],
    undisturbed: Ran,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    storage = tmp_path / "storage"
    shutil.copytree(undisturbed.storage, storage)
    shutil.rmtree(storage / "results")  # all must be trained again, from what else there is
    heads = sorted(path.name[:12] for path in storage.glob("states/*"))
    assert len(heads) == 2, "one a seed"
    for pattern in patterns:
        (path,) = storage.glob(pattern.format(*heads))
        damage(path)
    if "activations/*/data.npy" in patterns or "activations/*/rows.npz" in patterns:
        shutil.rmtree(storage / "states")  # or nothing would read the pooled vectors
    assert run_study(storage).complete
    for words in said:
        assert re.search(words.format(*heads), caplog.text), words
    same_results(storage, undisturbed)


@pytest.mark.slow
def test_damaged_results_are_said_and_made_again(
    undisturbed: Ran, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    storage = tmp_path / "storage"
    shutil.copytree(undisturbed.storage, storage)
    results = sorted(storage.glob("results/*/*"))
    damaged = {"result.json": cut, "predictions.npz": flip, "weights.safetensors": flip}
    for result, (name, damage) in zip(results, damaged.items(), strict=False):
        damage(result / name)
    assert run_study(storage).complete
    assert len(re.findall("the result .* is damaged .* it is deleted and made again", caplog.text)) == 3
    same_results(storage, undisturbed)


@pytest.mark.slow
def test_a_damaged_split_is_refused_and_named(undisturbed: Ran, tmp_path: Path) -> None:
    storage = tmp_path / "storage"
    shutil.copytree(undisturbed.storage, storage)
    (split,) = storage.glob("splits/*.csv")
    flip(split)
    with pytest.raises((StudyError, DataError), match="the split file is damaged or was edited") as caught:
        run_study(storage)
    assert str(split) in str(caught.value)


# ----------------------------------------------------------------------------------------------------- the ledger


AWAY = 60.0  # seconds


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_training_goes_on_while_the_mlflow_server_is_away_for_a_minute(undisturbed: Ran, tmp_path: Path) -> None:
    server = Server(tmp_path)
    server.start()
    try:
        trained_while_away(server, server.stop, server.start, undisturbed, tmp_path / "storage")
    finally:
        server.stop()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(no_postgres() is not None, reason=str(no_postgres()))
def test_training_goes_on_while_the_database_of_the_mlflow_server_is_away_for_a_minute(
    undisturbed: Ran, tmp_path: Path
) -> None:
    with postgres() as database:
        server = Server(tmp_path, database.url)
        server.start()
        try:
            crash = partial(database.stop, at_once=True)
            said = trained_while_away(server, crash, database.start, undisturbed, tmp_path / "storage")
            assert PASSWORD not in said
        finally:
            server.stop()


def trained_while_away(
    server: Server,
    stop: Callable[[], None],
    start: Callable[[], None],
    undisturbed: Ran,
    storage: Path,
) -> str:
    """Take the ledger away in the middle of a study; what the study said."""
    saved = EpochsSaved(prepared(storage, undisturbed))
    with launched(storage, "--tracking-uri", server.uri) as launch:
        assert launch.until(trains(storage), 600)
        stop()
        before = saved.total
        time.sleep(AWAY)
        trained = saved.total - before
        assert launch.running, "it waits for the ledger"
        start()
        assert launch.wait(600) == 0, launch.output
    saved.stop()
    assert trained >= 1, "epochs were finished meanwhile"
    away, back = (launch.output.count(f"the ledger is {where}") for where in ("away (", "back after "))
    assert 1 <= away == back <= 2, "said once; twice where a server that stops still answers in between"
    assert "Traceback" not in launch.output
    same_results(storage, undisturbed, server.uri)
    every_run_once(server.uri, undisturbed.plan)
    return launch.output


@pytest.mark.slow
def test_training_goes_on_while_another_process_locks_the_ledger(undisturbed: Ran, tmp_path: Path) -> None:
    storage = prepared(tmp_path / "storage", undisturbed)
    saved = EpochsSaved(storage)
    with launched(storage) as launch:
        assert launch.until(trains(storage), 600)
        command = [launch.process.args[0], "-c", HOLD, str(storage / "mlflow.db"), "12"]  # type: ignore[index]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
            assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
            before = saved.total
            holder.wait()
        trained = saved.total - before
        assert launch.wait(600) == 0, launch.output
    saved.stop()
    assert trained >= 1, "epochs were finished meanwhile"
    same_results(storage, undisturbed)
    every_run_once(f"sqlite:///{storage / 'mlflow.db'}", undisturbed.plan)


# ---------------------------------------------------------------------------------------------------- two drivers


def test_a_second_driver_of_a_study_is_told_who_runs_it_at_once(tmp_path: Path) -> None:
    storage = tmp_path / "storage"
    with launched(storage) as first:
        assert first.until(lambda: any(storage.glob("locks/*.json")))
        started = time.monotonic()
        second = completed(storage)
        assert second.process.returncode == 2
        assert time.monotonic() - started < 30
        said_once(
            second.output, "ablation is being run", f"by process {first.process.pid} on ", "since 20", "wait for it"
        )
        planning = completed(storage, "--plan")
        assert planning.process.returncode == 0, "a plan needs no lock"
        assert first.running
        first.send(signal.SIGKILL)
        first.wait()
    third = Launch(storage)
    try:
        assert third.until(lambda: "preparing" in third.output), "the system has freed the lock of the killed driver"
    finally:
        third.end()
