"""Object detection with YOLOv8 and RT-DETR on boxes of findings."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchvision.ops import batched_nms

from trainables.data.box_targets import BoxTargets
from trainables.data.images import ImageCache
from trainables.data.index import Index
from trainables.detection_metrics import Truth, evaluate
from trainables.detectors import Detector, detector_costs
from trainables.metrics import macro, undefined
from trainables.settings import Settings
from trainables.task import Rows, Scores
from trainables.transforms import image_transforms
from trainables.ultralytics_models import Outputs, StagedDetector, Targets, build_detector
from trainables.views import Views

_CANDIDATES = 3000  # boxes an image that suppression looks at, highest scores first; COCO keeps 100


class Detection:
    """The task of `settings.task = 'detection'`; see `trainables.task.Task`."""

    main_metric = "map50_95"

    def __init__(
        self, settings: Settings, index: Index, images: ImageCache, boxes: BoxTargets, detector: Detector
    ) -> None:
        self._settings = settings
        self._index = index
        self._images = images
        self._boxes = boxes
        self._detector = detector
        self.views = Views(len(index), settings.dataset.flips)
        self._size = settings.dataset.image_size
        self._in_input = boxes.in_input(self._size, settings.dataset.fit)
        self.classes = boxes.classes
        self.costs = detector_costs(detector.layers(self._size, len(self.classes)), detector.blocks, self._size)
        self._mean = torch.tensor(settings.model.mean or (0.0, 0.0, 0.0)).view(1, -1, 1, 1)
        self._std = torch.tensor(settings.model.std or (1.0, 1.0, 1.0)).view(1, -1, 1, 1)

    def build(self, seed: int) -> StagedDetector:
        """The detector: backbone from its weights file (or a fixed stream), what tells classes from the seed."""
        return build_detector(self._detector, self._size, len(self.classes), seed)

    def rows(self, split: str) -> Rows:
        """Rows of a split that were looked at for boxes, ascending."""
        rows = self._index.rows(split)
        return rows[self._boxes.annotated[rows]]

    def inputs(self, rows: Rows, device: torch.device) -> Tensor:
        """(B, 3, S, S): pixels / 255, grey repeated to three channels."""
        pixels = torch.from_numpy(self.views.pixels(self._images.pixels, rows)).to(device, non_blocking=True)
        x = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format).div_(255.0)
        return ((x.expand(-1, 3, -1, -1) - self._mean.to(device)) / self._std.to(device)).contiguous()

    def side_inputs(self, rows: Rows, device: torch.device, *, training: bool) -> Targets | None:
        """In training, the boxes that RT-DETR's denoising queries start from."""
        return self._targets(rows, device) if training and self._detector.family == "rtdetr" else None

    def class_counts(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Training images with a box of each class, and without."""
        train = self.rows("train")
        mine = np.isin(self._boxes.rows, train)
        pairs = np.unique(np.column_stack((self._boxes.rows[mine], self._boxes.labels[mine])), axis=0)
        positives = np.bincount(pairs[:, 1], minlength=len(self.classes)).astype(np.int64)
        return positives, len(train) - positives

    def loss(self, outputs: Outputs, rows: Rows, class_weights: Tensor | None) -> Tensor:
        """The family's own loss (boxes and classes); weights multiply the classification loss of their class."""
        device = next(outputs.detector.parameters()).device
        return outputs.detector.loss(outputs.raw, self._targets(rows, device), class_weights, self._settings.detection)

    def predictions(self, outputs: Outputs) -> npt.NDArray[np.float32]:
        """(B, max_det, 6): corners in px of the input, score, class; highest scores first, class −1 where none is."""
        boxes, scores, repeated = outputs.detector.candidates(outputs.raw)
        kept = torch.zeros(len(boxes), self._settings.detection.max_det, 6)
        kept[..., 5] = -1
        for image, (box, score) in enumerate(zip(boxes.clamp(0, self._size), scores, strict=True)):
            found = self._chosen(box, score, suppress=repeated).cpu()
            kept[image, : len(found)] = found
        return kept.numpy()

    def _chosen(self, boxes: Tensor, scores: Tensor, *, suppress: bool) -> Tensor:
        """(K, 6) best boxes of an image from (A, 4) boxes and (A, C) scores; a box may count for several classes."""
        settings = self._settings.detection
        flat = scores.flatten()
        values, order = flat.topk(min(len(flat), _CANDIDATES))
        order = order[~(values <= settings.min_score)]  # NaN stays, so that a broken model is noticed
        anchor, label = order // scores.shape[1], order % scores.shape[1]
        if suppress:
            keep = batched_nms(boxes[anchor], flat[order], label, settings.nms_iou)
            order, anchor, label = order[keep], anchor[keep], label[keep]
        found = torch.cat((boxes[anchor], flat[order, None], label[:, None].to(boxes.dtype)), dim=1)
        return found[: settings.max_det]

    def score(self, predictions: npt.NDArray[np.float32], rows: Rows) -> Scores:
        """mAP@50, mAP@50-95, precision and recall, of each class and their means over the defined ones."""
        quality = evaluate(predictions, self._truth(rows), len(self.classes), self._settings.detection.max_det)
        of_class = {
            "ap50_95": quality.ap,
            "ap50": quality.ap50,
            "precision": quality.precision,
            "recall": quality.recall,
        }
        metrics = {
            "map50_95": macro(quality.ap),
            "map50": macro(quality.ap50),
            "precision": macro(quality.precision),
            "recall": macro(quality.recall),
        }
        for name, values in of_class.items():
            pairs = zip(self.classes, values, strict=True)
            metrics |= {f"{name}/{label}": float(v) for label, v in pairs if np.isfinite(v)}
        return Scores(metrics, quality.ap50, undefined(quality.ap, self.classes))

    def describe(self, predictions: npt.NDArray[np.float32], rows: Rows) -> Mapping[str, npt.NDArray[np.generic]]:
        """Names, predicted and true boxes in px of the input, and the images' own sizes: all that the metrics need."""
        truth = self._truth(rows)
        return {
            "names": self._index.names[rows],
            "groups": self._index.groups[rows],
            "boxes": predictions,
            "true_image": truth.image,
            "true_class": truth.label,
            "true_xyxy": truth.xyxy,
            "image_sizes": self._boxes.sizes[rows],
            "image_size": np.array(self._size),
            "fit": np.array(self._settings.dataset.fit),
            "max_det": np.array(self._settings.detection.max_det),
            "classes": np.array(self.classes),
        }

    def transforms(self) -> dict[str, object]:
        """Size, fit and normalisation as applied."""
        return image_transforms(self._images, self._settings.dataset.fit, self._mean, self._std, self.views)

    def _truth(self, rows: Rows) -> Truth:
        image, number = self._boxes.of(self.views.image(rows))
        corners = self.views.corners(self._in_input[number], rows[image], self._size)
        return Truth(len(rows), image, self._boxes.labels[number], corners)

    def _targets(self, rows: Rows, device: torch.device) -> Targets:
        truth = self._truth(rows)
        corners = torch.from_numpy(truth.xyxy / self._size).float().clamp(0, 1)
        centres = torch.cat(((corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]), dim=1)
        counts = tuple(np.bincount(truth.image, minlength=len(rows)).tolist())
        label, image = torch.from_numpy(truth.label), torch.from_numpy(truth.image)
        return Targets(image.to(device), label.to(device), centres.to(device), counts)
