"""What is wrong with a study, in the words of who wrote it: each problem with its place, its key, and the remedy."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from study.documents import Document, Path_, StudyError

_Model = TypeVar("_Model", bound=BaseModel)


@dataclass(frozen=True)
class Origin:
    """Where a key got its value.

    Attributes:
        place: file and line, or the option as it was typed.
        key: the key as it is written there; empty where the place says it.
        option: given on the command line.
    """

    place: str
    key: str = ""
    option: bool = False


class Places:
    """Where each key of a completed study comes from: a line of its file, of a profile, or an option."""

    def __init__(self, file: str, lines: Mapping[Path_, int], origins: Mapping[Path_, Origin] | None = None) -> None:
        """Keys that `origins` does not name are the file's own."""
        self._file = file
        self._lines = lines
        self._origins = dict(origins or {})

    def of(self, at: Path_) -> str:
        """`PLACE: KEY`, or `PLACE` alone where that says everything."""
        dotted = ".".join(map(str, at))
        found = self._origin(at)
        if found is None:
            return f"{self.in_file(at)}: {dotted}" if dotted else self._file
        origin, depth = found
        if depth == len(at) or not at:
            return f"{origin.place}: {origin.key}" if origin.key else origin.place
        if origin.key:
            return f"{origin.place}: {'.'.join(map(str, (origin.key, *at[depth:])))}"
        return f"{origin.place}: {dotted}"

    def in_file(self, at: Path_) -> str:
        """`FILE:LINE` of a key path, or of what holds it."""
        line = self._line(at)
        return f"{self._file}:{line}" if line else self._file

    def _origin(self, at: Path_) -> tuple[Origin, int] | None:
        """The origin of the key, of the group it is in, or of an option that set something in it."""
        for end in range(len(at), 0, -1):
            if at[:end] in self._origins:
                return self._origins[at[:end]], end
        below = [o for path, o in self._origins.items() if at and path[: len(at)] == at and o.option]
        return (below[-1], len(at)) if below else None

    def _line(self, at: Path_) -> int | None:
        """Line of the longest part of a path that the file itself holds, its last keys joined by dots or not."""
        for end in range(len(at), 0, -1):
            for start in range(end - 1, -1, -1):
                joined = (*at[:start], ".".join(map(str, at[start:end])))
                if (line := self._lines.get(at[:end] if start == end - 1 else joined)) is not None:
                    return line
        return None


class Problems:
    """Collects everything wrong with a study, so that one look mends it all."""

    def __init__(self, places: Places) -> None:
        self.places = places
        self.found: list[str] = []

    def add(self, at: Path_, message: str) -> None:
        """A problem at a key path."""
        self.add_lines([f"{self.places.of(at)}: {message}"])

    def add_lines(self, lines: Iterable[str]) -> None:
        """Problems that say where they are themselves."""
        self.found += [line for line in lines if line not in self.found]

    def validate(
        self, model: type[_Model], data: Document, at: Path_ = (), inherited: Collection[str] = ()
    ) -> _Model | None:
        """The validated model, or None with its errors added; those of `inherited` keys are said elsewhere."""
        try:
            return model.model_validate(data)
        except ValidationError as error:
            for path, message in describe(model, error):
                if ".".join(map(str, path[:2])) not in inherited:
                    self.add((*at, *path), message)
            return None

    def raise_if_any(self) -> None:
        """Raise StudyError with all problems."""
        if self.found:
            raise StudyError(self.found)


def near(word: str, known: Iterable[str], prefix: str = "") -> str:
    """`; did you mean X?`, or nothing if no known word is near."""
    lower = {name.lower(): name for name in known}
    found = get_close_matches(word.lower(), lower, n=1, cutoff=0.65)
    return f"; did you mean {prefix}{lower[found[0]]}?" if found else ""


def describe(model: type[BaseModel], error: ValidationError) -> Iterator[tuple[Path_, str]]:
    """(path, what was expected and found) of each problem; the branches of a union make one problem together."""
    merged: dict[Path_, list[Any]] = {}
    for problem in error.errors(include_url=False):
        path, annotation = _field(model, problem["loc"])
        merged.setdefault(path, []).append((problem, annotation))
    for path, problems in merged.items():
        # Of a list whose items are wrong pydantic says that it is too short as well.
        below = any(len(other) > len(path) and other[: len(path)] == path for other in merged)
        if not (below and problems[0][0]["type"] == "too_short"):
            yield path, _message(model, path, problems)


