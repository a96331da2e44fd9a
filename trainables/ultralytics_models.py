"""YOLOv8 and RT-DETR as ultralytics builds them, staged for our loop: the only file that imports ultralytics.

ultralytics is AGPL-3.0. Taken from there: the modules, the losses, and the reader of its `.pt` files. Not taken: its
trainer, its settings, callbacks and telemetry (all off), its data pipeline, and its non-maximum suppression, which
gives up after a time limit and so depends on the clock.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import logging
import os
import pickle
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from trainables.costs import IMAGES
from trainables.detector_layers import IMAGE, Layer, carried
from trainables.detectors import Detector
from trainables.settings import DetectionSettings
from trainables.strategy import stream
from trainables.task_kind import ModelError


@contextlib.contextmanager
def _quiet_process() -> Iterator[None]:
    """Undo what importing ultralytics does to a process.

    It writes a settings file, looks for the network, changes the environment, and puts functions of its own in place of
    `PIL.Image.open` (which then tries to install decoders for files it cannot read) and `torch.save`.
    """
    folder = tempfile.mkdtemp(prefix="ultralytics-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    before, image_open, torch_save = dict(os.environ), Image.open, torch.save
    os.environ.update(YOLO_OFFLINE="1", YOLO_AUTOINSTALL="False", YOLO_CONFIG_DIR=folder, YOLO_VERBOSE="False")
    try:
        with np.printoptions(), warnings.catch_warnings():
            yield
    finally:
        Image.open, torch.save = image_open, torch_save
        for name in {name for name, value in os.environ.items() if before.get(name) != value}:
            del os.environ[name]
            if name in before:
                os.environ[name] = before[name]


with _quiet_process():
    from ultralytics.models.utils.loss import RTDETRDetectionLoss
    from ultralytics.nn.tasks import DetectionModel, RTDETRDetectionModel, torch_safe_load
    from ultralytics.utils import LOGGER, SETTINGS
    from ultralytics.utils.loss import v8DetectionLoss

LOGGER.setLevel(logging.ERROR)
for _name in ("sync", "mlflow", "raytune", "tensorboard", "wandb", "comet", "clearml", "dvc", "neptune", "hub"):
    if _name in SETTINGS:
        dict.__setitem__(SETTINGS, _name, False)  # in this process; nothing is written


@dataclass(frozen=True)
class Targets:
    """Boxes of a batch.

    Attributes:
        image: (K,) position of each box's image in the batch.
        label: (K,) class.
        box: (K, 4) centre, width and height, relative to the network input.
        counts: boxes an image.
    """

    image: Tensor
    label: Tensor
    box: Tensor
    counts: tuple[int, ...]

    def as_yolo(self) -> dict[str, Tensor]:
        """As YOLO's loss takes them."""
        return {"batch_idx": self.image.float(), "cls": self.label.float(), "bboxes": self.box}

    def as_rtdetr(self) -> dict[str, Any]:
        """As RT-DETR's decoder and loss take them."""
        return {"batch_idx": self.image, "cls": self.label, "bboxes": self.box, "gt_groups": list(self.counts)}


@dataclass(frozen=True)
class Outputs:
    """What a detector put out, with the detector: its loss and its boxes are defined by its own strides."""

    raw: Any
    detector: StagedDetector


