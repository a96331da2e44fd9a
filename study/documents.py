"""Study files as data: safe YAML, dotted keys, and the line a key stands on.

Keys, and the values of keys that hold text, are kept as they were typed: a row named 1e-4, on or 007 is called that.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

Document = dict[str, Any]
Path_ = tuple[str | int, ...]

LARGEST = 200_000  # values in a study file, aliases written out
LARGEST_BYTES = 500_000  # 10,000 rows; the parser reads some 100 kB a second

_CORE = "tag:yaml.org,2002:"
MERGE = f"{_CORE}merge"  # the key `<<`
_PLAIN = {f"{_CORE}{name}" for name in ("null", "bool", "int", "float", "str", "map", "seq")}
_TYPED = {f"{_CORE}{name}" for name in ("bool", "int", "float")}  # what text may look like
# Punctuation alone, such as a separator: it is text, though `|` opens a block in YAML and `,` means nothing.
_MARKS = re.compile(r"[^\w\s'\"~\[\]{}]+")


class StudyError(ValueError):
    """A study cannot be run as declared; holds every problem found, each one line."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


class KeysError(StudyError):
    """Dotted keys that contradict each other; `found`: key → what is wrong with it."""

    def __init__(self, found: Mapping[str, str]) -> None:
        self.found = dict(found)
        super().__init__(f"{key}: {message}" for key, message in found.items())


@dataclass(frozen=True)
class StudyFile:
    """A file as it was written.

    Attributes:
        document: its keys and values.
        lines: path of every key and list item → line it stands on, from 1.
    """

    path: Path
    document: Document
    lines: Mapping[Path_, int]


def read_document(path: Path, text_keys: Collection[str] = ()) -> StudyFile:
    """Read a study file.

    Args:
        path: of the file.
        text_keys: last words of the keys whose values are text, or lists of text, whatever they look like.

    Raises:
        StudyError: the file is missing, too large, not UTF-8, not YAML, asks for objects, or is no mapping of keys.
    """
    text = _decoded(path, _bytes_of(path))
    try:
        loader = _Loader(text, text_keys)
        root = loader.get_single_node()
        lines = _lines(root)  # before construction, which rewrites merged mappings
        data = None if root is None else loader.construct_document(root)
        too_large = _values(data, {}) > LARGEST
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise StudyError([f"{path}{_yaml_problem(error, text)}"]) from error
    if too_large:
        raise StudyError([f"{path}: too large: more than {LARGEST:,} values once its aliases are written out"])
    if not isinstance(data, dict):
        found = "an empty file" if data is None else "a list" if isinstance(data, list) else "plain text"
        raise StudyError([f"{path}: expected a mapping of keys such as study, seeds, rows at the top; found {found}"])
    return StudyFile(path, data, lines)


def _bytes_of(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_BYTES + 1)
    except OSError as error:
        raise StudyError([f"{path}: cannot be read ({error.strerror})"]) from error
    if len(data) > LARGEST_BYTES:
        raise StudyError([f"{path}: too large: more than {LARGEST_BYTES:,} bytes; is it a study file?"])
    return data


