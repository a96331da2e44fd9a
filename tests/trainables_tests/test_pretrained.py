"""Copies of pretrained networks: bit by bit what their files hold, and one trial's training reaches no other."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from tiny_segmentation import segmentation_data, segmentation_settings, segmentation_task
from tiny_trials import CPU, tiny_settings, tiny_task, trajectory
from torch import nn

from trainables import baseline_models, classification, pretrained, segmentation
from trainables.data.opened import Data
from trainables.model_files import WEIGHTS, BackboneError
from trainables.pretrained import copy_of
from trainables.settings import Settings
from trainables.task import StagedModel, Task, named_tensors, weights_sha256
from trainables.tasks import TASKS

BASELINES = ("timm:resnet50", "timm:densenet121", "timm:inception_v3", "albef")
EVERY = ("encoder", "tiny-sam2", *BASELINES)


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    pretrained._kept.clear()
    yield
    pretrained._kept.clear()


@dataclass
class Loads:
    """Every loader of pretrained networks, which counts its calls."""

    monkeypatch: pytest.MonkeyPatch
    networks: list[nn.Module] = field(default_factory=list)

    def __post_init__(self) -> None:
        for module, name in (
            (classification, "load_encoder"),
            (baseline_models, "load_chain"),
            (segmentation, "load_sam2"),
        ):
            self._count(module, name)

    def _count(self, module: object, name: str) -> None:
        load = getattr(module, name)

        def counted(*arguments: object) -> nn.Module:
            self.networks.append(load(*arguments))
            return self.networks[-1]

        self.monkeypatch.setattr(module, name, counted)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Loads:
    return Loads(monkeypatch)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return segmentation_data(tmp_path_factory.mktemp("clips"))


@pytest.fixture(params=EVERY)
def task(request: pytest.FixtureRequest, encoder: Path, data: Data, clips: Data) -> Task:
    """A task over each kind of network that is kept."""
    if request.param == "tiny-sam2":
        return segmentation_task(segmentation_settings(), clips)
    if request.param == "encoder":
        return tiny_task(tiny_settings(encoder), data)
    settings = tiny_settings(encoder, model={"backbone": request.param, "small": True}, dataset={"image_size": 96})
    return TASKS["classification"].open(settings, data)


def tensors(model: StagedModel) -> dict[str, torch.Tensor]:
    return dict(named_tensors(model))


def test_a_copy_is_bit_by_bit_what_was_loaded_and_in_the_same_mode(task: Task, loads: Loads) -> None:
    first, second = task.build(3), task.build(3)
    pretrained._kept.clear()
    afresh = task.build(3)
    assert len(loads.networks) == 2
    assert weights_sha256(first) == weights_sha256(second) == weights_sha256(afresh)
    for one, other in zip(second.module().modules(), afresh.module().modules(), strict=True):
        assert (type(one), one.training) == (type(other), other.training)
    for one, other in zip(second.module().parameters(), afresh.module().parameters(), strict=True):
        assert (one.requires_grad, one.stride()) == (other.requires_grad, other.stride())


def test_copies_share_no_memory(task: Task, loads: Loads) -> None:
    first, second = task.build(0), task.build(1)
    [kept] = loads.networks
    places = [
        {t.untyped_storage().data_ptr() for t in (*network.parameters(), *network.buffers())}
        for network in (first.module(), second.module(), kept)
    ]
    assert not (places[0] & places[1] or places[0] & places[2] or places[1] & places[2])


def test_building_draws_nothing_from_the_generator_that_training_draws_from(task: Task) -> None:
    states = [torch.get_rng_state()]
    for _ in range(2):  # loaded, and copied
        task.build(0)
        states.append(torch.get_rng_state())
    assert torch.equal(states[0], states[1]) and torch.equal(states[0], states[2])


def test_training_from_a_copy_gives_the_bits_of_training_from_the_file(encoder: Path, data: Data, loads: Loads) -> None:
    settings = tiny_settings(encoder)
    task = tiny_task(settings, data)

    def trained() -> list[str]:
        run = trajectory(task, settings)
        return [run.train_epoch().trajectory_sha256 for _ in range(4)]  # two with the encoder unfrozen

    from_file, from_copy = trained(), trained()
    assert len(loads.networks) == 1
    assert from_file == from_copy
    assert len(set(from_file)) == 4


def test_weights_that_are_replaced_are_read_again(encoder: Path, data: Data, tmp_path: Path, loads: Loads) -> None:
    folder = Path(shutil.copytree(encoder, tmp_path / "encoder"))
    task = tiny_task(tiny_settings(folder), data)
    before = tensors(task.build(0))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        other = classification.load_encoder(task._backbone)  # type: ignore[arg-type]
        for parameter in other.parameters():
            nn.init.normal_(parameter)
        other.save_pretrained(folder)
    after = tensors(task.build(0))
    own = other.embeddings.cls_token
    [name] = [n for n in after if n.endswith("cls_token")]
    assert torch.equal(after[name], own) and not torch.equal(before[name], own)


def test_another_image_size_is_another_network(encoder: Path, data: Data) -> None:
    """The ViT of ALBEF has position embeddings of its images' size."""

    def at(size: int) -> Settings:
        return tiny_settings(encoder, model={"backbone": "albef", "small": True}, dataset={"image_size": size})

    shapes = []
    for size in (32, 64, 32):
        model = TASKS["classification"].open(at(size), data).build(0)
        shapes.append(model.advance(torch.zeros(1, 3, size, size, device=CPU), -1, 0).shape)
    assert shapes[0] == shapes[2] != shapes[1]


def test_what_cannot_be_loaded_is_said_each_time_and_leaves_nothing_kept() -> None:
    said: list[str] = []

    def broken() -> nn.Module:
        said.append("asked")
        raise BackboneError("no weights")

    for _ in range(2):
        with pytest.raises(BackboneError, match="no weights"):
            copy_of("encoder", "a", broken)
    assert said == ["asked", "asked"]
    assert isinstance(copy_of("encoder", "a", nn.Identity), nn.Identity)


def test_one_network_of_each_kind_is_kept() -> None:
    asked: list[str] = []

    def load(name: str) -> nn.Module:
        asked.append(name)
        return nn.Linear(1, 1)

    wanted: Sequence[tuple[str, str]] = [("encoder", "a"), ("sam2", "b"), ("encoder", "a"), ("sam2", "b")]
    for kind, name in [*wanted, ("encoder", "c"), ("encoder", "a")]:
        copy_of(kind, name, lambda name=name: load(name))  # type: ignore[misc]
    assert asked == ["a", "b", "c", "a"]


def test_a_file_that_is_damaged_meanwhile_is_refused(encoder: Path, data: Data, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(encoder, tmp_path / "encoder"))
    task = tiny_task(tiny_settings(folder), data)
    task.build(0)
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:100])
    with pytest.raises(BackboneError, match="cannot be loaded"):
        task.build(0)
