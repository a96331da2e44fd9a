"""Search spaces as data: which settings are searched, between which bounds, under which conditions.

A space is declared relative to a study's baseline and resolved against it, so that one declaration serves data sets
whose rates differ by orders of magnitude. Nothing here imports Optuna: `study/search.py` asks it for values.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field, ValidationError, field_validator, model_validator

from trainables.settings import OBSERVER_GROUPS, Frozen, Settings

Assignment = dict[str, Any]  # dotted key → value, of the parameters that act

# What changes the data, the pretrained weights or the arithmetic makes other studies, not other trials.
FIXED_GROUPS = ("task", "dataset")
FIXED_KEYS = ("model.backbone", "model.mean", "model.std", "optimiser.precision")
# Keys that act after the head stage alone; all others act on it too, and are searched on a grid.
AFTER_HEAD_GROUPS = ("strategy", "weighting", *OBSERVER_GROUPS)
AFTER_HEAD_KEYS = ("optimiser.encoder_lr", "optimiser.tune_head_lr")


class Parameter(Frozen):
    """One searched setting: choices, or a range from `low` to `high`."""

    choices: tuple[Any, ...] | None = Field(None, min_length=1, description="values to choose from")
    low: float | None = Field(None, description="smallest value")
    high: float | None = Field(None, description="largest value")
    log: bool = Field(False, description="search the range on a logarithmic scale")
    whole: bool = Field(False, description="whole numbers alone")
    times: str | None = Field(None, description="key of the baseline whose value multiplies choices or bounds")
    when: dict[str, Any] = Field(
        default_factory=dict, description="key → value, or list of values, that another setting must have"
    )

    @field_validator("choices")
    @classmethod
    def _choices_differ(cls, choices: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
        texts = [json.dumps(choice) for choice in choices or ()]
        twice = sorted({text for text in texts if texts.count(text) > 1})
        if twice:
            raise ValueError(f"{', '.join(twice)} given twice; each choice may stand there once")
        return choices

    @model_validator(mode="after")
    def _one_form(self) -> Parameter:
        bounds = (self.low, self.high)
        if self.choices is not None and (bounds != (None, None) or self.log or self.whole):
            raise ValueError("choices, or a range by low and high: give one of them")
        if self.choices is None:
            low, high = bounds
            if low is None or high is None:
                raise ValueError("expected choices, or low and high")
            if low >= high:
                raise ValueError(f"low {low:g} is not below high {high:g}")
            if self.log and low <= 0:
                raise ValueError(f"low {low:g}: a logarithmic scale begins above 0")
        return self


@dataclass(frozen=True)
class Dimension:
    """A parameter resolved against a baseline.

    Attributes:
        key: dotted key of the setting.
        choices: values, or None for a range.
        when: key → values that another setting must have, one of them.
    """

    key: str
    choices: tuple[Any, ...] | None
    low: float
    high: float
    log: bool
    whole: bool
    when: Mapping[str, tuple[Any, ...]]

    @property
    def observes(self) -> bool:
        """Whether it says how a trajectory is looked at, and changes nothing of the trajectory."""
        return self.key.split(".")[0] in OBSERVER_GROUPS

    def holds(self, value: Any) -> bool:
        """Whether a value lies in it."""
        if self.choices is not None:
            return json.dumps(value) in map(json.dumps, self.choices)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and self.low <= value <= self.high and (not self.whole or value == int(value))

    def extremes(self) -> tuple[Any, ...]:
        """All choices, or both ends of the range: what has to be valid."""
        if self.choices is not None:
            return self.choices
        return (int(self.low), int(self.high)) if self.whole else (self.low, self.high)

    def drawn(self, rng: random.Random) -> Any:
        """A value at random."""
        if self.choices is not None:
            return rng.choice(self.choices)
        if self.whole:
            return rng.randint(int(self.low), int(self.high))
        if self.log:
            return math.exp(rng.uniform(math.log(self.low), math.log(self.high)))
        return rng.uniform(self.low, self.high)


@dataclass(frozen=True)
class Space:
    """The dimensions of a search, each after those that its conditions name.

    Attributes:
        baseline: the settings that every trial starts from, as plain data by group.
    """

    dimensions: tuple[Dimension, ...]
    baseline: Mapping[str, Any]

    def acts(self, dimension: Dimension, chosen: Mapping[str, Any]) -> bool:
        """Whether a dimension's conditions hold among what has been chosen, or else in the baseline."""
        return all(self._value(key, chosen) in values for key, values in dimension.when.items())

    def drawn(self, rng: random.Random) -> Assignment:
        """An assignment at random."""
        chosen: Assignment = {}
        for dimension in self.dimensions:
            if self.acts(dimension, chosen):
                chosen[dimension.key] = dimension.drawn(rng)
        return chosen

    def of_baseline(self) -> Assignment | None:
        """The baseline as an assignment; None where it does not lie in the space."""
        chosen: Assignment = {}
        for dimension in self.dimensions:
            if not self.acts(dimension, chosen):
                continue
            value = self._value(dimension.key, {})
            if value is None and dimension.key == "optimiser.tune_head_lr":
                value = chosen.get("optimiser.head_lr", self._value("optimiser.head_lr", {}))  # what null stands for
            if not dimension.holds(value):
                return None
            chosen[dimension.key] = value
        return chosen

    def interventions(self, chosen: Mapping[str, Any]) -> Assignment:
        """The part of an assignment that decides the trajectory."""
        observing = {dimension.key for dimension in self.dimensions if dimension.observes}
        return {key: value for key, value in chosen.items() if key not in observing}

    def observed(self, chosen: Mapping[str, Any]) -> list[Assignment]:
        """All assignments with the interventions of this one: every way to look at its trajectory, itself first."""
        looks: list[Assignment] = [self.interventions(chosen)]
        for dimension in self.dimensions:
            if dimension.observes:
                looks = [one for look in looks for one in self._with_each(dimension, look)]
        ordered = [{d.key: look[d.key] for d in self.dimensions if d.key in look} for look in looks]
        return [dict(chosen), *(look for look in ordered if look != dict(chosen))]

    def observers(self) -> int:
        """Number of ways to look at one trajectory."""
        return len(self.observed(self.drawn(random.Random(0))))

    def _with_each(self, dimension: Dimension, look: Assignment) -> Iterator[Assignment]:
        if not self.acts(dimension, look):
            yield look
            return
        for value in dimension.choices or ():
            yield look | {dimension.key: value}

    def _value(self, key: str, chosen: Mapping[str, Any]) -> Any:
        return chosen[key] if key in chosen else value_at(self.baseline, key)


