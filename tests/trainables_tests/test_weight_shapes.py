"""Weights that do not fit are refused by the plan: their shapes are read without torch, and no code of theirs runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.detection_extra import needs_detection
from tests.studies_for_tests import ROOT
from trainables.detectors import SHIPPED, detector_facts, find_detector
from trainables.settings import Settings
from trainables.task_kind import ModelError
from trainables.weight_shapes import require_fit, shapes_of

CLASSES = ("Mass", "Nodule")


def settings(backbone: str, weights: Path | None = None) -> Settings:
    return Settings.model_validate(
        {
            "task": "detection",
            "dataset": {"image_size": 64, "fit": "letterbox"},
            "model": {"backbone": backbone},
            "detection": {"weights": None if weights is None else str(weights)},
        }
    )


def backbone_parameters(name: str) -> list[int]:
    detector = find_detector(settings(name))
    return [layer.count.parameters for layer in detector.layers(64, 2)[: detector.blocks]]


@needs_detection
@pytest.mark.parametrize("name", ["tiny-yolo", "tiny-rtdetr"])
def test_shapes_of_both_kinds_of_file_are_those_that_torch_reads(name: str, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from trainables.ultralytics_models import build_detector

    net = build_detector(find_detector(settings(name)), 64, 2, 0).net
    torch.save({"model": None, "ema": net.half(), "train_args": {"imgsz": 64}, "date": "today"}, tmp_path / "w.pt")
    save_file({key: tensor.contiguous() for key, tensor in net.state_dict().items()}, tmp_path / "w.safetensors")
    expected = {key: tuple(tensor.shape) for key, tensor in net.state_dict().items()}
    assert shapes_of(tmp_path / "w.safetensors") == expected
    assert shapes_of(tmp_path / "w.pt") == expected
    for path in (tmp_path / "w.pt", tmp_path / "w.safetensors"):
        require_fit(path, name, backbone_parameters(name))
        assert detector_facts(settings(name, path), CLASSES).weights_digest


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_weights_fit_the_shipped_detectors(name: str) -> None:
    require_fit(SHIPPED[name].with_suffix(".safetensors"), name, backbone_parameters(name))


@needs_detection
def test_weights_of_another_size_are_refused_by_layer_and_remedy() -> None:
    weights = SHIPPED["tiny-yolo"].with_suffix(".safetensors")
    with pytest.raises(ModelError, match=r"is not of 'yolov8n': layer 0 of the backbone has 232 parameters in it, 464"):
        detector_facts(settings("yolov8n", weights), CLASSES)


class Runs:
    """What a malicious pickle holds: code to run when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_reading_shapes_runs_no_code_of_a_pickle(tmp_path: Path) -> None:
    import torch

    torch.save({"model": Runs(tmp_path / "ran")}, tmp_path / "bad.pt")
    with pytest.raises(ModelError, match="layer 0 of the backbone has 0 parameters"):
        require_fit(tmp_path / "bad.pt", "yolov8n", [464])
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "bad.pt", weights_only=False)
    assert (tmp_path / "ran").exists(), "the file would have run its code"


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    "content", [b"", b"no weights at all", b"PK\x03\x04 half a file", b"\x10" + b"\x00" * 7 + b"{}"]
)
def test_a_damaged_file_is_one_error_that_names_it(content: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"bad{suffix}"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=f"detection.weights: .*bad{suffix} cannot be read"):
        shapes_of(path)


@needs_detection
def test_a_plan_refuses_weights_that_do_not_fit_with_exit_status_2_and_without_torch(tmp_path: Path) -> None:
    weights = SHIPPED["tiny-rtdetr"].with_suffix(".safetensors")
    code = "import sys; from study.cli import main\ntry: main()\nfinally: print('torch' in sys.modules)"
    command = ["detection_ablation", "--plan", "-o", f"detection.weights={weights}", "--storage", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", code, *command], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert done.stderr.count("error") == 1, done.stderr
    assert "tiny-rtdetr.safetensors is not of 'tiny-yolo'" in done.stderr
    assert done.stdout.strip() == "False", "the plan imported torch"
    assert not (tmp_path / "out").exists()
