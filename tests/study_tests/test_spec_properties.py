"""Whatever a study file or an option says: a plan, or a list of problems, and never another exception."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_studies import document, write

from study.documents import StudyError
from study.plan import Plan, make_plan
from study.rows import RowsDocument
from study.spec import (
    Choices,
    Execution,
    Report,
    StudyDocument,
    load_study,
    shipped_studies,
)
from trainables.settings import Settings

SHIPPED = shipped_studies()


def names_of(model: type[Any]) -> list[str]:
    return list(model.model_fields)


GROUPS = {name: field.annotation for name, field in Settings.model_fields.items() if name != "task"}
DOTTED = [f"{group}.{name}" for group, model in GROUPS.items() for name in names_of(model)]
KEYS = st.sampled_from(
    [*names_of(StudyDocument), *names_of(RowsDocument), *names_of(Execution), *names_of(Report), *DOTTED]
    + ["name", "set", "part", "full", "parts", "phantom", "ham10000", "", ".", "a.b", "rows.list", "0", "<<"]
    + [key.split(".")[1] for key in DOTTED]
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 50),
    st.integers(10**20, 10**21),
    st.floats(),
    st.sampled_from(["phantom", "all", "none", "1e-4", "static", "tiny-phantom", "\x85", "é", "${x}", "0x10", "1:30"]),
    st.sampled_from(["nobody/nothing", "~nobody", "é/é", "x" * 300, "ham10000", "progressive", "", ".", "a\tb"]),
    st.dates(),
    st.binary(max_size=4),
)
JUNK = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(KEYS, inner, max_size=4)
        | st.dictionaries(st.integers(0, 3) | KEYS, inner, max_size=3)
    ),
    max_leaves=12,
)
ROWS = st.one_of(
    st.fixed_dictionaries(
        {
            "list": st.lists(
                st.fixed_dictionaries(
                    {"name": st.sampled_from("abc") | JUNK, "set": st.dictionaries(KEYS, JUNK, max_size=3) | JUNK}
                ),
                max_size=3,
            )
        }
    ),
    st.fixed_dictionaries(
        {
            "cumulative": st.lists(
                st.fixed_dictionaries(
                    {
                        "name": st.sampled_from("abc"),
                        "part": st.sampled_from("pq") | JUNK,
                        "set": st.dictionaries(KEYS, JUNK, max_size=2),
                    }
                ),
                max_size=3,
            )
        }
    ),
    st.fixed_dictionaries({"factorial": st.dictionaries(KEYS, st.lists(JUNK, max_size=3), max_size=2)}),
    st.fixed_dictionaries(
        {
            "leave_one_out": st.fixed_dictionaries(
                {
                    "full": JUNK | st.just({"name": "f"}),
                    "parts": st.dictionaries(KEYS, st.dictionaries(KEYS, JUNK, max_size=2), max_size=2),
                }
            )
        }
    ),
    JUNK,
)
DOCUMENTS = st.dictionaries(KEYS, JUNK, max_size=4).flatmap(
    lambda extra: st.fixed_dictionaries({"rows": ROWS}).map(lambda rows: {"study": "s", "title": "t", **extra, **rows})
)


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(DOCUMENTS, st.booleans(), st.dictionaries(KEYS.filter(bool), JUNK, max_size=2))
def test_whatever_the_file_says_it_is_a_plan_or_a_list_of_problems(
    tmp_path: Path, made: dict[str, Any], smoke: bool, overrides: dict[str, Any]
) -> None:
    plan_or_problems(write(tmp_path, yaml.safe_dump(made, allow_unicode=True)), Choices(overrides, smoke=smoke))


def plan_or_problems(path: Path, choices: Choices) -> Plan | StudyError:
    """What `--plan` comes to: anything but a plan or a list of problems is raised."""
    try:
        plan = make_plan(load_study(path, choices), storage=path.parent / "outputs")
    except StudyError as error:
        assert error.problems
        assert all(problem.strip() and "\n" not in problem for problem in error.problems)
        assert all(len(problem) < 1500 for problem in error.problems)
        return error
    assert plan.chains
    assert plan.units.floor <= plan.units.shared <= plan.units.alone
    json.dumps(plan.as_json())
    return plan


SETS = st.dictionaries(st.sampled_from(DOTTED), JUNK, max_size=3)
CHANGES = st.lists(
    st.tuples(st.integers(0, 40), st.sampled_from(["drop", "junk", "twice", "nest", "key"]), JUNK), max_size=3
)


@st.composite
def mutated_studies(draw: st.DrawFn) -> dict[str, Any]:
    """A shipped study or a small one in which some keys, at any depth, are dropped, renamed or hold something else."""
    shipped = draw(st.sampled_from([*SHIPPED, None]))
    made = document() if shipped is None else yaml.safe_load(SHIPPED[shipped].read_text(encoding="utf-8"))
    for at, how, junk in draw(CHANGES):
        places = list(mappings(made))
        group = places[at % len(places)]
        if not group:
            continue
        key = list(group)[at % len(group)]
        if how == "drop":
            del group[key]
        elif how == "key":
            group[draw(KEYS)] = group.pop(key)
        elif how == "nest":
            group[key] = {draw(KEYS): group[key]}
        elif how == "twice":
            group[f"{key}.{draw(KEYS)}"] = junk
        else:
            group[key] = junk
    return made | draw(SETS)


def mappings(value: Any) -> Iterator[dict[Any, Any]]:
    """All mappings within a value, itself first."""
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from mappings(inner)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(mutated_studies(), st.booleans(), SETS)
def test_a_study_with_some_keys_changed_is_a_plan_or_a_list_of_problems(
    tmp_path: Path, made: dict[str, Any], smoke: bool, overrides: dict[str, Any]
) -> None:
    plan_or_problems(write(tmp_path, yaml.safe_dump(made, allow_unicode=True)), Choices(overrides, smoke=smoke))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=80), st.sampled_from(list(SHIPPED)), st.integers(0, 10**6))
def test_whatever_the_bytes_it_is_a_plan_or_a_list_of_problems(tmp_path: Path, junk: bytes, name: str, at: int) -> None:
    """Junk alone, and junk in the middle of a study that was sound."""
    sound = SHIPPED[name].read_bytes()
    at %= len(sound)
    for content in (junk, sound[:at] + junk + sound[at + len(junk) :]):
        plan_or_problems(write(tmp_path, content), Choices())


@pytest.mark.parametrize(
    "override",
    [
        {"model.backbone": "x" * 1000},
        {"model.backbone": "~nobody/encoder"},
        {"model.backbone": "\u00e9/\u00e9"},
        {"model.backbone": "a\0b"},
        {"model.backbone": ""},
        {"model.backbone": "../.."},
        {"dataset.name": "ham10000", "dataset.root": "x" * 1000},
        {"dataset.name": "ham10000", "dataset.root": "~nobody/data"},
        {"dataset.name": "ham10000", "dataset.root": "a\0b"},
        {"strategy.head_epochs": 10**20},
        {"optimiser.batch_size": 10**20},
        {"dataset.images": 10**20},
        {"seeds": list(range(100_001))},
        {
            "rows": {
                "factorial": {f"optimiser.{n}": list(range(1, 40)) for n in ("batch_size", "head_lr", "encoder_lr")}
            }
        },
        {"model.std": [0.0], "model.mean": [0.5]},
    ],
    ids=lambda override: ", ".join(override),
)
def test_a_value_that_no_machine_can_follow_is_a_problem_said_at_once(tmp_path: Path, override: dict[str, Any]) -> None:
    started = time.monotonic()
    assert isinstance(plan_or_problems(write(tmp_path, document()), Choices(override)), StudyError)
    assert time.monotonic() - started < 10


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(alphabet="abr:-[]{}&*!?<>|#'\"\n\t 01e.,", max_size=60))
def test_whatever_the_characters_it_is_a_study_or_a_list_of_problems(tmp_path: Path, text: str) -> None:
    with pytest.raises(StudyError) as caught:
        load_study(write(tmp_path, text))
    assert caught.value.problems
