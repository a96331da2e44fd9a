"""Encoders of the baselines: their arithmetic against PyTorch's own count, their weights from every kind of file."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from trainables.architectures import ALBEF, ARCHITECTURES, Architecture
from trainables.baseline_files import Baseline, find_baseline, is_baseline, own_size
from trainables.baseline_models import Chain, load_chain
from trainables.costs import IMAGES
from trainables.model_files import BackboneError
from trainables.settings import ModelSettings
from trainables.strategy import Phase
from trainables.task import set_phase

EVERY = {**ARCHITECTURES, ALBEF.name: ALBEF}
CNNS = ("resnet50", "densenet121", "inception_v3")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small(name: str) -> Baseline:
    return find_baseline(ModelSettings(backbone=name if name == "albef" else f"timm:{name}", small=True))


def baseline_at(name: str, weights: Path) -> Baseline:
    architecture = "albef" if name == "albef" else name.partition(":")[2].partition(".")[0]
    return find_baseline(ModelSettings(backbone=name, weights={architecture: str(weights)}))


def counted_macs(module: nn.Module, x: Tensor) -> int:
    # Written out as products of matrices, attention is counted too.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        module(x)
    return int(counter.get_total_flops()) // 2


# -- arithmetic -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_macs_parameters_and_values_of_every_part_are_those_that_pytorch_counts(name: str) -> None:
    size = 64
    chain, parts = load_chain(small(name), size).eval(), EVERY[name].parts(size, small=True)
    x, told = torch.zeros(1, 3, size, size), [parts.stem, *parts.blocks]
    for module, part in zip([chain.stem, *chain.blocks()], told, strict=True):
        assert part.macs == counted_macs(module, x)
        assert part.parameters == sum(p.numel() for p in module.parameters())
        with torch.no_grad():
            x = module(x)
        assert part.values == x[0].numel()
    assert parts.neck_parameters == sum(p.numel() for p in chain.neck.parameters())
    whole = chain.advance(torch.zeros(2, 3, size, size), IMAGES, len(parts.blocks) + 1)
    assert whole.shape == (2, parts.features)


@pytest.mark.parametrize(
    ("name", "millions", "features"),
    [("resnet50", 23.508, 2048), ("densenet121", 6.954, 1024), ("inception_v3", 21.786, 2048), ("albef", 85.8, 768)],
)
def test_the_true_sizes_are_those_of_the_literature(name: str, millions: float, features: int) -> None:
    architecture = EVERY[name]
    parts = architecture.parts(architecture.image_size, small=False)
    total = parts.stem.parameters + sum(block.parameters for block in parts.blocks) + parts.neck_parameters
    assert total / 1e6 == pytest.approx(millions, rel=2e-3)
    assert parts.features == features


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_facts_of_an_architecture_are_those_that_timm_states(name: str) -> None:
    architecture = ARCHITECTURES[name]
    stated = timm.get_pretrained_cfg(f"{name}.{architecture.hub}")
    assert stated is not None
    assert (architecture.image_size,) * 2 == stated.input_size[1:]
    assert architecture.statistics == (stated.mean, stated.std)
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
    parts = architecture.parts(architecture.image_size, small=False)
    told = parts.stem.parameters + sum(block.parameters for block in parts.blocks) + parts.neck_parameters
    assert told == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("is_small", [True, False])
def test_the_smallest_images_leave_the_last_map_more_than_one_place(name: str, is_small: bool) -> None:
    architecture = EVERY[name]
    least = architecture.least[is_small]
    with pytest.raises(ValueError, match=f"{name} needs images of at least {least} px, not {least - 1}"):
        architecture.parts(least - 1, small=is_small)
    assert (
        architecture.parts(least, small=is_small).blocks[-1].values > architecture.parts(least, small=is_small).features
    )


@pytest.mark.parametrize("name", CNNS)
def test_a_batch_of_one_image_trains_at_the_smallest_size(name: str) -> None:
    chain = load_chain(small(name), EVERY[name].least[True]).train()
    size = EVERY[name].least[True]
    assert torch.isfinite(chain.advance(torch.randn(1, 3, size, size), IMAGES, len(chain.blocks()) + 1)).all()


def test_the_table_is_read_without_torch_and_without_timm() -> None:
    code = "import sys, trainables.baseline_files, study.spec; print(*{m.split('.')[0] for m in sys.modules})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert not {"torch", "timm", "torchvision"} & set(run.stdout.split())


# -- what is frozen ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CNNS)
def test_batch_norms_of_frozen_blocks_stand_still_in_flag_and_statistics(name: str) -> None:
    chain = load_chain(small(name), 64).with_head(nn.Linear(EVERY[name].parts(64, small=True).features, 2))
    set_phase(chain, Phase("tune", 0, 1, unfrozen=2, base=False))
    trained = {id(m) for block in chain.blocks()[-2:] for m in block.modules()}
    norms = {n: m for n, m in chain.named_modules() if isinstance(m, nn.BatchNorm2d)}
    before = {n: m.running_mean.clone() for n, m in norms.items()}
    chain.predict(chain.advance(torch.randn(4, 3, 64, 64), IMAGES, len(chain.blocks()) + 1))
    assert any(id(m) in trained for m in norms.values()), "a block without batch norm proves nothing"
    for n, m in norms.items():
        assert m.training == (id(m) in trained), n
        assert torch.equal(m.running_mean, before[n]) != (id(m) in trained), n
        assert all(p.requires_grad == (id(m) in trained) for p in m.parameters()), n


# -- weights ----------------------------------------------------------------------------------------------------------


def features_of(model: nn.Module, size: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        return x, model.eval()(x)


def chain_features(chain: Chain, x: Tensor) -> Tensor:
    with torch.no_grad():
        return chain.eval().advance(x, IMAGES, len(chain.blocks()) + 1)


def timm_model(name: str, **changes: Any) -> nn.Module:
    torch.manual_seed(7)
    return timm.create_model(name, pretrained=False, **changes)


@pytest.mark.parametrize("name", CNNS)
def test_a_safetensors_file_of_timm_gives_timms_own_features(name: str, tmp_path: Path) -> None:
    size = ARCHITECTURES[name].least[False]
    stored = timm_model(name, num_classes=1000)  # as on the hub, with its classifier
    save_file(stored.state_dict(), tmp_path / "encoder.safetensors")
    stored.reset_classifier(0)
    x, expected = features_of(stored, size)
    chain = load_chain(baseline_at(f"timm:{name}", tmp_path / "encoder.safetensors"), size)
    torch.testing.assert_close(chain_features(chain, x), expected, rtol=1e-4, atol=1e-4)
    assert (len(chain.blocks()), "Aux" in str(chain)) == (len(EVERY[name].parts(size, small=False).blocks), False)


def test_the_auxiliary_head_of_inception_is_left_in_the_file(tmp_path: Path) -> None:
    stored = timm_model("inception_v3", num_classes=10, aux_logits=True)
    assert any(key.startswith("AuxLogits.") for key in stored.state_dict())
    save_file(stored.state_dict(), tmp_path / "encoder.safetensors")
    chain = load_chain(baseline_at("timm:inception_v3", tmp_path / "encoder.safetensors"), 107)
    assert torch.equal(chain.stem[0].conv.weight, stored.Conv2d_1a_3x3.conv.weight)


def test_a_copy_of_a_hub_repository_brings_its_own_pixel_statistics(tmp_path: Path) -> None:
    save_file(timm_model("resnet50", num_classes=0).state_dict(), tmp_path / "model.safetensors")
    config = {"architecture": "resnet50", "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert is_baseline(str(tmp_path))
    found = find_baseline(ModelSettings(backbone=str(tmp_path)))
    assert (found.mean, found.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert found.architecture is ARCHITECTURES["resnet50"]
    load_chain(found, 64)


def albef_checkpoint(path: Path, side: int, **beside: Any) -> dict[str, Tensor]:
    """A checkpoint as ALBEF's training writes it, for images of a side; its image encoder's tensors."""
    encoder = timm_model("vit_base_patch16_224", num_classes=0, img_size=side).state_dict()
    model = {f"visual_encoder.{key}": value for key, value in encoder.items()}
    model |= {
        f"visual_encoder_m.{key}": torch.zeros_like(value) for key, value in encoder.items() if key == "norm.bias"
    }
    model |= {"text_encoder.embeddings.word_embeddings.weight": torch.zeros(3, 4), "temp": torch.tensor(0.07)}
    torch.save({"model": model, "optimizer": {"state": {}}, "config": {"image_res": side}, "epoch": 29, **beside}, path)
    return encoder


def test_albefs_checkpoint_gives_its_image_encoder_at_any_image_size(tmp_path: Path) -> None:
    encoder = albef_checkpoint(tmp_path / "ALBEF.pth", 256)
    found = baseline_at("albef", tmp_path / "ALBEF.pth")
    same = load_chain(found, 256)
    model = timm_model("vit_base_patch16_224", num_classes=0, img_size=256, global_pool="", fc_norm=False)
    model.load_state_dict(encoder)
    x, tokens = features_of(model, 256)
    torch.testing.assert_close(chain_features(same, x), tokens[:, 1:].mean(dim=1), rtol=1e-4, atol=1e-5)
    other = load_chain(found, 64)
    assert other.stem.pos_embed.shape == (1, 17, 768)
    assert torch.equal(other.stem.pos_embed[:, 0], encoder["pos_embed"][:, 0]), "the class token keeps its position"


class Runs:
    """What a malicious pickle holds: code to run when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_checkpoint_with_anything_to_run_in_it_is_refused_and_runs_none(tmp_path: Path) -> None:
    albef_checkpoint(tmp_path / "ALBEF.pth", 32, config=Runs(tmp_path / "ran"))
    with pytest.raises(BackboneError, match=r"ALBEF\.pth: cannot be read as weights alone .* save its tensors again"):
        load_chain(baseline_at("albef", tmp_path / "ALBEF.pth"), 64)
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "ALBEF.pth", weights_only=False)
    assert (tmp_path / "ran").exists(), "the file would have run its code"


