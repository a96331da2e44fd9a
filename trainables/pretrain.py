"""Pretrain the tiny encoder on phantoms of other hospitals, without labels, and measure it.

    python -m trainables.pretrain --out trainables/tiny_phantom          # about 15 minutes on one core
    python -m trainables.pretrain --out trainables/tiny_phantom --evaluate  # about a minute

Two objectives share one pass over a masked view of an image, of which only the visible patches are encoded:
reconstruction of the hidden patches, normalised a patch (He et al., Masked Autoencoders, CVPR 2022), and description of
the whole image by the mean of the visible tokens: the whitened principal components of what the undisturbed view looks
like (brightness on a coarse grid, strength of edges). Whitening gives faint and local appearances the weight that mere
brightness would take; the view's disturbances teach which differences are the scanner's. The result is a plain
transformers `Dinov2Model`.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Dinov2Config, Dinov2Model

from trainables.data.chest_scene import draw_chest
from trainables.data.derm_scene import draw_lesion
from trainables.data.images import ImageCache
from trainables.data.phantom import chest_images, lesion_images
from trainables.data.registry import load_index, prepare
from trainables.settings import DatasetSettings

_log = logging.getLogger("pretrain")

HOSPITALS = tuple(range(9001, 9009))  # never a default, and far from what anybody would choose
PATCH = 8
IMAGE = 64
GRID = IMAGE // PATCH
TARGET = 4  # px: side of a patch as it is to be reconstructed


@dataclass(frozen=True)
class Recipe:
    """Everything the weights depend on, besides the code."""

    steps: int = 4000
    batch: int = 32
    images: int = 1000  # of each kind and hospital
    visible: float = 0.75  # share of the patches that are encoded
    lr: float = 3e-3
    weight_decay: float = 0.05
    warmup: float = 0.05  # share of the steps
    description: float = 1.0  # weight of the description beside the reconstruction
    components: int = 64  # of the description
    seed: int = 7


def tiny_config() -> Dinov2Config:
    """Twelve blocks, so that depth 10 of 12 means what it means for RAD-DINO; 48 wide, 0.35 M parameters."""
    return Dinov2Config(
        hidden_size=48,
        num_hidden_layers=12,
        num_attention_heads=3,
        mlp_ratio=4,
        image_size=IMAGE,
        patch_size=PATCH,
        drop_path_rate=0.0,
        initializer_range=0.1,  # near 1/√48; the usual 0.02 is made for widths near 768 and starts too slowly here
    )


@dataclass(frozen=True)
class Pool:
    """Drawn images by kind, patients in a row.

    Attributes:
        images: (N, 96, 96, 3) uint8.
        kinds: (N,) 0 chest, 1 lesion.
    """

    images: npt.NDArray[np.uint8]
    kinds: npt.NDArray[np.uint8]

    @classmethod
    def draw(cls, images: int) -> Pool:
        """Draw `images` of each kind from each of `HOSPITALS`."""
        drawn: list[npt.NDArray[np.uint8]] = []
        for hospital in HOSPITALS:
            for row in chest_images(hospital, images):
                grey = draw_chest(hospital, row.patient, row.follow_up, row.findings, ap=row.ap).pixels
                drawn.append(np.repeat(grey[..., None], 3, axis=2))
        chests = len(drawn)
        for hospital in HOSPITALS:
            for lesion in lesion_images(hospital, images):
                wide = draw_lesion(hospital, lesion.lesion, lesion.view, lesion.dx)
                inset = (wide.shape[1] - wide.shape[0]) // 2
                drawn.append(wide[:, inset : inset + wide.shape[0]])
        return cls(np.stack(drawn), (np.arange(len(drawn)) >= chests).astype(np.uint8))

    def statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel in [0, 1]."""
        scaled = self.images[::7].astype(np.float64) / 255
        return scaled.mean((0, 1, 2)).round(4).tolist(), scaled.std((0, 1, 2)).round(4).tolist()

    def batches(self, batch: int, rng: np.random.Generator) -> Iterator[tuple[int, npt.NDArray[np.intp]]]:
        """Endless (kind, rows), each batch of one kind."""
        while True:
            kind = int(rng.integers(2))
            yield kind, rng.choice(np.flatnonzero(self.kinds == kind), batch, replace=False)


