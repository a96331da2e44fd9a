"""What one worker runs: a chain of epochs of one trajectory, for all the observers that watch it.

A trial starts from the deepest state of its chain that the store holds, trains epoch by epoch, saves the state after
each, follows every observer's validation metric, and writes an observer's result when its patience or its epochs are
over: so a killed trial loses at most one epoch, and running it again is how it is resumed.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from trainables import device
from trainables.activations import Activations
from trainables.device_memory import GPU_MEMORY
from trainables.loop import DivergedError, State, Trajectory
from trainables.requests import CacheRequest, Observer, TrialRequest, Watch
from trainables.results import CellResult, EpochRecord, TrainingError
from trainables.stopping import Followed, follow
from trainables.task import Task, weights_sha256

AwayTask = tuple[Task, str]  # the same task on other images, and the digest of their contents


@dataclass
class Checkpoint:
    """A trajectory's state with what was seen on the way: enough to go on and to choose epochs.

    Attributes:
        history: one record an epoch, from the first.
        provenance: hardware, library versions and image contents it was trained with.
        best: (copy, epoch) → tensors of the weights that some observer holds for its best so far.
    """

    state: State
    history: list[EpochRecord]
    provenance: dict[str, str]
    best: dict[tuple[str, int], dict[str, Tensor]] = field(default_factory=dict)


class Stash(Protocol):
    """Where a trial keeps states and results; the only place that knows paths is behind it."""

    def newest(self, keys: Sequence[str], usable: Callable[[Checkpoint], bool]) -> Checkpoint | None:
        """The checkpoint of the last of `keys` that is whole and usable, or None."""

    def save(self, key: str, checkpoint: Checkpoint) -> None:
        """Keep a checkpoint under its key, all or nothing."""

    def drop(self, key: str) -> None:
        """Forget a checkpoint."""

    def has_result(self, leaf: str, observer: str) -> bool:
        """Whether a cell's result is there."""

    def save_result(
        self, leaf: str, observer: str, result: CellResult, predictions: bytes, weights: dict[str, Tensor]
    ) -> None:
        """Keep a cell's result with its test predictions (npz) and evaluated weights, all or nothing."""

    def cache_folder(self) -> Path | None:
        """Folder of this node's activation caches; None turns them off."""


