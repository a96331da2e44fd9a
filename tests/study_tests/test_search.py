"""The trials of a search as Optuna keeps them: the same after every kill, told once, pruned only together."""

from __future__ import annotations

import json
import random
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import optuna
import pytest

from search_spaces.space import Parameter, Space, resolve
from study.documents import StudyError
from study.interrupts import StudyHaltedError
from study.search import TRAJECTORY, TrialFacts, Trials
from study.searches.settings import SearchSettings
from study.searches.trial_storage import JOURNAL, Place, check_place, default_place, storage_watched
from trainables.settings import Settings

SAMPLERS = ("tpe", "random", pytest.param("gp", marks=pytest.mark.slow), "cmaes", "nsga2")
SPACE = resolve(
    {
        "strategy.depth": Parameter(choices=(2, 4, "all")),
        "optimiser.encoder_lr": Parameter(low=1e-5, high=1e-2, log=True),
        "weighting.enabled": Parameter(choices=(False, True)),
        "weighting.eta": Parameter(low=0, high=1, when={"weighting.enabled": True}),
        "weighting.clip": Parameter(choices=(None, (0.5, 5.0)), when={"weighting.enabled": True}),
        "ema.enabled": Parameter(choices=(False, True)),
        "ema.decay": Parameter(choices=(0.9, 0.99), when={"ema.enabled": True}),
    },
    Settings.model_validate({"optimiser": {"encoder_lr": 1e-3}, "strategy": {"depth": 4}}),
)
DECLARED: dict[str, Any] = {"baseline": {"depth": 4}, "parameters": ["as above"]}


def settings(**given: Any) -> SearchSettings:
    return SearchSettings(**{"trials": 24, "startup": 2, "pruner": "none", **given})


def opened(folder: Path, space: Space = SPACE, **given: Any) -> Trials:
    return Trials.open(default_place(folder, "s"), "s", settings(**given), space, DECLARED)


def value(trial: TrialFacts) -> float:
    """A landscape with one hill; the averages of a trajectory differ a little."""
    rate = float(trial.chosen["optimiser.encoder_lr"])
    return 0.9 - abs(rate - 2e-3) * 50 - 0.01 * (trial.chosen["strategy.depth"] == "all") + 1e-4 * len(trial.chosen)


def told(trials: Trials, new: list[TrialFacts], objectives: int = 1) -> None:
    for trial in new:
        trials.finish(trial.number, [value(trial), 100.0 + trial.number][:objectives])


def run(folder: Path, *, reopen: bool = False, objectives: int = 1, **given: Any) -> list[TrialFacts]:
    """A whole search, as an executor with one slot would do it."""
    trials = opened(folder, **given)
    while trials.count < settings(**given).trials:
        if reopen:
            trials = opened(folder, **given)
        told(trials, trials.propose(), objectives)
    return trials.all()


def told_apart(trials: list[TrialFacts]) -> list[tuple[Any, ...]]:
    """Everything but the times."""
    return [(t.number, t.chosen, t.status, t.trajectory, t.values) for t in trials]


# ------------------------------------------------------------------------------------------------- proposals


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_same_seed_asks_for_the_same_trials_also_where_every_ask_is_another_process(
    tmp_path: Path, sampler: str
) -> None:
    if sampler == "cmaes":
        pytest.importorskip("cmaes")
    straight = run(tmp_path / "straight", sampler=sampler, trials=12)
    again = run(tmp_path / "again", sampler=sampler, trials=12, reopen=True)
    assert told_apart(straight) == told_apart(again)
    other = run(tmp_path / "other", sampler=sampler, trials=12, seed=1)
    assert told_apart(other) != told_apart(straight)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_proposal_lies_in_the_space_and_conditions_hold(tmp_path: Path, sampler: str) -> None:
    if sampler == "cmaes":
        pytest.importorskip("cmaes")
    for trial in run(tmp_path, sampler=sampler, trials=12):
        acting = [d for d in SPACE.dimensions if SPACE.acts(d, trial.chosen)]
        assert set(trial.chosen) == {d.key for d in acting}
        assert all(d.holds(trial.chosen[d.key]) for d in acting)


