"""What a person sees while a study runs: one live display, or plain lines where there is no terminal."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from study.chains import the_task
from study.schedule import Node, Schedule

if TYPE_CHECKING:
    from trainables.results import EpochRecord


PLAIN_SECONDS = 30.0  # without a terminal: between two lines on trials that are running
MEASURED = 0.05  # of the units: before, set-up and caches take the time, and an estimate would be days too long


class Progress:
    """Trials done, running and failed, the epoch and metric of each running one, and the time left."""

    def __init__(self, console: Console, schedule: Schedule) -> None:
        self._console = console
        self._schedule = schedule
        self._metrics = {study.name: the_task(study).main_metric for study in schedule.studies}
        self._running: dict[Node, EpochRecord | None] = {}
        self._started = time.monotonic()
        self._done_units = 0.0
        self._epochs: dict[Node, int] = {}
        self._spoke = self._started
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=4, transient=True)

    def __enter__(self) -> Progress:
        waiting = len(self._schedule.nodes) - self._schedule.count("done", "skipped")
        if self._console.is_terminal:
            self._live.start()
        else:
            self._plain(f"{waiting} trials to run; starting workers")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def started(self, node: Node) -> None:
        """A trial was given to a worker."""
        self._running[node] = None

    def epoch(self, node: Node, record: EpochRecord) -> None:
        """A trial has finished an epoch."""
        self._running[node] = record
        length = node.last - node.first
        if record.epoch > node.first:
            self._done_units += node.units / length
            self._epochs[node] = self._epochs.get(node, 0) + 1
        for event in record.events:
            self._say(f"note {node.name}: {event}", "yellow")
        if not self._console.is_terminal and time.monotonic() - self._spoke >= PLAIN_SECONDS:
            self._plain(f"{self._summary()} · {self._line(node, record).strip()}")

    def finished(self, node: Node) -> None:
        """A trial has ended well; epochs that early stopping left out need no time."""
        length = node.last - node.first
        self._done_units += node.units * (length - self._epochs.get(node, 0)) / length
        self._close(node)

    def retried(self, node: Node, reason: str) -> None:
        """A trial's worker died; it is started again."""
        self._say(f"again {node.name}: {reason}", "yellow")
        self._running.pop(node, None)

    def failed(self, node: Node, error: str) -> None:
        """A trial cannot be finished."""
        self._say(f"failed {node.name}: {error}", "red")
        self._close(node)

    def _close(self, node: Node) -> None:
        self._running.pop(node, None)
        if not self._console.is_terminal:
            self._plain(f"{self._summary()} · ended: {self._short(node)}")

    def _say(self, text: str, style: str) -> None:
        self._console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)

    def _plain(self, text: str) -> None:
        """A line of a log, which is not broken."""
        self._spoke = time.monotonic()
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _summary(self) -> str:
        return f"{self._counts()} · {_clock(time.monotonic() - self._started)} · {self._left()}"

    def _counts(self) -> str:
        schedule = self._schedule
        done = schedule.count("done", "skipped")
        failed = schedule.count("failed")
        return f"{done}/{len(schedule.nodes)} trials" + (f", {failed} failed" if failed else "")

    def _left(self) -> str:
        total = self._schedule.total_units
        elapsed = time.monotonic() - self._started
        if total <= 0 or self._done_units < MEASURED * total:
            return "time left: measuring"
        seconds = max(0.0, elapsed * (total / self._done_units - 1))
        return f"about {_clock(seconds)} left"

    def _render(self) -> Table:
        grid = Table.grid(padding=(0, 1), expand=True)
        grid.add_column(ratio=1)
        total = self._schedule.total_units or 1
        head = Table.grid(padding=(0, 1), expand=True)
        head.add_column(ratio=1)
        head.add_column(justify="right")
        head.add_row(ProgressBar(total=total, completed=self._done_units), self._summary())
        grid.add_row(head)
        if not self._running and not self._epochs:
            grid.add_row(Text("  starting workers"))
        for node, record in self._running.items():
            grid.add_row(Text(self._line(node, record), overflow="ellipsis", no_wrap=True))
        return grid

    def _line(self, node: Node, record: EpochRecord | None) -> str:
        name = self._short(node)
        if record is None:
            return f"  {name}: no epoch yet"
        metric = self._metrics[node.plan.study.name]
        value = record.metrics.get(f"val/raw/{metric}")
        shown = "" if value is None else f", val {metric} {value:.3f}"
        return f"  epoch {record.epoch}/{node.last}{shown}  {name}"

    def _short(self, node: Node) -> str:
        """A trial without its epochs, and without its study where there is one alone."""
        name = node.name.split(" · epochs")[0]
        return name.split(": ", 1)[-1] if len(self._metrics) == 1 else name


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
