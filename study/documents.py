"""Study files as data: safe YAML, dotted overrides, and the line a key stands on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

Document = dict[str, Any]
Path_ = tuple[str | int, ...]


MERGE = "tag:yaml.org,2002:merge"  # the key `<<`
LARGEST = 200_000  # values in a study file, aliases written out


class StudyError(ValueError):
    """A study cannot be run as declared; holds every problem found, each one line."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


class _Loader(yaml.SafeLoader):
    """Safe loading that refuses a key given twice instead of keeping the last one."""


def _mapping_without_duplicates(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        if key_node.tag == MERGE:
            continue
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str | int | float | bool | None):
            raise yaml.constructor.ConstructorError(None, None, "a key must be plain text", key_node.start_mark)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
        seen.add(key)
    return dict(yaml.SafeLoader.construct_mapping(loader, node, deep=True))


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_duplicates)


def read_document(path: Path) -> Document:
    """Read a study file.

    Raises:
        StudyError: the file is missing, is not UTF-8, is not YAML, asks for objects, or is no mapping.
    """
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise StudyError([f"{path}: cannot be read ({error.strerror})"]) from error
    except UnicodeDecodeError as error:
        raise StudyError([f"{path}: not UTF-8 text"]) from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise StudyError([f"{path}: {_yaml_problem(error)}"]) from error
    if _values(data, {}) > LARGEST:
        raise StudyError([f"{path}: too large: more than {LARGEST:,} values once its aliases are written out"])
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise StudyError([f"{path}: expected a mapping of keys such as study, seeds, rows at the top"])
    return data


def _yaml_problem(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f"line {mark.line + 1}: " if mark is not None else ""
    return f"{where}{getattr(error, 'problem', None) or 'not valid YAML'}"


def _values(data: Any, known: dict[int, int]) -> int:
    """Number of values, counting what an alias repeats as often as it stands there, without writing it out."""
    if not isinstance(data, dict | list):
        return 1
    if id(data) not in known:
        known[id(data)] = 1 + sum(_values(v, known) for v in (data.values() if isinstance(data, dict) else data))
    return known[id(data)]


def key_lines(path: Path) -> dict[Path_, int]:
    """Line (from 1) of every key and list item of a YAML file; empty where it cannot be parsed."""
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    lines: dict[Path_, int] = {}
    pending: list[tuple[Path_, yaml.Node]] = [((), root)] if root is not None else []
    visited: set[int] = set()
    while pending:
        at, node = pending.pop()
        if id(node) in visited:
            continue
        visited.add(id(node))
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    continue
                lines[(*at, key.value)] = key.start_mark.line + 1
                pending.append(((*at, key.value), value))
        elif isinstance(node, yaml.SequenceNode):
            for i, value in enumerate(node.value):
                lines[(*at, i)] = value.start_mark.line + 1
                pending.append(((*at, i), value))
    return lines


def parse_override(text: str) -> tuple[str, Any]:
    """`KEY=VALUE` → key and value; the value is read as YAML (so `[0,1]`, `true`, `null`, 3e-6).

    Raises:
        StudyError: no `=`, an empty key, or a value that is not YAML.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise StudyError([f"-o {text}: expected KEY=VALUE, such as strategy.depth=6"])
    try:
        return key.strip(), number(yaml.load(value, _Loader))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise StudyError([f"-o {text}: the value is not YAML"]) from error


def number(value: Any) -> Any:
    """YAML 1.1 reads 1e-4 (no dot) as text; people write it as a number, so it is one here."""
    if isinstance(value, str):
        try:
            return float(value) if "e" in value.lower() and value[:1] in "+-.0123456789" else value
        except ValueError:
            return value
    if isinstance(value, list):
        return [number(v) for v in value]
    if isinstance(value, dict):
        return {k: number(v) for k, v in value.items()}
    return value


def apply(document: Mapping[str, Any], overrides: Mapping[str, Any]) -> Document:
    """A copy of the document with overrides applied: keys are dotted paths or nested mappings.

    Raises:
        StudyError: a path goes through something that is not a mapping.
    """
    result: Document = _copy(document)
    problems = []
    for key, value in flatten(overrides).items():
        target = result
        *parents, last = key.split(".")
        for depth, parent in enumerate(parents):
            child = target.setdefault(parent, {})
            if not isinstance(child, dict):
                problems.append(f"{key}: {'.'.join(parents[: depth + 1])} is not a group of keys")
                break
            target = child
        else:
            target[last] = value
    if problems:
        raise StudyError(problems)
    return result


# Values that are mappings themselves: a row or profile replaces them whole.
_MAPPING_VALUES = frozenset({"weighting.boosts", "rows"})


def flatten(overrides: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested or dotted overrides as one flat mapping of dotted paths."""
    flat: dict[str, Any] = {}
    for key, value in overrides.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and value and path not in _MAPPING_VALUES:
            flat |= flatten(value, f"{path}.")
        else:
            flat[path] = value
    return flat


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _copy(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_copy(v) for v in value]
    return value
