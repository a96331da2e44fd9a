"""Pretrains the shipped detectors on phantoms of another 'hospital'.

    python -m trainables.pretrain_detector tiny-yolo

Plain training of the whole detector, through the one loop, on images that no study draws (hospital 1). What is kept is
backbone, neck and box layers, in half precision; the layers that tell classes are left out, so that every study draws
its own. A run takes minutes on two cores; the file that is shipped says in its metadata what made it.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from trainables import device
from trainables.activations import Activations
from trainables.data.box_targets import load_box_targets
from trainables.data.opened import Data, Folders, open_data
from trainables.detection import Detection
from trainables.detectors import SHIPPED, find_detector
from trainables.loop import Trajectory
from trainables.requests import CacheRequest, Compute
from trainables.settings import Settings
from trainables.ultralytics_models import tells_classes

HOSPITAL = 1  # studies draw hospital 0


def pretraining_settings(name: str, images: int, epochs: int) -> Settings:
    """Every layer trains from the second epoch on; the first one warms the head up."""
    rate = 2e-3 if name == "tiny-yolo" else 1e-3
    return Settings.model_validate(
        {
            "task": "detection",
            "dataset": {"images": images, "image_size": 96, "fit": "letterbox", "hospital": HOSPITAL},
            "model": {"backbone": name},
            "optimiser": {"batch_size": 16, "encoder_lr": rate, "head_lr": rate, "schedule": "cosine", "clip_norm": 10},
            "strategy": {"head_epochs": 1, "tune_epochs": epochs - 1, "unfreezing": "static", "depth": "all"},
        }
    )


def pretrain(name: str, images: int, epochs: int, data: Data, threads: int) -> Trajectory:
    """Train, saying the validation metric of every epoch; weights start drawn, never from what is shipped."""
    settings = pretraining_settings(name, images, epochs)
    drawn = dataclasses.replace(find_detector(settings), weights=None)
    task = Detection(settings, data.index, data.images, load_box_targets(settings, data.index, data.root), drawn)
    compute = Compute("cpu", threads, "fp32")
    where = device.start(compute)
    uncached = Activations(task, compute, where, CacheRequest("", ()), None, "", settings.optimiser.batch_size)
    trajectory = Trajectory(task, settings, 0, compute, where, uncached, {})
    for _ in range(epochs):
        record = trajectory.train_epoch()
        shown = {name: f"{record.metrics[f'val/raw/{name}']:.4f}" for name in ("map50", "map50_95")}
        print(f"epoch {record.epoch}/{epochs}  loss {record.metrics['train/loss']:.3f}  {shown}", flush=True)
    return trajectory


def main() -> None:
    """Pretrain one of the shipped detectors and write its file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(SHIPPED))
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folders = Folders(Path(folder) / "drawn", Path(folder) / "decoded", Path(folder) / "splits")
        data = open_data(pretraining_settings(given.name, given.images, given.epochs).dataset, folders, workers=2)
        trajectory = pretrain(given.name, given.images, given.epochs, data, given.threads)
    net = trajectory.model.module().get_submodule("net")
    tensors = {
        name: tensor.detach().half() if tensor.is_floating_point() else tensor.detach()
        for name, tensor in net.state_dict().items()
        if not tells_classes(name)
    }
    made = {
        "images": str(given.images),
        "epochs": str(given.epochs),
        "hospital": str(HOSPITAL),
        "torch": torch.__version__,
    }
    save_file(tensors, SHIPPED[given.name].with_suffix(".safetensors"), metadata=made)


if __name__ == "__main__":
    main()
