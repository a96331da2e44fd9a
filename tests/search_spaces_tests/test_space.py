"""Spaces: what may be searched, around which baseline, under which conditions."""

from __future__ import annotations

import math
import random
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from search_spaces.declared import combined, declared_space
from search_spaces.space import Parameter, Space, SpaceError, acts_on_head, changed, resolve, value_at
from trainables.settings import Settings, Task

BASELINE = Settings()


def space(**parameters: dict[str, Any]) -> Space:
    """Keys are written with two underscores for the dot."""
    declared = {k.replace("__", "."): Parameter.model_validate(v) for k, v in parameters.items()}
    return resolve(declared, BASELINE)


def refusals(**parameters: dict[str, Any]) -> dict[str, str]:
    with pytest.raises(SpaceError) as refused:
        space(**parameters)
    return refused.value.found


# ------------------------------------------------------------------------------------------------- declared spaces


@pytest.mark.parametrize("task", get_args(Task))
def test_every_task_has_a_space_that_holds_what_a_search_is_for(task: Task) -> None:
    searched = set(declared_space(task))
    assert searched >= {
        "strategy.depth",
        "strategy.unfreezing",
        "strategy.head_epochs",
        "strategy.tune_epochs",
        "optimiser.head_lr",
        "optimiser.encoder_lr",
        "optimiser.weight_decay",
        "weighting.enabled",
        "weighting.eta",
        "weighting.normalise",
        "weighting.clip",
        "ema.enabled",
        "ema.decay",
    }


@pytest.mark.parametrize("task", get_args(Task))
def test_every_assignment_of_a_declared_space_is_valid_settings(task: Task) -> None:
    baseline = Settings(task=task)
    resolved = resolve(declared_space(task), baseline)
    rng = random.Random(7)
    for _ in range(200):
        chosen = resolved.drawn(rng)
        settings = Settings.model_validate(changed(baseline.model_dump(), chosen))
        for key, value in chosen.items():
            assert value_at(settings.model_dump(), key) == value


@pytest.mark.parametrize("task", get_args(Task))
def test_head_stages_are_few_so_that_trials_can_share_them(task: Task) -> None:
    resolved = resolve(declared_space(task), Settings(task=task))
    grid = [len(d.choices or ()) for d in resolved.dimensions if acts_on_head(d.key)]
    assert 0 not in grid
    assert math.prod(grid) <= 16


def test_a_study_adds_replaces_and_takes_out_parameters() -> None:
    own = {"optimiser.head_lr": None, "model.dropout": Parameter(choices=(0.1, 0.2))}
    merged = combined("classification", own)
    assert "optimiser.head_lr" not in merged
    assert merged["model.dropout"].choices == (0.1, 0.2)
    assert merged["strategy.depth"] == declared_space("classification")["strategy.depth"]


# ------------------------------------------------------------------------------------------------- what is searched


def test_bounds_that_multiply_follow_the_baseline() -> None:
    rate = {"low": 0.1, "high": 10, "log": True, "times": "optimiser.encoder_lr"}
    for encoder_lr in (3e-6, 5e-4):
        baseline = Settings.model_validate({"optimiser": {"encoder_lr": encoder_lr}})
        (dimension,) = resolve({"optimiser.encoder_lr": Parameter.model_validate(rate)}, baseline).dimensions
        assert dimension.low == pytest.approx(encoder_lr / 10)
        assert dimension.high == pytest.approx(encoder_lr * 10)


def test_whole_numbers_stay_whole_and_do_not_fall_below_one() -> None:
    baseline = Settings.model_validate({"strategy": {"tune_epochs": 3}})
    declared = {"strategy.tune_epochs": Parameter(choices=(0.1, 0.5, 1, 2), times="strategy.tune_epochs")}
    assert resolve(declared, baseline).dimensions[0].choices == (1, 2, 3, 6)


def test_a_parameter_acts_only_where_its_condition_holds() -> None:
    made = space(
        weighting__eta={"low": 0, "high": 1, "when": {"weighting.enabled": True}},
        weighting__enabled={"choices": [False, True]},
    )
    assert [d.key for d in made.dimensions] == ["weighting.enabled", "weighting.eta"], "what decides comes first"
    drawn = [made.drawn(random.Random(i)) for i in range(40)]
    assert {one["weighting.enabled"] for one in drawn} == {False, True}
    assert all(("weighting.eta" in one) == one["weighting.enabled"] for one in drawn)