@pytest.mark.parametrize("suffix", ["pt", "bin", "safetensors"])
def test_no_other_name_makes_a_pickle_run(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"encoder.{suffix}"
    torch.save({"weight": torch.zeros(2), "code": Runs(tmp_path / "ran")}, path)
    with pytest.raises(BackboneError, match=f"encoder.{suffix}"):
        load_chain(baseline_at("timm:resnet50.tv_in1k", path), 64)
    assert not (tmp_path / "ran").exists()


def test_albef_without_its_checkpoint_says_how_to_name_it() -> None:
    with pytest.raises(BackboneError, match=r"-o model\.weights\.albef=ALBEF\.pth"):
        find_baseline(ModelSettings(backbone="albef"))


def test_weights_of_another_architecture_are_refused_from_the_files_header(tmp_path: Path) -> None:
    save_file(timm_model("resnet18", num_classes=0).state_dict(), tmp_path / "encoder.safetensors")
    with pytest.raises(BackboneError, match=r"holds 11,176,512 weights of an encoder, resnet50 has 23,508,032"):
        baseline_at("timm:resnet50", tmp_path / "encoder.safetensors")


def test_a_damaged_file_is_named_before_and_when_it_is_loaded(tmp_path: Path) -> None:
    whole = tmp_path / "whole.safetensors"
    save_file(timm_model("resnet50", num_classes=0).state_dict(), whole)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(whole.read_bytes()[:100_000])
    with pytest.raises(BackboneError, match=r"cut\.safetensors: not a readable safetensors file"):
        baseline_at("timm:resnet50", cut)
    (tmp_path / "cut.pth").write_bytes(whole.read_bytes()[:1000])
    with pytest.raises(BackboneError, match=r"cut\.pth: cannot be read as weights alone"):
        load_chain(baseline_at("timm:resnet50", tmp_path / "cut.pth"), 64)


def test_torchvisions_names_of_dense_layers_and_missing_counters_are_understood(tmp_path: Path) -> None:
    stored = timm_model("densenet121", num_classes=0)
    names = {"norm1": "norm.1", "conv1": "conv.1", "norm2": "norm.2", "conv2": "conv.2"}
    renamed = {}
    for key, value in stored.state_dict().items():
        parts = [names.get(part, part) if "denselayer" in key else part for part in key.split(".")]
        if not key.endswith("num_batches_tracked"):
            renamed[".".join(parts)] = value
    torch.save(renamed, tmp_path / "densenet121.pth")
    x, expected = features_of(stored, 64)
    chain = load_chain(baseline_at("timm:densenet121", tmp_path / "densenet121.pth"), 64)
    torch.testing.assert_close(chain_features(chain, x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:resnet51", r"no known architecture 'resnet51'; known are timm:resnet50\.tv_in1k"),
        ("timm:", "no known architecture ''"),
    ],
)
def test_an_unknown_architecture_is_refused_with_those_that_are_known(name: str, message: str) -> None:
    with pytest.raises(BackboneError, match=message):
        find_baseline(ModelSettings(backbone=name))


def test_missing_files_and_foreign_formats_are_named(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=r"model\.weights\.resnet50: no such file or folder: .*nowhere"):
        baseline_at("timm:resnet50", tmp_path / "nowhere")
    (tmp_path / "weights.h5").touch()
    with pytest.raises(BackboneError, match=r"weights\.h5 is none of \.safetensors, \.pth"):
        baseline_at("timm:resnet50", tmp_path / "weights.h5")
    with pytest.raises(BackboneError, match=r"no model\.safetensors in"):
        baseline_at("timm:resnet50", tmp_path)


# -- small ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_small_encoders_are_drawn_from_one_seed_and_tell_images_apart(name: str) -> None:
    torch.manual_seed(0)
    one = load_chain(small(name), 64).state_dict()
    torch.manual_seed(1)
    other = load_chain(small(name), 64).state_dict()
    assert all(torch.equal(one[key], other[key]) for key in one)
    x = torch.randn(4, 3, 64, 64)
    found = chain_features(load_chain(small(name), 64), x)
    assert (found.std(dim=0) / found.abs().mean()).mean() > 1e-3
    assert torch.isfinite(found).all()


def test_digests_of_small_encoders_differ_by_architecture() -> None:
    assert len({small(name).weights_digest() for name in EVERY}) == len(EVERY)


def test_own_sizes_are_those_of_pretraining() -> None:
    sizes = {name: own_size(name) for name in ("timm:inception_v3", "timm/resnet50.tv_in1k", "albef", "tiny-phantom")}
    assert sizes == {"timm:inception_v3": 299, "timm/resnet50.tv_in1k": 224, "albef": 256, "tiny-phantom": None}


def test_every_architecture_has_blocks_for_the_ten_that_the_method_unfreezes() -> None:
    blocks = {a.name: len(a.parts(a.image_size, small=False).blocks) for a in EVERY.values()}
    assert blocks == {
        "resnet50": 16,
        "densenet121": 10,
        "inception_v3": 11,
        "vit_base_patch16_224": 12,
        "deit_base_patch16_224": 12,
        "albef": 12,
    }
    assert isinstance(ALBEF, Architecture)
