"""Study files become studies: rows in four forms, every problem at once with its line, overrides by rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from pydantic import ValidationError
from small_studies import document, loaded, write

from study.documents import StudyError
from study.spec import (
    Choices,
    Study,
    find_study,
    load_study,
    shipped_studies,
    study_schema,
)

SHIPPED = shipped_studies()


def refusals(folder: Path, content: Any, choices: Choices | None = None) -> list[str]:
    with pytest.raises(StudyError) as caught:
        loaded(folder, content, choices)
    return list(caught.value.problems)


def table(study: Study, *keys: str) -> list[tuple[Any, ...]]:
    """Name of each row, with the values of its complete settings under dotted keys."""
    found = []
    for row in study.rows:
        plain = row.settings[study.datasets[0]].model_dump()
        values = []
        for key in keys:
            group, name = key.split(".")
            values.append(plain[group][name])
        found.append((row.name, *values))
    return found


# ------------------------------------------------------------------------------------------------- the four forms


def test_rows_of_a_list_each_change_the_baseline(tmp_path: Path) -> None:
    rows = [
        {"name": "as it is"},
        {"name": "shallow", "set": {"strategy.depth": 4}},
        {"name": "averaged", "set": {"ema": {"enabled": True}}},
    ]
    study = loaded(tmp_path, document(rows, strategy={"depth": 8}))
    assert table(study, "strategy.depth", "ema.enabled") == [
        ("as it is", 8, False),
        ("shallow", 4, False),
        ("averaged", 8, True),
    ]
    assert [row.changes for row in study.rows] == [{}, {"strategy.depth": 4}, {"ema.enabled": True}]
    assert [row.marks for row in study.rows] == [{}, {}, {}]
    assert study.parts == ()


def test_cumulative_rows_keep_what_those_above_them_set(tmp_path: Path) -> None:
    rows = [
        {"name": "head", "set": {"strategy.unfreezing": "none"}},
        {"name": "+ unfreezing", "part": "Unfreezing", "set": {"strategy": {"unfreezing": "progressive", "depth": 4}}},
        {"name": "+ weights", "part": "Weights", "set": {"weighting.enabled": True}},
        {"name": "+ deeper", "set": {"strategy.depth": 10}},
    ]
    study = loaded(tmp_path, document({"cumulative": rows}))
    assert table(study, "strategy.unfreezing", "strategy.depth", "weighting.enabled") == [
        ("head", "none", 10, False),
        ("+ unfreezing", "progressive", 4, False),
        ("+ weights", "progressive", 4, True),
        ("+ deeper", "progressive", 10, True),
    ]
    assert [row.marks for row in study.rows] == [
        {"Unfreezing": False, "Weights": False},
        {"Unfreezing": True, "Weights": False},
        {"Unfreezing": True, "Weights": True},
        {"Unfreezing": True, "Weights": True},
    ]
    assert study.parts == ("Unfreezing", "Weights")


def test_leave_one_out_is_the_full_row_and_one_row_a_part_without_it(tmp_path: Path) -> None:
    form = {
        "full": {"name": "SPFT", "set": {"weighting.enabled": True, "ema.enabled": True}},
        "parts": {"Prog. unfreezing": {"strategy.unfreezing": "static"}, "EMA": {"ema.enabled": False}},
    }
    study = loaded(tmp_path, document({"leave_one_out": form}))
    assert table(study, "strategy.unfreezing", "weighting.enabled", "ema.enabled") == [
        ("SPFT", "progressive", True, True),
        ("− Prog. unfreezing", "static", True, True),
        ("− EMA", "progressive", True, False),
    ]
    assert [row.marks for row in study.rows] == [
        {"Prog. unfreezing": True, "EMA": True},
        {"Prog. unfreezing": False, "EMA": True},
        {"Prog. unfreezing": True, "EMA": False},
    ]


def test_factorial_rows_are_every_combination_with_the_last_axis_varying_fastest(tmp_path: Path) -> None:
    axes = {"strategy.depth": [4, "all"], "optimiser.encoder_lr": [1e-4, 3e-6], "ema.enabled": [False, True]}
    study = loaded(tmp_path, document({"factorial": axes}))
    assert table(study, "strategy.depth", "optimiser.encoder_lr", "ema.enabled") == [
        ("depth = 4, encoder_lr = 0.0001, enabled = off", 4, 1e-4, False),
        ("depth = 4, encoder_lr = 0.0001, enabled = on", 4, 1e-4, True),
        ("depth = 4, encoder_lr = 3e-06, enabled = off", 4, 3e-6, False),
        ("depth = 4, encoder_lr = 3e-06, enabled = on", 4, 3e-6, True),
        ("depth = all, encoder_lr = 0.0001, enabled = off", "all", 1e-4, False),
        ("depth = all, encoder_lr = 0.0001, enabled = on", "all", 1e-4, True),
        ("depth = all, encoder_lr = 3e-06, enabled = off", "all", 3e-6, False),
        ("depth = all, encoder_lr = 3e-06, enabled = on", "all", 3e-6, True),
    ]


def test_factorial_axes_with_the_same_last_word_are_named_in_full(tmp_path: Path) -> None:
    axes = {"ema.enabled": [False, True], "weighting.enabled": [True]}
    study = loaded(tmp_path, document({"factorial": axes}))
    assert [row.name for row in study.rows] == [
        "ema.enabled = off, weighting.enabled = on",
        "ema.enabled = on, weighting.enabled = on",
    ]


def test_cells_are_every_data_set_row_and_seed(tmp_path: Path) -> None:
    rows = [{"name": "a"}, {"name": "b", "set": {"ema.enabled": True}}]
    study = loaded(tmp_path, document(rows, seeds=[3, 1], datasets=["phantom", "phantom-derm"]))
    assert [(c.dataset, c.row.name, c.seed) for c in study.cells()] == [
        ("phantom", "a", 3),
        ("phantom", "a", 1),
        ("phantom", "b", 3),
        ("phantom", "b", 1),
        ("phantom-derm", "a", 3),
        ("phantom-derm", "a", 1),
        ("phantom-derm", "b", 3),
        ("phantom-derm", "b", 1),
    ]
    assert {c.settings.dataset.name for c in study.cells() if c.dataset == "phantom-derm"} == {"phantom-derm"}


@pytest.mark.parametrize(
    ("compare", "pairs"),
    [("previous", (("b", "a"), ("c", "b"))), ("first", (("b", "a"), ("c", "a"))), ("none", ())],
)
def test_rows_are_compared_as_the_report_says(tmp_path: Path, compare: str, pairs: Any) -> None:
    rows = [{"name": n, "set": {"strategy.depth": k}} for n, k in (("a", 2), ("b", 4), ("c", 6))]
    assert loaded(tmp_path, document(rows, report={"compare": compare})).comparisons() == pairs


# -------------------------------------------------------------------------------------------- what is refused, and how


def test_all_problems_of_a_file_come_at_once_each_with_its_line_key_and_expectation(tmp_path: Path) -> None:
    text = """\