class SpaceError(ValueError):
    """A space that cannot be searched; `found`: key of the parameter → what is wrong with it."""

    def __init__(self, found: Mapping[str, str]) -> None:
        self.found = dict(found)
        super().__init__("\n".join(f"{key}: {message}" for key, message in found.items()))


def resolve(parameters: Mapping[str, Parameter], baseline: Settings) -> Space:
    """The space around a baseline.

    Raises:
        SpaceError: with every parameter that is no setting, is fixed, cannot have one of its values, or depends on
            one that it may not depend on.
    """
    plain = baseline.model_dump(mode="json")
    problems = {key: problem for key in parameters if (problem := _refusal(key, parameters, plain))}
    dimensions = []
    for key in _in_order(parameters):
        if key not in problems:
            dimension = _resolved(key, parameters[key], plain)
            if problem := _invalid(dimension, plain):
                problems[key] = problem
            dimensions.append(dimension)
    if problems:
        raise SpaceError(problems)
    return Space(tuple(dimensions), plain)


def value_at(plain: Mapping[str, Any], key: str) -> Any:
    """A value of nested settings by its dotted key.

    Raises:
        KeyError: there is none.
    """
    value: Any = plain
    for part in key.split("."):
        if not isinstance(value, Mapping):
            raise KeyError(key)
        value = value[part]
    return value


