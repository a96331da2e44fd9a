"""The trials of a search, kept by Optuna: what is tried next, what came out, and what is pruned.

With `search_storage` and `search_figures` the only file that imports optuna. Two Optuna studies stand behind it. The
kept one is in a journal file or database; a trial enters it in one write, with all its parameters, so that a driver
that is killed at any point leaves whole trials. The other one is a draft in memory, made anew for every proposal from
what the kept one holds, with a sampler seeded by the search's seed and the trial's number: so a search that was killed
and goes on asks for the same trials as one that was not.
"""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from analysis.credentials import without_credentials
from search_spaces.space import Assignment, Dimension, Space
from study.documents import StudyError
from study.searches.settings import DIRECTIONS, SearchSettings
from study.searches.trial_storage import Place, begun_study, check_declaration, kept_study

POPULATION = 16  # of genetic samplers: Optuna's own, 50, is more than most searches here have trials
TRAJECTORY, OBSERVED, UNITS, ERROR = "trajectory", "observed", "units", "error"

Status = Literal["RUNNING", "FINISHED", "PRUNED", "FAILED"]
_STATUS: Mapping[TrialState, Status] = {
    TrialState.RUNNING: "RUNNING",
    TrialState.COMPLETE: "FINISHED",
    TrialState.PRUNED: "PRUNED",
    TrialState.FAIL: "FAILED",
}


@dataclass(frozen=True)
class TrialFacts:
    """A trial as the search knows it.

    Attributes:
        chosen: dotted key → value of the parameters that act.
        trajectory: number of the first trial on its trajectory.
        values: one an objective, of a finished trial.
        units: training units of each epoch of a pruned trial, counted in the loop.
        ended_ms: milliseconds since 1970.
    """

    number: int
    chosen: Assignment
    status: Status
    trajectory: int
    values: tuple[float, ...] = ()
    units: tuple[int, ...] = ()
    error: str = ""
    ended_ms: int = 0