class StagedDetector(nn.Module):
    """A detector as a chain of positions: b the first b layers of its backbone; all above is the head.

    Activations at a boundary are every output that a later layer takes, flattened and joined: (B, V).
    """

    def __init__(self, net: Any, detector: Detector, layers: Sequence[Layer], image_size: int) -> None:
        super().__init__()
        self.net: Any = net  # a DetectionModel, of which ultralytics says no types
        self._layers = layers
        self._family = detector.family
        self._size = image_size
        parts = list(net.model)
        self._blocks = parts[: detector.blocks]
        # Not registered a second time: its parameters are named by their place in the net.
        self.__dict__["_head"] = nn.ModuleList(parts[detector.blocks :])

    def base(self) -> Sequence[nn.Module]:
        """Nothing: the stem is the first block."""
        return []

    def blocks(self) -> Sequence[nn.Module]:
        """The backbone's layers."""
        return self._blocks

    def head(self) -> nn.Module:
        """Neck and detection head."""
        head: nn.Module = self.__dict__["_head"]
        return head

    def module(self) -> nn.Module:
        """The whole of it."""
        return self

    def advance(self, x: Tensor, start: int, stop: int) -> Tensor:
        """(B, 3, S, S) images up to position 0, (B, V) packed maps from position 1 on."""
        stop = min(stop, len(self._blocks))
        if stop <= max(start, 0):
            return x
        maps = self._unpacked(x, max(start, IMAGES + 1))
        for number in range(max(start, 0), stop):
            maps[number] = self._run(number, maps)
        return torch.cat([maps[source].flatten(1) for source in carried(self._layers, stop)], dim=1)

    def predict(self, features: Tensor, side: Targets | None = None) -> Outputs:
        """Raw outputs of the head; `side` gives RT-DETR the boxes that its denoising queries start from."""
        maps = self._unpacked(features, len(self._blocks))
        last = len(self._layers) - 1
        for number in range(len(self._blocks), last):
            maps[number] = self._run(number, maps)
        # bf16 has too few digits for the coordinates of boxes
        with torch.autocast(features.device.type, enabled=False):
            inputs = [maps[source].float() for source in self._layers[last].sources]
            decode = self.net.model[last]
            raw = decode(inputs) if self._family == "yolo" else decode(inputs, side and side.as_rtdetr())
        return Outputs(raw, self)

    def loss(self, raw: Any, targets: Targets, class_weights: Tensor | None, gains: DetectionSettings) -> Tensor:
        """The family's own loss, an image; class weights (C,) multiply the classification loss of their class."""
        if self._family == "yolo":
            return _yolo_loss(self.net, raw, targets, class_weights, gains)
        return _rtdetr_loss(self.net.model[-1].nc, raw, targets, class_weights)

    def candidates(self, raw: Any) -> tuple[Tensor, Tensor, bool]:
        """Boxes before any is dropped, from outputs in eval mode.

        Returns:
            (B, A, 4) corners in px of the input, (B, A, C) scores, and whether boxes of one object may come twice.
        """
        if self._family == "yolo":
            centres, scores = raw[0].float().transpose(1, 2).split((4, raw[0].shape[1] - 4), dim=2)
            return _corners(centres), scores, True
        boxes, scores = raw[1][0][-1].float(), raw[1][1][-1].float().sigmoid()
        return _corners(boxes) * self._size, scores, False

    def _run(self, number: int, maps: Mapping[int, Tensor]) -> Tensor:
        inputs = [maps[source] for source in self._layers[number].sources]
        layer = self.net.model[number]
        out: Tensor = layer(inputs[0] if isinstance(layer.f, int) else inputs)
        return out

    def _unpacked(self, x: Tensor, position: int) -> dict[int, Tensor]:
        if x.dim() == 4:
            return {IMAGE: x}
        sources = carried(self._layers, position)
        layers = [self._layers[source] for source in sources]
        parts = torch.split(x, [layer.values for layer in layers], dim=1)
        shapes = [(len(x), layer.channels, layer.size, layer.size) for layer in layers]
        return {s: part.reshape(shape) for s, part, shape in zip(sources, parts, shapes, strict=True)}


def _corners(centres: Tensor) -> Tensor:
    middle, half = centres[..., :2], centres[..., 2:] / 2
    return torch.cat((middle - half, middle + half), dim=-1)


# -- losses ------------------------------------------------------------------------------------------------------------


def _yolo_loss(
    net: Any, raw: dict[str, Any], targets: Targets, class_weights: Tensor | None, gains: DetectionSettings
) -> Tensor:
    """CIoU + classification + distribution focal loss (v8DetectionLoss), summed, without its factor of batch size."""
    net.args = SimpleNamespace(box=gains.box_gain, cls=gains.class_gain, dfl=gains.dfl_gain)
    criterion = v8DetectionLoss(net)
    criterion.class_weights = None if class_weights is None else class_weights.view(1, 1, -1)
    total, _ = criterion(raw, targets.as_yolo())
    loss: Tensor = total.sum() / raw["boxes"].shape[0]
    return loss


class WeightedRTDETRLoss(RTDETRDetectionLoss):
    """RT-DETR's loss with the classification loss of class c multiplied by w_c; matching is left as it is."""

    def __init__(self, classes: int, class_weights: Tensor | None) -> None:
        super().__init__(nc=classes, use_vfl=True)
        self.nc: int = classes
        self._class_weights = class_weights

    def _get_loss_class(
        self, pred_scores: Tensor, targets: Tensor, gt_scores: Tensor, num_gts: int, postfix: str = ""
    ) -> dict[str, Tensor]:
        """The loss is a sum over classes, each independent of the others: weight its terms."""
        if self._class_weights is None:
            whole: dict[str, Tensor] = super()._get_loss_class(pred_scores, targets, gt_scores, num_gts, postfix)
            return whole
        classes, self.nc = self.nc, 1
        try:
            terms = [
                # class c alone: its own queries are class 0, all others background
                super(WeightedRTDETRLoss, self)._get_loss_class(
                    pred_scores[..., c : c + 1], (targets != c).to(targets.dtype), gt_scores, num_gts, postfix
                )[f"loss_class{postfix}"]
                for c in range(classes)
            ]
        finally:
            self.nc = classes
        return {f"loss_class{postfix}": (torch.stack(terms) * self._class_weights).sum()}


