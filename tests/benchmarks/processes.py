"""Whole commands in processes of their own: wall time, memory, output."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import psutil

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = (str(ROOT / "study" / "launch.py"),)
# What must be equal where two ways of running a study are compared.
HASHES = ("row", "seed", "weights_sha256", "trajectory_sha256", "best_epoch", "macro_auc")


Memory = Literal["own", "family"]


@dataclass(frozen=True)
class Ran:
    """A command that ended well.

    Attributes:
        seconds: wall time.
        peak_bytes: the most memory that it held at a time, where that was watched, else 0.
        output: of stdout.
    """

    seconds: float
    peak_bytes: int
    output: str


def run_python(arguments: Sequence[str], *, watch: Memory | None = None) -> Ran:
    """Run Python with arguments in the project's root.

    Args:
        arguments: of the interpreter.
        watch: memory of the process alone ('own'), or of it and all its descendants, shared pages counted once.

    Raises:
        RuntimeError: it failed; carries the end of its output.
    """
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        started = time.perf_counter()
        process = subprocess.Popen([sys.executable, *arguments], stdout=output, stderr=errors, cwd=ROOT)
        memory = _PeakMemory(process.pid, watch) if watch else None
        code = process.wait()
        seconds = time.perf_counter() - started
        peak = memory.stop() if memory else 0
        output.seek(0)
        errors.seek(0)
        told = output.read()
        if code:
            raise RuntimeError(f"{' '.join(arguments)} ended with {code}: {told[-2000:]}{errors.read()[-2000:]}")
    return Ran(seconds, peak, told)


def launch(*arguments: str, watch: Memory | None = None) -> Ran:
    """Run the launcher."""
    return run_python([*LAUNCH, *arguments], watch=watch)


class _PeakMemory:
    """Samples a process from a thread until it is stopped."""

    def __init__(self, pid: int, watch: Memory) -> None:
        self._pid = pid
        self._peak = 0
        self._stopped = threading.Event()
        # The kernel keeps a process's own peak, so that is read cheaply and often; a family's must be added up.
        sample, pause = (self._own, 0.01) if watch == "own" else (self._family, 0.5)
        self._thread = threading.Thread(target=self._watch, args=(sample, pause), daemon=True)
        self._thread.start()

    def stop(self) -> int:
        self._stopped.set()
        self._thread.join()
        return self._peak

    def _watch(self, sample: Callable[[], int], pause: float) -> None:
        while not self._stopped.wait(pause):
            self._peak = max(self._peak, sample())

    def _own(self) -> int:
        try:
            lines = Path(f"/proc/{self._pid}/status").read_text(encoding="utf-8").splitlines()
        except OSError:  # it has just ended
            return 0
        return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

    def _family(self) -> int:
        try:
            parent = psutil.Process(self._pid)
            family = [parent, *parent.children(recursive=True)]
        except psutil.Error:
            return 0
        total = 0
        for process in family:
            with suppress(psutil.Error):  # it has ended meanwhile
                total += process.memory_full_info().pss
        return total


@dataclass(frozen=True)
class TimedRun:
    """A run of the launcher under a stopwatch, see `timed_launch`.

    Attributes:
        seconds: of the whole command.
        executor_seconds: from the first trial's start to the last one's end, libraries imported before.
        begins: seconds to build each trial and take it to its first state (not known of trials in other processes).
        afters: seconds of each epoch after its training and validation: state, results, what is dropped.
        units: of the study's header, as `--json` prints them.
        cells: cells.csv, by row and seed.
    """

    seconds: float
    executor_seconds: float
    begins: tuple[float, ...]
    afters: tuple[float, ...]
    units: dict[str, int]
    cells: pd.DataFrame


def launch_timed(storage: Path, *arguments: str) -> TimedRun:
    """Run a study with the stopwatch, on a storage folder."""
    record = storage / "stopwatch.json"
    ran = run_python(
        ["-m", "tests.benchmarks.timed_launch", str(record), *arguments, "--json", "--storage", str(storage)]
    )
    said = json.loads(ran.output.strip().splitlines()[-1])
    times: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
    return TimedRun(
        seconds=ran.seconds,
        executor_seconds=times["executor_seconds"],
        begins=tuple(times["begins"]),
        afters=tuple(times["afters"]),
        units=said["units"],
        cells=pd.read_csv(Path(said["report"]).parent / "cells.csv"),
    )


def same_bits(first: pd.DataFrame, second: pd.DataFrame) -> bool:
    """Whether two tables of cells hold the same hashes, epochs and test metric."""
    names = list(HASHES)
    return first[names].equals(second[names])


@contextmanager
def fresh_storage() -> Iterator[Path]:
    """An empty folder that is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        yield Path(folder)


def overrides(values: dict[str, Any]) -> list[str]:
    """Settings as the launcher's `-o` options."""
    return [part for key, value in values.items() for part in ("-o", f"{key}={json.dumps(value)}")]