def test_a_trajectory_is_one_trial_for_each_way_to_look_at_it(tmp_path: Path) -> None:
    trials = run(tmp_path)
    groups: dict[int, list[TrialFacts]] = {}
    for trial in trials:
        groups.setdefault(trial.trajectory, []).append(trial)
    assert [len(group) for group in groups.values()] == [3] * 8
    for first, group in groups.items():
        assert [t.number for t in group] == list(range(first, first + 3))
        assert all(SPACE.interventions(t.chosen) == SPACE.interventions(group[0].chosen) for t in group)
        looks = {(t.chosen["ema.enabled"], t.chosen.get("ema.decay")) for t in group}
        assert looks == {(False, None), (True, 0.9), (True, 0.99)}


def test_the_first_trajectory_is_the_baselines(tmp_path: Path) -> None:
    first = opened(tmp_path).propose()[0]
    assert first.chosen == {
        "strategy.depth": 4, "optimiser.encoder_lr": 1e-3, "weighting.enabled": False, "ema.enabled": False,
    }  # fmt: skip


def test_a_budget_is_kept_to_the_trial(tmp_path: Path) -> None:
    assert [t.trajectory for t in run(tmp_path, trials=7)] == [0, 0, 0, 3, 3, 3, 6]


def test_a_search_goes_on_with_a_larger_budget_and_loses_nothing(tmp_path: Path) -> None:
    before = told_apart(run(tmp_path, trials=6))
    after = told_apart(run(tmp_path, trials=12))
    assert after[:6] == before
    assert len(after) == 12


def test_a_configuration_that_was_tried_is_one_trial_and_no_trajectory(tmp_path: Path) -> None:
    space = resolve(
        {"strategy.depth": Parameter(choices=(4,)), "ema.enabled": Parameter(choices=(False, True))}, Settings()
    )
    trials = opened(tmp_path, space)
    numbers = [[t.number for t in trials.propose()] for _ in range(3)]
    assert [len(group) for group in numbers[1:]] == [1, 1]


def test_the_sampler_learns(tmp_path: Path) -> None:
    """Later trajectories are better than those drawn at random, on a landscape with one hill."""
    trials = run(tmp_path, trials=120, startup=6)
    early = [t.values[0] for t in trials if 3 <= t.number < 21]
    late = [t.values[0] for t in trials if t.number >= 90]
    assert sum(late) / len(late) > sum(early) / len(early)


def test_a_trial_that_runs_counts_for_what_is_asked_next(tmp_path: Path) -> None:
    """Constant liar: all else equal, another running trial can lead to another proposal; without it, none does."""
    proposals = []
    for i, rate in enumerate((1e-5, 2e-3, 2e-3)):
        folder = tmp_path / str(i)
        run(folder, trials=18)
        trials = opened(folder)
        running = {**trials.best()[0].chosen, "optimiser.encoder_lr": rate}
        trials._add(running, {TRAJECTORY: 18})
        proposals.append(trials.propose()[0].chosen)
    assert proposals[0] != proposals[1] == proposals[2]


def test_the_sampler_learns_which_values_go_together(tmp_path: Path) -> None:
    """Multivariate: good are pairs that agree, while neither value by itself is better than another."""
    values = (2, 4, 6)
    space = resolve(
        {"strategy.depth": Parameter(choices=values), "strategy.step": Parameter(choices=values)},
        Settings.model_validate({"strategy": {"depth": 4}}),
    )
    trials = opened(tmp_path, space, trials=90, startup=30)
    agree = []
    while trials.count < 90:
        (trial,) = trials.propose()
        agree.append(trial.chosen["strategy.depth"] == trial.chosen["strategy.step"])
        trials.finish(trial.number, [0.9 if agree[-1] else 0.1])
    assert sum(agree[:30]) < 15, "a third by chance"
    assert sum(agree[30:]) > 39, "of 60; a sampler that learns of each parameter by itself comes to 35"


# ------------------------------------------------------------------------------------------------- kills


def test_a_journal_that_is_cut_anywhere_leads_to_the_same_search(tmp_path: Path) -> None:
    """The file as a kill leaves it: after any record, or in the middle of one."""
    straight = told_apart(run(tmp_path / "straight", trials=9))
    written = (tmp_path / "straight" / "s" / JOURNAL).read_bytes()
    ends = [i + 1 for i, byte in enumerate(written) if byte == ord("\n")]
    rng = random.Random(5)
    cuts = [*ends, *(rng.randrange(len(written)) for _ in range(25))]
    for i, cut in enumerate(cuts):
        folder = tmp_path / str(i)
        (folder / "s").mkdir(parents=True)
        (folder / "s" / JOURNAL).write_bytes(written[:cut])
        trials = opened(folder, trials=9)
        told(trials, [t for t in trials.completed() if t.status == "RUNNING"])
        while trials.count < 9:
            told(trials, trials.propose())
        assert told_apart(trials.all()) == straight, f"cut after {cut} of {len(written)} bytes"


