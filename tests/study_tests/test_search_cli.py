"""The commands of a search as a user meets them: estimates without heavy imports, one clear message for bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_studies import document, write
from test_cli import Told, launch

from study.running import this_command
from study.searches.rows import Search
from study.searches.settings import SearchSettings
from study.searches.trial_storage import default_place
from study.spec import Choices, find_study, load_study

SLOW = pytest.mark.slow  # each is a process


def search(folder: Path, *arguments: str) -> Told:
    return launch(folder, "search", *arguments)


# ------------------------------------------------------------------------------------------------- what is said


@pytest.mark.parametrize("task", ["classification", pytest.param("detection", marks=pytest.mark.slow), "segmentation"])
def test_the_estimate_of_every_tasks_search_is_printed_and_nothing_is_written(tmp_path: Path, task: str) -> None:
    if task == "detection":
        pytest.importorskip("ultralytics")
    told = search(tmp_path, "--task", task, "--trials", "15", "--plan", "--json")
    assert told.status == 0, told.err
    plan: dict[str, Any] = json.loads(told.out)
    assert (plan["trials"], plan["observers"]) == (15, 5)
    assert plan["search"]["cells"] == 15
    units = plan["search"]["units"]
    assert units["floor"] <= units["shared"] < units["alone"] / 3, "five looks at each trajectory"
    assert plan["confirmation"]["seeds"] == [0, 1, 2]
    assert list(tmp_path.iterdir()) == []


def test_a_plan_for_people_shows_the_space_and_both_costs(tmp_path: Path) -> None:
    told = search(tmp_path, "--trials", "20", "--plan")
    assert told.status == 0
    for shown in ("20, 5 on each trajectory: 4 trajectories", "search: units shared", "confirmation: units shared"):
        assert shown in told.out
    assert "optimiser.encoder_lr" in told.out
    assert "5e-05 … 0.005, log" in told.out


def test_a_study_file_that_declares_a_search_is_searched_under_its_own_name(tmp_path: Path) -> None:
    path = write(tmp_path, document(study="mine", search={"trials": 5}))
    told = launch(tmp_path, str(path), "--plan", "--json")
    assert told.status == 0, told.err
    assert json.loads(told.out)["trials"] == 5


def test_help_names_the_options_of_a_search(tmp_path: Path) -> None:
    told = search(tmp_path, "--help")
    for option in ("--task", "--trials", "--timeout", "--sampler", "--pruner", "--optuna-storage", "--stage-timeout"):
        assert option in told.out


# ------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--task", "regression"], "--task regression: expected one of classification, detection, segmentation"),
        pytest.param(["search", "--task", "detection"], "a study has its task; give one of them", marks=SLOW),
        pytest.param(["--sampler", "grid"], "expected 'tpe', 'random', 'gp', 'cmaes' or 'nsga2'", marks=SLOW),
        pytest.param(["--pruner", "best"], "expected 'none', 'asha', 'hyperband' or 'median'", marks=SLOW),
        pytest.param(["--trials", "0"], "search.trials=0", marks=SLOW),
        pytest.param(["--timeout", "-1"], "--timeout -1: expected seconds above 0", marks=SLOW),
        pytest.param(["--stage-timeout", "0"], "--stage-timeout 0: expected seconds above 0", marks=SLOW),
        (["--trials", "5", "-o", "search.trials=6"], "search.trials is given twice"),
        pytest.param(["ablation"], "declares no search; add a group `search`", marks=SLOW),
        pytest.param(
            ["--optuna-storage", "mysql://x/y", "--smoke"], "--optuna-storage mysql://x/y: cannot be used", marks=SLOW
        ),
        (["-o", "search.parameters={strategy.depth: {choices: [4, 13]}}"], "strategy.depth: 13 blocks"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_message_and_status_2_and_starts_nothing(
    tmp_path: Path, arguments: list[str], said: str
) -> None:
    told = search(tmp_path, *arguments, "--storage", "results")
    assert told.status == 2, told.out
    assert said in told.err
    assert told.err.count("error ") == 1
    assert "Traceback" not in told.err
    assert list(tmp_path.iterdir()) == []


def test_a_search_that_was_begun_otherwise_is_refused_before_data_is_drawn(tmp_path: Path) -> None:
    from study.search import Trials

    declared = Search.of(load_study(find_study("search"), Choices(smoke=True)))
    place = default_place(tmp_path / "results", "search")
    Trials.open(place, "search", SearchSettings(), declared.space, declared.declaration(tmp_path)).propose()
    told = search(tmp_path, "--smoke", "--storage", "results", "-o", "optimiser.batch_size=16")
    assert told.status == 2
    assert "search 'search' was begun with other baseline, data, encoder, device or code" in told.err
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["search"]


def test_the_ablation_of_a_search_that_is_not_there_or_not_finished_is_refused(tmp_path: Path) -> None:
    from study.search import Trials

    told = launch(tmp_path, "ablate-best", "--smoke", "--storage", "results")
    assert told.status == 2
    assert "holds no search 'search'; run `launch.py search` first" in told.err
    declared = Search.of(load_study(find_study("search"), Choices(smoke=True)))
    place = default_place(tmp_path / "results", "search")
    trials = Trials.open(place, "search", SearchSettings(), declared.space, declared.declaration(tmp_path))
    first = trials.propose()[0]
    told = launch(tmp_path, "ablate-best", "--smoke", "--storage", "results")
    assert "has no finished trial yet" in told.err
    trials.finish(first.number, [0.7])
    told = launch(tmp_path, "ablate-best", "--smoke", "--storage", "results", "--plan")
    assert told.status == 2
    assert "has 4 trials that are not finished" in told.err


@pytest.mark.parametrize("words", [["--optuna-storage", "{}"], ["--optuna-storage={}"]])
def test_a_command_is_kept_without_the_password_of_an_address(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = "postgresql+psycopg://ann:s3cret@127.0.0.1:5432/optuna"
    typed = ["launch.py", "search", "-o", "study=a:b@c", *(word.format(url) for word in words)]
    monkeypatch.setattr("sys.argv", typed)
    kept = this_command()
    assert "s3cret" not in kept
    assert "postgresql+psycopg://…@127.0.0.1:5432/optuna" in kept
    assert "study=a:b@c" in kept
