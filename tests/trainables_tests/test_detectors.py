"""Detectors by arithmetic and for real: costs, parameters and shapes of the models that ultralytics builds; weights."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import tests.detection_extra_alone  # noqa: F401
from tests.studies_for_tests import ROOT
from trainables import detectors
from trainables.detector_layers import IMAGE, carried
from trainables.detectors import SHIPPED, detector_facts, find_detector
from trainables.settings import Settings
from trainables.task_kind import ModelError
from trainables.ultralytics_models import StagedDetector, build_detector, read_weights

CLASSES = tuple("abcdefgh")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def settings(backbone: str, image_size: int = 64, **detection: Any) -> Settings:
    return Settings.model_validate(
        {
            "task": "detection",
            "model": {"backbone": backbone},
            "dataset": {"image_size": image_size, "fit": "letterbox"},
            "detection": detection,
        }
    )


def built(given: Settings, seed: int = 0) -> StagedDetector:
    return build_detector(find_detector(given), given.dataset.image_size, len(CLASSES), seed)


# -- arithmetic --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("tiny-yolo", 64),
        ("tiny-rtdetr", 96),
        ("yolov8n", 128),
        pytest.param("yolov8m", 64, marks=pytest.mark.slow),
        pytest.param("rtdetr-l", 64, marks=pytest.mark.slow),
        pytest.param("rtdetr-x", 64, marks=pytest.mark.slow),
    ],
)
def test_every_layer_costs_holds_and_puts_out_what_the_real_one_does(name: str, size: int) -> None:
    given = settings(name, size)
    layers, net = find_detector(given).layers(size, len(CLASSES)), built(given).eval().net
    assert len(layers) == len(net.model)
    outputs: list[Any] = []
    for number, (layer, real) in enumerate(zip(layers, net.model, strict=True)):
        inputs = [torch.zeros(1, 3, size, size) if s == IMAGE else outputs[s] for s in layer.sources]
        with torch.no_grad(), FlopCounterMode(display=False) as counted:
            outputs.append(real(inputs[0] if isinstance(real.f, int) else inputs))
        macs = counted.get_total_flops() / 2
        assert layer.count.macs == pytest.approx(macs, rel=0.01), (number, layer.module)
        tensors = [*real.parameters(), *(b for n, b in real.named_buffers() if n == "dfl.conv.weight")]
        assert layer.count.parameters == sum(t.numel() for t in tensors), (number, layer.module)
        if number < len(layers) - 1:
            assert outputs[-1].shape[1:] == (layer.channels, layer.size, layer.size), (number, layer.module)


@pytest.mark.parametrize(("name", "millions"), [("yolov8n", 3.157), ("yolov8s", 11.167), ("yolov8x", 68.230)])
def test_parameters_with_80_classes_are_those_that_ultralytics_states(name: str, millions: float) -> None:
    classes = tuple(map(str, range(80)))
    costs = detector_facts(settings(name, 640), classes).costs
    assert sum(costs.block_parameters) + costs.head_parameters == pytest.approx(millions * 1e6, rel=1e-3)
    assert len(costs.blocks) == 10


def test_a_boundary_keeps_every_map_that_a_later_layer_takes() -> None:
    layers = find_detector(settings("yolov8n")).layers(64, 8)
    assert [carried(layers, p) for p in (0, 1, 5, 6, 9, 10)] == [(-1,), (0,), (4,), (4, 5), (4, 6, 8), (4, 6, 9)]
    facts = detector_facts(settings("yolov8n"), CLASSES)
    # P3, P4 and P5 at strides 8, 16 and 32, of 64, 128 and 256 channels
    assert facts.costs.feature_values == 64 * 8**2 + 128 * 4**2 + 256 * 2**2
    assert not facts.costs.pooled


# -- names and files ---------------------------------------------------------------------------------------------------


def test_facts_come_without_torch_and_without_importing_ultralytics() -> None:
    code = (
        "import sys; from trainables.settings import Settings; from trainables.detectors import detector_facts\n"
        "s = Settings(task='detection', model={'backbone': 'yolov8x'}, dataset={'image_size': 640})\n"
        "assert detector_facts(s, ('a', 'b')).costs.blocks[0] > 0\n"
        "print(sorted({'torch', 'ultralytics', 'cv2', 'torchvision'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("backbone", "size", "said"),
    [
        ("tiny-phantom", 64, "'tiny-phantom' is no detector; expected one of yolov8n"),
        ("yolov8q", 64, "'yolov8q' is no detector"),
        ("missing.yaml", 64, "no such file"),
        ("yolov8n", 72, "72 px is no multiple of 32, as detectors need; try 64"),
    ],
)
def test_what_is_no_detector_is_refused_with_what_there_is(backbone: str, size: int, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        detector_facts(settings(backbone, size), CLASSES)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"activation": "__import__('os').system('true')"}, "unknown keys activation"),
        ({"backbone": [[-1, 1, "Conv"]]}, "layer 0 of the detector"),
        ({"backbone": [[-1, 1, "C3k2", [64]]]}, "module 'C3k2' is not known"),
        ({"backbone": [[3, 1, "Conv", [64, 3, 2]]]}, "takes the output of layer 3, which does not come before it"),
        ({"head": [[-1, 1, "Conv", [8, 3]]]}, "its last layer is Conv; expected one of Detect, RTDETRDecoder"),
        ({"head": []}, "no lists of layers"),
        ({"scales": {"n": [1, 2]}}, "scales: no .depth, width, max channels. for size 'n'"),
    ],
)
def test_a_yaml_that_describes_no_detector_is_refused_with_the_place(
    change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    document = yaml.safe_load(SHIPPED["tiny-yolo"].read_text(encoding="utf-8")) | change
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    with pytest.raises(ModelError, match=said):
        detector_facts(settings(str(path)), CLASSES)


def test_a_yaml_of_ones_own_is_a_detector(tmp_path: Path) -> None:
    document = yaml.safe_load(SHIPPED["tiny-yolo"].read_text(encoding="utf-8"))
    document["scales"] = {"narrow": [0.34, 0.0625, 1024]}
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    model = built(settings(str(path)))
    facts = detector_facts(settings(str(path)), CLASSES)
    own = sum(p.numel() for p in model.parameters()) + 4  # the bins, which are no parameter here
    assert sum(facts.costs.block_parameters) + facts.costs.head_parameters == own
    assert facts.shape_digest != detector_facts(settings("tiny-yolo"), CLASSES).shape_digest


def test_without_the_extra_one_error_names_it_before_anything_is_drawn(tmp_path: Path) -> None:
    """A Python that finds no ultralytics: the finder is told so, everything else is real."""
    code = (
        "import sys, runpy\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('ultralytics', 'faster_coco_eval'):\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "from importlib.machinery import PathFinder\n"
        "find = PathFinder.find_spec\n"
        "hidden = ('ultralytics', 'faster_coco_eval')\n"
        "PathFinder.find_spec = classmethod(lambda c, n, *a: None if n.split('.')[0] in hidden else find(n, *a))\n"
        "sys.argv = ['launch.py', 'detection_ablation', '--smoke', '--storage', sys.argv[1]]\n"
        "runpy.run_path('study/launch.py', run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "outputs")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"COLUMNS": "300"},
    )
    assert done.returncode == 2, done.stderr
    assert "ultralytics, faster_coco_eval, not installed: pip install 'spft-studies[detection]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "outputs" / "phantoms").exists()


# -- weights -----------------------------------------------------------------------------------------------------------


def test_a_drawn_backbone_is_the_same_for_every_seed_and_keeps_the_size_of_its_signals(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(detectors, "_shipped_weights", lambda name: None)
    one, other = built(settings("tiny-yolo"), 1).eval(), built(settings("tiny-yolo"), 2)
    block = zip(one.blocks()[3].parameters(), other.blocks()[3].parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in block)
    head = zip(one.head().parameters(), other.head().parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in head)
    with torch.no_grad():
        features = one.advance(torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)), -1, 11)
    assert 1e-3 < float(features.std()) < 10, "a frozen drawn backbone must not fade to nothing"


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_weights_of_a_file_start_backbone_and_neck_and_the_seed_draws_what_tells_classes(
    suffix: str, tmp_path: Path
) -> None:
    source = built(settings("tiny-yolo"), seed=7)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(0.125)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch.save({"model": source.net, "epoch": 3}, path)
    else:
        save_file({name: t.contiguous() for name, t in source.net.state_dict().items()}, path)
    given = settings("tiny-yolo", weights=str(path))
    one, other = built(given, 1).net.state_dict(), built(given, 2).net.state_dict()
    there = source.net.state_dict()
    for name, tensor in one.items():
        if ".cv3." in name and name.endswith("weight") and tensor.dim() == 4:
            assert not torch.equal(tensor, there[name])
            assert not torch.equal(tensor, other[name])
        elif ".cv3." not in name:
            assert torch.equal(tensor, there[name]), name
    drawn = detector_facts(settings("yolov8n"), CLASSES)
    assert detector_facts(given, CLASSES).weights_digest != drawn.weights_digest


class Runs:
    """What a malicious pickle holds: code to run when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_that_would_run_code_is_refused_and_runs_none(tmp_path: Path) -> None:
    torch.save({"model": Runs(tmp_path / "ran")}, tmp_path / "bad.pt")
    with pytest.raises(ModelError, match=r"bad.pt cannot be read as a detector's weights"):
        read_weights(tmp_path / "bad.pt")
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "bad.pt", weights_only=False)
    assert (tmp_path / "ran").exists(), "the file would have run its code"


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"no weights", b"PK\x03\x04 half a file"])
def test_a_damaged_weights_file_is_one_error_that_names_it(content: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"bad{suffix}"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=f"detection.weights: .*bad{suffix} cannot be read"):
        read_weights(path)