@pytest.mark.slow
def test_a_lock_that_a_killed_driver_left_is_taken_over_within_seconds(tmp_path: Path) -> None:
    trials = opened(tmp_path, trials=3)
    told(trials, trials.propose())
    journal = tmp_path / "s" / JOURNAL
    (journal.parent / f"{JOURNAL}.lock").symlink_to(journal)
    again = opened(tmp_path, trials=6)
    assert len(again.propose()) == 3


def test_telling_again_changes_nothing(tmp_path: Path) -> None:
    trials = opened(tmp_path, trials=3)
    new = trials.propose()
    told(trials, new)
    before = told_apart(trials.all())
    trials.finish(0, [0.1])
    trials.fail(1, "late")
    trials.prune(2, [5])
    assert told_apart(trials.all()) == before


# ------------------------------------------------------------------------------------------------- pruning


def test_halving_keeps_the_better_half_and_an_undefined_value_goes(tmp_path: Path) -> None:
    trials = opened(tmp_path, pruner="asha", reduction=2, trials=9)
    first, second, third = trials.propose(), trials.propose(), trials.propose()
    assert [trials.prunes(t.number, 1, 0.70 + i / 100) for i, t in enumerate(first)] == [False, False, False]
    assert [trials.prunes(t.number, 1, 0.50) for t in second] == [True, True, True]
    assert trials.prunes(third[0].number, 1, 0.80) is False
    assert trials.prunes(third[1].number, 1, float("nan")) is True


@pytest.mark.parametrize("pruner", ["asha", "hyperband", "median"])
def test_every_pruner_lets_the_best_go_on_and_ends_the_worst(tmp_path: Path, pruner: str) -> None:
    trials = opened(tmp_path, pruner=pruner, rungs=2, trials=60, startup=1)
    verdicts = {}
    for i in range(19):
        new = trials.propose()
        good = i % 2 == 0
        verdicts[i] = [trials.prunes(t.number, 1, (0.8 if good else 0.4) + i / 1000) for t in new]
        told(trials, new)
    assert not all(verdicts[18]), "the best value so far"
    assert any(all(verdicts[i]) for i in range(3, 19, 2)), "half of all are much worse"


def test_a_pruned_trial_is_pruned_and_remembers_what_it_cost(tmp_path: Path) -> None:
    trials = opened(tmp_path, pruner="asha", trials=3)
    for trial in trials.propose():
        trials.prunes(trial.number, 1, 0.5)
        trials.prune(trial.number, [3, 4])
    again = opened(tmp_path, pruner="asha", trials=3)
    assert [(t.status, t.units, t.values) for t in again.all()] == [("PRUNED", (3, 4), ())] * 3
    assert again.best() == []
    assert {t.state for t in again.study.trials} == {optuna.trial.TrialState.PRUNED}


def test_a_failed_trial_keeps_its_reason(tmp_path: Path) -> None:
    trials = opened(tmp_path, trials=3)
    trials.fail(trials.propose()[0].number, "loss is NaN")
    assert (trials.all()[0].status, trials.all()[0].error) == ("FAILED", "loss is NaN")


@pytest.mark.parametrize(
    ("tune_epochs", "rungs"), [(1, {}), (2, {1: 2}), (4, {1: 1, 2: 2}), (12, {3: 1, 6: 2}), (20, {5: 1, 10: 2})]
)
def test_rungs_lie_at_shares_of_a_trajectorys_own_stage_2(tune_epochs: int, rungs: dict[int, int]) -> None:
    assert settings(pruner="asha", rungs=2, reduction=2).rung_epochs(tune_epochs) == rungs
    assert settings().rung_epochs(tune_epochs) == {}, "nothing is cut where nothing is pruned"


# ------------------------------------------------------------------------------------------------- objectives, best


def test_the_best_comes_first_and_equals_by_number(tmp_path: Path) -> None:
    trials = opened(tmp_path, trials=6)
    numbers = [t.number for t in (*trials.propose(), *trials.propose())]
    for number, metric in zip(numbers, (0.5, 0.7, 0.7, 0.6, 0.9, 0.1), strict=True):
        trials.finish(number, [metric])
    assert [t.number for t in trials.best()] == [4, 1, 2, 3, 0, 5]