class Trials:
    """All trials of one search."""

    def __init__(self, study: optuna.Study, search: SearchSettings, space: Space) -> None:
        self.study = study
        self._search = search
        self._space = space
        self._distributions = {d.key: _distribution(d) for d in space.dimensions}

    @classmethod
    def open(
        cls, place: Place, name: str, search: SearchSettings, space: Space, declaration: Mapping[str, Any]
    ) -> Trials:
        """Begin a search or go on with one.

        Args:
            declaration: what a trial's value depends on; the same whenever the search goes on.

        Raises:
            StudyError: the place cannot be used, or holds a search that was begun under another declaration.
        """
        directions = [DIRECTIONS[objective] for objective in search.objectives]
        study = begun_study(place, name, directions, _pruner(search, space), declaration)
        return cls(study, search, space)

    @classmethod
    def found(
        cls, place: Place, name: str, search: SearchSettings, space: Space, declaration: Mapping[str, Any]
    ) -> Trials:
        """A search that is there already, to be read.

        Raises:
            StudyError: there is none, or it was begun under another declaration.
        """
        study = kept_study(place, name)
        if study is None:
            where = without_credentials(place.address)
            raise StudyError([f"{where}: holds no search {name!r}; run `launch.py search` first"])
        check_declaration(study, place, declaration)
        return cls(study, search, space)

    # -- what is there ------------------------------------------------------------------------------------------------

    def all(self) -> list[TrialFacts]:
        """Every trial, by number."""
        return [self._facts(trial) for trial in self.study.get_trials(deepcopy=False)]

    @property
    def count(self) -> int:
        """Number of trials, whatever became of them."""
        return len(self.study.get_trials(deepcopy=False))

    def best(self) -> list[TrialFacts]:
        """Finished trials, best first; with several objectives the Pareto front, best first in the first of them."""
        facts = self.all()
        if len(self.study.directions) > 1:
            front = {trial.number for trial in self.study.best_trials}
            facts = [fact for fact in facts if fact.number in front]
        finished = [fact for fact in facts if fact.status == "FINISHED"]
        upwards = self.study.directions[0] == optuna.study.StudyDirection.MAXIMIZE
        return sorted(finished, key=lambda fact: (-fact.values[0] if upwards else fact.values[0], fact.number))

    # -- what is tried next -------------------------------------------------------------------------------------------

    def completed(self) -> list[TrialFacts]:
        """Add the ways to look at a trajectory that a killed driver had not added yet; all trials afterwards."""
        trials = self.study.get_trials(deepcopy=False)
        for first in [trial for trial in trials if OBSERVED in trial.user_attrs]:
            there = [self._chosen(t) for t in trials if t.user_attrs.get(TRAJECTORY) == first.number]
            for look in map(self._as_chosen, first.user_attrs[OBSERVED]):
                if look not in there:
                    self._add(look, {TRAJECTORY: first.number})
        return self.all()

    def propose(self) -> list[TrialFacts]:
        """The next trajectory: trials for all ways to look at it, as many as the budget has left.

        The first trajectory is the baseline's, where it lies in the space. A configuration that was tried already is
        one trial, and trains nothing.
        """
        trials = self.study.get_trials(deepcopy=False)
        number = len(trials)
        baseline = self._space.of_baseline() if number == 0 else None
        chosen, attributes = (baseline, {}) if baseline is not None else self._asked(trials)
        tried = [self._space.interventions(self._chosen(trial)) for trial in trials]
        looks = [chosen] if self._space.interventions(chosen) in tried else self._space.observed(chosen)
        looks = looks[: self._search.trials - number]
        self._add(chosen, {TRAJECTORY: number, OBSERVED: looks}, attributes)
        for look in looks[1:]:
            self._add(look, {TRAJECTORY: number})
        return self.all()[number:]

    def _asked(self, trials: Sequence[FrozenTrial]) -> tuple[Assignment, dict[str, Any]]:
        """What the sampler chooses next, and what it wants to remember of it."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            draft = optuna.create_study(
                directions=self.study.directions, sampler=_sampler(self._search, self._space, len(trials))
            )
            draft.add_trials(trials)
            asked = draft.ask()
            chosen: Assignment = {}
            for dimension in self._space.dimensions:
                if self._space.acts(dimension, chosen):
                    chosen[dimension.key] = _suggested(asked, dimension)
        return chosen, dict(draft.get_trials(deepcopy=False)[-1].system_attrs)

    def _add(self, chosen: Assignment, attributes: Mapping[str, Any], system: Mapping[str, Any] | None = None) -> None:
        """Keep a trial that is to run, in one write."""
        self.study.add_trial(
            optuna.trial.create_trial(
                state=TrialState.RUNNING,
                params={key: _encoded(value) for key, value in chosen.items()},
                distributions={key: self._distributions[key] for key in chosen},
                user_attrs=json.loads(json.dumps(attributes)),
                system_attrs=dict(system or {}),
            )
        )

    # -- what came out ------------------------------------------------------------------------------------------------

    def finish(self, number: int, values: Sequence[float]) -> None:
        """Tell a trial's objectives; telling them again changes nothing."""
        self.study.tell(number, list(values), skip_if_finished=True)

    def fail(self, number: int, error: str) -> None:
        """A trial that could not be trained to its end."""
        if self._trial(number).state == TrialState.RUNNING:
            self._handle(number).set_user_attr(ERROR, error)
            self.study.tell(number, state=TrialState.FAIL, skip_if_finished=True)

    def prunes(self, number: int, step: int, value: float) -> bool:
        """Report a trial's value at a rung, and ask whether it alone would be pruned there."""
        handle = self._handle(number)
        if step not in self._trial(number).intermediate_values:
            handle.report(value, step)
        return handle.should_prune()

    def prune(self, number: int, units: Sequence[int]) -> None:
        """End a trial at its rung.

        Args:
            units: training units of the epochs that it has trained.
        """
        if self._trial(number).state == TrialState.RUNNING:
            self._handle(number).set_user_attr(UNITS, list(units))
            self.study.tell(number, state=TrialState.PRUNED, skip_if_finished=True)

    def _trial(self, number: int) -> FrozenTrial:
        return self.study.get_trials(deepcopy=False)[number]

    def _handle(self, number: int) -> optuna.Trial:
        return optuna.Trial(self.study, self._trial(number)._trial_id)

    # -- facts --------------------------------------------------------------------------------------------------------

    def _facts(self, trial: FrozenTrial) -> TrialFacts:
        finished = trial.state == TrialState.COMPLETE
        return TrialFacts(
            number=trial.number,
            chosen=self._chosen(trial),
            status=_STATUS[trial.state],
            trajectory=int(trial.user_attrs.get(TRAJECTORY, trial.number)),
            values=tuple(trial.values) if finished and trial.values else (),
            units=tuple(trial.user_attrs.get(UNITS, ())),
            error=str(trial.user_attrs.get(ERROR, "")),
            ended_ms=0 if trial.datetime_complete is None else int(trial.datetime_complete.timestamp() * 1000),
        )

    def _chosen(self, trial: FrozenTrial) -> Assignment:
        return {d.key: _decoded(d, trial.params[d.key]) for d in self._space.dimensions if d.key in trial.params}

    def _as_chosen(self, look: Mapping[str, Any]) -> Assignment:
        """An assignment that went through JSON."""
        return {d.key: _decoded(d, _encoded(look[d.key])) for d in self._space.dimensions if d.key in look}