def _uniform(generator: torch.Generator, count: int, low: float, high: float) -> Tensor:
    return low + (high - low) * torch.rand(count, 1, 1, 1, generator=generator)


def crop(images: Tensor, generator: torch.Generator) -> Tensor:
    """(B, 3, 96, 96) → (B, 3, 64, 64): shifted, slightly turned, 82 to 100 % of the side."""
    count = len(images)
    scale, turn = (_uniform(generator, count, *bounds).flatten() for bounds in ((0.82, 1.0), (-0.06, 0.06)))
    right, down = ((1 - scale) * _uniform(generator, count, -1, 1).flatten() for _ in range(2))
    theta = torch.stack([torch.stack([scale, turn, right], 1), torch.stack([-turn, scale, down], 1)], 1)
    grid = functional.affine_grid(theta, [count, 3, IMAGE, IMAGE], align_corners=False)
    smooth = functional.avg_pool2d(images, 2, stride=1)  # against aliasing: 96 px become 64
    return functional.grid_sample(smooth, grid, align_corners=False, padding_mode="border")


def disturb(views: Tensor, generator: torch.Generator) -> Tensor:
    """The same views, (B, 3, S, S) in [0, 1], as another scanner would show them: brightness, contrast, blur, noise."""
    count = len(views)
    blurred = _uniform(generator, count, 0.0, 0.5)
    views = (1 - blurred) * views + blurred * functional.avg_pool2d(views, 3, stride=1, padding=1)
    views = views.clamp(1e-3, 1) ** _uniform(generator, count, 0.8, 1.25)
    views = (views - 0.5) * _uniform(generator, count, 0.8, 1.25) + 0.5 + _uniform(generator, count, -0.06, 0.06)
    noise = torch.randn(count, 1, *views.shape[2:], generator=generator)
    return views + noise * _uniform(generator, count, 0, 0.03)


