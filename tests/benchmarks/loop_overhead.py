"""What the loop costs over a plain PyTorch script that trains the same cell, and what averaged copies cost.

Both train in this process, epoch by epoch in turn, the order changing with every epoch, so that a drift of the
machine's speed meets both alike. Nothing is cached or shared: that is what a cell costs that shares nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from study.plan import Plan
from study.store import Store
from tests.benchmarks.measuring import Effort, Figure, Measured
from tests.benchmarks.plain_training import PlainTraining
from tests.benchmarks.processes import fresh_storage
from tests.studies_for_tests import TINY, planned
from trainables.activations import Activations
from trainables.data.opened import Data, Folders, open_data
from trainables.loop import Trajectory
from trainables.requests import CacheRequest, Observer, TrialRequest, Watch
from trainables.settings import Settings
from trainables.strategy import total_epochs
from trainables.task import Task, named_tensors
from trainables.trial import Trial
from trainables.workbench import Workbench

MOST_OVER_PLAIN, MOST_OF_FIVE = 0.05, 0.10
TOLERANCE = 1e-6  # between the weights of both at the end
DECAYS = (0.9, 0.95, 0.98, 0.99, 0.999)
# One cell of the embedded ablation with stages of half length: two head epochs say what twelve would.
FULL: dict[str, Any] = {"seeds": [0], "strategy.head_epochs": 2, "strategy.tune_epochs": 6}


@dataclass(frozen=True)
class Cell:
    """One cell to train, with its data open."""

    settings: Settings
    plan: Plan
    data: Data
    task: Task
    provenance: dict[str, str]


def loop_overhead(effort: Effort) -> Measured:
    """The full method's cell: our trial, with checkpoints and records, against the plain script."""
    chosen = {**TINY, "seeds": [0]} if effort.smallest else FULL
    rounds, gaps = [], []
    with fresh_storage() as storage:
        cell = open_cell(storage, chosen)
        for repeat in range(effort.repeats):
            store = Store(storage / f"run {repeat}", caches=False)
            plain, trial = PlainTraining(cell.settings, cell.data, 0), _trial(cell, store)
            rounds.append(_in_turn(plain.train_epoch, trial.step, _either(plain, trial)))
            gaps.append(_largest_gap(plain, trial))
    epochs = [pair for pairs in rounds for pair in pairs]
    steps = cell.plan.chains[0].material.train_images / cell.settings.optimiser.batch_size
    return Measured(
        {
            "over the plain loop": Figure(_median_over(epochs), "share", at_most=MOST_OVER_PLAIN),
            "plain step": Figure(1e3 * statistics.median(p for p, _ in epochs) / steps, "ms"),
            "largest difference of any weight": Figure(max(gaps), "", at_most=TOLERANCE),
        },
        {"overrides": chosen, "epochs_plain_and_ours_seconds": rounds},
    )


def averaging_overhead(effort: Effort) -> Measured:
    """Five averaged copies against none: the steps of stage 2, and apart from them the copies' own validation."""
    chosen = {**TINY, "seeds": [0]} if effort.smallest else FULL
    steps, whole = [], []
    with fresh_storage() as storage:
        cell = open_cell(storage, chosen)
        for _ in range(effort.repeats):
            none, five = _trajectory(cell, ()), _trajectory(cell, DECAYS)
            inner: tuple[list[float], list[float]] = ([], [])
            for trajectory, seconds in zip((none, five), inner, strict=True):
                trajectory._train_steps = _timed(trajectory._train_steps, seconds)  # type: ignore[method-assign]
            head = cell.settings.strategy.head_epochs
            whole += _in_turn(none.train_epoch, five.train_epoch, _ended(five))[head:]
            steps += list(zip(*inner, strict=True))[head:]
    return Measured(
        {
            "five decays, over the steps without": Figure(_median_over(steps), "share", at_most=MOST_OF_FIVE),
            "with their validation, over the epoch without": Figure(_median_over(whole), "share"),
        },
        {"overrides": chosen, "steps_none_and_five_seconds": steps, "epochs_none_and_five_seconds": whole},
    )


def open_cell(storage: Path, chosen: dict[str, Any]) -> Cell:
    """The cell of the last row, the full method, with threads set as a trial sets them."""
    plan = planned(storage, chosen)
    settings = plan.chains[-1].cell.settings
    torch.set_num_threads(plan.compute.threads)
    store = Store(storage)
    folders = Folders(store.phantoms, store.images, store.splits)
    data = open_data(settings.dataset, folders)
    task, provenance = Workbench(folders).task(settings)
    return Cell(settings, plan, data, task, provenance)


def _trial(cell: Cell, store: Store) -> Trial:
    chain = cell.plan.chains[-1]
    request = TrialRequest(
        name="one cell",
        settings=cell.settings,
        seed=0,
        keys=chain.keys,
        first=0,
        watches=(Watch(chain.observer, (chain.leaf,)),),
        keep=frozenset(),
        cache=CacheRequest("none", ()),
        compute=cell.plan.compute,
    )
    return Trial(request, cell.task, store, cell.provenance)


def _trajectory(cell: Cell, decays: Sequence[float]) -> Trajectory:
    device, compute = torch.device("cpu"), cell.plan.compute
    served = Activations(
        cell.task, compute, device, CacheRequest("none", ()), None, "none", cell.settings.optimiser.batch_size
    )
    observers = [Observer(decay, cell.settings.ema.tau, None) for decay in decays]
    averages = {o.copy: (decay, o.tau) for o, decay in zip(observers, decays, strict=True)}
    return Trajectory(cell.task, cell.settings, 0, compute, device, served, averages)


def _in_turn(
    first: Callable[[], object], second: Callable[[], object], over: Callable[[], bool]
) -> list[tuple[float, float]]:
    """Seconds of each call of both until it is over, the order changing with every pair."""
    pairs: list[tuple[float, float]] = []
    while not over():
        ahead, behind = (first, second) if len(pairs) % 2 == 0 else (second, first)
        seconds = [_seconds(ahead), _seconds(behind)]
        pairs.append((seconds[0], seconds[1]) if ahead is first else (seconds[1], seconds[0]))
    return pairs


def _either(plain: PlainTraining, trial: Trial) -> Callable[[], bool]:
    return lambda: plain.done or trial.done


def _ended(trajectory: Trajectory) -> Callable[[], bool]:
    return lambda: trajectory.epoch >= total_epochs(trajectory.settings.strategy)


def _seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def _timed(action: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    def timed(*arguments: Any) -> Any:
        started = time.perf_counter()
        result = action(*arguments)
        seconds.append(time.perf_counter() - started)
        return result

    return timed


def _median_over(pairs: Sequence[tuple[float, float]]) -> float:
    """Median over pairs of (second − first) / first."""
    return statistics.median(second / first for first, second in pairs) - 1


def _largest_gap(plain: PlainTraining, trial: Trial) -> float:
    """Largest difference between the weights of both.

    Raises:
        RuntimeError: one has trained longer than the other.
    """
    if plain.epoch != trial.epoch:
        raise RuntimeError(f"the plain loop ended after {plain.epoch} epochs, the trial after {trial.epoch}")
    theirs, ours = plain.named_tensors(), dict(named_tensors(trial._trajectory.model))
    return max(float((tensor.detach() - theirs[name]).abs().max()) for name, tensor in ours.items())
