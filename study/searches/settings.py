"""What a study file says about a search, and the checks that need no other library. No optuna, torch or ray here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from search_spaces.declared import combined
from search_spaces.space import Parameter, Space, SpaceError, resolve
from study.problems import Problems
from trainables.settings import Frozen, Settings

Sampler = Literal["tpe", "random", "gp", "cmaes", "nsga2"]
Pruner = Literal["none", "asha", "hyperband", "median"]
Objective = Literal["metric", "units"]
DIRECTIONS: Mapping[Objective, Literal["maximize", "minimize"]] = {"metric": "maximize", "units": "minimize"}
ONE_OBJECTIVE = ("cmaes",)  # samplers that know one objective alone


class SearchSettings(Frozen):
    """A search: its budget, its sampler and pruner, and the parameters that differ from the task's space."""

    trials: int = Field(60, ge=1, le=100_000, description="configurations that are evaluated, observers included")
    seed: int = Field(0, ge=0, lt=2**63, description="of the sampler")
    trial_seed: int = Field(
        1000, ge=0, lt=2**63, description="training seed of every trial; none of `seeds`, which judge the winner"
    )
    sampler: Sampler = Field("tpe", description="of Optuna; cmaes needs the package of that name")
    startup: int = Field(6, ge=0, le=10_000, description="trajectories drawn at random before the sampler learns")
    pruner: Pruner = Field("asha", description="of Optuna; none trains every trial to its end")
    rungs: int = Field(1, ge=1, le=10, description="points in stage 2 at which a trajectory can be pruned")
    reduction: int = Field(
        2, ge=2, le=100, description="of stage 2 between two rungs; asha keeps the best 1 in so many"
    )
    objectives: Annotated[tuple[Objective, ...], Field(min_length=1)] = Field(
        ("metric",), description="metric: validation metric, larger; units: training cost, smaller"
    )
    parameters: dict[str, Parameter | None] = Field(
        default_factory=dict, description="dotted key → parameter beside the task's space, or null to leave one out"
    )
    confirm: int = Field(3, ge=0, le=1_000, description="best configurations that are run again over `seeds`")
    parts: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="ablate-best: part → what switches it off, by dotted key"
    )

    @field_validator("objectives")
    @classmethod
    def _objectives_differ(cls, objectives: tuple[Objective, ...]) -> tuple[Objective, ...]:
        if len(set(objectives)) < len(objectives):
            raise ValueError(f"{', '.join(objectives)}: each may stand there once")
        return objectives

    @model_validator(mode="after")
    def _objectives_can_be_served(self) -> SearchSettings:
        if len(self.objectives) > 1 and self.pruner != "none":
            raise ValueError(f"pruner {self.pruner} knows one objective alone: set pruner to none")
        if len(self.objectives) > 1 and self.sampler in ONE_OBJECTIVE:
            raise ValueError(f"sampler {self.sampler} knows one objective alone: use tpe, gp, nsga2 or random")
        return self

    def rung_epochs(self, tune_epochs: int) -> dict[int, int]:
        """Epochs of stage 2 after which a trajectory can be pruned → step that Optuna knows the rung by.

        Rung i of n lies at reduction^(i − n) of the trajectory's own stage 2, so trials of different lengths are
        compared at the same share of their schedules; its step is reduction^i. Rungs that fall into one epoch are one.
        """
        if self.pruner == "none":
            return {}
        rungs: dict[int, int] = {}
        for i in range(self.rungs):
            epochs = max(1, round(tune_epochs * self.reduction ** (i - self.rungs)))
            if epochs < tune_epochs:
                rungs[epochs] = self.reduction**i
        return rungs


def space_of(search: SearchSettings, baseline: Settings) -> Space:
    """The space of a search around its baseline.

    Raises:
        SpaceError: with everything that is wrong with its parameters.
    """
    return resolve(combined(baseline.task, search.parameters), baseline)


def check_search(
    search: SearchSettings, baseline: Settings, seeds: Sequence[int], datasets: Sequence[str], problems: Problems
) -> None:
    """Everything about a search that is wrong on its own ground, before any data is looked at."""
    if search.trial_seed in seeds:
        problems.add(
            ("search", "trial_seed"),
            f"{search.trial_seed} is one of `seeds`: the winner was chosen on it, so it cannot judge the winner; "
            "give another one",
        )
    if len(datasets) > 1:
        problems.add(("datasets",), "a search has one data set; search on each of them by itself (--dataset NAME)")
    unknown = [key for key, parameter in search.parameters.items() if parameter is None]
    for key in unknown:
        if key not in combined(baseline.task, {}):
            problems.add(("search", "parameters", key), f"null takes out a parameter of the {baseline.task} space")
    try:
        space_of(search, baseline)
    except SpaceError as error:
        for key, message in error.found.items():
            problems.add(("search", "parameters", key), message)