# -- Optuna's terms --------------------------------------------------------------------------------------------------


def _encoded(value: Any) -> Any:
    """A value as Optuna keeps it: what is no scalar is JSON text."""
    return json.dumps(value) if isinstance(value, list | tuple | dict) else value


def _decoded(dimension: Dimension, value: Any) -> Any:
    """The choice that an encoded value stands for."""
    if dimension.choices is None:
        return value
    return next(choice for choice in dimension.choices if json.dumps(_encoded(choice)) == json.dumps(value))


def _distribution(dimension: Dimension) -> BaseDistribution:
    if dimension.choices is not None:
        return CategoricalDistribution([_encoded(choice) for choice in dimension.choices])
    if dimension.whole:
        return IntDistribution(int(dimension.low), int(dimension.high), log=dimension.log)
    return FloatDistribution(dimension.low, dimension.high, log=dimension.log)


def _suggested(trial: optuna.Trial, dimension: Dimension) -> Any:
    key = dimension.key
    if dimension.choices is not None:
        return _decoded(dimension, trial.suggest_categorical(key, [_encoded(choice) for choice in dimension.choices]))
    if dimension.whole:
        return trial.suggest_int(key, int(dimension.low), int(dimension.high), log=dimension.log)
    return trial.suggest_float(key, dimension.low, dimension.high, log=dimension.log)


def _sampler(search: SearchSettings, space: Space, number: int) -> optuna.samplers.BaseSampler:
    """The sampler of one proposal; what it knows of earlier ones is in the trials."""
    seed = random.Random(f"{search.seed}|{number}").getrandbits(32)
    startup = search.startup * space.observers()  # Optuna counts trials
    samplers = optuna.samplers
    if search.sampler == "random":
        return samplers.RandomSampler(seed)
    if search.sampler == "gp":
        return samplers.GPSampler(seed=seed, n_startup_trials=startup, warn_independent_sampling=False)
    if search.sampler == "cmaes":
        return samplers.CmaEsSampler(seed=seed, n_startup_trials=startup, warn_independent_sampling=False)
    if search.sampler == "nsga2":
        return samplers.NSGAIISampler(seed=seed, population_size=POPULATION)
    return samplers.TPESampler(seed=seed, n_startup_trials=startup, multivariate=True, group=True, constant_liar=True)


def check_sampler(search: SearchSettings) -> None:
    """Refuse a sampler whose package is missing.

    Raises:
        StudyError: naming the package.
    """
    import importlib.util

    if search.sampler == "cmaes" and importlib.util.find_spec("cmaes") is None:
        raise StudyError(
            ["search.sampler: cmaes needs the package of that name, which the extra `search` brings; or choose tpe"]
        )


def _pruner(search: SearchSettings, space: Space) -> optuna.pruners.BasePruner:
    """The pruner over rungs, whose steps are 1, reduction, reduction², … whatever the length of a trajectory."""
    pruners = optuna.pruners
    if search.pruner == "asha":
        return pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=search.reduction)
    if search.pruner == "hyperband":
        most = search.reduction**search.rungs
        return pruners.HyperbandPruner(min_resource=1, max_resource=most, reduction_factor=search.reduction)
    if search.pruner == "median":
        return pruners.MedianPruner(n_startup_trials=max(1, search.startup * space.observers()))
    return pruners.NopPruner()