def changed(plain: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of settings with some of them changed, by dotted keys of the form group.name."""
    copy: dict[str, Any] = {name: dict(group) if isinstance(group, Mapping) else group for name, group in plain.items()}
    for key, value in changes.items():
        group, _, name = key.partition(".")
        copy[group][name] = value
    return copy


# -- checks ----------------------------------------------------------------------------------------------------------


def _refusal(key: str, parameters: Mapping[str, Parameter], plain: Mapping[str, Any]) -> str:
    """Why a parameter cannot be searched as it is declared; empty where it can."""
    parameter = parameters[key]
    group, _, name = key.partition(".")
    if not isinstance(plain.get(group), Mapping) or name not in plain[group]:
        return "is no setting; give a dotted key such as optimiser.encoder_lr"
    if group in FIXED_GROUPS or key in FIXED_KEYS:
        return "stays as it is during a search; make it another study"
    if parameter.choices is None and (group in OBSERVER_GROUPS or acts_on_head(key)):
        observed = "is looked at with every value on one trajectory: give choices"
        return observed if group in OBSERVER_GROUPS else "acts on the head stage, which trials share: give choices"
    if parameter.times is not None and not _is_number(_or_none(plain, parameter.times)):
        return f"times {parameter.times}: the baseline has no number there"
    return next(filter(None, (_condition_refusal(key, other, parameters, plain) for other in parameter.when)), "")


def _condition_refusal(key: str, other: str, parameters: Mapping[str, Parameter], plain: Mapping[str, Any]) -> str:
    if other not in parameters and _or_none(plain, other) is None:
        return f"when {other}: neither a parameter nor a setting that the baseline has"
    if key.split(".", maxsplit=1)[0] not in OBSERVER_GROUPS and other.split(".", maxsplit=1)[0] in OBSERVER_GROUPS:
        return f"when {other}: how a trajectory is looked at cannot decide how it is trained"
    return ""


def acts_on_head(key: str) -> bool:
    """Whether a setting influences the head stage."""
    if key == "strategy.head_epochs":
        return True
    return key not in AFTER_HEAD_KEYS and key.split(".", maxsplit=1)[0] not in AFTER_HEAD_GROUPS


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _or_none(plain: Mapping[str, Any], key: str) -> Any:
    try:
        return value_at(plain, key)
    except KeyError:
        return None


def _in_order(parameters: Mapping[str, Parameter]) -> Sequence[str]:
    """Keys so that a condition is decided before what it decides, interventions before observers.

    Raises:
        SpaceError: parameters that wait for each other.
    """
    ordered: list[str] = []
    waiting = sorted(parameters, key=lambda key: key.split(".")[0] in OBSERVER_GROUPS)  # a stable sort
    while waiting:
        ready = [k for k in waiting if all(o in ordered or o not in parameters for o in parameters[k].when)]
        if not ready:
            raise SpaceError(dict.fromkeys(waiting, "its conditions wait for each other: remove one of them"))
        ordered.append(ready[0])
        waiting.remove(ready[0])
    return ordered


def _resolved(key: str, parameter: Parameter, plain: Mapping[str, Any]) -> Dimension:
    factor = 1 if parameter.times is None else value_at(plain, parameter.times)
    group, _, name = key.partition(".")
    integral = isinstance(plain[group][name], int)

    def scaled(value: Any) -> Any:
        if parameter.times is None or not _is_number(value):
            return value
        return max(1, round(value * factor)) if integral else float(f"{value * factor:.6g}")

    choices = (
        None if parameter.choices is None else tuple(dict.fromkeys(map(_hashable, map(scaled, parameter.choices))))
    )
    conditions = {k: tuple(v) if isinstance(v, list | tuple) else (v,) for k, v in parameter.when.items()}
    low, high = scaled(parameter.low or 0.0), scaled(parameter.high or 0.0)
    return Dimension(key, choices, low, high, parameter.log, parameter.whole, conditions)


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _invalid(dimension: Dimension, plain: Mapping[str, Any]) -> str:
    """What the settings say to a value that the search could choose; empty where all are valid."""
    said = []
    for value in dimension.extremes():
        try:
            Settings.model_validate(changed(plain, {dimension.key: value}))
        except ValidationError as error:
            said.append(f"{value!r} is no value of it ({error.errors(include_url=False)[0]['msg']})")
    return "; ".join(said)
