"""The launcher with a stopwatch on its executor: `python -m tests.benchmarks.timed_launch RECORD.json ARGUMENTS…`.

Nothing of the run is changed but the clock reading around three calls; the record is written when the executor ends.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from study.cli import main
from study.executors import LocalExecutor
from trainables.loop import Trajectory
from trainables.trial import Trial


class Stopwatch:
    """Durations of trials' beginnings, of what follows each epoch, and of the whole."""

    def __init__(self, record: Path) -> None:
        self._record = record
        self._begins: list[float] = []
        self._steps: list[float] = []
        self._epochs: list[float] = []

    def attach(self) -> None:
        """Time the calls from now on."""
        _time(Trial, "__init__", self._begins.append)
        _time(Trial, "step", self._steps.append)
        _time(Trajectory, "train_epoch", self._epochs.append)
        _time(LocalExecutor, "run", self._write)

    def _write(self, executor_seconds: float) -> None:
        afters = [step - epoch for step, epoch in zip(self._steps, self._epochs, strict=True)]
        record = {"executor_seconds": executor_seconds, "begins": self._begins, "afters": afters}
        self._record.write_text(json.dumps(record), encoding="utf-8")


def _time(owner: type, name: str, tell: Callable[[float], None]) -> None:
    """Tell how many seconds each call of a method takes."""
    action = getattr(owner, name)

    def timed(*arguments: Any, **named: Any) -> Any:
        started = time.perf_counter()
        result = action(*arguments, **named)
        tell(time.perf_counter() - started)
        return result

    setattr(owner, name, timed)


if __name__ == "__main__":
    Stopwatch(Path(sys.argv[1])).attach()
    sys.argv = ["launch.py", *sys.argv[2:]]
    main()