def test_weights_of_another_detector_are_refused_with_the_first_tensor(tmp_path: Path) -> None:
    source = nn.Module()
    source.model = nn.ModuleList([nn.Conv2d(3, 8, 3)])
    save_file(source.state_dict(), tmp_path / "other.safetensors")
    given = settings("tiny-yolo", weights=str(tmp_path / "other.safetensors"))
    with pytest.raises(ModelError, match=r"is not of 'tiny-yolo': \d+ tensors .* first 'model.0.conv.weight'"):
        built(given)


@pytest.mark.parametrize(
    ("weights", "said"),
    [("there.onnx", "expected a file that ends with .pt or .safetensors"), ("nowhere.pt", "no such file")],
)
def test_a_weights_file_that_is_not_there_is_refused_by_the_plan(weights: str, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        detector_facts(settings("yolov8n", weights=weights), CLASSES)


@pytest.mark.slow
def test_importing_ultralytics_leaves_environment_and_home_alone(tmp_path: Path) -> None:
    code = (
        "import os, sys, warnings, torch, torchvision, PIL.Image\n"
        "before, functions = dict(os.environ), (PIL.Image.open, torch.save, torch.load)\n"
        "import trainables.ultralytics_models as m\n"
        "assert (PIL.Image.open, torch.save, torch.load) == functions\n"
        "assert dict(os.environ) == before, set(os.environ.items()) ^ set(before.items())\n"
        "from ultralytics.utils import SETTINGS, ONLINE\n"
        "assert not ONLINE and not any(SETTINGS.get(k) for k in ('sync', 'mlflow', 'raytune'))"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("YOLO")} | {"HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert not any("ltralytics" in path.name for path in tmp_path.rglob("*"))