study: wrong in many ways
title: T
seeds: [0, -1]
stratgy: {depth: 4}
optimiser:
  encoder_lr: fast
  batch_size: 0
weighting:
  clip: [5, 0.5]
rows:
  list:
    - name: a
      set:
        strategy.depht: 4
        optimiser.head_lr: -1
    - name: b
      set: {seeds: [1]}
"""
    found = refusals(tmp_path, text)
    expected = [
        "study.yaml:1: study: expected letters, digits, '.', '_' and '-', at most 61 of them, no blanks",
        "study.yaml:3: seeds.1: expected at least 0; found -1",
        "study.yaml:4: stratgy: unknown key; did you mean strategy?",
        "study.yaml:6: optimiser.encoder_lr: expected a number; found 'fast'",
        "study.yaml:7: optimiser.batch_size: expected at least 1; found 0",
        "study.yaml:9: weighting.clip: lower bound 5.0 is above upper bound 0.5",
        "study.yaml:14: rows.list.0.set.strategy.depht: unknown key; did you mean strategy.depth?",
        "study.yaml:15: rows.list.0.set.optimiser.head_lr: expected more than 0; found -1",
        "study.yaml:17: rows.list.1.set.seeds: row 'b' can change only keys of task, dataset",
    ]
    assert len(found) == len(expected), found
    for beginning in expected:
        assert sum(line.startswith(beginning) for line in found) == 1, (beginning, found)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seeds": [0, 1, 0]}, "seeds: 0 given twice"),
        ({"seeds": []}, "seeds: expected at least 1 item(s); found []"),
        ({"seeds": 3}, "seeds: expected a list; found 3"),
        ({"seeds": [int("9" * 4000) * 10**4000]}, "seeds.0: "),
        ({"title": None}, "title: expected text; found nothing"),
        (
            {"dataset": {"name": "chestxray15"}},
            "dataset.name: unknown data set 'chestxray15'; did you mean chestxray14?; expected one of chestxray14, ",
        ),
        ({"datasets": ["phantom", "nosuch"]}, "datasets.1: unknown data set 'nosuch'; expected one of"),
        (
            {"rows": {}},
            "rows: expected exactly one of list, cumulative, leave_one_out, factorial; found none with rows",
        ),
        ({"rows": {"list": []}}, "rows: expected exactly one of"),
        (
            {"rows": {"list": [{"name": "a"}], "factorial": {"ema.enabled": [True]}}},
            "rows: expected exactly one of list, cumulative, leave_one_out, factorial; found list, factorial",
        ),
        (
            {"rows": {"factorial": {"strategy.depth": []}}},
            "rows.factorial.strategy.depth: expected at least 1 item(s); found []",
        ),
        (
            {"rows": {"leave_one_out": {"full": {"name": "f"}, "parts": {}}}},
            "rows.leave_one_out.parts: expected at least 1 item(s); found {}",
        ),
        (
            {"rows": {"list": [{"name": "a"}, {"name": "a", "set": {"ema.enabled": True}}]}},
            "rows: row 'a' is declared twice",
        ),
        ({"rows": {"factorial": {"strategy.depth": [4, 4]}}}, "rows: row 'depth = 4' is declared twice"),
        (
            {"rows": {"list": [{"name": "a"}, {"name": "b", "set": {"strategy.depth": 10}}]}},
            "rows.list.1.set: row 'b' changes nothing: its settings equal those of row 'a'",
        ),
        (
            {"rows": {"cumulative": [{"name": "a", "set": {"ema.enabled": True}}, {"name": "b", "part": "P"}]}},
            "rows.cumulative.1.set: row 'b' changes nothing: its settings equal those of row 'a'",
        ),
        (
            {"rows": {"list": [{"name": "a", "set": {"strategy.depth.of": 1}}]}},
            "rows.list.0.set.strategy.depth.of: strategy.depth is not a group of keys",
        ),
        (
            {"rows": {"list": [{"name": "a", "set": {"dataset": {"name": "ham10000"}}}]}},
            "rows.list.0.set.dataset.name: a row cannot change the data set: name several under `datasets`",
        ),
        ({"model": {"mean": [0.5]}}, "model.mean and model.std are given together or not at all"),
        ({"optimiser": {"encoder_lr": float("inf")}}, "optimiser.encoder_lr: expected a finite number"),
        ({"execution": {"cpu": 2}}, "execution.cpu: unknown key"),
        ({"execution": {"gpus": "half"}}, "execution.gpus: expected a number or 'auto'; found 'half'"),
        ({"execution": {"gpus": -1}}, "execution.gpus: expected at least 0 or 'auto'; found -1"),
        ({"execution": {"autoscale_to": 0}}, "execution.autoscale_to: expected at least 1; found 0"),
        ({"profiles": {"phantom": 3}}, "profiles.phantom: expected a mapping of keys; found 3"),
        ({"smoke": [1]}, "smoke: expected a mapping of keys; found [1]"),
    ],
)
def test_a_problem_is_said_in_the_words_of_the_file(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    found = refusals(tmp_path, json.dumps(document() | change) if "seeds" not in change else yaml_of(change))
    assert any(said in line and line.startswith("study.yaml") for line in found), found
    assert all("\n" not in line and len(line) < 500 for line in found)


def yaml_of(change: dict[str, Any]) -> str:
    """A study with such seeds; whole numbers in hexadecimal, which Python reads whatever their length."""
    seeds = change["seeds"]
    shown = "[" + ", ".join(hex(s) for s in seeds) + "]" if isinstance(seeds, list) else str(seeds)
    rest = {key: value for key, value in document().items() if key != "seeds"}
    return f"seeds: {shown}\n" + "".join(f"{key}: {json.dumps(value)}\n" for key, value in rest.items())


def test_a_row_beside_a_broken_baseline_is_judged_by_the_groups_that_are_sound(tmp_path: Path) -> None:
    """std in the row completes the baseline's mean: no problem of its own, whatever else is wrong."""
    rows = [{"name": "a", "set": {"model.mean": [0.5], "model.std": [0.2]}}]
    found = refusals(tmp_path, document(rows, ema={"decay": 2}))
    assert [line.split(": ", 1)[1] for line in found] == ["ema.decay: expected less than 1; found 2"]


