"""A search in a study's terms: trials as rows, the confirmation of winners, the ablation around the best."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_studies import document, loaded

from study.chains import materials_of
from study.documents import StudyError
from study.plan import make_plan
from study.search import TrialFacts
from study.searches.rows import Search, ablation_of, chains_of, confirmation
from study.spec import Choices, find_study, load_study

BASELINE = {"ema": {"enabled": True, "decay": 0.98}, "weighting": {"enabled": True}}
PARAMETERS = {
    "strategy.depth": {"choices": [4, 10]},
    "optimiser.head_lr": {"choices": [1e-3, 2e-3]},
    "ema.enabled": {"choices": [False, True]},
    "ema.decay": {"choices": [0.9, 0.98], "when": {"ema.enabled": True}},
}


def made(folder: Path, **given: Any) -> Search:
    rows = given.pop("rows", [{"name": "Default"}])
    everything = {f"{group}.{name}": None for group, name in TASK_KEYS} | PARAMETERS
    content = document(rows, **BASELINE, search={"parameters": everything, **given})
    return Search.of(loaded(folder, content))


TASK_KEYS = [
    ("strategy", "unfreezing"), ("strategy", "step"), ("strategy", "tune_epochs"), ("strategy", "head_epochs"),
    ("optimiser", "weight_decay"), ("optimiser", "encoder_lr"), ("optimiser", "tune_head_lr"),
    ("weighting", "enabled"), ("weighting", "eta"), ("weighting", "normalise"), ("weighting", "clip"),
]  # fmt: skip


def trial(number: int, value: float, trajectory: int | None = None, **chosen: Any) -> TrialFacts:
    """A finished one; keys are written with two underscores for the dot."""
    plain = {"strategy.depth": 10, "optimiser.head_lr": 1e-3, "ema.enabled": True, "ema.decay": 0.98}
    plain |= {key.replace("__", "."): given for key, given in chosen.items()}
    if not plain["ema.enabled"]:
        del plain["ema.decay"]
    return TrialFacts(number, plain, "FINISHED", number if trajectory is None else trajectory, (value,))


# ------------------------------------------------------------------------------------------------- trials as rows


def test_looks_at_a_trajectory_are_rows_that_train_once(tmp_path: Path) -> None:
    search = made(tmp_path)
    looks = search.space.observed(trial(0, 0.5).chosen)
    study = search.trials_study([search.row(f"trial {i}", i, look) for i, look in enumerate(looks)])
    chains = chains_of(study, tmp_path)
    assert len(chains) == 3
    assert len({chain.leaf for chain in chains}) == 1
    assert len({chain.observer.name for chain in chains}) == 3
    assert {chain.cell.seed for chain in chains} == {search.settings.trial_seed}


def test_head_stages_are_as_many_as_the_grid_of_head_settings(tmp_path: Path) -> None:
    search = made(tmp_path, trials=200)
    chains = chains_of(search.drawn(tmp_path), tmp_path)
    heads = {chain.keys[chain.cell.settings.strategy.head_epochs - 1] for chain in chains}
    assert len(heads) == 2
    assert len({chain.leaf for chain in chains}) == 4


def test_an_estimate_costs_what_its_trials_would(tmp_path: Path) -> None:
    search = made(tmp_path, trials=9)
    plan = make_plan(search.drawn(tmp_path), storage=tmp_path, repeats=True)
    assert plan.units.alone == sum(sum(chain.course.units()) for chain in plan.chains)
    assert plan.units.alone > 2 * plan.units.shared, "three looks at each trajectory"


def test_every_value_is_tried_on_the_encoder_before_anything_starts(tmp_path: Path) -> None:
    search = made(tmp_path, parameters={**PARAMETERS, "strategy.depth": {"choices": [4, 13, 14]}})
    with pytest.raises(StudyError) as refused:
        search.check_values(tmp_path, download=False)
    assert [problem.split(",")[0] for problem in refused.value.problems] == [
        "strategy.depth: 13 blocks",
        "strategy.depth: 14 blocks",
    ]
    made(tmp_path).check_values(tmp_path, download=False)


def test_a_declaration_changes_with_all_that_a_value_depends_on_and_with_nothing_else(tmp_path: Path) -> None:
    before = made(tmp_path).declaration(tmp_path)
    for same in ({"trials": 7}, {"seed": 3}, {"sampler": "random"}, {"startup": 1}, {"confirm": 0}):
        assert made(tmp_path, **same).declaration(tmp_path) == before
    for other in (
        {"trial_seed": 5}, {"pruner": "median"}, {"rungs": 2}, {"objectives": ["units"]},
        {"parameters": {**PARAMETERS, "strategy.depth": {"choices": [2, 4]}}},
        {"rows": [{"name": "Default", "set": {"strategy.step": 1}}]},
    ):  # fmt: skip
        assert made(tmp_path, **other).declaration(tmp_path) != before


# ------------------------------------------------------------------------------------------------- confirmation


def test_winners_stand_beside_the_rows_of_the_study_and_say_how_they_were_chosen(tmp_path: Path) -> None:
    search = made(tmp_path, confirm=2)
    best = [trial(5, 0.9, strategy__depth=4), trial(6, 0.8, 5, strategy__depth=4, ema__decay=0.9)]
    best += [trial(2, 0.7, optimiser__head_lr=2e-3)]
    pruned = TrialFacts(7, best[0].chosen, "PRUNED", 7)
    study = confirmation(search, best, [*best, pruned], tmp_path)
    assert study is not None
    assert [row.name for row in study.rows] == [
        "Default (0 trials)",
        "No. 1 of 4 trials (trial 5)",
        "No. 3 of 4 trials (trial 2)",
    ], "one a trajectory"
    assert study.name == f"{search.study.name}-confirm"
    assert study.seeds == (0, 1)
    assert search.settings.trial_seed not in study.seeds
    assert study.comparisons() == tuple((row.name, "Default (0 trials)") for row in study.rows[1:])
    assert any("among 4 trials on 3 trajectories (3 finished, 1 pruned, 0 failed)" in n for n in study.report.notes)
    make_plan(study, storage=tmp_path)


def test_a_trial_that_is_the_default_is_not_confirmed_against_itself(tmp_path: Path) -> None:
    search = made(tmp_path)
    itself, other = trial(0, 0.9), trial(3, 0.8, strategy__depth=4)
    study = confirmation(search, [itself, other], [itself, other], tmp_path)
    assert study is not None
    assert [row.name for row in study.rows] == ["Default (0 trials)", "No. 2 of 2 trials (trial 3)"]
    assert confirmation(search, [itself], [itself], tmp_path) is None


# ------------------------------------------------------------------------------------------------- ablation


PARTS = {
    "Unfreezing": {"strategy.unfreezing": "none"},
    "Weights": {"weighting.enabled": False},
    "EMA": {"ema.enabled": False},
}


def test_each_row_of_the_ablation_lacks_one_part_or_one_tuned_value(tmp_path: Path) -> None:
    search = made(tmp_path, parts=PARTS)
    study = ablation_of(search, trial(5, 0.9, strategy__depth=4, ema__decay=0.9), 20, tmp_path)
    full, *others = study.rows
    assert full.name == "No. 1 of 20 trials (trial 5)"
    assert [row.name for row in others] == [
        "− Unfreezing", "− Weights", "− EMA", "− strategy.depth = 4", "− ema.decay = 0.9",
    ]  # fmt: skip
    complete = full.settings["phantom"].model_dump()
    for row in others:
        settings = row.settings["phantom"].model_dump()
        differing = [(g, n) for g in complete if isinstance(complete[g], dict)
                     for n in complete[g] if complete[g][n] != settings[g][n]]  # fmt: skip
        assert len(differing) == 1
        assert [part for part, on in row.marks.items() if not on] == [row.name.removeprefix("− ")]
    assert all(full.marks.values())
    assert {reference for _, reference in study.comparisons()} == {full.name}
    make_plan(study, storage=tmp_path)


def test_a_part_that_the_winner_does_not_have_is_left_out_and_named(tmp_path: Path) -> None:
    search = made(tmp_path, parts=PARTS)
    study = ablation_of(search, trial(5, 0.9, strategy__depth=4, ema__enabled=False), 20, tmp_path)
    assert "− EMA" not in [row.name for row in study.rows]
    assert any("nothing changes without them: EMA" in note for note in study.report.notes)


def test_a_part_that_is_no_setting_is_one_clear_error(tmp_path: Path) -> None:
    search = made(tmp_path, parts={"Nothing": {"strategy.nothing": 1}})
    with pytest.raises(StudyError, match=r"search\.parts\.Nothing: cannot be switched off so"):
        ablation_of(search, trial(5, 0.9), 20, tmp_path)


# ------------------------------------------------------------------------------------------------- declared wrongly


def test_all_that_is_wrong_with_a_search_is_said_with_its_place(tmp_path: Path) -> None:
    wrong = {
        "trial_seed": 1,
        "parameters": {"optimiser.encoder_lr": {"low": -1, "high": 1}, "nothing.here": None},
    }
    with pytest.raises(StudyError) as refused:
        loaded(tmp_path, document(search=wrong))
    said = "\n".join(refused.value.problems)
    assert "study.yaml" in said
    assert "search.trial_seed: 1 is one of `seeds`" in said
    assert "search.parameters.optimiser.encoder_lr: -1.0 is no value of it" in said
    assert "search.parameters.nothing.here: null takes out a parameter" in said


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"objectives": ["metric", "units"]}, "pruner asha knows one objective alone"),
        ({"objectives": ["metric", "units"], "pruner": "none", "sampler": "cmaes"}, "sampler cmaes knows one"),
        ({"objectives": ["metric", "metric"]}, "each may stand there once"),
        ({"sampler": "grid"}, "expected 'tpe', 'random', 'gp', 'cmaes' or 'nsga2'"),
        ({"trials": 0}, "expected at least 1"),
    ],
)
def test_a_search_that_cannot_be_served_is_refused(tmp_path: Path, given: dict[str, Any], said: str) -> None:
    with pytest.raises(StudyError, match=said):
        loaded(tmp_path, document(search=given))


def test_a_study_without_a_search_is_told_how_to_declare_one(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="add a group `search`"):
        Search.of(loaded(tmp_path, document()))


@pytest.mark.parametrize("name", ["search", "search_segmentation"])
@pytest.mark.parametrize("smoke", [False, True])
def test_the_shipped_searches_hold_only_what_is_possible(tmp_path: Path, name: str, smoke: bool) -> None:
    search = Search.of(load_study(find_study(name), Choices(smoke=smoke)))
    search.check_values(tmp_path, download=False)
    assert search.space.of_baseline() is not None, "the first trajectory is the default's"
    materials_of(search.drawn(tmp_path), tmp_path, download=False)