def _rtdetr_loss(classes: int, raw: Any, targets: Targets, class_weights: Tensor | None) -> Tensor:
    """Varifocal + L1 + GIoU of every decoder layer and of the denoising queries, as RTDETRDetectionModel sums them."""
    dec_boxes, dec_scores, enc_boxes, enc_scores, denoising = raw
    dn_boxes = dn_scores = None
    if denoising is not None:
        dn_boxes, dec_boxes = torch.split(dec_boxes, denoising["dn_num_split"], dim=2)
        dn_scores, dec_scores = torch.split(dec_scores, denoising["dn_num_split"], dim=2)
    boxes = torch.cat([enc_boxes.unsqueeze(0), dec_boxes])
    scores = torch.cat([enc_scores.unsqueeze(0), dec_scores])
    criterion = WeightedRTDETRLoss(classes, class_weights)
    parts = criterion((boxes, scores), targets.as_rtdetr(), dn_bboxes=dn_boxes, dn_scores=dn_scores, dn_meta=denoising)
    return torch.stack([part.to(boxes.device) for part in parts.values()]).sum()


# -- building ----------------------------------------------------------------------------------------------------------


def build_detector(detector: Detector, image_size: int, classes: int, seed: int) -> StagedDetector:
    """A detector with its initial weights.

    From a file: every tensor of the backbone, and those of the head that fit but for the layers that tell classes,
    whose classes are others; what is left is drawn from the seed. Without a file: the backbone is drawn from a stream
    of its own, the same for every seed, so that frozen prefixes are shared as those of pretrained weights are; the head
    from the seed.

    Raises:
        ModelError: the file cannot be read, or its backbone is another one.
    """
    net = _drawn(detector, classes, stream("head", seed))
    if detector.weights is None:
        start = {n: t for n, t in _drawn_backbone(detector, classes).items() if _is_backbone(n, detector)}
    else:
        start = {n: t for n, t in read_weights(detector.weights).items() if not tells_classes(n)}
        _require_backbone(detector, start, net.state_dict())
    own = net.state_dict()
    net.load_state_dict(own | {n: t for n, t in start.items() if n in own and t.shape == own[n].shape})
    if detector.family == "yolo":
        _fix_bins(net.model[-1].dfl.conv)
    return StagedDetector(net, detector, detector.layers(image_size, classes), image_size)


def _drawn(detector: Detector, classes: int, seed: int) -> Any:
    document = copy.deepcopy(dict(detector.document)) | {"nc": classes, "scales": {"chosen": _scale(detector)}}
    document |= {"scale": "chosen"}
    kind = DetectionModel if detector.family == "yolo" else RTDETRDetectionModel
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(document, ch=3, nc=classes, verbose=False)


def _scale(detector: Detector) -> list[float]:
    return [detector.scale.depth, detector.scale.width, detector.scale.most_channels]


def _drawn_backbone(detector: Detector, classes: int) -> dict[str, Tensor]:
    """Convolutions by He et al. 2015: BatchNorm in eval mode does not normalise yet, so their size must hold itself."""
    seed = stream("backbone", 0)
    net = _drawn(detector, classes, seed)
    generator = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def tells_classes(name: str) -> bool:
    """Whether a tensor belongs to the layers that tell classes apart, by ultralytics' names."""
    return any(part in name for part in (".cv3.", "_score_head.", "denoising_class_embed."))


def _is_backbone(name: str, detector: Detector) -> bool:
    return int(name.split(".")[1]) < detector.blocks


def _fix_bins(convolution: nn.Conv2d) -> None:
    """The bins 0 … 15 that distances are averaged over are no weights: nothing may train them."""
    weight = convolution.weight.detach()
    del convolution.weight
    convolution.register_buffer("weight", weight)


def _require_backbone(detector: Detector, given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    wrong = [
        name
        for name, tensor in own.items()
        if _is_backbone(name, detector) and (name not in given or given[name].shape != tensor.shape)
    ]
    if wrong:
        raise ModelError(
            f"detection.weights: {detector.weights} is not of {detector.name!r}: {len(wrong)} tensors of the backbone "
            f"are missing or of another shape, first {wrong[0]!r}"
        )


def read_weights(path: Path) -> Mapping[str, Tensor]:
    """Tensors of a weights file by ultralytics' names.

    A `.pt` is a pickle: it is read by torch's weights-only unpickler, which makes objects of ultralytics' and torch's
    own layer classes and of nothing else, so that a file can run no code of its own.

    Raises:
        ModelError: damaged, or holding anything else.
    """
    try:
        if path.suffix == ".safetensors":
            return {
                name: tensor.float() if tensor.is_floating_point() else tensor
                for name, tensor in load_file(path).items()
            }
        return _read_pt(str(path), path.stat().st_mtime_ns)
    except (
        OSError,
        TypeError,
        ValueError,
        RuntimeError,
        AttributeError,
        pickle.UnpicklingError,
        SafetensorError,
    ) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(f"detection.weights: {path} cannot be read as a detector's weights ({reason})") from error


@cache
def _read_pt(path: str, _stamp: int) -> Mapping[str, Tensor]:
    checkpoint, _ = torch_safe_load(path, safe_only=True)
    model = checkpoint.get("ema") or checkpoint.get("model")
    if not isinstance(model, nn.Module):
        raise TypeError("no model in it")
    return {
        name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in model.state_dict().items()
    }
