"""The shipped tiny encoder, and the script that made it."""

from __future__ import annotations

import json
import logging
import math
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import Dinov2Model

from trainables import pretrain
from trainables.settings import DatasetSettings

SHIPPED = Path(pretrain.__file__).parent / "tiny_phantom"


@pytest.fixture(scope="module")
def pool() -> pretrain.Pool:
    return pretrain.Pool.draw(4)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the script computes; more threads only get in each other's way on so small a model."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class TestShippedEncoder:
    def test_it_loads_without_a_warning(self, caplog: pytest.LogCaptureFixture) -> None:
        with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
            warnings.simplefilter("error")
            encoder, info = Dinov2Model.from_pretrained(SHIPPED, output_loading_info=True)
        assert caplog.records == []
        assert not any(info[part] for part in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert (encoder.config.num_hidden_layers, encoder.config.hidden_size) == (12, 48)

    def test_it_is_small_fp32_and_finite(self) -> None:
        weights = SHIPPED / "model.safetensors"
        assert weights.stat().st_size <= 2_000_000
        with safe_open(weights, framework="pt") as file:
            tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118 (not a dict)
        assert all(tensor.dtype == torch.float32 and torch.isfinite(tensor).all() for tensor in tensors)

    def test_its_normalisation_is_stated(self) -> None:
        facts = json.loads((SHIPPED / "preprocessor_config.json").read_text())
        assert len(facts["image_mean"]) == len(facts["image_std"]) == 3
        assert all(0 < value < 1 for value in facts["image_mean"] + facts["image_std"])

    @pytest.mark.slow
    def test_its_card_states_what_is_measured(self) -> None:
        card = (SHIPPED / "README.md").read_text()
        for name, measured in pretrain.evaluate(SHIPPED).items():
            assert measured["pretrained"] > measured["random"]
            line = next(li for li in card.splitlines() if li.startswith(f"| {name} "))
            stated = [float(cell) for cell in line.strip("| ").split("|")[1:]]
            assert stated == pytest.approx([measured["random"], measured["pretrained"]], abs=0.01)


class TestPretraining:
    def test_it_draws_only_hospitals_that_are_no_default(self, pool: pretrain.Pool) -> None:
        assert DatasetSettings().hospital not in pretrain.HOSPITALS
        assert pool.images.shape == (2 * 4 * len(pretrain.HOSPITALS), 96, 96, 3)
        assert pool.kinds.tolist() == [0] * 32 + [1] * 32

    def test_it_repeats_to_the_bit_and_changes_every_block(self, pool: pretrain.Pool) -> None:
        recipe = pretrain.Recipe(steps=3, batch=8, components=8)
        first, second = (pretrain.pretrain(recipe, pool).encoder.state_dict() for _ in range(2))
        torch.manual_seed(recipe.seed)
        untrained = pretrain.Pretrainer(recipe).encoder.state_dict()
        for name, weights in first.items():
            assert torch.equal(weights, second[name]), name
            assert name == "embeddings.mask_token" or not torch.equal(weights, untrained[name]), name

    def test_a_description_tells_images_apart_and_has_unit_variance(self, pool: pretrain.Pool) -> None:
        views = pretrain.crop(torch.rand(200, 3, 96, 96), torch.Generator().manual_seed(0))
        description = pretrain.Description(views, 16)
        described = description.of(views)
        assert described.shape == (200, 16)
        assert described.mean().item() == pytest.approx(0, abs=0.01)
        assert described.square().mean().item() == pytest.approx(1, rel=0.02)
        spread = described.std(0)
        assert torch.all(spread[:-1] >= spread[1:] - 1e-4)

    def test_encoding_all_patches_visible_is_what_the_encoder_computes(self) -> None:
        torch.manual_seed(0)
        model = pretrain.Pretrainer(pretrain.Recipe()).eval()
        pixels = torch.randn(2, 3, 64, 64)
        every = torch.arange(64).expand(2, -1)
        with torch.inference_mode():
            own = model.encode_visible(pixels, every)
            theirs = model.encoder(pixels).last_hidden_state[:, 1:]
        torch.testing.assert_close(own, theirs)

    def test_hidden_patches_do_not_reach_the_encoding(self) -> None:
        torch.manual_seed(0)
        model = pretrain.Pretrainer(pretrain.Recipe()).eval()
        pixels = torch.randn(1, 3, 64, 64)
        changed = pixels.clone()
        changed[:, :, :8, 8:16] += 1  # patch 1
        kept = torch.tensor([[0, 2, 3, 40]])
        with torch.inference_mode():
            assert torch.equal(model.encode_visible(pixels, kept), model.encode_visible(changed, kept))
            seen = torch.tensor([[0, 1, 3, 40]])
            assert not torch.equal(model.encode_visible(pixels, seen), model.encode_visible(changed, seen))

    def test_a_disturbed_view_keeps_its_geometry(self) -> None:
        views = torch.full((4, 3, 64, 64), 0.2)
        views[:, :, 20:40, 10:30] = 0.8
        disturbed = pretrain.disturb(views, torch.Generator().manual_seed(1))
        inside, outside = disturbed[:, :, 23:37, 13:27].mean((1, 2, 3)), disturbed[:, :, 44:].mean((1, 2, 3))
        assert torch.all(inside > outside + 0.2)
        assert not torch.allclose(disturbed[0], disturbed[1])

    def test_the_rate_warms_up_and_ends_at_zero(self) -> None:
        recipe = pretrain.Recipe(steps=100, warmup=0.1)
        rates = [pretrain._rate(recipe, step) for step in range(101)]
        assert rates[0] == pytest.approx(0.1)
        assert rates[100] == pytest.approx(0, abs=1e-12)
        assert rates[50] == pytest.approx(0.5 + 0.5 * math.cos(math.pi / 2))
        assert max(rates) <= 1

    def test_a_saved_encoder_gives_the_same_features(self, pool: pretrain.Pool, tmp_path: Path) -> None:
        model = pretrain.pretrain(pretrain.Recipe(steps=2, batch=8, components=8), pool)
        pretrain.save(model, pool, tmp_path)
        mean, std = pool.statistics()
        pixels = pool.images[:3, :64, :64]
        own = pretrain.mean_patch_tokens(model.encoder, pixels, mean, std)
        loaded = pretrain.mean_patch_tokens(Dinov2Model.from_pretrained(tmp_path), pixels, mean, std)
        assert own.shape == (3, 48)
        assert np.array_equal(own, loaded)