def test_a_condition_on_what_is_not_searched_is_decided_by_the_baseline() -> None:
    made = space(strategy__step={"choices": [1, 2], "when": {"strategy.unfreezing": ["static", "none"]}})
    assert BASELINE.strategy.unfreezing == "progressive"
    assert made.drawn(random.Random(0)) == {}


def test_every_look_at_a_trajectory_is_listed_once_the_chosen_one_first() -> None:
    made = space(
        ema__decay={"choices": [0.9, 0.99], "when": {"ema.enabled": True}},
        ema__enabled={"choices": [False, True]},
        strategy__depth={"choices": [2, 4]},
    )
    chosen = {"strategy.depth": 4, "ema.enabled": True, "ema.decay": 0.99}
    looks = made.observed(chosen)
    assert looks[0] == chosen
    assert sorted(map(str, looks)) == sorted(
        map(
            str,
            [
                {"strategy.depth": 4, "ema.enabled": False},
                {"strategy.depth": 4, "ema.enabled": True, "ema.decay": 0.9},
                chosen,
            ],
        )
    )
    assert made.observers() == 3
    assert made.interventions(chosen) == {"strategy.depth": 4}


def test_the_baseline_is_an_assignment_where_it_lies_in_the_space() -> None:
    around = {"low": 0.1, "high": 10, "log": True, "times": "optimiser.head_lr"}
    made = space(optimiser__tune_head_lr=around, strategy__depth={"choices": [4, 10]})
    assert made.of_baseline() == {"optimiser.tune_head_lr": BASELINE.optimiser.head_lr, "strategy.depth": 10}, (
        "a head rate of stage 2 that is not given is that of the head stage"
    )
    assert space(strategy__depth={"choices": [2, 4]}).of_baseline() is None


# ------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("parameter", "said"),
    [
        ({}, "expected choices, or low and high"),
        ({"low": 1}, "expected choices, or low and high"),
        ({"low": 2, "high": 2}, "low 2 is not below high 2"),
        ({"low": 0, "high": 2, "log": True}, "begins above 0"),
        ({"choices": [1], "low": 0, "high": 1}, "give one of them"),
        ({"choices": [1, 1]}, "given twice"),
        ({"choices": []}, "at least 1"),
        ({"choises": [1]}, "choises"),
    ],
)
def test_a_parameter_of_no_form_is_refused(parameter: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Parameter.model_validate(parameter)


def test_all_that_is_wrong_with_a_space_is_said_at_once() -> None:
    found = refusals(
        strategy__dept={"choices": [1]},
        dataset__image_size={"choices": [64, 128]},
        model__backbone={"choices": ["a"]},
        optimiser__head_lr={"low": 1e-4, "high": 1e-3},
        ema__decay={"low": 0.9, "high": 0.99},
        optimiser__encoder_lr={"low": -1.0, "high": 1.0},
        strategy__depth={"choices": [2, "al"]},
        optimiser__tune_head_lr={"choices": [1], "times": "strategy.depht"},
        weighting__eta={"low": 0, "high": 1, "when": {"ema.enabled": True}},
        strategy__step={"choices": [1], "when": {"strategy.nothing": 1}},
    )
    assert {key: message.split(":")[0].split("(")[0].strip() for key, message in found.items()} == {
        "strategy.dept": "is no setting; give a dotted key such as optimiser.encoder_lr",
        "dataset.image_size": "stays as it is during a search; make it another study",
        "model.backbone": "stays as it is during a search; make it another study",
        "optimiser.head_lr": "acts on the head stage, which trials share",
        "ema.decay": "is looked at with every value on one trajectory",
        "optimiser.encoder_lr": "-1.0 is no value of it",
        "strategy.depth": "'al' is no value of it",
        "optimiser.tune_head_lr": "times strategy.depht",
        "weighting.eta": "when ema.enabled",
        "strategy.step": "when strategy.nothing",
    }


def test_conditions_that_wait_for_each_other_are_refused() -> None:
    found = refusals(
        strategy__step={"choices": [1, 2], "when": {"strategy.depth": 2}},
        strategy__depth={"choices": [2, 4], "when": {"strategy.step": 1}},
    )
    assert set(found) == {"strategy.step", "strategy.depth"}
    assert "wait for each other" in found["strategy.step"]
