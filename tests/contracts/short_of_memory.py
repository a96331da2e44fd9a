"""Run a small study through Ray on a node that is short of memory for a while; the outcome as JSON.

A program of its own, because Ray reads the limits of its memory monitor once, when it is imported.

    python tests/contracts/short_of_memory.py STORAGE
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import psutil

ROOM, TAKEN = 4_000_000_000, 5_000_000_000  # bytes above what is in use now: the monitor's limit, and what is taken


def main(storage: Path) -> None:
    """Take memory when the first trial of stage 2 has an epoch, give it back when a worker was lost for it."""
    memory = psutil.virtual_memory()
    limit = (memory.total - memory.available + ROOM) / memory.total
    os.environ.update({"RAY_memory_usage_threshold": str(limit), "RAY_memory_monitor_refresh_ms": "100"})
    from study.schedule import Node
    from tests.contracts.test_executors import ONE_SEED, Heard, digests, execute
    from tests.studies_for_tests import planned
    from trainables.results import EpochRecord

    taken: list[bytearray] = []
    begun: list[str] = []

    class ShortOfMemory(Heard):
        def retried(self, node: Node, reason: str) -> None:
            if "memory" in reason:
                taken.clear()
            super().retried(node, reason)

    def take(node: Node, record: EpochRecord) -> None:
        if record.epoch == 2 and not begun:
            begun.append(node.name)
            taken.append(bytearray(b"\1") * TAKEN)

    plan = planned(storage, {**ONE_SEED, "execution.max_failures": 10})
    heard, _, session = execute("ray", plan, storage, take, kind_of_listener=ShortOfMemory)
    told = {"complete": session.close()[1], "reasons": heard.reasons, "digests": digests(session)}
    print(json.dumps(told))


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    main(Path(sys.argv[1]))
