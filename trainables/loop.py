"""The only training loop: one trajectory of raw weights, epoch by epoch, with the copies that observe it.

Tasks and strategies differ through `Task` and `Phase`; nothing here knows which study it serves. Given the settings,
the seed and the state after epoch e, the state after epoch e + 1 is a pure function: random numbers come from (seed,
epoch, step), schedules from the epoch.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trainables.activations import Activations
from trainables.device import autocast, seed_dropout
from trainables.ema import Average
from trainables.requests import RAW, Compute
from trainables.results import EpochRecord, TrainingError
from trainables.settings import Settings
from trainables.strategy import Phase, phase, rates, stream
from trainables.task import (
    Outputs,
    Rows,
    Scores,
    StagedModel,
    Task,
    named_tensors,
    set_phase,
    trained_tensors,
    weights_sha256,
)
from trainables.weighting import Weights, initial_state, refine, training_weights


class DivergedError(TrainingError):
    """Losses, predictions or weights are no numbers any more; says in which epoch, and at which step if it is known."""


@dataclass
class Counted:
    """Units computed so far in an epoch, counted where they are computed."""

    training: int = 0
    evaluation: int = 0


@dataclass
class State:
    """All that a trajectory needs to go on: weights that ever trained, optimiser, averages, class weights.

    Attributes:
        epoch: epochs completed.
        tensors: 'model/<name>', 'optimiser/<name>/<slot>', 'average/<copy>/<name>'.
        averages: copy → optimiser steps averaged.
        class_state: unclipped class weights, None before stage 2 or without weighting.
    """

    epoch: int
    tensors: dict[str, Tensor]
    averages: dict[str, int] = field(default_factory=dict)
    class_state: list[float] | None = None


class Trajectory:
    """The live training of one (settings, seed): advances by epochs, and can be taken down to a `State` and back."""

    def __init__(
        self,
        task: Task,
        settings: Settings,
        seed: int,
        compute: Compute,
        device: torch.device,
        activations: Activations,
        averages: dict[str, tuple[float, float]],
    ) -> None:
        """Build the model with its initial weights.

        Args:
            averages: copy name → (decay, tau) of every averaged copy that some observer wants.
        """
        self.task = task
        self.settings = settings
        self.seed = seed
        self.device = device
        self.model: StagedModel = task.build(seed)
        self.model.module().to(device)
        self.epoch = 0
        self._compute = compute
        self._activations = activations
        self._initial = {name: t.detach().to("cpu", copy=True) for name, t in named_tensors(self.model)}
        self._optimiser = self._build_optimiser()
        self._parameters = list(self.model.module().parameters())  # walking the modules takes longer than clipping
        self._averages = {name: Average(*numbers) for name, numbers in averages.items()}
        self._class_state: Weights | None = None
        self.counted = Counted()

    # -- the story of an epoch --------------------------------------------------------------------------------------

    def train_epoch(self) -> EpochRecord:
        """Train one epoch, validate every copy, refine the class weights, and say what was done.

        Raises:
            DivergedError: the loss is not finite, or predictions, weights or moments after the last step.
        """
        started = time.perf_counter()
        now = self.phase()
        self.counted = Counted()
        self._enter(now)
        weights = self._loss_weights(now)
        loss, effective = self._train_steps(now, weights)
        metrics = {"train/loss": loss, "unfrozen_blocks": float(now.unfrozen)}
        metrics |= {f"lr/{group}": lr for group, lr in effective["learning_rates"]["first_step"].items()}
        metrics |= self._weight_metrics(weights)
        metrics |= self._validate(now)
        self._check_finite(now)
        self.epoch += 1
        return EpochRecord(
            epoch=self.epoch,
            time_ms=time.time_ns() // 1_000_000,
            seconds=time.perf_counter() - started,
            units=self.counted.training,
            evaluation_units=self.counted.evaluation,
            metrics=metrics,
            trajectory_sha256=weights_sha256(self.model),
            effective=effective,
            cache=self._activations.used_key(),
            events=self._activations.take_events(),
        )

    def phase(self) -> Phase:
        """Phase of the epoch that comes next."""
        return phase(self.settings.strategy, len(self.model.blocks()), self.epoch)

    def _enter(self, now: Phase) -> None:
        set_phase(self.model, now)
        self._activations.enter(self.model, self.task.costs.frozen_position(now.unfrozen, now.base))
        if now.segment == "tune":
            live = trained_tensors(self.model, now)
            for average in self._averages.values():
                average.track(live)
            if self.settings.weighting.enabled and self._class_state is None:
                counts = self.task.class_counts()
                self._class_state = initial_state(*counts, self.task.classes, self.settings.weighting)

    def _train_steps(self, now: Phase, weights: Weights | None) -> tuple[float, dict[str, Any]]:
        order = np.random.default_rng(stream("order", self.seed, self.epoch)).permutation(self.task.rows("train"))
        batches = self._batches(order)
        live = trained_tensors(self.model, now) if now.segment == "tune" and self._averages else {}
        loss_weights = None if weights is None else torch.tensor(weights, dtype=torch.float32, device=self.device)
        losses: list[Tensor] = []
        effective: dict[str, Any] = {}
        for step, chosen in enumerate(batches):
            rows = self.task.views.drawn(chosen, self.seed, self.epoch, step)
            self._set_rates(now, step, len(batches))
            if step == 0:
                effective = self._read_back(now, loss_weights)
            seed_dropout(self.device, stream("dropout", self.seed, self.epoch, step))
            losses.append(self._step(rows, now, loss_weights))
            for average in self._averages.values() if now.segment == "tune" else ():
                average.update(live)
        effective["learning_rates"]["last_step"] = self._group_rates()
        return self._mean_loss(losses, [len(rows) for rows in batches]), effective

    def _mean_loss(self, losses: list[Tensor], sizes: list[int]) -> float:
        """Mean over images; read from the device once an epoch, so that steps never wait for it."""
        values = torch.stack(losses).double().cpu()
        for step in torch.nonzero(~torch.isfinite(values)).flatten().tolist()[:1]:
            raise DivergedError(f"loss is {values[step]:g} in epoch {self.epoch + 1}, step {step + 1} of {len(sizes)}")
        return float((values * torch.tensor(sizes)).sum() / sum(sizes))

    def _step(self, rows: Rows, now: Phase, loss_weights: Tensor | None) -> Tensor:
        self._optimiser.zero_grad(set_to_none=True)
        outputs, start = self._forward(rows, training=True)
        loss = self.task.loss(outputs, rows, loss_weights)
        loss.backward()  # type: ignore[no-untyped-call]
        if self.settings.optimiser.clip_norm is not None:
            trained = [p for p in self._parameters if p.grad is not None]
            torch.nn.utils.clip_grad_norm_(trained, self.settings.optimiser.clip_norm)
        self._optimiser.step()
        self.counted.training += len(rows) * self.task.costs.training(start, now.unfrozen, now.base)
        return loss.detach()

    def _forward(self, rows: Rows, *, training: bool) -> tuple[Outputs, int]:
        fetched = self._activations.fetch(self.model, rows)
        side = self.task.side_inputs(rows, self.device, training=training)
        with autocast(self._compute):
            features = self.model.advance(fetched.values, fetched.position, self.task.costs.features)
            return self.model.predict(features, side), fetched.start

    def _validate(self, now: Phase) -> dict[str, float]:
        """Validation metrics of the raw weights and of each copy; refines the class weights by the raw ones."""
        rows = self.task.rows("val")
        scores = self.evaluate(rows)
        metrics = {f"val/{RAW}/{name}": value for name, value in scores.metrics.items()}
        if now.segment == "head":
            return metrics
        for name, average in self._averages.items():
            with self._swapped(average):
                metrics |= {f"val/{name}/{k}": v for k, v in self.evaluate(rows).metrics.items()}
        if self._class_state is not None:
            self._class_state = refine(self._class_state, scores.quality, self.settings.weighting)
        return metrics

    # -- evaluation -------------------------------------------------------------------------------------------------

    def evaluate(self, rows: Rows) -> Scores:
        """Score the present weights on rows.

        Raises:
            DivergedError: the weights predict no numbers, as after a last step that broke them; names the epoch.
        """
        predictions = self.predict(rows)
        if not np.isfinite(predictions).all():
            raise DivergedError(f"predictions are not finite after the last step of epoch {self.epoch + 1}")
        return self.task.score(predictions, rows)

    def predict(self, rows: Rows) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Predictions of the present weights in eval mode, one line a row."""
        module = self.model.module()
        modes = {m: m.training for m in module.modules()}
        module.eval()
        kept = []
        with torch.no_grad():
            for batch in self._batches(rows):
                outputs, start = self._forward(batch, training=False)
                kept.append(self.task.predictions(outputs))
                self.counted.evaluation += len(batch) * self.task.costs.evaluation(start)
        for m, training in modes.items():
            m.training = training
        return np.concatenate(kept)

    @contextmanager
    def visiting(self, task: Task, activations: Activations) -> Iterator[None]:
        """The same model on other images: predictions are of their rows until its own come back."""
        own = self.task, self._activations
        self.task, self._activations = task, activations
        try:
            yield
        finally:
            self.task, self._activations = own

    @contextmanager
    def holding(self, overlay: dict[str, Tensor], epoch: int) -> Iterator[None]:
        """The model as it was after `epoch` epochs: the overlay's tensors, initial values elsewhere.

        The trajectory's own weights come back afterwards.
        """
        now = phase(self.settings.strategy, len(self.model.blocks()), epoch - 1)
        present = {name: t.detach().clone() for name, t in named_tensors(self.model)}
        self._activations.stand_at(self.task.costs.frozen_position(now.unfrozen, now.base))
        self._write(self._initial | overlay)
        try:
            yield
        finally:
            self._write(present)

    def copy_tensors(self, copy: str) -> dict[str, Tensor]:
        """Tensors of the raw weights or of an averaged copy that trained so far, on the CPU."""
        last = phase(self.settings.strategy, len(self.model.blocks()), max(0, self.epoch - 1))
        tensors = dict(trained_tensors(self.model, last))
        if copy != RAW:
            tensors |= self._averages[copy].tensors
        return {name: t.detach().to("cpu", copy=True) for name, t in tensors.items()}

    # -- state ------------------------------------------------------------------------------------------------------

    def state(self) -> State:
        """Everything that the next epoch depends on."""
        last = phase(self.settings.strategy, len(self.model.blocks()), self.epoch - 1)
        tensors = self._live_tensors(last)
        return State(
            epoch=self.epoch,
            tensors={name: t.to("cpu", copy=True).contiguous() for name, t in tensors.items()},
            averages={copy: average.t for copy, average in self._averages.items()},
            class_state=None if self._class_state is None else self._class_state.tolist(),
        )

    def _live_tensors(self, last: Phase) -> dict[str, Tensor]:
        """Tensors of a `State` after an epoch of this phase, where they are."""
        tensors = {f"model/{name}": t for name, t in trained_tensors(self.model, last).items()}
        names: dict[Tensor, str] = {p: n for n, p in self.model.module().named_parameters()}
        for parameter, slots in self._optimiser.state.items():
            tensors |= {f"optimiser/{names[parameter]}/{slot}": t for slot, t in slots.items()}
        for copy, average in self._averages.items():
            tensors |= {f"average/{copy}/{name}": t for name, t in average.tensors.items()}
        return {name: t.detach() for name, t in tensors.items()}

    def _check_finite(self, now: Phase) -> None:
        """Nothing is kept that training cannot go on from: a moment of AdamW that overflows shows in no loss."""
        tensors = {name: t for name, t in self._live_tensors(now).items() if t.is_floating_point()}
        if torch.isfinite(torch.nn.utils.get_total_norm(list(tensors.values()))):
            return  # one number for all of them; if it alone overflows, no tensor is named below
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise DivergedError(f"{name} is not finite after the last step of epoch {self.epoch + 1}")

    def restore(self, state: State) -> None:
        """Go on from a state of the same settings and seed."""
        self.epoch = state.epoch
        self._write(self._initial | _under(state.tensors, "model/"))
        parameters = dict(self.model.module().named_parameters())
        self._optimiser.state.clear()
        for key, tensor in _under(state.tensors, "optimiser/").items():
            name, slot = key.rsplit("/", 1)
            self._optimiser.state[parameters[name]][slot] = tensor.to(self.device, copy=True)
        for copy, average in self._averages.items():
            tensors = _under(state.tensors, f"average/{copy}/")
            average.t = state.averages.get(copy, 0)
            average.tensors = {name: t.to(self.device, copy=True) for name, t in tensors.items()}
        self._class_state = None if state.class_state is None else np.array(state.class_state)

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        for name, tensor in named_tensors(self.model):
            tensor.copy_(values[name])

    @contextmanager
    def _swapped(self, average: Average) -> Iterator[None]:
        """The model with an averaged copy's tensors in place of the raw ones: pointers are exchanged, not values."""
        live = dict(named_tensors(self.model))
        _exchange(live, average.tensors)
        try:
            yield
        finally:
            _exchange(live, average.tensors)

    # -- small parts ------------------------------------------------------------------------------------------------

    def _build_optimiser(self) -> torch.optim.AdamW:
        head = list(self.model.head().parameters())
        in_head = {id(p) for p in head}
        encoder = [p for p in self.model.module().parameters() if id(p) not in in_head]
        groups = [{"params": encoder, "name": "encoder"}, {"params": head, "name": "head"}]
        return torch.optim.AdamW(groups, lr=0.0, weight_decay=self.settings.optimiser.weight_decay, fused=True)

    def _set_rates(self, now: Phase, step: int, steps: int) -> None:
        wanted = rates(self.settings.optimiser, now, self.epoch, step, steps)
        for group in self._optimiser.param_groups:
            group["lr"] = wanted.encoder if group["name"] == "encoder" else wanted.head

    def _group_rates(self) -> dict[str, float]:
        return {str(group["name"]): float(group["lr"]) for group in self._optimiser.param_groups}

    def _batches(self, rows: Rows) -> Sequence[Rows]:
        size = self.settings.optimiser.batch_size
        return [rows[i : i + size] for i in range(0, len(rows), size)]

    def _loss_weights(self, now: Phase) -> Weights | None:
        if now.segment == "head" or self._class_state is None:
            return None
        return training_weights(self._class_state, self.settings.weighting)

    def _weight_metrics(self, weights: Weights | None) -> dict[str, float]:
        if weights is None:
            return {}
        return {f"class_weight/{name}": float(w) for name, w in zip(self.task.classes, weights, strict=True)}

    def _read_back(self, now: Phase, loss_weights: Tensor | None) -> dict[str, Any]:
        """What is about to train, read from the objects themselves and not from the settings."""
        model, groups = self.model, self._optimiser.param_groups
        return {
            "segment": now.segment,
            "trainable_blocks": [i for i, block in enumerate(model.blocks()) if _trains(block)],
            "trainable_base": any(_trains(module) for module in model.base()),
            "trainable_parameters": sum(p.numel() for p in model.module().parameters() if p.requires_grad),
            "learning_rates": {"first_step": self._group_rates()},
            "weight_decay": {str(g["name"]): float(g["weight_decay"]) for g in groups},
            "class_weights": None if loss_weights is None else [round(float(w), 6) for w in loss_weights],
            "averages": {name: [a.decay, a.tau] for name, a in self._averages.items()} if now.segment == "tune" else {},
            "transforms": self.task.transforms(),
            "precision": self._compute.precision,
            "device": str(self.device.type),
            "threads": torch.get_num_threads(),
        }


def _trains(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def _exchange(live: dict[str, Tensor], averaged: dict[str, Tensor]) -> None:
    for name, tensor in averaged.items():
        live[name].data, tensor.data = tensor.data, live[name].data


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}