class Description:
    """What a view looks like: half-whitened principal components of a coarse descriptor, fitted on a kind of image."""

    def __init__(self, views: Tensor, components: int) -> None:
        described = self._describe(views)
        self._mean = described.mean(0)
        self._scale = torch.cat([block.std().expand(block.shape[1]) for block in self._blocks(described - self._mean)])
        _, spread, directions = torch.linalg.svd((described - self._mean) / self._scale, full_matrices=False)
        # Component k keeps a standard deviation of its own to the power 1/2; they are 1 in quadratic mean.
        deviation = spread[:components] ** 0.5
        deviation /= deviation.square().mean().sqrt()
        self._directions = directions[:components].T / (spread[:components] / len(views) ** 0.5) * deviation

    def of(self, views: Tensor) -> Tensor:
        """(B, 3, 64, 64) → (B, components), of unit variance on average."""
        described: Tensor = ((self._describe(views) - self._mean) / self._scale) @ self._directions
        return described

    @staticmethod
    def _describe(views: Tensor) -> Tensor:
        """Colours on a 16 × 16 grid, then the mean strength of vertical and of horizontal edges on an 8 × 8 grid."""
        grey = views.mean(1, keepdim=True)
        edges = [grey.diff(dim=dim).abs() for dim in (3, 2)]
        strengths = [functional.adaptive_avg_pool2d(edge, GRID).flatten(1) for edge in edges]
        return torch.cat([functional.avg_pool2d(views, IMAGE // 16).flatten(1), *strengths], 1)

    @staticmethod
    def _blocks(described: Tensor) -> tuple[Tensor, Tensor]:
        return described[:, : 3 * 16 * 16], described[:, 3 * 16 * 16 :]


def _waves(width: int) -> Tensor:
    """(GRID², width) sines and cosines of row and column: a start from which places are told apart at once."""
    frequency = 8 * 0.75 ** torch.arange(width // 4)
    rows, columns = torch.meshgrid(torch.arange(GRID) / GRID, torch.arange(GRID) / GRID, indexing="ij")
    phases = [place.flatten()[:, None] * frequency for place in (rows, columns)]
    return torch.cat([wave(phase) for phase in phases for wave in (torch.sin, torch.cos)], 1)


class Pretrainer(nn.Module):
    """The encoder with what is thrown away afterwards: a decoder of patches and a projection of pooled features."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.encoder = Dinov2Model(tiny_config())
        with torch.no_grad():
            self.encoder.embeddings.position_embeddings[:, 1:] = 0.5 * _waves(self.encoder.config.hidden_size)
        width = self.encoder.config.hidden_size
        self.decoder_mask = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_position = nn.Parameter(0.02 * torch.randn(1, GRID * GRID, width))
        self.decoder = nn.TransformerEncoderLayer(width, 3, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.decoder_head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 3 * TARGET * TARGET))
        self.describers = nn.ModuleList(
            # Pooled tokens differ little between images; without normalisation over the batch learning hardly begins.
            nn.Sequential(
                nn.BatchNorm1d(width, affine=False), nn.Linear(width, 192), nn.GELU(), nn.Linear(192, recipe.components)
            )
            for _ in range(2)
        )

    def forward(self, views: Tensor, described: Tensor, kind: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Losses (reconstruction, description) of (B, 3, 64, 64) normalised views of one kind."""
        order = torch.rand(len(views), GRID * GRID, generator=generator).argsort(1)
        kept = order[:, : round(self.recipe.visible * GRID * GRID)]
        encoded = self.encode_visible(views, kept)
        description = functional.mse_loss(self.describers[kind](encoded.mean(1)), described)
        return self._reconstruction(views, encoded, order, kept), description

    def encode_visible(self, pixels: Tensor, kept: Tensor) -> Tensor:
        """(B, V, width) tokens of the patches at the positions `kept` (B, V), as if no other patch existed."""
        embeddings = self.encoder.embeddings
        patches = embeddings.patch_embeddings(pixels) + embeddings.position_embeddings[:, 1:]
        visible = patches.gather(1, kept[..., None].expand(-1, -1, patches.shape[2]))
        first = (embeddings.cls_token + embeddings.position_embeddings[:, :1]).expand(len(pixels), -1, -1)
        hidden = torch.cat([first, visible], 1)
        for block in self.encoder.encoder.layer:
            hidden = block(hidden)
        normalised: Tensor = self.encoder.layernorm(hidden)
        return normalised[:, 1:]

    def _reconstruction(self, pixels: Tensor, encoded: Tensor, order: Tensor, kept: Tensor) -> Tensor:
        width = self.decoder_mask.shape[2]
        tokens = self.decoder_mask.expand(len(pixels), GRID * GRID, width).clone()
        tokens.scatter_(1, kept[..., None].expand(-1, -1, width), encoded)
        predicted = self.decoder_head(self.decoder(tokens + self.decoder_position))
        # Averaged over 2 × 2 px: most of the finest detail is noise, which nothing can predict.
        target = functional.unfold(functional.avg_pool2d(pixels, PATCH // TARGET), TARGET, stride=TARGET).transpose(
            1, 2
        )
        spread = target.std(2, keepdim=True)
        target = (target - target.mean(2, keepdim=True)) / (spread + 0.1)
        hidden = order[:, kept.shape[1] :, None].expand(-1, -1, target.shape[2])
        return functional.mse_loss(predicted.gather(1, hidden), target.gather(1, hidden))


def pretrain(recipe: Recipe, pool: Pool) -> Pretrainer:
    """Train for `recipe.steps` steps; logs both losses every 250."""
    torch.manual_seed(recipe.seed)
    generator = torch.Generator().manual_seed(recipe.seed)
    model = Pretrainer(recipe)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate(recipe, step))
    descriptions = [_fit_description(pool, kind, recipe, generator) for kind in range(2)]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in pool.statistics())
    batches = pool.batches(recipe.batch, np.random.default_rng(recipe.seed))
    begin = time.monotonic()
    for step in range(1, recipe.steps + 1):
        kind, rows = next(batches)
        views = crop(_as_tensor(pool.images[rows]), generator)
        described = descriptions[kind].of(views)
        views = (disturb(views, generator) - mean) / std
        reconstruction, description = model(views, described, kind, generator)
        loss = reconstruction + recipe.description * description
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 250 == 0:
            took = time.monotonic() - begin
            _log.info(
                "step %d: reconstruction %.4f, description %.4f, %.0f s",
                step,
                reconstruction.item(),
                description.item(),
                took,
            )
    return model


def _fit_description(pool: Pool, kind: int, recipe: Recipe, generator: torch.Generator) -> Description:
    rows = np.flatnonzero(pool.kinds == kind)
    sample = rows[:: max(1, len(rows) // 3000)]
    return Description(crop(_as_tensor(pool.images[sample]), generator), recipe.components)


def _as_tensor(images: npt.NDArray[np.uint8]) -> Tensor:
    """(B, H, W, C) uint8 → (B, C, H, W) in [0, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


def _rate(recipe: Recipe, step: int) -> float:
    """Fraction of the peak rate: linear warm-up, then cosine to 0."""
    warmup = recipe.warmup * recipe.steps
    return min((step + 1) / max(1.0, warmup), 0.5 + 0.5 * math.cos(math.pi * step / recipe.steps))


def save(model: Pretrainer, pool: Pool, out: Path) -> None:
    """Write config.json, model.safetensors and preprocessor_config.json."""
    model.encoder.save_pretrained(out)
    mean, std = pool.statistics()
    facts = {"image_mean": mean, "image_std": std, "size": {"height": IMAGE, "width": IMAGE}, "do_normalize": True}
    (out / "preprocessor_config.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


@torch.inference_mode()
def mean_patch_tokens(
    encoder: Dinov2Model, pixels: npt.NDArray[np.uint8], mean: list[float], std: list[float]
) -> npt.NDArray[np.float32]:
    """(N, 64, 64, C) uint8 → (N, width) mean of the patch tokens, CLS left out."""
    encoder.eval()
    shift, scale = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)
    features = []
    for begin in range(0, len(pixels), 256):
        images = torch.from_numpy(pixels[begin : begin + 256].copy()).permute(0, 3, 1, 2).float() / 255
        tokens = encoder((images.expand(-1, 3, -1, -1) - shift) / scale).last_hidden_state
        features.append(tokens[:, 1:].mean(1))
    return torch.cat(features).numpy()


def linear_probe(encoder: Dinov2Model, settings: DatasetSettings, mean: list[float], std: list[float]) -> float:
    """Test macro AUC of a logistic regression a class on frozen features; its strength C is chosen on validation."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    index = load_index(settings)
    with tempfile.TemporaryDirectory() as folder:
        root = prepare(settings, index, Path(folder))
        cache = ImageCache.open(index, root, image_size=IMAGE, fit="crop", folder=Path(folder))
        features = mean_patch_tokens(encoder, cache.pixels, mean, std)
    train, val, test = (index.rows(split) for split in ("train", "val", "test"))
    chosen = []
    for column in range(len(index.classes)):
        target = index.labels[:, column]
        tried = []
        for strength in (0.003, 0.03, 0.3, 3.0):
            probe = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=2000))
            scores = probe.fit(features[train], target[train]).decision_function(features)
            tried.append((roc_auc_score(target[val], scores[val]), roc_auc_score(target[test], scores[test])))
        chosen.append(max(tried)[1])
    return float(np.mean(chosen))


def evaluate(folder: Path, images: int | None = None) -> dict[str, dict[str, float]]:
    """Linear probes of the saved encoder and of a random one with the same input statistics, on both phantoms."""
    facts = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    torch.manual_seed(0)
    encoders = {"pretrained": Dinov2Model.from_pretrained(folder), "random": Dinov2Model(tiny_config())}
    return {
        name: {
            kind: round(linear_probe(encoder, settings, facts["image_mean"], facts["image_std"]), 3)
            for kind, encoder in encoders.items()
        }
        for name in ("phantom", "phantom-derm")
        for settings in [DatasetSettings(name=name, image_size=IMAGE, images=images)]
    }


def main() -> None:
    """Command line: pretrain into --out, or measure what lies there."""
    parser = argparse.ArgumentParser(description="Pretrain the tiny encoder on phantoms, or measure it.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the encoder")
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--images", type=int, default=Recipe.images, help="drawn of each kind and hospital")
    parser.add_argument("--evaluate", action="store_true", help="measure the encoder in --out, train nothing")
    parser.add_argument("--evaluation-images", type=int, default=None, help="size of the phantoms measured on")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    if not arguments.evaluate:
        pool = Pool.draw(arguments.images)
        model = pretrain(Recipe(steps=arguments.steps, images=arguments.images), pool)
        arguments.out.mkdir(parents=True, exist_ok=True)
        save(model, pool, arguments.out)
    print(json.dumps(evaluate(arguments.out, arguments.evaluation_images), indent=2))


if __name__ == "__main__":
    main()
