"""The loop against a plain PyTorch program written out here, and what may not influence a trajectory."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_trials import CPU, KEPT, begin, keys_of, timeless, tiny_settings, tiny_task, trajectory, trial_request
from torch import Tensor, nn
from torch.nn import functional
from transformers import Dinov2Model

from study.store import Store
from trainables.classification import Classification
from trainables.data.opened import Data
from trainables.requests import Observer
from trainables.results import TrainingError
from trainables.settings import Settings
from trainables.task import Rows

RAW = Observer(None, 0.0, None)
PLAIN_MEAN, PLAIN_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # a backbone without a preprocessor's file


# -- a plain program -------------------------------------------------------------------------------------------------


def seed_of(*parts: object) -> int:
    return int(hashlib.sha256(":".join(map(str, parts)).encode()).hexdigest()[:16], 16) // 2


class PlainAdamW:
    """Decoupled weight decay (Loshchilov & Hutter, 2019), each parameter with its own count of steps."""

    def __init__(self, weight_decay: float) -> None:
        self.weight_decay = weight_decay
        self.seen: dict[int, tuple[int, Tensor, Tensor]] = {}

    @torch.no_grad()
    def step(self, parameters: list[nn.Parameter], gradients: list[Tensor], lr: float) -> None:
        for p, g in zip(parameters, gradients, strict=True):
            t, m, v = self.seen.get(id(p), (0, torch.zeros_like(p), torch.zeros_like(p)))
            t, m, v = t + 1, 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            self.seen[id(p)] = (t, m, v)
            p.mul_(1 - lr * self.weight_decay)
            p.sub_(lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8))


class PlainProgram:
    """One head epoch and epochs of stage 2 with the top k blocks, as a person would write them for this one case."""

    def __init__(self, encoder: Path, data: Data, classifier: dict[str, Tensor], seed: int) -> None:
        self.encoder = Dinov2Model.from_pretrained(encoder).requires_grad_(False).eval()
        self.head = {name: nn.Parameter(value.clone()) for name, value in classifier.items()}
        self.adamw = PlainAdamW(weight_decay=0.02)
        self.data, self.seed = data, seed
        self.train = np.flatnonzero(data.index.split == 0)

    def logits(self, rows: Rows, rate: float) -> Tensor:
        grey = torch.from_numpy(self.data.images.pixels[rows]).float() / 255
        x = grey.permute(0, 3, 1, 2).repeat(1, 3, 1, 1)
        x = (x - torch.tensor(PLAIN_MEAN).view(3, 1, 1)) / torch.tensor(PLAIN_STD).view(3, 1, 1)
        x = self.encoder(x).last_hidden_state[:, 1:].mean(1)
        h = self.head
        x = functional.layer_norm(x, (16,), h["0.weight"], h["0.bias"])
        x = functional.dropout(functional.gelu(functional.linear(x, h["1.weight"], h["1.bias"])), rate)
        x = functional.dropout(functional.gelu(functional.linear(x, h["4.weight"], h["4.bias"])), rate)
        return functional.linear(x, h["7.weight"], h["7.bias"])

    def epoch(self, epoch: int, k: int, peaks: tuple[float, float], weights: Tensor | None, clip: float) -> float:
        """An epoch of a segment one epoch long: cosine from the peaks to 0 over its four steps."""
        tuned = [p for layer in self.encoder.encoder.layer[4 - k :] for p in layer.requires_grad_(True).parameters()]
        for layer in self.encoder.encoder.layer[4 - k :]:
            layer.train()
        order = np.random.default_rng(seed_of("order", self.seed, epoch)).permutation(self.train)
        total = 0.0
        for step, first in enumerate(range(0, len(order), 32)):
            rows = order[first : first + 32]
            torch.manual_seed(seed_of("dropout", self.seed, epoch, step))
            z = self.logits(rows, rate=0.2)
            y = torch.from_numpy(self.data.index.labels[rows]).float()
            w = torch.ones(4) if weights is None else weights
            loss = -(w * y * functional.logsigmoid(z) + (1 - y) * functional.logsigmoid(-z)).mean()
            parameters = [*tuned, *self.head.values()]
            gradients = list(torch.autograd.grad(loss, parameters))
            norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in gradients))
            gradients = [g * min(1.0, clip / (norm + 1e-6)) for g in gradients]
            factor = 0.5 * (1 + math.cos(math.pi * step / 4))
            self.adamw.step(tuned, gradients[: len(tuned)], peaks[0] * factor)
            self.adamw.step(list(self.head.values()), gradients[len(tuned) :], peaks[1] * factor)
            total += loss.item() * len(rows)
        return total / len(order)

    def tensors(self) -> dict[str, Tensor]:
        encoder = {f"encoder.{name}": p for name, p in self.encoder.named_parameters()}
        return encoder | {f"classifier.{name}": p for name, p in self.head.items()}


@pytest.mark.parametrize("kind", ["encoder", "restless_encoder"])
def test_a_trajectory_is_that_of_a_plain_program(kind: str, request: pytest.FixtureRequest, data: Data) -> None:
    folder = request.getfixturevalue(kind)
    clip = 0.05  # below the norms that occur, so that clipping has an effect
    settings = tiny_settings(
        folder,
        optimiser={"encoder_lr": 1e-4, "head_lr": 1e-3, "tune_head_lr": 5e-4, "weight_decay": 0.02, "clip_norm": clip},
        strategy={"head_epochs": 1, "tune_epochs": 1, "step": 2},
        weighting={"enabled": True, "clip": (0.5, 1.2)},
    )
    ours = trajectory(tiny_task(settings, data), settings, seed=3)
    classifier = {name: t.detach().clone() for name, t in ours.model.head().state_dict().items()}
    plain = PlainProgram(folder, data, classifier, seed=3)

    labels = data.index.labels[plain.train].astype(float)
    ratios = (1 - labels).sum(0) / labels.sum(0)
    weights = np.clip(ratios / ratios.mean(), 0.5, 1.2)

    head = ours.train_epoch()
    assert head.metrics["train/loss"] == pytest.approx(plain.epoch(0, 0, (0.0, 1e-3), None, clip), abs=1e-6)
    tune = ours.train_epoch()
    loss = plain.epoch(1, 2, (1e-4, 5e-4), torch.tensor(weights, dtype=torch.float32), clip)
    assert tune.metrics["train/loss"] == pytest.approx(loss, abs=1e-6)
    assert [tune.metrics[f"class_weight/{name}"] for name in data.index.classes] == pytest.approx(weights, rel=1e-5)

    expected, initial = plain.tensors(), dict(Dinov2Model.from_pretrained(folder).named_parameters())
    for name, tensor in ours.model.module().named_parameters():
        torch.testing.assert_close(tensor.detach(), expected[name].detach(), rtol=0, atol=2e-6, msg=name)
    moved = "encoder.layer.3.mlp.fc1.weight"
    assert (expected[f"encoder.{moved}"] - initial[moved]).abs().max() > 1e-4  # far more than the tolerance


def test_class_weights_multiply_the_positive_term_of_the_loss(encoder: Path, data: Data) -> None:
    task = tiny_task(tiny_settings(encoder), data)
    rows = task.rows("train")[:6]
    z = np.linspace(-4, 4, 24).reshape(6, 4)
    y, w = data.index.labels[rows].astype(float), np.array([0.5, 1.0, 2.0, 5.0])
    p = 1 / (1 + np.exp(-z))
    expected = -(w * y * np.log(p) + (1 - y) * np.log(1 - p)).mean()
    assert y.sum() > 0
    loss = task.loss(torch.tensor(z), rows, torch.tensor(w, dtype=torch.float32))
    assert loss.item() == pytest.approx(expected, rel=1e-6)


# -- class weights ---------------------------------------------------------------------------------------------------


def refined_by_hand(u: np.ndarray, aucs: np.ndarray, eta: float) -> np.ndarray:
    v = np.array([w * (1 + eta * max(0.0, aucs.mean() - a)) for w, a in zip(u, aucs, strict=True)])
    return v / v.mean()


def test_refinement_goes_by_the_raw_weights_and_from_the_unclipped_state(encoder: Path, data: Data) -> None:
    settings = tiny_settings(encoder, weighting={"enabled": True, "eta": 2.0, "clip": (0.99, 1.01)})
    # An average that all but stands still: its AUCs are those of the weights at the start of stage 2.
    t = trajectory(tiny_task(settings, data), settings, averages={"slow": (1 - 1e-7, 1e-3)})
    records = [t.train_epoch() for _ in range(4)]
    labels = data.index.labels[data.index.split == 0].astype(float)
    u = (1 - labels).sum(0) / labels.sum(0)
    u = u / u.mean()
    wrong = u
    for record in records[2:]:
        used = [record.metrics[f"class_weight/{name}"] for name in data.index.classes]
        assert used == pytest.approx(np.clip(u, 0.99, 1.01), rel=1e-6)
        raw, slow = (
            np.array([record.metrics[f"val/{copy}/auc/{name}"] for name in data.index.classes])
            for copy in ("raw", "slow")
        )
        u, wrong = refined_by_hand(u, raw, 2.0), refined_by_hand(wrong, slow, 2.0)
    state = t.state().class_state
    assert state == pytest.approx(u, rel=1e-6)
    assert np.abs(np.array(state) - wrong).max() > 1e-3


def test_stage_1_knows_no_class_weights(encoder: Path, data: Data) -> None:
    plain, weighted = (tiny_settings(encoder, weighting={"enabled": on}) for on in (False, True))
    first, second = (trajectory(tiny_task(s, data), s) for s in (plain, weighted))
    for _ in range(2):
        assert timeless(first.train_epoch()) == timeless(second.train_epoch())
    assert first.train_epoch().trajectory_sha256 != second.train_epoch().trajectory_sha256


# -- what must not matter --------------------------------------------------------------------------------------------


def test_averages_are_pure_observers(restless_encoder: Path, data: Data) -> None:
    settings = tiny_settings(restless_encoder, weighting={"enabled": True})
    many = {f"copy {d}": (d, 3.0) for d in (0.5, 0.9, 0.99, 0.999, 0.9999)}
    unwatched, watched = (trajectory(tiny_task(settings, data), settings, averages=a) for a in ({}, many))
    for epoch in range(6):
        alone, beside = unwatched.train_epoch(), watched.train_epoch()
        assert alone.trajectory_sha256 == beside.trajectory_sha256
        assert alone.metrics.items() <= beside.metrics.items()
        assert sum(name.startswith("val/copy") for name in beside.metrics) == (0 if epoch < 2 else 5 * 5)
    assert unwatched.state().class_state == watched.state().class_state


def test_an_averaged_copy_is_the_recurrence_over_the_raw_weights_of_stage_2(encoder: Path, data: Data) -> None:
    # One step an epoch, so that the raw weights after every step can be seen.
    settings = tiny_settings(encoder, optimiser={"batch_size": 125}, strategy={"head_epochs": 1, "tune_epochs": 4})
    t = trajectory(tiny_task(settings, data), settings, averages={"copy": (0.9, 2.0)})
    t.train_epoch()
    raw = dict(t.model.module().named_parameters())
    mine = {name: p.detach().double().clone() for name, p in raw.items()}
    for step in range(1, 5):
        t.train_epoch()
        d = 0.9 * (1 - math.exp(-step / 2.0))
        mine = {name: d * mine[name] + (1 - d) * p.detach().double() for name, p in raw.items()}
    kept = t.copy_tensors("copy")
    assert set(kept) == {n for n in raw if n.startswith(("encoder.encoder.", "classifier."))}
    for name, tensor in kept.items():
        torch.testing.assert_close(tensor.double(), mine[name], rtol=0, atol=1e-6)
        assert not torch.equal(tensor, raw[name])


class Logging(Classification):
    """The task, noting which rows are trained on and the state that dropout starts from."""

    def rows(self, split: str) -> Rows:
        self.noted: list[tuple[int, list[int]]] = getattr(self, "noted", [])
        return super().rows(split)

    def loss(self, outputs: Tensor, rows: Rows, class_weights: Tensor | None) -> Tensor:
        self.noted.append((torch.initial_seed(), rows.tolist()))
        return super().loss(outputs, rows, class_weights)


def noted(settings: Settings, data: Data, seed: int, epochs: int = 4) -> list[tuple[int, list[int]]]:
    task = tiny_task(settings, data, Logging)
    assert isinstance(task, Logging)
    t = trajectory(task, settings, seed=seed)
    for _ in range(epochs):
        t.train_epoch()
    return task.noted


def test_data_order_and_dropout_depend_on_seed_epoch_and_step_alone(encoder: Path, data: Data) -> None:
    one = noted(tiny_settings(encoder), data, seed=5)
    other = noted(
        tiny_settings(
            encoder,
            model={"head_hidden": 8, "dropout": 0.5},
            optimiser={"encoder_lr": 1e-5, "head_lr": 1e-4, "schedule": "linear", "clip_norm": None},
            strategy={"head_epochs": 1, "tune_epochs": 9, "depth": "all", "unfreezing": "static"},
            weighting={"enabled": True},
        ),
        data,
        seed=5,
    )
    assert one == other
    seeds = [seed for seed, _ in one]
    assert seeds == [seed_of("dropout", 5, epoch, step) for epoch in range(4) for step in range(4)]
    epochs = [[row for _, rows in one[4 * e : 4 * e + 4] for row in rows] for e in range(4)]
    assert all(sorted(rows) == data.index.rows("train").tolist() for rows in epochs)
    assert len({tuple(rows) for rows in epochs}) == 4
    assert not {seed for seed, _ in noted(tiny_settings(encoder), data, seed=6)} & set(seeds)


def test_random_numbers_drawn_elsewhere_change_nothing(restless_encoder: Path, data: Data) -> None:
    settings = tiny_settings(restless_encoder, strategy={"head_epochs": 1, "tune_epochs": 1})
    quiet, noisy = (trajectory(tiny_task(settings, data), settings) for _ in range(2))
    for _ in range(2):
        expected = quiet.train_epoch().trajectory_sha256
        torch.rand(17)
        np.random.default_rng().random(3)
        assert noisy.train_epoch().trajectory_sha256 == expected


def test_the_initial_head_depends_on_the_seed_alone(encoder: Path, data: Data) -> None:
    def head(seed: int, **groups: dict[str, object]) -> dict[str, Tensor]:
        torch.rand(seed + 1)
        return tiny_task(tiny_settings(encoder, **groups), data).build(seed).head().state_dict()

    first, again, other = head(0), head(0, strategy={"depth": 1}, optimiser={"head_lr": 1.0}), head(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["1.weight"], other["1.weight"])


# -- units -----------------------------------------------------------------------------------------------------------


def test_units_are_counted_image_by_image(encoder: Path, data: Data) -> None:
    settings = tiny_settings(encoder, strategy={"head_epochs": 1, "tune_epochs": 1, "step": 2})
    t = trajectory(tiny_task(settings, data), settings, averages={"copy": (0.9, 2.0)})
    head, tune = t.train_epoch(), t.train_epoch()
    embedding = round(16 * 3 * 64 * 16 / 1000)
    block = round((12 * 17 * 16**2 + 2 * 17**2 * 16) / 1000)
    mlp = round((16 * 16 + 16 * 16 + 16 * 4) / 1000)
    forward = embedding + 4 * block + mlp
    assert head.units == 125 * (forward + 2 * mlp)
    assert head.evaluation_units == 22 * forward
    assert tune.units == 125 * (forward + 2 * (mlp + 2 * block))
    assert tune.evaluation_units == 2 * 22 * forward


# -- losses that are not finite --------------------------------------------------------------------------------------


def test_an_enormous_rate_ends_with_epoch_and_step_and_the_state_before_is_kept(
    encoder: Path, data: Data, tmp_path: Path
) -> None:
    settings = tiny_settings(encoder, optimiser={"tune_head_lr": 1e30})
    store, request = Store(tmp_path), trial_request(settings, [RAW])
    trial = begin(request, tiny_task(settings, data), store)
    trial.step()
    before = trial.step()
    with pytest.raises(TrainingError, match=r"loss is (nan|inf) in epoch 3, step 2 of 4; the state after epoch 2"):
        trial.step()
    kept = store.newest(keys_of("trajectory", 6), lambda _: True)
    assert kept is not None
    assert kept.state.epoch == 2
    assert kept.history[-1].trajectory_sha256 == before.trajectory_sha256


class Broken(Classification):
    """The task with one training image that is not a number."""

    def inputs(self, rows: Rows, device: torch.device) -> Tensor:
        x = super().inputs(rows, device)
        x[torch.from_numpy(rows == self.rows("train")[17])] = float("nan")
        return x


def test_an_image_that_is_not_a_number_ends_with_the_step_that_met_it(encoder: Path, data: Data) -> None:
    settings = tiny_settings(encoder)
    order = np.random.default_rng(seed_of("order", 0, 0)).permutation(data.index.rows("train"))
    step = order.tolist().index(data.index.rows("train")[17]) // 32
    with pytest.raises(TrainingError, match=rf"loss is nan in epoch 1, step {step + 1} of 4"):
        trajectory(tiny_task(settings, data, Broken), settings).train_epoch()


def test_weights_that_break_in_the_last_step_are_a_training_error_too(encoder: Path, data: Data) -> None:
    settings = tiny_settings(encoder, optimiser={"batch_size": 125, "head_lr": 1e30})
    with pytest.raises(TrainingError, match="predictions are not finite after the last step of epoch 1"):
        trajectory(tiny_task(settings, data), settings).train_epoch()


# -- states in memory ------------------------------------------------------------------------------------------------


def test_a_state_is_a_snapshot_that_later_epochs_do_not_change(encoder: Path, data: Data) -> None:
    settings = tiny_settings(encoder, weighting={"enabled": True})
    t = trajectory(tiny_task(settings, data), settings, averages={"copy": (0.9, 5.0)})
    for _ in range(3):
        t.train_epoch()
    state = t.state()
    onward = [timeless(t.train_epoch()) for _ in range(3)]
    t.restore(state)
    assert [timeless(t.train_epoch()) for _ in range(3)] == onward


def test_other_weights_are_held_for_a_while_and_the_own_come_back(encoder: Path, data: Data) -> None:
    settings = tiny_settings(encoder, strategy={"head_epochs": 1, "tune_epochs": 3, "step": 1})
    t = trajectory(tiny_task(settings, data), settings)
    t.train_epoch()
    t.train_epoch()
    rows = t.task.rows("test")
    early, expected = t.copy_tensors("raw"), t.predict(rows)
    t.train_epoch()
    present = t.predict(rows)
    with pytest.raises(RuntimeError, match="on purpose"), t.holding(early, 2):
        assert np.array_equal(t.predict(rows), expected)
        raise RuntimeError("on purpose")
    assert np.array_equal(t.predict(rows), present)
    assert not np.array_equal(present, expected)


def test_pixels_are_scaled_repeated_and_standardised(encoder: Path, data: Data) -> None:
    settings = tiny_settings(encoder, model={"mean": (0.5307,), "std": (0.2583,)})
    task = tiny_task(settings, data)
    rows = task.rows("val")[:3]
    grey = (data.images.pixels[rows][:, :, :, 0].astype(np.float64) / 255 - 0.5307) / 0.2583
    x = task.inputs(rows, CPU)
    assert x.shape == (3, 3, 32, 32)
    for channel in range(3):
        assert x[:, channel].numpy() == pytest.approx(grey, abs=1e-5)
    assert task.classes == KEPT
