"""The spaces that come with the project: one file a task, TASK.yaml, a mapping from settings to parameters."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import yaml

from search_spaces.space import Parameter
from trainables.settings import Task

FOLDER = Path(__file__).parent


@cache
def declared_space(task: Task) -> Mapping[str, Parameter]:
    """Dotted key → parameter of a task's space, in the order of its file."""
    text = (FOLDER / f"{task}.yaml").read_text(encoding="utf-8")
    return {key: Parameter.model_validate(value) for key, value in yaml.safe_load(text).items()}


def combined(task: Task, own: Mapping[str, Parameter | None]) -> dict[str, Parameter]:
    """A task's space with a study's own parameters: new ones are added, named ones replaced, null takes one out."""
    merged = {**declared_space(task), **own}
    return {key: parameter for key, parameter in merged.items() if parameter is not None}
