"""What a person sees of a run: a display that fits a terminal of 80 columns, or whole lines in a log."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console
from small_studies import document, planned

from study import progress as module
from study.progress import Progress
from study.schedule import Node, Schedule
from trainables.results import EpochRecord

ROWS = [
    {"name": "A row with a name that is much too long for one line of a terminal of eighty columns, in all respects"},
    {"name": "[bold]not markup[/bold]", "set": {"strategy.depth": 4}},
]


@pytest.fixture
def schedule(tmp_path: Path) -> Schedule:
    plan = planned(tmp_path, document(ROWS, seeds=[0, 1]))
    return Schedule(plan, plan.chains, lambda chain: False, lambda key: False)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Seconds that pass when the test says so."""
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    yield now


def record(node: Node, epoch: int, events: tuple[str, ...] = ()) -> EpochRecord:
    fields = dict.fromkeys(EpochRecord.__dataclass_fields__) | {
        "epoch": epoch,
        "metrics": {"val/raw/macro_auc": 0.71234},
        "events": list(events),
    }
    return EpochRecord(**fields)  # type: ignore[arg-type]


def take(schedule: Schedule, progress: Progress) -> Node:
    node = schedule.next()
    assert node is not None
    progress.started(node)
    return node


def finish(schedule: Schedule, progress: Progress, node: Node) -> None:
    for epoch in range(node.request.first + 1, node.request.last + 1):
        progress.epoch(node, record(node, epoch))
    schedule.done(node)
    progress.finished(node)


def test_a_log_gets_a_whole_line_for_every_trial_that_ends(schedule: Schedule, clock: list[float]) -> None:
    out = io.StringIO()
    with Progress(Console(file=out, width=80), schedule) as progress:
        for _ in schedule.nodes:
            clock[0] += 5
            finish(schedule, progress, take(schedule, progress))
    lines = out.getvalue().splitlines()
    n = len(schedule.nodes)
    assert lines[0] == f"{n} trials to run; starting workers"
    assert [line.split(" · ")[0] for line in lines[1:]] == [f"{i}/{n} trials" for i in range(1, n + 1)]
    assert all(" · ended: " in line and line.endswith(("seed 0", "seed 1")) for line in lines[1:])
    assert any("[bold]not markup[/bold]" in line for line in lines)
    assert "\x1b" not in out.getvalue()


def test_a_log_hears_of_a_long_trial_twice_a_minute_and_not_of_every_epoch(
    schedule: Schedule, clock: list[float]
) -> None:
    out = io.StringIO()
    with Progress(Console(file=out, width=80), schedule) as progress:
        node = take(schedule, progress)
        for second in range(90):
            clock[0] += 1
            progress.epoch(node, record(node, 1 + second % 2))
    lines = out.getvalue().splitlines()[1:]
    assert len(lines) == 3
    assert all("epoch " in line and "val macro_auc 0.712" in line and " left" in line for line in lines)


def test_the_time_left_is_told_once_a_twentieth_of_the_units_is_done(schedule: Schedule, clock: list[float]) -> None:
    for node in schedule.nodes:
        node.units = 1 if node.children else 100
    total = sum(node.units for node in schedule.nodes)
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    progress = Progress(console, schedule)
    heads = [take(schedule, progress) for node in schedule.nodes if node.children]
    for node in heads:
        finish(schedule, progress, node)
    clock[0] += 100
    assert "time left: measuring" in shown(console, progress)  # 100 s for hardly any units say nothing of the rest
    finish(schedule, progress, take(schedule, progress))
    left = int(100 * (total / (len(heads) + 100) - 1))
    assert f"about {left // 60}:{left % 60:02d} left" in shown(console, progress)


def test_notes_restarts_and_failures_are_whole_lines_that_name_the_trial(schedule: Schedule) -> None:
    out = io.StringIO()
    reason = "its worker died: " + "x" * 100
    with Progress(Console(file=out, width=80), schedule) as progress:
        node = take(schedule, progress)
        progress.epoch(node, record(node, 1, events=("activations are recomputed",)))
        progress.retried(node, reason)
        schedule.failed(node, reason)
        progress.failed(node, reason)
    lines = out.getvalue().splitlines()
    assert f"note {node.name}: activations are recomputed" in lines
    assert f"again {node.name}: {reason}" in lines
    assert f"failed {node.name}: {reason}" in lines
    assert "failed" in lines[-1]


def test_the_display_fits_eighty_columns_with_one_line_a_running_trial(schedule: Schedule, clock: list[float]) -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    progress = Progress(console, schedule)
    assert "starting workers" in shown(console, progress)
    first, second = take(schedule, progress), take(schedule, progress)
    clock[0] += 61
    progress.epoch(first, record(first, first.request.first + 1))
    lines = shown(console, progress).splitlines()
    assert len(lines) == 3
    assert all(len(line) <= 80 for line in lines)
    assert f"0/{len(schedule.nodes)} trials · 1:01 · time left: " in lines[0]
    assert f"epoch {first.request.first + 1}/{first.request.last}, val macro_auc 0.712" in lines[1]
    assert lines[1].rstrip().endswith("…")
    assert second.request.first == 0


def shown(console: Console, progress: Progress) -> str:
    with console.capture() as captured:
        console.print(progress._render())
    return captured.get().strip("\n")