@pytest.mark.parametrize("sampler", ["tpe", pytest.param("gp", marks=pytest.mark.slow), "nsga2", "random"])
def test_several_objectives_give_the_pareto_front(tmp_path: Path, sampler: str) -> None:
    given = {"objectives": ("metric", "units"), "sampler": sampler}
    trials = opened(tmp_path, trials=12, **given)
    while trials.count < 12:
        for trial in trials.propose():
            trials.finish(
                trial.number, [[0.6, 0.7, 0.8, 0.65][trial.number % 4], [1.0, 3.0, 9.0, 5.0][trial.number % 4]]
            )
    front = {t.values for t in trials.best()}
    assert front == {(0.8, 9.0), (0.7, 3.0), (0.6, 1.0)}, "0.65 for 5 is worse than 0.7 for 3"


# ------------------------------------------------------------------------------------------------- refusals


def test_a_search_that_was_begun_otherwise_is_refused_and_says_in_what(tmp_path: Path) -> None:
    run(tmp_path, trials=3)
    other = DECLARED | {"baseline": {"depth": 6}, "seed": 1}
    with pytest.raises(StudyError, match=r"begun with other baseline, seed: .*\(-o study=NAME\)"):
        Trials.open(default_place(tmp_path, "s"), "s", settings(), SPACE, other)
    with pytest.raises(StudyError, match="begun with other baseline, seed"):
        check_place(default_place(tmp_path, "s"), "s", other)
    check_place(default_place(tmp_path, "s"), "s", DECLARED)
    check_place(default_place(tmp_path, "another"), "another", other)


def test_a_study_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'theirs.db'}"
    theirs = optuna.create_study(storage=url, study_name="s")
    theirs.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=2)
    with pytest.raises(StudyError, match="no search of this project"):
        Trials.open(Place(url), "s", settings(), SPACE, DECLARED)
    assert len(theirs.trials) == 2


def test_a_search_that_is_not_there_is_said_and_not_made(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="holds no search 's'"):
        Trials.found(default_place(tmp_path, "s"), "s", settings(), SPACE, DECLARED)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("postgresql+psycopg://ann:secret@127.0.0.1:1/none", "cannot be used"),
        ("oracle+nothing://x/y", "cannot be used"),
        ("sqlite:////no/such/folder/file.db", "cannot be used"),
    ],
)
def test_a_database_that_cannot_be_used_is_one_message_without_its_password(url: str, said: str) -> None:
    with pytest.raises(StudyError) as refused:
        check_place(Place(url), "s", DECLARED)
    (problem,) = refused.value.problems
    assert said in problem
    assert "--optuna-storage" in problem
    assert "secret" not in problem


def test_a_database_keeps_a_search_as_the_journal_does(tmp_path: Path) -> None:
    place = Place(f"sqlite:///{tmp_path / 'optuna.db'}")
    for _ in range(3):
        trials = Trials.open(place, "s", settings(trials=9), SPACE, DECLARED)
        told(trials, trials.propose())
    assert told_apart(trials.all()) == told_apart(run(tmp_path / "journal", trials=9))


def test_a_database_that_fails_on_the_way_is_one_message_that_says_how_to_go_on(tmp_path: Path) -> None:
    file = tmp_path / "optuna.db"
    place = Place(f"sqlite:///{file}")
    trials = Trials.open(place, "s", settings(), SPACE, DECLARED)
    told(trials, trials.propose())
    with closing(sqlite3.connect(file)) as database:
        database.execute("DROP TABLE trial_params")
        database.commit()
    with (
        pytest.raises(StudyHaltedError, match=r"failed .*trial_params.* run the same command again"),
        storage_watched(place),
    ):
        trials.propose()


def test_the_journal_is_read_by_optunas_own_tools(tmp_path: Path) -> None:
    run(tmp_path, trials=6)
    backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / "s" / JOURNAL))
    study = optuna.load_study(study_name="s", storage=optuna.storages.JournalStorage(backend))
    assert [t.state for t in study.trials] == [optuna.trial.TrialState.COMPLETE] * 6
    assert json.loads(json.dumps(study.user_attrs["declaration"])) == DECLARED
