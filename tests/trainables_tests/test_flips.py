"""Flips in training: boxes and masks turn with their images, keys and caches know of them, sharing changes no bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from study.plan import Plan
from tests.detection_extra import needs_detection
from tests.studies_for_tests import TINY, planned
from tests.task_cases import CASES, CPU

FLIPS = {"flips": "both"}
MIRRORED, UPENDED = 1, 2
SHORT = {**TINY, "seeds": [0]}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp() / "task_cases"


@needs_detection
def test_boxes_turn_with_their_images(drawn: Path) -> None:
    task: Any = CASES["detection by YOLO"].open(drawn, dataset=FLIPS)
    rows = task.rows("train")
    plain = task._targets(rows, CPU)
    assert len(plain.box) > 5
    x, y, width, height = plain.box.T
    for view, expected in (
        (MIRRORED, (1 - x, y, width, height)),
        (UPENDED, (x, 1 - y, width, height)),
        (MIRRORED + UPENDED, (1 - x, 1 - y, width, height)),
    ):
        turned = task._targets(rows + view * task.views.images, CPU)
        torch.testing.assert_close(turned.box, torch.stack(expected, 1), rtol=0, atol=1e-6)
        assert torch.equal(turned.label, plain.label)
        assert turned.counts == plain.counts


def test_masks_memories_and_prompts_turn_with_their_images(drawn: Path) -> None:
    noiseless = {"prompt_noise": 0.0}
    task: Any = CASES["segmentation"].open(drawn, dataset=FLIPS, segmentation=noiseless)
    rows = task.rows("train")[:4]
    mirrored, upended = (rows + view * task.views.images for view in (MIRRORED, UPENDED))
    outputs = torch.from_numpy(np.random.default_rng(0).normal(size=(4, 3, 2, 16, 16)).astype(np.float32))
    loss = task.loss(outputs, rows, None)
    torch.testing.assert_close(task.loss(outputs.flip(-1), mirrored, None), loss)
    torch.testing.assert_close(task.loss(outputs.flip(-2), upended, None), loss)
    assert not torch.isclose(task.loss(outputs, mirrored, None), loss), "the truth has turned"
    drawn_box, turned_box = (task.side_inputs(r, CPU, training=True)[:, :, 1] for r in (rows, mirrored))
    size = task._masks.size
    (left, right), x = drawn_box[..., 0].unbind(-1), turned_box[..., 0]
    assert torch.equal(x, torch.stack((size - 1 - right, size - 1 - left), -1))
    assert torch.equal(turned_box[..., 1], drawn_box[..., 1])


def keys(plan: Plan) -> set[str]:
    return {key for chain in plan.chains for key in chain.keys}


def test_flips_are_part_of_every_key_and_of_the_identity_of_caches(tmp_path: Path) -> None:
    plans = [planned(tmp_path, {**SHORT, "dataset.flips": flips}) for flips in ("none", "horizontal", "both")]
    for number, plan in enumerate(plans):
        for other in plans[number + 1 :]:
            assert keys(plan).isdisjoint(keys(other))
            identities = [{chain.cache_identity for chain in p.chains} for p in (plan, other)]
            assert identities[0].isdisjoint(identities[1])
    assert keys(plans[0]) == keys(planned(tmp_path, SHORT)), "none is the default"


STUDY = """\
study: flips
title: What flips add
seeds: [0]
dataset: {images: 600}
rows:
  list:
    - name: as they are
    - name: flipped
      set: {dataset.flips: horizontal}
"""


def test_rows_may_differ_in_flips_on_one_split(tmp_path: Path) -> None:
    (tmp_path / "flips.yaml").write_text(STUDY)
    plan = planned(tmp_path, {}, study=str(tmp_path / "flips.yaml"))
    first, second = plan.chains
    assert first.material.index is second.material.index, "the table is read once"
    assert set(first.keys).isdisjoint(second.keys)
    assert plan.images_to_decode == len(first.material.index), "and its images decoded once"


def test_a_cache_of_two_views_is_counted_twice_and_only_planned_where_it_pays(tmp_path: Path) -> None:
    def pooled(flips: str, head_epochs: int) -> Plan:
        return planned(tmp_path, {**SHORT, "dataset.flips": flips, "strategy.head_epochs": head_epochs})

    one, two = (pooled(flips, 4).caches for flips in ("none", "horizontal"))
    one, two = ([cache for cache in caches if cache.pooled] for caches in (one, two))
    assert [cache.build_units for cache in two] == [2 * cache.build_units for cache in one]
    assert one[0].bytes < two[0].bytes < 2 * one[0].bytes, "held-out images have one view"
    plan = pooled("both", 1)  # head epochs of the chain and of stage 2 without unfreezing: 3 readers of 4 views
    assert [cache for cache in plan.caches if cache.pooled] == []
    for plan in (pooled(flips, epochs) for flips in ("none", "horizontal", "both") for epochs in (1, 4)):
        assert plan.units.floor <= plan.units.shared <= plan.units.alone