class Trial:
    """Runs a `TrialRequest` epoch by epoch."""

    def __init__(
        self,
        request: TrialRequest,
        task: Task,
        stash: Stash,
        provenance: dict[str, str],
        away: Callable[[], AwayTask] | None = None,
    ) -> None:
        """Build the trajectory and take it to the deepest state there is.

        Args:
            away: opens the data set that observers test on elsewhere; needed where one does.
        """
        self.request = request
        self._open_away = away
        self._away: AwayTask | None = None
        self._task = task
        self._stash = stash
        self._device = where = device.start(request.compute, request.gpu_share)
        self._provenance = provenance | {"hardware": device.hardware(request.compute), "torch": torch.__version__}
        folder = stash.cache_folder() if request.cache.positions else None
        batch_size = request.settings.optimiser.batch_size
        identity = provenance["contents_digest"]
        self.activations = Activations(task, request.compute, where, request.cache, folder, identity, batch_size)
        averages = {
            w.observer.copy: (w.observer.decay, w.observer.tau) for w in request.watches if w.observer.decay is not None
        }
        self._trajectory = Trajectory(
            task, request.settings, request.seed, request.compute, where, self.activations, averages
        )
        self._history: list[EpochRecord] = []
        self._best: dict[tuple[str, int], dict[str, Tensor]] = {}
        self._resume()
        self._resumed = len(self._history)
        self._write_results()

    @property
    def epoch(self) -> int:
        """Epochs completed."""
        return self._trajectory.epoch

    @property
    def done(self) -> bool:
        """Whether its epochs are over, every observer has stopped, or all its cells have their results already."""
        return self.epoch >= self.request.last or self._all_stopped() or all(map(self._resolved, self.request.watches))

    @property
    def gpu_memory(self) -> tuple[int, int] | None:
        """The most memory that it took so far of a GPU that it has for itself, and all that the GPU has, bytes."""
        return device.memory_taken(self.request.compute, self.request.gpu_share)

    def step(self) -> EpochRecord:
        """Train one epoch, save its state, and write the results that it completes.

        Raises:
            TrainingError: training diverged, memory was refused, or a replayed epoch differs from the one on record.
        """
        try:
            record = self._trajectory.train_epoch()
        except DivergedError as error:
            raise TrainingError(f"{error}; {self._last_good_state()}: {self._calmer_settings()}") from None
        self._history.append(record)
        self._keep_best()
        before = self.epoch - 1
        self._stash.save(
            self.request.keys[self.epoch - 1],
            Checkpoint(self._trajectory.state(), self._history, self._provenance, self._best),
        )
        self._write_results()
        self._forget(before)
        if self.done:  # also what a worker that was cut off, and given up, has saved behind our back
            for epoch in range(self.request.first + 1, self.epoch + 1):
                self._forget(epoch)
        return record

    def _forget(self, epoch: int) -> None:
        """Drop a state that nothing will start from: the next one is there, or all its cells have their results."""
        if epoch > 0 and self.request.keys[epoch - 1] not in self.request.keep:
            self._stash.drop(self.request.keys[epoch - 1])

    # -- what a failure leaves behind -------------------------------------------------------------------------------

    def _last_good_state(self) -> str:
        """Every state that is kept is finite, and training can go on from it."""
        if not self._history:
            return "no epoch was finished before"
        return f"the state after epoch {self.epoch} is kept and sound ({self.request.keys[self.epoch - 1][:12]})"

    def _calmer_settings(self) -> str:
        """What to change, and how much of the training it leaves valid: keys say which epochs a setting acts on."""
        optimiser = self.request.settings.optimiser
        clip = "" if optimiser.clip_norm is not None else ", or set optimiser.clip_norm and train all of it again"
        if self.request.settings.strategy.unfreezing == "plain":
            rates = f"optimiser.encoder_lr ({optimiser.encoder_lr:g}) or optimiser.head_lr ({optimiser.head_lr:g})"
            clip = "" if optimiser.clip_norm is not None else ", or set optimiser.clip_norm"
            return f"lower {rates}{clip}, and train all of it again"
        if self.epoch < self._head_epochs:
            return f"lower optimiser.head_lr ({optimiser.head_lr:g}){clip}"
        tune_head_lr = optimiser.tune_head_lr or optimiser.head_lr
        return (
            f"lower optimiser.encoder_lr ({optimiser.encoder_lr:g}) or optimiser.tune_head_lr ({tune_head_lr:g}), "
            f"which goes on from the head stage, epoch {self._head_epochs}{clip}"
        )

    # -- where it starts --------------------------------------------------------------------------------------------

    def _resume(self) -> None:
        checkpoint = self._stash.newest(self.request.keys, self._usable)
        if checkpoint is not None:
            self._check_same_ground(checkpoint)
            self._trajectory.restore(checkpoint.state)
            self._history = list(checkpoint.history)
            self._best = dict(checkpoint.best)

    def _check_same_ground(self, checkpoint: Checkpoint) -> None:
        """A trajectory whose parts come from different hardware, libraries or images is no single trajectory."""
        if checkpoint.provenance.get("contents_digest") != self._provenance["contents_digest"]:
            raise TrainingError("the images have changed since this trajectory was begun; use another --storage")
        for name in ("hardware", "torch"):
            then, now = checkpoint.provenance.get(name), self._provenance[name]
            if then != now and not self.request.mixed:
                raise TrainingError(
                    f"the state after epoch {checkpoint.state.epoch} comes from {name} {then!r}, this worker has "
                    f"{now!r}; results would not be one trajectory: pass -o execution.allow_mixed=true to go on"
                )

    def _usable(self, checkpoint: Checkpoint) -> bool:
        """Holds every averaged copy and every best so far that this trial's observers need."""
        tuned = len(checkpoint.history) - self._head_epochs
        if tuned <= 0:
            return True
        copies = {w.observer.copy for w in self.request.watches if w.observer.decay is not None}
        return copies <= set(checkpoint.state.averages) and self._wanted_best(checkpoint.history) <= set(
            checkpoint.best
        )

    # -- observers --------------------------------------------------------------------------------------------------

    @property
    def _head_epochs(self) -> int:
        return self.request.settings.strategy.head_epochs

    def _followed(self, observer: Observer, history: Sequence[EpochRecord]) -> Followed:
        metric = f"val/{observer.copy}/{self._task.main_metric}"
        values = [record.metrics.get(metric, float("nan")) for record in history[self._head_epochs :]]
        return follow(values, observer.patience)

    def _all_stopped(self) -> bool:
        return all(self._followed(w.observer, self._history).stopped is not None for w in self.request.watches)

    def _wanted_best(self, history: Sequence[EpochRecord]) -> set[tuple[str, int]]:
        """(copy, epoch) of the weights that observers without a result hold for their best so far."""
        wanted = set()
        for watch in self.request.watches:
            best = self._followed(watch.observer, history).best
            if best is not None and not self._resolved(watch):
                wanted.add((watch.observer.copy, self._head_epochs + best + 1))
        return wanted

    def _keep_best(self) -> None:
        wanted = self._wanted_best(self._history)
        for copy, epoch in wanted - set(self._best):
            assert epoch == self.epoch, "a best epoch of the past must have been kept when it came"
            self._best[copy, epoch] = self._trajectory.copy_tensors(copy)
        self._best = {at: tensors for at, tensors in self._best.items() if at in wanted}

    # -- results ----------------------------------------------------------------------------------------------------

    def _resolved(self, watch: Watch) -> bool:
        return all(self._stash.has_result(leaf, watch.observer.name) for leaf in watch.leaves)

    def _write_results(self) -> None:
        """Evaluate the test split for every observer that has stopped, or that ends here with the trajectory."""
        for watch in self.request.watches:
            followed = self._followed(watch.observer, self._history)
            here = self.request.keys[self.epoch - 1] if self.epoch else ""
            leaves = watch.leaves if followed.stopped is not None else tuple(x for x in watch.leaves if x == here)
            missing = [leaf for leaf in leaves if not self._stash.has_result(leaf, watch.observer.name)]
            if missing:
                result, predictions, weights = self._result(watch.observer, followed)
                for leaf in missing:
                    self._stash.save_result(leaf, watch.observer.name, result, predictions, weights)

    def _result(self, observer: Observer, followed: Followed) -> tuple[CellResult, bytes, dict[str, Tensor]]:
        if followed.best is None:
            raise TrainingError(
                f"validation {self._task.main_metric} was undefined in every epoch of stage 2: no epoch can be chosen"
            )
        best_epoch = self._head_epochs + followed.best + 1
        stopped = followed.stopped is not None
        last_epoch = self._head_epochs + followed.stopped + 1 if followed.stopped is not None else len(self._history)
        weights = self._best[observer.copy, best_epoch]
        counted = self._trajectory.counted.evaluation
        task, provenance = self._task, self._provenance
        with ExitStack() as there:
            if observer.away:
                task, contents = self._away_task()
                provenance = provenance | {"away_contents_digest": contents}
                there.enter_context(self._trajectory.visiting(task, self._uncached(task, contents)))
            rows = task.rows("test")
            there.enter_context(self._trajectory.holding(weights, best_epoch))
            predictions = self._trajectory.predict(rows)
            digest = weights_sha256(self._trajectory.model)
        scores = task.score(predictions, rows)
        chosen = self._history[best_epoch - 1].metrics
        prefix = f"val/{observer.copy}/"
        metrics = {f"test/{name}": value for name, value in scores.metrics.items()}
        metrics |= {f"val/{name[len(prefix) :]}": v for name, v in chosen.items() if name.startswith(prefix)}
        result = CellResult(
            observer=observer.name,
            copy=observer.copy,
            best_epoch=best_epoch,
            last_epoch=last_epoch,
            stopped_early=stopped and last_epoch < self._planned_epochs(),
            metrics=metrics,
            undefined=scores.undefined,
            weights_sha256=digest,
            trajectory_sha256=self._history[last_epoch - 1].trajectory_sha256,
            evaluation_units=self._trajectory.counted.evaluation - counted,
            history=self._history[:last_epoch],
            provenance=provenance | self._memory_on_record(),
        )
        return result, _npz(task.describe(predictions, rows)), weights

    def _memory_on_record(self) -> dict[str, str]:
        """For the next launch, which gives trials like it the part of a GPU that fits (see `study.cluster.gpu_shares`).

        Nothing where this process has trained no epoch of it: set-up and evaluation alone take less.
        """
        taken = self.gpu_memory
        if taken is None or len(self._history) == self._resumed:
            return {}
        peak, card = taken
        averages = len({watch.observer.copy for watch in self.request.watches if watch.observer.decay is not None})
        return {GPU_MEMORY: json.dumps({"peak_bytes": peak, "card_bytes": card, "averages": averages})}

    def _away_task(self) -> AwayTask:
        if self._away is None:
            assert self._open_away is not None, "an observer tests elsewhere, and nothing was given that opens it"
            self._away = self._open_away()
        return self._away

    def _uncached(self, task: Task, contents: str) -> Activations:
        """Frozen prefixes of images that are read once: computed as everywhere, kept nowhere."""
        request = self.request
        never, batch_size = CacheRequest(request.cache.identity, ()), request.settings.optimiser.batch_size
        return Activations(task, request.compute, self._device, never, None, contents, batch_size)

    def _planned_epochs(self) -> int:
        strategy = self.request.settings.strategy
        return strategy.head_epochs + strategy.tune_epochs


def _npz(arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()