def _decoded(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise StudyError([f"{path}:{line}: not UTF-8 text; save the file as UTF-8"]) from error


def _yaml_problem(error: Exception, text: str) -> str:
    """`:LINE: what is wrong`, in the words of someone who writes study files."""
    mark = getattr(error, "problem_mark", None)
    line = mark.line + 1 if mark is not None else None
    said = getattr(error, "problem", None) or "not YAML"
    if isinstance(error, RecursionError):
        said = "nested too deeply"
    elif isinstance(error, yaml.reader.ReaderError):
        line, said = text.count("\n", 0, error.position) + 1, "a control character; a study file is plain text"
    elif "'\\t'" in said:
        said = "a tab; indent with spaces"
    elif "another document" in said:
        said = "a second document; a file declares one study"
    return f":{line}: {said}" if line is not None else f": {said}"


class _Loader(yaml.SafeLoader):
    """Safe loading of plain values alone; a key given twice is refused instead of keeping the last one."""

    # Dates are text here: no setting is one.
    yaml_implicit_resolvers = {  # noqa: RUF012 (as the parent declares it)
        first: [(tag, pattern) for tag, pattern in resolvers if tag != f"{_CORE}timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str, text_keys: Collection[str] = ()) -> None:
        super().__init__(text)
        self._text_keys = text_keys
        self._merged = 0

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if node.tag not in _PLAIN:
            tag = _shown_tag(node.tag)
            raise _refused(f"{tag} asks for an object; text, numbers, lists and mappings alone are read", node)
        try:
            return super().construct_object(node, deep=deep)
        except ValueError as error:  # a number of thousands of digits
            raise _refused("a number too long to be read", node) from error

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merge `<<`. What is given more than once is kept once, or merges of merges would grow without end."""
        super().flatten_mapping(node)
        self._merged += len(node.value)
        if self._merged > LARGEST:
            raise _refused("too large once its merges are written out", node)
        last = {key.value if isinstance(key, yaml.ScalarNode) else id(key): (key, value) for key, value in node.value}
        node.value = list(last.values())

    def mapping(self, node: yaml.MappingNode) -> Document:
        """A mapping from keys as they were typed."""
        self._refuse_repeats(node)
        self.flatten_mapping(node)
        return {key.value: self._value(key.value, value) for key, value in node.value}

    def _refuse_repeats(self, node: yaml.MappingNode) -> None:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            if key.tag == MERGE:
                continue
            if not isinstance(key, yaml.ScalarNode) or key.tag not in _PLAIN:
                raise _refused("a key must be plain text", key)
            if key.value in seen:
                raise _refused(f"key {key.value!r} is given twice, first in line {seen[key.value]}", key)
            seen[key.value] = key.start_mark.line + 1

    def _value(self, key: str, node: yaml.Node) -> Any:
        return self.as_text(node) if key.rsplit(".", 1)[-1] in self._text_keys else self.construct_object(node, True)

    def as_text(self, node: yaml.Node) -> Any:
        """Text as it was typed, where YAML would see a number or a switch; lists of such too."""
        if isinstance(node, yaml.ScalarNode) and node.tag in _TYPED:
            return node.value
        if isinstance(node, yaml.SequenceNode) and node.tag in _PLAIN:
            return [self.as_text(item) for item in node.value]
        return self.construct_object(node, True)


_Loader.add_constructor(f"{_CORE}map", _Loader.mapping)


def _refused(problem: str, node: yaml.Node) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def _shown_tag(tag: str) -> str:
    return f"!!{tag.removeprefix(_CORE)}" if tag.startswith(_CORE) else tag


def _values(data: Any, known: dict[int, int]) -> int:
    """Number of values, counting what an alias repeats as often as it stands there, without writing it out."""
    if not isinstance(data, dict | list):
        return 1
    if id(data) not in known:
        known[id(data)] = 1 + sum(_values(v, known) for v in (data.values() if isinstance(data, dict) else data))
    return known[id(data)]


def _lines(root: yaml.Node | None) -> dict[Path_, int]:
    """In the order of the file, so that what an alias repeats keeps the line on which it was written."""
    lines: dict[Path_, int] = {}
    pending: list[tuple[Path_, yaml.Node]] = [((), root)] if root is not None else []
    visited: set[int] = set()
    while pending:
        at, node = pending.pop()
        if id(node) in visited:
            continue
        visited.add(id(node))
        children = _children(node)
        lines |= {(*at, name): mark.start_mark.line + 1 for name, mark, _ in children}
        pending += [((*at, name), value) for name, _, value in reversed(children)]
    return lines


def _children(node: yaml.Node) -> list[tuple[str | int, yaml.Node, yaml.Node]]:
    """(key or position, node that marks its line, value)."""
    if isinstance(node, yaml.MappingNode):
        return [(key.value, key, value) for key, value in node.value if isinstance(key, yaml.ScalarNode)]
    if isinstance(node, yaml.SequenceNode):
        return [(i, value, value) for i, value in enumerate(node.value)]
    return []


def parse_override(text: str, text_keys: Collection[str] = ()) -> tuple[str, Any]:
    """`KEY=VALUE` → key and value; the value is read as YAML (so `[0,1]`, `true`, `null`, 3e-6).

    Raises:
        StudyError: no `=`, an empty part of the key, or a value that is not YAML.
    """
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not all(key.split(".")):
        raise StudyError([f"-o {text}: expected KEY=VALUE, such as strategy.depth=6"])
    try:
        text_wanted = key.rsplit(".", 1)[-1] in text_keys
        if text_wanted and _MARKS.fullmatch(value):
            return key, value
        loader = _Loader(value, text_keys)
        node = loader.get_single_node()
        if node is None:
            return key, None
        return key, loader.as_text(node) if text_wanted else loader.construct_document(node)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = _yaml_problem(error, value).rsplit(": ", 1)[-1]
        raise StudyError([f"-o {text}: the value cannot be read as YAML: {reason}"]) from error


def apply(document: Mapping[str, Any], overrides: Mapping[str, Any]) -> Document:
    """A copy of the document with overrides applied: keys are dotted paths or nested mappings.

    Raises:
        KeysError: a path goes through something that is not a mapping, or is given twice.
    """
    result: Document = _copy(document)
    problems = {}
    for key, value in flatten(overrides).items():
        target = result
        *parents, last = key.split(".")
        for depth, parent in enumerate(parents):
            child = target.setdefault(parent, {})
            if not isinstance(child, dict):
                problems[key] = f"{'.'.join(parents[: depth + 1])} is not a group of keys"
                break
            target = child
        else:
            nothing = value == {} and isinstance(target.get(last), dict) and key not in _MAPPING_VALUES
            if not nothing:  # an empty group changes none of its keys
                target[last] = value
    if problems:
        raise KeysError(problems)
    return result


# Values that are mappings themselves: a row or profile replaces them whole.
_MAPPING_VALUES = frozenset({"weighting.boosts", "rows", "search.parameters", "search.parts"})


def flatten(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Nested or dotted overrides as one flat mapping of dotted paths.

    Raises:
        KeysError: a path is given twice, dotted and nested, so that one of its values would be lost.
    """
    flat: dict[str, Any] = {}
    problems: dict[str, str] = {}
    for path, value in _leaves(overrides, ""):
        if path in flat:
            problems[path] = "given twice, dotted and nested; remove one of them"
        flat[path] = value
    groups = {path[:end]: path for path in flat for end in _dots(path)}
    for parent in flat.keys() & groups.keys():
        problems[parent] = f"given twice, as a value and as a group with {groups[parent]}; remove one of them"
    if problems:
        raise KeysError(problems)
    return flat


def _dots(path: str) -> Iterable[int]:
    return (i for i, character in enumerate(path) if character == ".")


def _leaves(overrides: Mapping[str, Any], prefix: str) -> Iterable[tuple[str, Any]]:
    for key, value in overrides.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and value and path not in _MAPPING_VALUES:
            yield from _leaves(value, f"{path}.")
        else:
            yield path, value


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _copy(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_copy(v) for v in value]
    return value
