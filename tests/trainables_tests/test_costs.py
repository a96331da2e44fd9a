"""Units of the design's closed forms, of a ViT counted on paper, and of the real model counted by PyTorch."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Dinov2Model

from trainables.backbone_files import find_backbone
from trainables.backbones import PooledViT, load_encoder, mlp_head
from trainables.costs import IMAGES, Costs, vit_costs
from trainables.settings import ModelSettings, StrategySettings
from trainables.strategy import Phase, phase, total_epochs

EQUAL = Costs(embedding=0, blocks=(1,) * 12, head=0)  # F = 12 units
PROGRESSIVE = StrategySettings(head_epochs=10, tune_epochs=20, depth=10)
HEAD_ONLY = PROGRESSIVE.model_copy(update={"unfreezing": "none"})
F, E1, E2 = 12, 10, 20


def phases(strategy: StrategySettings) -> list[Phase]:
    return [phase(strategy, 12, epoch) for epoch in range(total_epochs(strategy))]


def alone(strategy: StrategySettings) -> int:
    return sum(EQUAL.training(IMAGES, now.unfrozen, now.base) for now in phases(strategy))


def from_perfect_caches(strategy: StrategySettings) -> int:
    return sum(
        EQUAL.training(EQUAL.frozen_position(now.unfrozen, now.base), now.unfrozen, now.base)
        for now in phases(strategy)
    )


def from_pooled_vectors(strategy: StrategySettings) -> int:
    return sum(
        EQUAL.training(EQUAL.features if now.unfrozen == 0 else IMAGES, now.unfrozen, now.base)
        for now in phases(strategy)
    )


def ablation_alone(tuned: StrategySettings) -> int:
    """Head only, + unfreezing, + class weights, + EMA: each trained by itself."""
    return alone(HEAD_ONLY) + 3 * alone(tuned)


@pytest.mark.parametrize(
    ("tuned", "k_mean", "ratio"),
    [
        (PROGRESSIVE, 8, Fraction(5, 2)),
        (PROGRESSIVE.model_copy(update={"unfreezing": "static", "depth": 6}), 6, Fraction(3)),
        (PROGRESSIVE.model_copy(update={"unfreezing": "static"}), 10, Fraction(11, 5)),
    ],
)
def test_the_ablation_has_the_designs_closed_form_and_ratio(
    tuned: StrategySettings, k_mean: int, ratio: Fraction
) -> None:
    assert sum(now.unfrozen for now in phases(tuned)) == k_mean * E2
    assert ablation_alone(tuned) == (4 * E1 + E2) * F + 3 * E2 * (F + 2 * k_mean)
    # EMA observes the class-weighted trajectory, so two trajectories are trained; head epochs cost nothing
    floor = 2 * from_perfect_caches(tuned)
    assert from_perfect_caches(HEAD_ONLY) == 0
    assert floor == 2 * E2 * 3 * k_mean
    assert Fraction(ablation_alone(tuned), floor) == ratio


def test_one_pass_over_the_data_set_takes_little_from_the_ratio() -> None:
    one_pass = EQUAL.forward(IMAGES, EQUAL.features)
    assert one_pass == F
    assert 3 * ablation_alone(PROGRESSIVE) / (3 * 2 * from_perfect_caches(PROGRESSIVE) + one_pass) == pytest.approx(
        2.49, abs=0.005
    )


def test_pooled_vectors_alone_give_the_designs_ratio() -> None:
    shared = 2 * from_pooled_vectors(PROGRESSIVE) + from_pooled_vectors(HEAD_ONLY)
    assert shared == 2 * E2 * (F + 2 * 8)
    assert ablation_alone(PROGRESSIVE) / shared == pytest.approx(2.14, abs=0.005)


UNEVEN = Costs(embedding=7, blocks=(1, 10, 100), head=3)


@pytest.mark.parametrize(
    ("start", "stop", "units"),
    [(-1, 0, 7), (-1, 1, 8), (-1, 3, 118), (-1, 4, 118), (0, 1, 1), (1, 3, 110), (2, 4, 100), (3, 4, 0), (4, 4, 0)],
)
def test_a_forward_pass_costs_the_parts_between_its_positions(start: int, stop: int, units: int) -> None:
    assert UNEVEN.forward(start, stop) == units


@pytest.mark.parametrize(
    ("unfrozen", "base", "position"), [(0, False, 4), (1, False, 2), (2, False, 1), (3, False, 0), (3, True, -1)]
)
def test_the_frozen_position_is_the_last_that_training_cannot_change(unfrozen: int, base: bool, position: int) -> None:
    assert UNEVEN.frozen_position(unfrozen, base) == position


def test_backward_costs_twice_the_forward_of_each_unfrozen_part() -> None:
    assert UNEVEN.training(IMAGES, 0, False) == 121 + 2 * 3
    assert UNEVEN.training(4, 0, False) == 3 + 2 * 3
    assert UNEVEN.training(IMAGES, 1, False) == 121 + 2 * (3 + 100)
    assert UNEVEN.training(2, 1, False) == 103 + 2 * (3 + 100)
    assert UNEVEN.training(IMAGES, 3, False) == 121 + 2 * (3 + 111)
    assert UNEVEN.training(IMAGES, 3, True) == 3 * 121


def test_the_units_of_rad_dino_are_those_counted_on_paper() -> None:
    costs = vit_costs(hidden=768, layers=12, mlp_ratio=4, patch=14, image_size=256, head_hidden=512, classes=14)
    tokens = 18 * 18 + 1  # 256 px leave 18 patches a side
    assert costs.embedding == round(324 * 588 * 768 / 1000)
    assert costs.blocks == (round((12 * tokens * 768 * 768 + 2 * tokens * tokens * 768) / 1000),) * 12
    assert costs.head == round((768 * 512 + 512 * 512 + 512 * 14) / 1000)
    assert costs.values(0) * 4 == pytest.approx(1.0e6, rel=0.01)  # the design's 1.0 MB an image and boundary
    assert costs.values(0) == costs.values(12)
    assert costs.values(13) * 4 * 112_120 == pytest.approx(344e6, rel=0.01)  # and 344 MB for NIH


def test_a_part_never_costs_nothing() -> None:
    tiny = vit_costs(hidden=1, layers=2, mlp_ratio=1, patch=8, image_size=8, head_hidden=1, classes=1)
    assert (tiny.embedding, tiny.blocks, tiny.head) == (1, (1, 1), 1)


def test_the_units_are_what_pytorch_counts_in_the_shipped_encoder() -> None:
    backbone = find_backbone("tiny-phantom")
    model = PooledViT(load_encoder(backbone), mlp_head(48, 14, ModelSettings(), seed=0)).eval()
    assert isinstance(model.encoder, Dinov2Model)
    model.encoder.set_attn_implementation("eager")  # so that attention's products are counted too
    costs = vit_costs(hidden=48, layers=12, mlp_ratio=4, patch=8, image_size=64, head_hidden=512, classes=14)
    images = torch.zeros(1, 3, 64, 64)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.predict(model.advance(images, IMAGES, costs.features))
    units = counter.get_total_flops() / 2 / 1000  # a multiply-accumulate is two operations
    assert costs.evaluation(IMAGES) == pytest.approx(units, rel=0.005)
