"""The study of baselines: encoders by name, image sizes of their own, and plain fine-tuning in keys and plans."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import timm
from safetensors.torch import save_file
from small_studies import chain, document, loaded, planned

from study.chains import Chain
from study.documents import StudyError
from study.executors import placed
from study.plan import Plan, make_plan
from study.schedule import Schedule
from study.spec import Choices, find_study, load_study
from trainables.strategy import Phase

SMALL_ENCODER = {"backbone": "timm:resnet50", "small": True}


def row(name: str, **changes: Any) -> dict[str, Any]:
    return {"name": name, "set": {key.replace("__", "."): value for key, value in changes.items()}}


def refusal(tmp_path: Path, content: dict[str, Any]) -> str:
    with pytest.raises(StudyError) as caught:
        planned(tmp_path, content)
    return str(caught.value)


# -- plain fine-tuning ------------------------------------------------------------------------------------------------


def test_plain_fine_tuning_trains_everything_from_the_first_epoch_under_one_schedule(tmp_path: Path) -> None:
    plain = chain(planned(tmp_path, document([row("p", strategy__unfreezing="plain", strategy__depth="all")])), "p")
    assert plain.phases == (
        *[Phase("head", 0, 6, unfrozen=12, base=True)] * 2,
        *[Phase("tune", 0, 6, unfrozen=12, base=True)] * 4,
    )
    top = chain(planned(tmp_path, document([row("p", strategy__unfreezing="plain", strategy__depth=3)])), "p")
    assert {(now.unfrozen, now.base) for now in top.phases} == {(3, False)}


def test_plain_fine_tuning_shares_no_epoch_with_a_head_stage(tmp_path: Path) -> None:
    plan = planned(tmp_path, document([row("p", strategy__unfreezing="plain"), row("s")]))
    assert not set(chain(plan, "p").keys) & set(chain(plan, "s").keys)


def test_copies_and_class_weights_of_plain_fine_tuning_begin_with_stage_2(tmp_path: Path) -> None:
    base = {"unfreezing": "plain", "depth": "all"}
    rows = [row("raw"), row("averaged", ema__enabled=True), row("weighted", weighting__enabled=True)]
    plan = planned(tmp_path, document(rows, strategy=base))
    raw, averaged, weighted = (chain(plan, name) for name in ("raw", "averaged", "weighted"))
    assert raw.keys == averaged.keys
    assert [a == b for a, b in zip(raw.keys, weighted.keys, strict=True)] == [True, True, False, False, False, False]


# -- encoders ---------------------------------------------------------------------------------------------------------


def test_encoders_with_blocks_of_unequal_cost_are_planned_by_their_own_costs(tmp_path: Path) -> None:
    plan = planned(tmp_path, document([row("only row", strategy__depth=4)], model=SMALL_ENCODER))
    course = chain(plan, "only row").course
    costs = course.material.costs
    assert len(costs.blocks) == 16
    assert len(set(costs.blocks)) > 1
    images = course.material.train_images
    forward = costs.embedding + sum(costs.blocks) + costs.head
    assert course.units()[-1] == images * (forward + 2 * (sum(costs.blocks[-4:]) + costs.head))


def test_a_depth_beyond_an_encoder_is_refused_with_its_number_of_blocks(tmp_path: Path) -> None:
    model = {"backbone": "timm:densenet121", "small": True}
    told = refusal(tmp_path, document([row("only row", strategy__depth=11)], model=model))
    assert "strategy.depth: 11 blocks, but backbone 'timm:densenet121 (small)' has 10" in told


def test_images_below_an_encoders_least_are_refused_with_it(tmp_path: Path) -> None:
    told = refusal(tmp_path, document(model={"backbone": "timm:inception_v3"}))
    assert "dataset.image_size: inception_v3 needs images of at least 107 px, not 64" in told


def test_each_row_takes_images_of_its_encoders_own_size_and_the_others_the_studys(tmp_path: Path) -> None:
    rows = [row(name, model__backbone=name) for name in ("timm:inception_v3", "timm:resnet50", "tiny-phantom")]
    study = loaded(tmp_path, document(rows, model={"own_size": True}))
    assert [r.settings["phantom"].dataset.image_size for r in study.rows] == [299, 224, 64]
    small = loaded(tmp_path, document(rows, model={"own_size": True, "small": True}))
    assert {r.settings["phantom"].dataset.image_size for r in small.rows} == {64}


def test_an_unknown_encoder_with_its_own_size_is_named_with_its_row(tmp_path: Path) -> None:
    told = refusal(tmp_path, document([row("mine", model__backbone="timm:resnet51")], model={"own_size": True}))
    assert "no known architecture 'resnet51'" in told


def weighted(plan: Plan) -> Chain:
    return chain(plan, "only row")


def test_weights_act_through_what_is_in_the_file_and_not_through_its_place(tmp_path: Path) -> None:
    model = timm.create_model("resnet50", num_classes=0)
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        save_file(model.state_dict(), tmp_path / place / "model.safetensors")
    keys = {}
    for place in ("a", "b"):
        content = document(model={"backbone": "timm:resnet50", "weights": {"resnet50": str(tmp_path / place)}})
        keys[place] = weighted(planned(tmp_path, content)).keys
    assert keys["a"] == keys["b"]
    absent = weighted(planned(tmp_path, document(model={"backbone": "timm:resnet50"}))).keys
    assert absent[0] != keys["a"][0]
    model.bn1.bias.data += 1
    save_file(model.state_dict(), tmp_path / "b" / "model.safetensors")
    content = document(model={"backbone": "timm:resnet50", "weights": {"resnet50": str(tmp_path / "b")}})
    assert weighted(planned(tmp_path, content)).keys[0] != keys["a"][0]


def test_another_process_finds_weights_and_both_data_sets_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_file(timm.create_model("resnet50", num_classes=0).state_dict(), tmp_path / "encoder.safetensors")
    content = document(model={"backbone": "timm:resnet50", "weights": {"resnet50": "encoder.safetensors"}})
    plan = planned(tmp_path, content)
    request = Schedule(plan, plan.chains, lambda c: False, lambda k: False).nodes[0].request
    assert placed(request).settings.model.weights == {"resnet50": str(tmp_path / "encoder.safetensors")}


# -- the shipped study ------------------------------------------------------------------------------------------------


def test_the_shipped_study_pairs_each_encoder_with_itself(tmp_path: Path) -> None:
    study = load_study(find_study("baselines"), Choices())
    names = [r.name for r in study.rows]
    assert len(names) == 9
    for name in names[:4]:
        plain, spft = (next(r for r in study.rows if r.name == n) for n in (name, f"{name} + SPFT"))
        a, b = (r.settings["phantom-derm"] for r in (plain, spft))
        assert a.model == b.model
        assert a.optimiser == b.optimiser, "one rate for an encoder's two rows"
        assert (a.strategy.unfreezing, b.strategy.unfreezing) == ("plain", "progressive")
    plan = make_plan(study, storage=tmp_path)
    assert {c.material.synthetic for c in plan.chains} == {True}


def test_on_real_data_the_encoders_are_pretrained_and_large(tmp_path: Path) -> None:
    study = load_study(find_study("baselines"), Choices(dataset="ham10000", data_roots={"": "nowhere"}))
    for r in study.rows:
        settings = r.settings["ham10000"]
        assert not settings.model.small
        assert settings.dataset.images is None
    sizes = {r.name: r.settings["ham10000"].dataset.image_size for r in study.rows}
    assert [sizes[n] for n in ("InceptionV3", "ResNet50", "DenseNet121", "ALBEF (only images)", "SPFT")] == [
        299,
        224,
        224,
        256,
        256,
    ]


def test_planning_nine_encoders_takes_no_time(tmp_path: Path) -> None:
    study = load_study(find_study("baselines"), Choices())
    started = time.perf_counter()
    make_plan(study, storage=tmp_path)
    assert time.perf_counter() - started < 5
