"""Pretrain the tiny encoder on phantoms of other hospitals, without labels, and measure it.

    python -m trainables.pretrain --out trainables/tiny_phantom          # about 20 minutes on one core
    python -m trainables.pretrain --out trainables/tiny_phantom --evaluate    # about a minute

Two objectives share one pass over masked views of an image, of which only the visible patches are encoded:
reconstruction of the hidden patches, normalised a patch (He et al., Masked Autoencoders, CVPR 2022), and agreement of
the pooled visible patches of two views against the rest of the batch (InfoNCE; Chen et al., SimCLR, ICML 2020). A batch
holds whole patients, so what must be told apart is what differs between images of one anatomy. The result is a plain
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

    steps: int = 9000
    batch: int = 64  # images, each in two views
    images: int = 1500  # of each kind and hospital
    visible: float = 0.3  # share of the patches that are encoded
    lr: float = 2e-3
    weight_decay: float = 0.05
    warmup: float = 0.05  # share of the steps
    contrast: float = 0.5  # weight of InfoNCE beside the reconstruction
    temperature: float = 0.15
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

    def batches(self, batch: int, rng: np.random.Generator, run: int = 8) -> Iterator[npt.NDArray[np.intp]]:
        """Endless batches of one kind each, made of runs of consecutive images: patients stay together."""
        while True:
            kind = int(rng.integers(2))
            rows = np.flatnonzero(self.kinds == kind)
            starts = rng.choice(len(rows) - run, batch // run, replace=False)
            yield rows[np.unique(starts[:, None] + np.arange(run))]


def two_views(images: Tensor, generator: torch.Generator) -> Tensor:
    """(B, 3, 96, 96) in [0, 1] → (2B, 3, 64, 64): crops under another scanner's look."""
    twice = torch.cat([images, images])
    count = len(twice)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    scale, turn = uniform(0.78, 1.0), uniform(-0.08, 0.08)
    offset = uniform(-1, 1, 2) * (1 - scale)[:, None]
    theta = torch.stack([torch.stack([scale, turn, offset[:, 0]], 1), torch.stack([-turn, scale, offset[:, 1]], 1)], 1)
    grid = functional.affine_grid(theta, [count, 3, IMAGE, IMAGE], align_corners=False)
    softened = functional.avg_pool2d(twice, 3, stride=1, padding=1)
    blurred = uniform(0.1, 0.6, 1, 1, 1)
    views = functional.grid_sample(
        (1 - blurred) * twice + blurred * softened, grid, align_corners=False, padding_mode="border"
    )
    views = views.clamp(1e-3, 1) ** uniform(0.75, 1.35, 1, 1, 1)
    views = (views - 0.5) * uniform(0.75, 1.3, 1, 1, 1) + 0.5 + uniform(-0.08, 0.08, 1, 1, 1)
    noise = torch.randn(count, 1, IMAGE, IMAGE, generator=generator)
    return views + noise * uniform(0, 0.035, 1, 1, 1)


class Pretrainer(nn.Module):
    """The encoder with what is thrown away afterwards: a decoder of patches and a projection of pooled features."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.encoder = Dinov2Model(tiny_config())
        width = self.encoder.config.hidden_size
        self.decoder_mask = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_position = nn.Parameter(0.02 * torch.randn(1, GRID * GRID, width))
        self.decoder = nn.TransformerEncoderLayer(width, 3, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.decoder_head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 3 * TARGET * TARGET))
        self.projection = nn.Sequential(nn.Linear(width, 256), nn.BatchNorm1d(256), nn.GELU(), nn.Linear(256, 64))

    def forward(self, pixels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(reconstruction, InfoNCE) of (2B, 3, 64, 64) normalised views; the second half are the first's partners."""
        order = torch.rand(len(pixels), GRID * GRID, generator=generator).argsort(1)
        kept = order[:, : round(self.recipe.visible * GRID * GRID)]
        encoded = self.encode_visible(pixels, kept)
        return self._reconstruction(pixels, encoded, order, kept), self._agreement(encoded.mean(1))

    def encode_visible(self, pixels: Tensor, kept: Tensor) -> Tensor:
        """(B, V, width) tokens of the patches at the positions `kept` (B, V), as if no other patch existed."""
        embeddings = self.encoder.embeddings
        patches = embeddings.patch_embeddings(pixels) + embeddings.position_embeddings[:, 1:]
        visible = patches.gather(1, kept[..., None].expand(-1, -1, patches.shape[2]))
        first = (embeddings.cls_token + embeddings.position_embeddings[:, :1]).expand(len(pixels), -1, -1)
        hidden = torch.cat([first, visible], 1)
        for block in self.encoder.encoder.layer:
            hidden = block(hidden)
        return self.encoder.layernorm(hidden)[:, 1:]

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

    def _agreement(self, pooled: Tensor) -> Tensor:
        projected = functional.normalize(self.projection(pooled), dim=1)
        similarity = projected @ projected.T / self.recipe.temperature
        similarity.fill_diagonal_(-1e9)
        half = len(pooled) // 2
        partner = torch.arange(len(pooled)).roll(half)
        return functional.cross_entropy(similarity, partner)


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
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in pool.statistics())
    batches = pool.batches(recipe.batch, np.random.default_rng(recipe.seed))
    begin = time.monotonic()
    for step in range(1, recipe.steps + 1):
        images = torch.from_numpy(pool.images[next(batches)]).permute(0, 3, 1, 2).float() / 255
        views = (two_views(images, generator) - mean) / std
        reconstruction, agreement = model(views, generator)
        loss = reconstruction + recipe.contrast * agreement
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 250 == 0:
            took = time.monotonic() - begin
            _log.info(
                "step %d: reconstruction %.4f, agreement %.4f, %.0f s",
                step,
                reconstruction.item(),
                agreement.item(),
                took,
            )
    return model


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
