"""What is frozen stays frozen: weights, buffers, flags, modes, gradients. On the ViT, and on a model with BatchNorm."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_trials import NormModel, NormTask, tiny_settings, tiny_task, trajectory
from torch import Tensor, nn

from trainables.data.opened import Data
from trainables.loop import Trajectory
from trainables.settings import Settings
from trainables.strategy import Phase
from trainables.task import StagedModel, named_tensors, set_phase, trained_modules, trained_tensors, weights_sha256

PHASES = [
    Phase("head", 0, 2, 0, False),
    Phase("tune", 2, 4, 0, False),
    Phase("tune", 2, 4, 1, False),
    Phase("tune", 2, 4, 2, False),
    Phase("tune", 2, 4, 3, False),
    Phase("tune", 2, 4, 3, True),
]


def copies(model: StagedModel) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in named_tensors(model)}


def changed(model: StagedModel, before: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in named_tensors(model) if not torch.equal(tensor, before[name])}


def names_under(*prefixes: str, model: StagedModel) -> set[str]:
    return {name for name, _ in named_tensors(model) if name.startswith(prefixes)}


@pytest.fixture(params=["vit", "batch norm"])
def model(request: pytest.FixtureRequest, restless_encoder: Path, data: Data) -> StagedModel:
    if request.param == "batch norm":
        return NormTask().build(0)
    return tiny_task(tiny_settings(restless_encoder), data).build(0)


def test_every_tensor_belongs_to_exactly_one_of_base_blocks_and_head(model: StagedModel) -> None:
    owners: dict[int, int] = {}
    for part in (*model.base(), *model.blocks(), model.head()):
        for tensor in (*part.parameters(), *part.buffers()):
            owners[id(tensor)] = owners.get(id(tensor), 0) + 1
    assert owners == {id(tensor): 1 for _, tensor in named_tensors(model)}


@pytest.mark.parametrize("now", PHASES, ids=lambda now: f"{now.segment} {now.unfrozen} base {now.base}")
def test_flags_and_modes_are_those_of_the_phase_whatever_came_before(model: StagedModel, now: Phase) -> None:
    for before in PHASES:
        set_phase(model, before)
        set_phase(model, now)
        blocks = model.blocks()
        parts = [(part, now.base) for part in model.base()]
        parts += [(block, i >= len(blocks) - now.unfrozen) for i, block in enumerate(blocks)]
        parts.append((model.head(), True))
        for part, trains in parts:
            assert all(p.requires_grad is trains for p in part.parameters())
            assert all(module.training is trains for module in part.modules())


def test_frozen_parameters_lose_the_gradients_of_the_phase_before(model: StagedModel) -> None:
    set_phase(model, PHASES[-1])
    for parameter in model.module().parameters():
        parameter.grad = torch.ones_like(parameter)
    set_phase(model, PHASES[0])
    head = {id(p) for p in model.head().parameters()}
    assert all((p.grad is not None) is (id(p) in head) for p in model.module().parameters())


@pytest.mark.parametrize("now", PHASES)
def test_the_trained_tensors_are_those_of_the_trained_modules(model: StagedModel, now: Phase) -> None:
    wanted = {id(t) for m in trained_modules(model, now) for t in (*m.parameters(), *m.buffers())}
    trained = trained_tensors(model, now)
    assert {id(t) for t in trained.values()} == wanted
    assert list(trained) == sorted(trained)


def run(settings: Settings, task: NormTask | object, epochs: int) -> tuple[Trajectory, list[set[str]]]:
    """Names of what changed, epoch by epoch."""
    t = trajectory(task, settings)  # type: ignore[arg-type]
    moved = []
    for _ in range(epochs):
        before = copies(t.model)
        t.train_epoch()
        moved.append(changed(t.model, before))
    return t, moved


def test_an_epoch_changes_the_head_and_the_unfrozen_blocks_and_nothing_else(encoder: Path, data: Data) -> None:
    settings = tiny_settings(encoder, strategy={"head_epochs": 1, "tune_epochs": 3, "depth": 3, "step": 1})
    t, moved = run(settings, tiny_task(settings, data), 4)
    layers = [f"encoder.encoder.layer.{i}." for i in range(4)]
    for epoch, top in enumerate([(), layers[3:], layers[2:], layers[1:]]):
        assert moved[epoch] == names_under("classifier.", *top, model=t.model)
    assert not any("embeddings" in name or name.startswith("encoder.layernorm") for name in set().union(*moved))


def test_all_layers_move_embeddings_and_final_norm_once_every_block_is_free(encoder: Path, data: Data) -> None:
    settings = tiny_settings(encoder, strategy={"head_epochs": 1, "tune_epochs": 2, "depth": "all", "step": 2})
    t, moved = run(settings, tiny_task(settings, data), 3)
    base = names_under("encoder.embeddings.", "encoder.layernorm.", model=t.model)
    assert not moved[1] & base
    assert moved[2] & base == base - {"encoder.embeddings.mask_token"}  # which no forward pass of ours uses


def test_frozen_batch_norm_keeps_its_running_statistics_and_unfrozen_one_moves_them(encoder: Path) -> None:
    settings = tiny_settings(
        encoder, optimiser={"batch_size": 16}, strategy={"head_epochs": 1, "tune_epochs": 3, "depth": "all", "step": 1}
    )
    _, moved = run(settings, NormTask(), 4)
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    statistics = [{f"layers.{i}.1.{buffer}" for buffer in buffers} for i in range(3)]
    embedding = {f"embedding.1.{buffer}" for buffer in buffers}
    assert not any("running" in name or "tracked" in name for name in moved[0])
    for epoch, (still, moving) in enumerate([(2, 1), (1, 2)], start=1):
        assert not moved[epoch] & set().union(embedding, *statistics[:still])
        assert moved[epoch] >= set().union(*statistics[-moving:])
    assert moved[3] >= set().union(embedding, *statistics)


def test_frozen_parts_have_no_dropout_and_unfrozen_ones_have(restless_encoder: Path, data: Data) -> None:
    settings = tiny_settings(restless_encoder)
    task = tiny_task(settings, data)
    model = task.build(0)
    x = task.inputs(task.rows("train")[:8], torch.device("cpu"))

    def is_random(start: int, stop: int) -> bool:
        with torch.no_grad():
            before = x if start < 0 else model.advance(x, -1, start)
            outcomes = []
            for seed in (1, 2):
                torch.manual_seed(seed)
                outcomes.append(model.advance(before, start, stop))
        return not torch.equal(*outcomes)

    set_phase(model, Phase("tune", 2, 4, 2, False))
    assert not is_random(-1, 2)
    assert is_random(2, 4)
    set_phase(model, Phase("head", 0, 2, 0, False))
    assert not is_random(-1, 5)
    features = model.advance(x, -1, 5)
    torch.manual_seed(1)
    once = model.predict(features)
    torch.manual_seed(2)
    assert not torch.equal(model.predict(features), once)


def test_weight_decay_does_not_reach_frozen_weights_that_trained_state_left_behind(encoder: Path, data: Data) -> None:
    settings = tiny_settings(encoder, optimiser={"weight_decay": 0.5}, strategy={"unfreezing": "none"})
    t, moved = run(settings, tiny_task(settings, data), 4)
    assert set().union(*moved) == names_under("classifier.", model=t.model)


def test_predicting_leaves_weights_buffers_modes_and_gradients_as_they_are(encoder: Path) -> None:
    settings = tiny_settings(encoder, optimiser={"batch_size": 16}, strategy={"head_epochs": 1, "depth": 2})
    t, _ = run(settings, NormTask(), 2)
    modes = [m.training for m in t.model.module().modules()]
    flags = [p.requires_grad for p in t.model.module().parameters()]
    digest = weights_sha256(t.model)
    t.predict(t.task.rows("val"))
    assert [m.training for m in t.model.module().modules()] == modes
    assert [p.requires_grad for p in t.model.module().parameters()] == flags
    assert True in modes
    assert False in modes
    assert weights_sha256(t.model) == digest


def test_what_trains_is_read_back_from_the_model(encoder: Path, data: Data) -> None:
    settings = tiny_settings(encoder, strategy={"head_epochs": 1, "tune_epochs": 2, "depth": "all", "step": 2})
    t = trajectory(tiny_task(settings, data), settings)
    records = [t.train_epoch() for _ in range(3)]
    assert [r.effective["trainable_blocks"] for r in records] == [[], [2, 3], [0, 1, 2, 3]]
    assert [r.effective["trainable_base"] for r in records] == [False, False, True]
    head = sum(p.numel() for p in t.model.head().parameters())
    block = sum(p.numel() for p in t.model.blocks()[0].parameters())
    everything = sum(p.numel() for p in t.model.module().parameters())
    assert [r.effective["trainable_parameters"] for r in records] == [head, head + 2 * block, everything]


def test_the_digest_of_weights_sees_names_values_and_buffers() -> None:
    model = NormModel()
    digest = weights_sha256(model)
    assert weights_sha256(model) == digest
    with torch.no_grad():
        model.layers[0][1].num_batches_tracked += 1
    assert (second := weights_sha256(model)) != digest
    with torch.no_grad():
        model.classifier.bias[0] = torch.nextafter(model.classifier.bias[0], torch.tensor(9.0))
    assert weights_sha256(model) != second


def test_the_digest_of_weights_tells_apart_equal_values_under_other_names() -> None:
    class Two(nn.Module):
        def __init__(self, *names: str) -> None:
            super().__init__()
            for name in names:
                self.register_parameter(name, nn.Parameter(torch.zeros(2)))

        def module(self) -> nn.Module:
            return self

    assert weights_sha256(Two("a", "b")) != weights_sha256(Two("a", "c"))  # type: ignore[arg-type]