def test_a_missing_file_and_an_unknown_name_are_said_with_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(
        StudyError, match=r"ablatoin: no such study or file; did you mean ablation\?; shipped studies: ablation"
    ) as caught:
        find_study("ablatoin")
    assert len(caught.value.problems) == 1
    path = write(tmp_path, document())
    assert find_study(str(path)) == path
    assert find_study("ablation") == SHIPPED["ablation"]


# ------------------------------------------------------------------------------------------ profiles, smoke, overrides


def values_of(study: Study, *keys: str) -> tuple[Any, ...]:
    return table(study, *keys)[0][1:]


def test_later_sources_win_shipped_profile_file_own_profile_smoke_command_line_row(tmp_path: Path) -> None:
    keys = ("strategy.head_epochs", "strategy.tune_epochs", "strategy.step", "strategy.depth", "optimiser.batch_size")
    base = document(
        [{"name": "row", "set": {"optimiser.batch_size": 7}}],
        strategy={"tune_epochs": 21, "step": 21, "depth": 2},
        optimiser={"batch_size": 21},
        profiles={"phantom": {"strategy": {"step": 22, "depth": 3}, "optimiser.batch_size": 22}},
        smoke={"strategy.depth": 4, "optimiser.batch_size": 23, "seeds": [5]},
    )
    del base["strategy"]["head_epochs"]
    # head_epochs: 6 comes from the profile that is shipped for phantoms.
    assert values_of(loaded(tmp_path, base), *keys) == (6, 21, 22, 3, 7)
    smoke = loaded(tmp_path, base, Choices(smoke=True))
    assert values_of(smoke, *keys) == (6, 21, 22, 4, 7)
    assert (smoke.seeds, smoke.smoke) == ((5,), True)
    told = Choices({"strategy": {"depth": 9}, "seeds": [8], "optimiser.batch_size": 24}, smoke=True)
    assert values_of(loaded(tmp_path, base, told), *keys) == (6, 21, 22, 9, 7)
    assert loaded(tmp_path, base, told).seeds == (8,)


