"""Several studies as one: a file that names studies whose rows are the same steps of one strategy, each in its task.

Each of them stays a study in its own right, with its own rows, ledger and report: what was run alone is not run again.
Imports no torch, ray or mlflow.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from study.documents import LARGEST_BYTES, Document, StudyError, flatten, read_document
from study.layers import Choices
from study.problems import Places, Problems
from study.rows import Name
from study.spec import Study, find_study, load_study, shipped_joint_studies
from trainables.settings import ONLY_IN_TASK, Frozen

ALONE = ("model.backbone",)  # keys that no two tasks can have the same value of


class JointDocument(Frozen):
    """A file of several studies."""

    study: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,60}$")] = Field(
        ..., description="name: folder of its report"
    )
    title: Name
    description: str = ""
    studies: Annotated[tuple[str, ...], Field(min_length=2)] = Field(
        ..., description="shipped studies by name, or files relative to this one"
    )
    smoke: dict[str, Any] = Field(
        default_factory=dict, description="dotted key → value, in every study under --smoke, over its own smoke"
    )


@dataclass(frozen=True)
class JointStudy:
    """Studies that are run by one command and reported side by side."""

    name: str
    title: str
    description: str
    studies: tuple[Study, ...]

    @property
    def cells(self) -> int:
        """Cells of all its studies."""
        return sum(len(study.cells()) for study in self.studies)


def find_joint(name: str) -> Path | None:
    """File of a joint study by name or path; None where it is none, so that it is a study, or an error to be told."""
    shipped = shipped_joint_studies()
    if name in shipped:
        return shipped[name]
    if not os.path.isfile(name):  # noqa: PTH113 (Path raises for a name too long to be one)
        return None
    try:
        with Path(name).open("rb") as file:
            if b"studies" not in file.read(LARGEST_BYTES):
                return None  # without reading as YAML what will be read as a study's
        document = read_document(Path(name)).document
    except (StudyError, OSError):
        return None
    return Path(name) if "studies" in document and "rows" not in document else None


def load_joint(path: Path, choices: Choices | None = None) -> JointStudy:
    """Read and validate a joint study and all its studies.

    Args:
        path: of its file.
        choices: what the command line says; an override of a group that one task has acts in the studies of that task.

    Raises:
        StudyError: with every problem of the file and of all its studies, and where their rows are not the same steps.
    """
    choices = choices or Choices()
    file = read_document(path, ("study", "title", "description", "studies"))
    problems = Problems(Places(path.name, file.lines))
    declared = problems.validate(JointDocument, file.document)
    problems.raise_if_any()
    assert declared is not None
    if choices.smoke:
        choices = _with_smoke(choices, declared, path)
    problems.add_lines(_idle(choices))
    studies: list[Study] = []
    for position, name in enumerate(declared.studies):
        try:
            part = _file_of(name, path)
            studies.append(load_study(part, _for_task(choices, _task_of(part))))
        except StudyError as error:
            for line in error.problems:
                (problems.add_lines([line]) if _names_its_place(line) else problems.add(("studies", position), line))
    _check_names(declared, studies, problems)
    _check_same_steps(studies, problems)
    problems.raise_if_any()
    return JointStudy(declared.study, declared.title, declared.description, tuple(studies))


def _file_of(name: str, joint: Path) -> Path:
    beside = joint.parent / name
    return beside if beside.suffix in (".yaml", ".yml") and beside.is_file() else find_study(name)


def _task_of(path: Path) -> str:
    task: Any = read_document(path).document.get("task", "classification")
    return str(task)


def _names_its_place(line: str) -> bool:
    """Whether a problem begins with a file or an option, as those of a study's own keys do."""
    head = line.partition(": ")[0]
    return ".y" in head or head.startswith("-")


def _for_task(choices: Choices, task: str) -> Choices:
    """The choices without what acts in other tasks alone."""
    foreign = {group for (group, names), of in ONLY_IN_TASK.items() if not names and of != task}
    overrides = {key: value for key, value in choices.overrides.items() if key.split(".")[0] not in foreign}
    return replace(choices, overrides=overrides)


def _with_smoke(choices: Choices, declared: JointDocument, path: Path) -> Choices:
    """The choices with what the file says of --smoke, where the command line says nothing else."""
    ours = {key: value for key, value in flatten(declared.smoke).items() if key not in choices.flat()}
    typed = {key: f"{path.name}: smoke: {key}" for key in ours}
    return replace(choices, overrides={**choices.overrides, **ours}, typed={**choices.typed, **typed})


def _idle(choices: Choices) -> list[str]:
    """Options that cannot hold for several tasks at once."""
    flat: Document = flatten(choices.flat())
    return [
        f"{choices.option(key)}: the studies have different models; put it into a copy of the study's own file, and "
        "name that under `studies` in a file of your own"
        for key in ALONE
        if key in flat
    ]


def _check_names(declared: JointDocument, studies: list[Study], problems: Problems) -> None:
    names = [study.name for study in studies]
    for name in (name for name, times in Counter(names).items() if times > 1):
        problems.add(("studies",), f"{name!r} is named twice")
    if declared.study in names:
        problems.add(("study",), f"{declared.study!r} is the name of one of its studies; their reports would collide")


def _check_same_steps(studies: list[Study], problems: Problems) -> None:
    """Rows stand beside each other by their marks: the same parts of the strategy, in the same order."""
    for study in studies[1:]:
        first, ours = ([list(row.marks.items()) for row in s.rows] for s in (studies[0], study))
        if first != ours or not studies[0].parts:
            problems.add(
                ("studies",),
                f"{study.name} has rows with {_steps(study)}, {studies[0].name} with {_steps(studies[0])}; studies "
                "that stand beside each other need the same parts, switched on in the same order",
            )


def _steps(study: Study) -> str:
    return ", ".join("+".join(part for part, on in row.marks.items() if on) or "none" for row in study.rows)
