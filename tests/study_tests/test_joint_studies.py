"""Joint studies: a file of studies, checked as a whole before anything starts, and told from studies and mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from study.cli import app
from study.documents import StudyError, apply
from study.joint import find_joint, load_joint
from study.layers import Choices
from study.spec import shipped_joint_studies
from tests.detection_extra import needs_detection

UNIFIED = shipped_joint_studies()["unified"]


def joint(folder: Path, **changes: Any) -> Path:
    """A joint study's file, and two studies beside it."""
    for name, task in (("one", "classification"), ("two", "segmentation")):
        steps = [
            {"name": "head", "set": {"strategy.unfreezing": "none"}},
            {"name": "more", "part": "Unfreezing", "set": {"strategy.unfreezing": "progressive"}},
        ]
        rows = {"cumulative": steps}
        document = {"study": name, "title": name, "seeds": [0], "task": task, "rows": rows}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    path = folder / "joint.yaml"
    document = {"study": "both", "title": "Both", "studies": ["one.yaml", "two.yaml"]} | changes
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def problems_of(path: Path, choices: Choices | None = None) -> tuple[str, ...]:
    with pytest.raises(StudyError) as refused:
        load_joint(path, choices)
    return refused.value.problems


def test_unified_holds_the_ablation_of_every_task_with_the_same_steps() -> None:
    unified = load_joint(UNIFIED)
    tasks = [study.rows[0].settings[study.datasets[0]].task for study in unified.studies]
    assert tasks == ["classification", "detection", "segmentation"]
    marks = [[list(row.marks.values()) for row in study.rows] for study in unified.studies]
    assert marks[0] == marks[1] == marks[2] == [[False] * 3, [True, False, False], [True, True, False], [True] * 3]
    assert unified.cells == 36


def test_what_a_joint_file_says_of_smoke_acts_in_all_its_studies_and_the_command_line_has_the_last_word(
    tmp_path: Path,
) -> None:
    both = ["ablation", "segmentation_ablation"]
    path = joint(tmp_path, studies=both, smoke={"seeds": [3, 4], "strategy.tune_epochs": 4})
    assert {study.seeds for study in load_joint(path).studies} == {(0, 1, 2)}
    smoke = load_joint(path, Choices({"seeds": [5]}, smoke=True)).studies
    assert {study.seeds for study in smoke} == {(5,)}
    assert {study.rows[0].settings[study.datasets[0]].strategy.tune_epochs for study in smoke} == {4}
    problems = problems_of(joint(tmp_path, studies=both, smoke={"strategy.tune_epoch": 2}), Choices(smoke=True))
    assert all(said.startswith("joint.yaml: smoke: strategy.tune_epoch: ") for said in problems)


def test_a_study_and_a_mistake_are_no_joint_study(tmp_path: Path) -> None:
    assert find_joint("unified") == UNIFIED
    assert find_joint(str(joint(tmp_path))) == tmp_path / "joint.yaml"
    assert find_joint("ablation") is None
    assert find_joint(str(tmp_path / "one.yaml")) is None
    assert find_joint("no-such-study") is None
    (tmp_path / "broken.yaml").write_text("studies: [")
    assert find_joint(str(tmp_path / "broken.yaml")) is None


def test_files_beside_it_are_found_and_options_act_in_all_of_its_studies(tmp_path: Path) -> None:
    choices = Choices(apply({}, {"seeds": [3, 4], "strategy.tune_epochs": 5, "segmentation.prompt": "point"}))
    one, two = load_joint(joint(tmp_path), choices).studies
    assert one.seeds == two.seeds == (3, 4)
    assert one.rows[0].settings["phantom"].strategy.tune_epochs == 5
    assert two.rows[0].settings["phantom"].segmentation.prompt == "point"
    assert one.rows[0].settings["phantom"].segmentation.prompt == "box", "it acts in the task that has it"


def test_every_problem_of_every_study_is_said_at_once(tmp_path: Path) -> None:
    path = joint(tmp_path, studies=["one.yaml", "two.yaml", "thre.yaml", "ablation"])
    for name in ("one", "two"):
        text = (tmp_path / f"{name}.yaml").read_text()
        (tmp_path / f"{name}.yaml").write_text(f"{text}stratgy: 1\n")
    found = problems_of(path)
    assert [line.split(":")[0] for line in found if "stratgy" in line] == ["one.yaml", "two.yaml"]
    assert any(line.startswith("thre.yaml: no such file") for line in found)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"studies": ["one.yaml"]}, "joint.yaml:3: studies: expected at least 2"),
        ({"studies": ["one.yaml", "one.yaml"]}, "'one' is named twice"),
        ({"study": "one"}, "'one' is the name of one of its studies"),
        ({"studies": ["one.yaml", "ablation"]}, "ablation has rows with none, Unfreezing, Unfreezing+Class weights"),
        ({"seeds": [0]}, "seeds"),
        ({"studies": ["one.yaml", "nothing"]}, "nothing: no such study or file"),
    ],
)
def test_what_cannot_stand_side_by_side_is_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    found = problems_of(joint(tmp_path, **changes))
    assert any(said in line for line in found), found


def test_one_model_for_all_tasks_is_refused_with_what_to_do() -> None:
    choices = Choices({"model.backbone": "x"}, typed={"model.backbone": "--backbone x"})
    found = problems_of(UNIFIED, choices)
    assert [line for line in found if line.startswith("--backbone x: the studies have different models")]


@needs_detection
def test_the_plan_of_unified_is_that_of_its_studies(tmp_path: Path) -> None:
    told = CliRunner().invoke(app, ["unified", "--smoke", "--plan", "--json", "--storage", str(tmp_path / "out")])
    assert told.exit_code == 0, told.output
    plan = json.loads(told.output)
    assert plan["cells"] == sum(study["cells"] for study in plan["studies"]) == 12
    assert [study["study"] for study in plan["studies"]] == ["ablation", "detection_ablation", "segmentation_ablation"]
    alone = CliRunner().invoke(
        app, ["ablation", "--smoke", "--seeds", "0", "--plan", "--json", "--storage", str(tmp_path / "out")]
    )
    assert plan["studies"][0] == json.loads(alone.output)
    assert not (tmp_path / "out").exists()


@needs_detection
def test_what_keeps_any_study_from_running_keeps_all_from_starting(tmp_path: Path) -> None:
    options = ["-o", "dataset.images=40", "-o", "dataset.drop_classes=[Cardiomegaly]"]
    options += ["-o", f"detection.weights={tmp_path / 'nowhere.pt'}"]
    told = CliRunner().invoke(app, ["unified", *options, "--storage", str(tmp_path / "out"), "--executor", "local"])
    assert isinstance(told.exception, StudyError)
    said = "\n".join(told.exception.problems)
    assert "without a positive" in said
    assert "nowhere.pt: no such file" in said
    assert not (tmp_path / "out" / "states").exists()
