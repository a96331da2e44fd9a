"""Segmentation of anatomical structures by SAM 2, each from a memory of another patient's image and masks.

Protocol. The memory frame of every image, at training and test alike, is an image of the training split of another
patient, chosen by a hash of the image's name and the split's seed; its masks say what to segment. Prompts are those of
`trainables.prompts`: the figures that epochs and rows are chosen by come from a box around the whole image, so that
nothing of an image's own masks reaches its prediction.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from trainables.costs import Costs
from trainables.data.images import ImageCache
from trainables.data.index import SPLITS, DataError, Index
from trainables.data.mask_cache import MaskCache
from trainables.mask_arrays import dice, mean_defined, packed, unpacked
from trainables.pretrained import copy_of
from trainables.prompts import PROMPTS, oracle_prompt, training_prompt, whole_image
from trainables.sam2 import ClipSegmenter, draw_head, load_sam2
from trainables.sam2_files import Sam2Files
from trainables.settings import SegmentationSettings, Settings
from trainables.strategy import stream
from trainables.task import Rows, Scores
from trainables.transforms import image_transforms
from trainables.views import Views

_AT_ONCE = 64  # images whose masks are unpacked together when scored


class Segmentation:
    """The task of `settings.task = 'segmentation'`; see `trainables.task.Task`."""

    main_metric = "mean_dice"

    def __init__(
        self, settings: Settings, index: Index, images: ImageCache, masks: MaskCache, files: Sam2Files, costs: Costs
    ) -> None:
        """Choose every image's memory frame.

        Raises:
            DataError: a split without any mask of a structure, or no other patient to remember.
        """
        self._settings = settings
        self._index = index
        self._images = images
        self._masks = masks
        self._files = files
        self.views = Views(len(index), settings.dataset.flips)
        self.classes = masks.structures
        self.costs = costs
        self._memory = memory_rows(index, masks, settings.dataset.split_seed)
        _refuse_unmeasurable(index, masks)
        model = settings.model
        self._mean = torch.tensor(model.mean or files.mean).view(1, -1, 1, 1)
        self._std = torch.tensor(model.std or files.std).view(1, -1, 1, 1)

    def build(self, seed: int) -> ClipSegmenter:
        """The pretrained SAM 2, decoder included; where nothing is pretrained, the decoder is drawn from the seed."""
        files, size = self._files, self._masks.size
        identity = (files.folder, files.config_digest, files.weights_digest(), size)
        model = ClipSegmenter(copy_of("sam2", identity, lambda: load_sam2(files, size)), len(self.classes))
        if self._files.drawn:
            draw_head(model.head(), seed)
        return model

    def rows(self, split: str) -> Rows:
        """Rows of a split, ascending."""
        return self._index.rows(split)

    def inputs(self, rows: Rows, device: torch.device) -> Tensor:
        """(B, 6 + C, S, S): the image and its memory frame, normalised, and the memory frame's masks, 0 or 1.

        A memory frame is seen in the view of its image: to remember a mirrored chest is what a mirrored one needs.
        """
        frames = self.views.alike(self._memory[self.views.image(rows)], rows)
        masks = torch.from_numpy(self._masks_of(frames)).to(device, non_blocking=True).float()
        return torch.cat([self._pixels(rows, device), self._pixels(frames, device), masks], dim=1)

    def _pixels(self, rows: Rows, device: torch.device) -> Tensor:
        pixels = torch.from_numpy(self.views.pixels(self._images.pixels, rows)).to(device, non_blocking=True)
        x = pixels.permute(0, 3, 1, 2).to(torch.float32).div_(255.0).expand(-1, 3, -1, -1)
        return (x - self._mean.to(device)) / self._std.to(device)

    def _masks_of(self, rows: Rows) -> npt.NDArray[np.bool_]:
        """(B, C, S, S) masks in the rows' views."""
        return self.views.turned(self._masks.of(self.views.image(rows)), rows)

    def side_inputs(self, rows: Rows, device: torch.device, *, training: bool) -> Tensor:
        """(B, C, P, 2, 3) prompts in the order of `PROMPTS`; at evaluation the second is the oracle's."""
        masks, images = self._masks_of(rows), self.views.image(rows)
        nothing = whole_image(self._masks.size)
        prompts = [
            [np.stack([nothing, self._drawn(mask, row, c, training)]) for c, mask in enumerate(of_row)]
            for row, of_row in zip(images.tolist(), masks, strict=True)
        ]
        return torch.from_numpy(np.array(prompts, np.float32)).to(device, non_blocking=True)

    def _drawn(self, mask: npt.NDArray[np.bool_], row: int, c: int, training: bool) -> npt.NDArray[np.float32]:
        given = self._settings.segmentation
        if not training:
            return oracle_prompt(mask, given)
        name, seed = str(self._index.names[row]), self._settings.dataset.split_seed
        return training_prompt(mask, given, name, self.classes[c], seed)

    def class_counts(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """(C,) pixels inside and outside, over the training images that have a mask of the structure."""
        rows = self.rows("train")
        known = self._masks.known[rows]
        inside: npt.NDArray[np.int64] = (self._masks.area(rows) * known).sum(axis=0)
        return inside, known.sum(axis=0) * self._masks.size**2 - inside

    def loss(self, outputs: Tensor, rows: Rows, class_weights: Tensor | None) -> Tensor:
        """Mean over images and structures with a mask of w_c · mean over prompts of (g_f · focal + g_d · Dice loss).

        w_c is the structure's class weight, 1 without weighting: it scales all that the structure adds to the loss.
        """
        truth = torch.from_numpy(self._masks_of(rows)).to(outputs.device, non_blocking=True).float()
        known = torch.from_numpy(self._masks.known[self.views.image(rows)]).to(outputs.device).float()
        weights = known if class_weights is None else known * class_weights
        losses = mask_losses(self._full_size(outputs), truth.unsqueeze(2), self._settings.segmentation).mean(dim=2)
        return (weights * losses).sum() / known.sum().clamp(min=1)

    def _full_size(self, outputs: Tensor) -> Tensor:
        """(B, C, P, S/4, S/4) → (B, C, P, S, S) logits, bilinear as in SAM 2."""
        size = (self._masks.size, self._masks.size)
        full = functional.interpolate(outputs.float().flatten(1, 2), size=size, mode="bilinear")
        return full.reshape(*outputs.shape[:3], *size)

    def predictions(self, outputs: Tensor) -> npt.NDArray[np.float32]:
        """(B, K) masks of every structure and prompt (logit > 0), packed; NaN where logits are no numbers."""
        logits = self._full_size(outputs)
        kept = packed((logits > 0).cpu().numpy())
        kept[~torch.isfinite(logits).flatten(1).all(dim=1).cpu().numpy()] = np.nan
        return kept

    def score(self, predictions: npt.NDArray[np.float32], rows: Rows) -> Scores:
        """Dice of each structure, its mean over images, and their mean over structures; the oracle's under its name.

        `both_empty`: masks that are empty and predicted so; their Dice is 1.
        """
        scores = mean_defined(self._dice(predictions, rows))  # (C, P)
        metrics: dict[str, float] = {}
        for p, label in enumerate(("", "_oracle")):
            metrics[f"mean_dice{label}"] = float(mean_defined(scores[:, p]))
            defined = {name: float(v) for name, v in zip(self.classes, scores[:, p], strict=True) if np.isfinite(v)}
            metrics |= {f"dice{label}/{name}": value for name, value in defined.items()}
        metrics["both_empty"] = float(self._both_empty(predictions, rows))
        quality = scores[:, 0]
        missing = tuple(name for name, v in zip(self.classes, quality, strict=True) if not np.isfinite(v))
        return Scores(metrics, quality, missing)

    def _dice(self, predictions: npt.NDArray[np.float32], rows: Rows) -> npt.NDArray[np.float64]:
        """(N, C, P) Dice of every image; NaN where there is no mask of a structure."""
        found = []
        for start in range(0, len(rows), _AT_ONCE):
            part = rows[start : start + _AT_ONCE]
            of_part = dice(self._unpacked(predictions[start : start + _AT_ONCE]), self._masks.of(part)[:, :, None])
            found.append(np.where(self._masks.known[part][:, :, None], of_part, np.nan))
        return np.concatenate(found)

    def _both_empty(self, predictions: npt.NDArray[np.float32], rows: Rows) -> int:
        """How many masks and their predictions without a hint are both empty, which counts as a Dice of 1."""
        empty = (self._masks.area(rows) == 0) & self._masks.known[rows]
        count = 0
        for i in np.flatnonzero(empty.any(axis=1)).tolist():
            (found,) = self._unpacked(predictions[i : i + 1])
            count += int((empty[i] & ~found[:, 0].any(axis=(-2, -1))).sum())
        return count

    def _unpacked(self, predictions: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
        return unpacked(predictions, (len(self.classes), len(PROMPTS), self._masks.size, self._masks.size))

    def describe(self, predictions: npt.NDArray[np.float32], rows: Rows) -> Mapping[str, npt.NDArray[np.generic]]:
        """Predicted and true masks (packed with `numpy.packbits` over the last axis), and what they are of.

        `predicted` is (N, C, P, ⌈S²/8⌉), `truth` (N, C, ⌈S²/8⌉), `known` (N, C), `dice` (N, C, P).
        """
        size = self._masks.size
        flat = self._unpacked(predictions).reshape(len(rows), len(self.classes), len(PROMPTS), size**2)
        return {
            "names": self._index.names[rows],
            "groups": self._index.groups[rows],
            "memory": self._index.names[self._memory[rows]],
            "classes": np.array(self.classes),
            "prompts": np.array(PROMPTS),
            "size": np.array(size),
            "predicted": np.packbits(flat, axis=-1),
            "truth": np.asarray(self._masks.bits[rows]),
            "known": self._masks.known[rows],
            "dice": self._dice(predictions, rows),
        }

    def transforms(self) -> dict[str, object]:
        """Size, fit, normalisation, prompts and masks as applied."""
        given = self._settings.segmentation
        return image_transforms(self._images, self._settings.dataset.fit, self._mean, self._std, self.views) | {
            "prompts": {"training": ["whole image", f"noisy {given.prompt}"], "evaluation": list(PROMPTS)},
            "masks": dict(zip(self.classes, self._masks.known.sum(axis=0).tolist(), strict=True)),
        }


def mask_losses(logits: Tensor, truth: Tensor, settings: SegmentationSettings) -> Tensor:
    """g_f · focal + g_d · Dice loss of every mask, as SAM 2 was trained (arXiv 2408.00714, appendix D.2).

    Focal (arXiv 1708.02002): mean over pixels of α_t · (1 − p_t)^γ · (−log p_t), α_t = α inside and 1 − α outside.
    Dice loss (arXiv 1606.04797): 1 − (2·Σ p·y + 1) / (Σ p + Σ y + 1).

    Args:
        logits, truth: (…, S, S), shapes that broadcast; truth 0 or 1.
        settings: gains, α, γ.

    Returns:
        (…) losses.
    """
    truth = truth.expand_as(logits)
    entropy = functional.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    p = torch.sigmoid(logits)
    missed = p + truth - 2 * p * truth  # 1 − p_t
    alpha = settings.focal_alpha * truth + (1 - settings.focal_alpha) * (1 - truth)
    focal = (alpha * missed**settings.focal_gamma * entropy).mean(dim=(-2, -1))
    overlap, sizes = (p * truth).sum(dim=(-2, -1)), p.sum(dim=(-2, -1)) + truth.sum(dim=(-2, -1))
    return settings.focal_gain * focal + settings.dice_gain * (1 - (2 * overlap + 1) / (sizes + 1))


def memory_rows(index: Index, masks: MaskCache, split_seed: int) -> Rows:
    """(N,) the training row that serves each image as memory: of another group, with a mask of every structure.

    Raises:
        DataError: no training image with all masks, or none of another group.
    """
    train = index.rows("train")
    complete = train[(masks.area(train) > 0).all(axis=1)]
    groups = index.groups.tolist()
    chosen = []
    for name, group in zip(index.names.tolist(), groups, strict=True):
        first = stream(f"memory {name}", split_seed)
        turns = (int(complete[(first + turn) % len(complete)]) for turn in range(len(complete)))
        row = next((row for row in turns if groups[row] != group), None)
        if row is None:
            raise DataError(
                f"{index.dataset}: no memory frame for {name}: of {len(train)} training images {len(complete)} have a "
                f"mask of every structure ({', '.join(masks.structures)}), none of another {index.group_kind}; take "
                "more images or fewer segmentation.structures"
            )
        chosen.append(row)
    return np.array(chosen, np.intp)


def _refuse_unmeasurable(index: Index, masks: MaskCache) -> None:
    """Every structure needs a mask in each split: to be learnt, chosen by, and measured."""
    for split in SPLITS:
        without = masks.known[index.rows(split)].sum(axis=0) == 0
        if without.any():
            names = ", ".join(name for name, missing in zip(masks.structures, without, strict=True) if missing)
            raise DataError(
                f"{index.dataset}: no usable mask of {names} in the split {split!r}; leave the structure out of "
                "segmentation.structures, take more images, or lower segmentation.min_mask_quality"
            )
