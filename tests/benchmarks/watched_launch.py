"""The launcher with an eye on its driver: `python -m tests.benchmarks.watched_launch RECORD.json ARGUMENTS…`.

Nothing of the run is changed: what workers report of their steps is written down as the searcher hears it, and the
driver's own memory and processor time are sampled from a thread. The record is written when the command ends.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from study.cli import main
from study.cluster import ray_environment

SAMPLE_SECONDS = 0.5


class Watch:
    """Steps of all workers, and the driver's memory."""

    def __init__(self) -> None:
        self._steps: list[tuple[float, int, float]] = []  # when it was heard, the worker's process, its seconds
        self._samples: list[tuple[float, int, float]] = []  # when, resident bytes, processor seconds
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def attach(self) -> None:
        """Watch from now on; ray is imported when its environment is ready, and not before."""
        prepare = ray_environment.prepare_environment

        def prepared(*arguments: Any, **named: Any) -> None:
            prepare(*arguments, **named)
            self._listen()

        ray_environment.prepare_environment = prepared
        self._thread.start()

    def write(self, record: Path) -> None:
        """Stop, and write what was seen."""
        self._ended.set()
        self._thread.join()
        record.write_text(json.dumps({"steps": self._steps, "samples": self._samples}), encoding="utf-8")

    def _listen(self) -> None:
        from study.ray_executor import StageSearcher

        def listened(name: str) -> None:
            hear = getattr(StageSearcher, name)

            def heard(searcher: Any, trial_id: str, result: dict[str, Any] | None = None, **named: Any) -> Any:
                if result is not None:
                    self._steps.append((time.time(), result["pid"], result["time_this_iter_s"]))
                return hear(searcher, trial_id, result, **named)

            setattr(StageSearcher, name, heard)

        if not hasattr(StageSearcher, "watched"):
            StageSearcher.watched = True  # type: ignore[attr-defined]  # the driver makes its executor twice
            listened("on_trial_result")
            listened("on_trial_complete")

    def _sample(self) -> None:
        driver = psutil.Process()
        while not self._ended.wait(SAMPLE_SECONDS):
            times = driver.cpu_times()
            self._samples.append((time.time(), driver.memory_info().rss, times.user + times.system))


if __name__ == "__main__":
    watch = Watch()
    watch.attach()
    record = Path(sys.argv[1])
    sys.argv = ["launch.py", *sys.argv[2:]]
    try:
        main()
    finally:
        watch.write(record)