def test_a_profile_acts_on_its_own_data_set_alone(tmp_path: Path) -> None:
    made = document(profiles={"phantom-derm": {"optimiser.batch_size": 5}}, optimiser={"batch_size": 9})
    assert values_of(loaded(tmp_path, made), "optimiser.batch_size") == (9,)
    assert values_of(loaded(tmp_path, made, Choices(dataset="phantom-derm")), "optimiser.batch_size") == (5,)
    both = loaded(tmp_path, made | {"datasets": ["phantom", "phantom-derm"]})
    assert {d: s.optimiser.batch_size for d, s in both.rows[0].settings.items()} == {"phantom": 9, "phantom-derm": 5}


def test_the_data_set_of_the_command_line_replaces_those_of_the_file(tmp_path: Path) -> None:
    made = document(datasets=["phantom", "phantom-derm"])
    assert loaded(tmp_path, made).datasets == ("phantom", "phantom-derm")
    assert loaded(tmp_path, made, Choices(dataset="ham10000")).datasets == ("ham10000",)
    assert loaded(tmp_path, made, Choices({"dataset.name": "ham10000"})).datasets == ("ham10000",)
    assert loaded(tmp_path, made, Choices({"datasets": ["phantom-derm"]})).datasets == ("phantom-derm",)


def test_roots_go_to_the_data_sets_that_they_name(tmp_path: Path) -> None:
    made = document(datasets=["ham10000", "chestxray14"])
    roots = {"ham10000": "here", "chestxray14": "there"}
    study = loaded(tmp_path, made, Choices(data_roots=roots))
    assert {d: s.dataset.root for d, s in study.rows[0].settings.items()} == roots
    alone = loaded(tmp_path, made, Choices(dataset="ham10000", data_roots={"": "anywhere"}))
    assert alone.rows[0].settings["ham10000"].dataset.root == "anywhere"


# --------------------------------------------------------------------------------------------------------- properties


def test_studies_and_settings_cannot_be_changed(tmp_path: Path) -> None:
    study = loaded(tmp_path, document())
    settings_ = study.rows[0].settings["phantom"]
    for target, name in (
        (settings_, "task"),
        (settings_.strategy, "depth"),
        (study.execution, "cpus"),
        (study.report, "notes"),
    ):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(target, name, getattr(target, name))
    for target, name in ((study, "seeds"), (study.rows[0], "name"), (study.cells()[0], "seed")):
        with pytest.raises(AttributeError):
            setattr(target, name, getattr(target, name))


# ------------------------------------------------------------------------------------------------- shipped, and schema


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_study_is_called_as_its_file_and_fits_the_schema(name: str) -> None:
    schema = study_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    plain = yaml.safe_load(SHIPPED[name].read_text(encoding="utf-8"))
    jsonschema.validate(plain, schema)
    study = load_study(SHIPPED[name])
    assert study.name == plain["study"] == name
    assert load_study(SHIPPED[name], Choices(smoke=True)).smoke


@pytest.mark.parametrize(
    "change",
    [{"stratgy": {}}, {"seeds": "0"}, {"strategy": {"depth": 0}}, {"rows": 3}, {"title": ""}, {"study": "a b"}],
)
def test_the_schema_refuses_what_loading_refuses(tmp_path: Path, change: dict[str, Any]) -> None:
    made = document() | change
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(made, study_schema())
    assert refusals(tmp_path, made)