def _message(model: type[BaseModel], path: Path_, problems: Sequence[tuple[Any, Any]]) -> str:
    first = problems[0][0]
    if first["type"] == "extra_forbidden":
        return f"unknown key{_suggestion(model, path)}"
    if first["type"] == "value_error":
        return str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "missing":
        return "missing; it has to be given"
    wanted = dict.fromkeys(_expected(problem, annotation) for problem, annotation in problems)
    return f"expected {' or '.join(wanted)}; found {shown(first['input'])}"


def _expected(problem: Any, annotation: Any) -> str:
    """What would have been right, after pydantic's kind of error."""
    kind, context = str(problem["type"]), problem.get("ctx", {})
    if kind in ("model_type", "model_attributes_type") or (kind == "dict_type" and _is_model(annotation)):
        return f"a group of keys ({', '.join(annotation.model_fields)})" if _is_model(annotation) else "a group of keys"
    if kind in _BOUNDS:
        return _BOUNDS[kind].format(**context)
    for beginning, said in _KINDS.items():
        if kind.startswith(beginning):
            return said
    return str(problem["msg"])


_BOUNDS = {
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "less than {lt:g}",
    "less_than_equal": "at most {le:g}",
    "literal_error": "{expected}",
    "too_short": "at least {min_length} item(s)",
    "too_long": "at most {max_length} item(s)",
    "string_too_short": "text of at least {min_length} characters",
    "string_too_long": "text of at most {max_length} characters",
}
_KINDS = {  # beginnings of pydantic's kinds
    "finite": "a finite number",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string_pattern": "letters, digits, '.', '_' and '-', at most 61 of them, no blanks",
    "string": "text",
    "tuple": "a list",
    "list": "a list",
    "dict": "a mapping of keys",
    "invalid_key": "a key of plain text",
}


def shown(value: Any) -> str:
    """A value as a message shows it: short, on one line, and whatever it is."""
    if value is None:
        return "nothing"
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write out whole numbers of thousands of digits
        return "a number too long to show"
    return text if len(text) <= 80 else f"{text[:80]}…"


# -- keys and models -------------------------------------------------------------------------------------------------


def text_keys(*models: type[BaseModel]) -> frozenset[str]:
    """Names of all fields that hold text or lists of text, in the models and the groups within them."""
    found: set[str] = set()
    for model in models:
        for name, field in model.model_fields.items():
            kinds = set(_leaves(field.annotation))
            found |= text_keys(*(kind for kind in kinds if _is_model(kind)))
            if kinds - {type(None), Ellipsis} == {str}:
                found.add(name)
    return frozenset(found)


def _leaves(annotation: Any) -> Iterator[Any]:
    """The types that an annotation is made of; what a mapping maps is not looked at."""
    if get_origin(annotation) is Annotated:
        yield from _leaves(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, UnionType, tuple, list):
        for inner in get_args(annotation):
            yield from _leaves(inner)
    else:
        yield annotation


def _field(model: type[BaseModel], location: Sequence[str | int]) -> tuple[Path_, Any]:
    """The part of pydantic's location that is a path of keys, without the names of a union's branches."""
    annotation: Any = model
    for i, part in enumerate(location):
        inner = _inside(annotation, part)
        if inner is None:
            return tuple(location[:i]), annotation
        annotation = inner
    return tuple(location), _bare(annotation)


def _inside(annotation: Any, part: str | int) -> Any:
    """What lies under a key or position of a type; None if there is nothing under it."""
    bare = _bare(annotation)
    if _is_model(bare):
        field = bare.model_fields.get(part)
        return Any if field is None else field.annotation
    origin, arguments = get_origin(bare), get_args(bare)
    if origin in (tuple, list) and isinstance(part, int):
        return arguments[part] if part < len(arguments) and arguments[part] is not Ellipsis else arguments[0]
    if origin is dict and part != "[key]":
        return arguments[1]
    return None


def _bare(annotation: Any) -> Any:
    """The type without what is annotated, and without `| None`."""
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in (Union, UnionType):
        branches = [branch for branch in get_args(annotation) if branch is not type(None)]
        if len(branches) == 1:
            return _bare(branches[0])
    return annotation


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _suggestion(model: type[BaseModel], path: Path_) -> str:
    """The nearest key of the same group, or the group in which a key of this name is."""
    *above, word = map(str, path)
    group = _bare(_field(model, path[:-1])[1]) if above else model
    if not _is_model(group):
        return ""
    prefix = ".".join([*above, ""]) if all(isinstance(part, str) for part in path) else ""
    if suggestion := near(word, group.model_fields, prefix):
        return suggestion
    homes = [
        f"{name}.{word}"
        for name, field in model.model_fields.items()
        if _is_model(_bare(field.annotation)) and word in _bare(field.annotation).model_fields
    ]
    if homes:
        return f"; did you mean {' or '.join(homes)}?"
    return f"; expected one of {', '.join(group.model_fields)}"
