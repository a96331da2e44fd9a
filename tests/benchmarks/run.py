"""Measure what the design promises: `python -m tests.benchmarks.run [NAME …] [--repeats N] [--json FILE]`.

Each measurement is a whole command in a process of its own, on fresh storage, compared with its counterpart in turn
(A B A B …) so that a drift of the machine's speed meets both; medians are reported.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import psutil

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = [sys.executable, str(ROOT / "study" / "launch.py")]
HASHES = ["row", "seed", "weights_sha256", "trajectory_sha256", "best_epoch", "macro_auc"]


@dataclass(frozen=True)
class Measured:
    """A command's wall time and the most memory its processes held together (proportional set size, bytes)."""

    seconds: float
    peak_bytes: int


def measure(arguments: list[str]) -> Measured:
    """Run the launcher with arguments.

    Raises:
        RuntimeError: it failed; carries the end of its output.
    """
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen([*LAUNCH, *arguments], stdout=output, stderr=subprocess.STDOUT, cwd=ROOT)
        peak = _PeakMemory(process.pid)
        code = process.wait()
        seconds = time.perf_counter() - started
        if code:
            output.seek(0)
            raise RuntimeError(f"{' '.join(arguments)} ended with {code}: {output.read()[-2000:]}")
    return Measured(seconds, peak.stop())


class _PeakMemory:
    """Samples the memory of a process and all its descendants; shared pages count once (PSS)."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._peak = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        self._stopped.set()
        self._thread.join()
        return self._peak

    def _sample(self) -> None:
        while not self._stopped.wait(0.5):
            total = 0
            try:
                family = [self._root, *self._root.children(recursive=True)]
            except psutil.Error:
                continue
            for process in family:
                try:
                    total += process.memory_full_info().pss
                except psutil.Error:
                    continue
            self._peak = max(self._peak, total)


def sharing(repeats: int) -> dict[str, Any]:
    """The embedded ablation, 12 cells, in one process: shared against every cell alone; and whether all bits agree."""
    shared, alone, equal, units = [], [], True, {}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as a, tempfile.TemporaryDirectory() as b:
            base = ["ablation", "--executor", "local"]
            shared.append(measure([*base, "--storage", a]).seconds)
            alone.append(measure([*base, "--no-sharing", "--storage", b]).seconds)
            tables = [pd.read_csv(Path(x) / "ablation" / "report" / "cells.csv")[HASHES] for x in (a, b)]
            equal = equal and tables[0].equals(tables[1])
            units = json.loads(_output(["ablation", "--plan", "--json", "--storage", a]))["units"]
    gain = statistics.median(y / x for x, y in zip(shared, alone, strict=True))
    expected = units["alone"] / units["shared"]
    return {
        "cells": 12,
        "bit_identical": equal,
        "shared_seconds": statistics.median(shared),
        "alone_seconds": statistics.median(alone),
        "gain": gain,
        "gain_in_units": expected,
        "gain_share": gain / expected,
    }


def embedded(repeats: int) -> dict[str, Any]:
    """The main job as users run it: the embedded ablation through Ray on this machine, from command to table."""
    runs = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as storage:
            runs.append(measure(["ablation", "--storage", storage]))
            again = measure(["ablation", "--storage", storage]).seconds
    return {
        "seconds": statistics.median(r.seconds for r in runs),
        "peak_gigabytes": max(r.peak_bytes for r in runs) / 1e9,
        "second_run_seconds": again,
    }


def smoke(repeats: int) -> dict[str, Any]:
    """The smallest honest run, through Ray."""
    seconds = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as storage:
            seconds.append(measure(["ablation", "--smoke", "--storage", storage]).seconds)
    return {"seconds": statistics.median(seconds)}


def plan(repeats: int) -> dict[str, Any]:
    """`--plan` of the embedded default, and `--help`."""
    with tempfile.TemporaryDirectory() as storage:
        planned = [measure(["ablation", "--plan", "--json", "--storage", storage]).seconds for _ in range(repeats)]
    helped = [measure(["--help"]).seconds for _ in range(repeats)]
    return {"plan_seconds": statistics.median(planned), "help_seconds": statistics.median(helped)}


BENCHMARKS: dict[str, tuple[Callable[[int], dict[str, Any]], int]] = {
    "plan": (plan, 5),
    "smoke": (smoke, 1),
    "embedded": (embedded, 1),
    "sharing": (sharing, 1),
}


def _output(arguments: list[str]) -> str:
    return subprocess.run([*LAUNCH, *arguments], check=True, capture_output=True, text=True, cwd=ROOT).stdout


def _machine() -> dict[str, Any]:
    return {
        "cores": os.cpu_count(),
        "memory_gigabytes": round(psutil.virtual_memory().total / 1e9, 1),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def main() -> None:
    """Run the named benchmarks, all by default, and print their figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}")
    parser.add_argument("--repeats", type=int, help="runs of each command")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args()
    unknown = set(options.names) - set(BENCHMARKS)
    if unknown:
        parser.error(f"unknown benchmark {', '.join(sorted(unknown))}; expected some of {', '.join(BENCHMARKS)}")
    figures: dict[str, Any] = {"machine": _machine()}
    for name in options.names or BENCHMARKS:
        run, repeats = BENCHMARKS[name]
        figures[name] = run(options.repeats or repeats)
        print(json.dumps({name: figures[name]}, indent=2), flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
