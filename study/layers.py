"""Which value of a key wins: shipped profile ← study file ← its profile ← --smoke ← command line, later ones winning.

Every key remembers where its value came from, so that a problem names the line or the option that has to be mended.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from study.documents import Document, KeysError, Path_, StudyFile, apply, flatten, read_document
from study.problems import Origin, Places, Problems, near
from trainables.data.registry import DATASETS
from trainables.settings import Settings

PROFILES = Path(__file__).parent / "profiles.yaml"


@dataclass(frozen=True)
class Choices:
    """What the command line says beside the file.

    Attributes:
        overrides: key → value, dotted or nested.
        data_roots: data set → folder; the empty name stands for the study's only data set.
        typed: key of `overrides` → the option as it was typed; default: `-o KEY`.
    """

    overrides: Mapping[str, Any] = field(default_factory=dict)
    dataset: str | None = None
    data_roots: Mapping[str, str] = field(default_factory=dict)
    smoke: bool = False
    typed: Mapping[str, str] = field(default_factory=dict)

    def option(self, key: str) -> str:
        """How an override was given."""
        return self.typed.get(key, f"-o {key}")

    def flat(self) -> dict[str, Any]:
        """All overrides by dotted path; of one that is given twice the last, `check_options` having said so."""
        try:
            return flatten(self.overrides)
        except KeysError:
            return {k: v for key, value in self.overrides.items() for k, v in flatten({key: value}).items()}


@cache
def shipped_profiles() -> StudyFile:
    """Data set → settings that every study on it starts from."""
    return read_document(PROFILES)


# -- data sets -------------------------------------------------------------------------------------------------------


def dataset_names(file: StudyFile, choices: Choices, problems: Problems) -> tuple[str, ...]:
    """Data sets of the study: --dataset, else -o dataset.name, else `datasets`, else `dataset.name`."""
    named = _named_datasets(file.document, choices)
    for name, (place, at) in named.items():
        if name not in DATASETS:
            where = place or problems.places.of(at)
            known = ", ".join(DATASETS)
            problems.add_lines([f"{where}: unknown data set {name!r}{near(name, DATASETS)}; expected one of {known}"])
    return tuple(named)


def _named_datasets(document: Document, choices: Choices) -> dict[str, tuple[str, Path_]]:
    """Name → the option that names it, or the key in the file."""
    if choices.dataset is not None:
        return {choices.dataset: (f"--dataset {choices.dataset}", ())}
    told = choices.flat()
    if told.get("dataset.name") is not None:
        name = str(told["dataset.name"])
        return {name: (choices.option("dataset.name"), ())}
    several = told.get("datasets", document.get("datasets"))
    if isinstance(several, list | tuple) and several:
        option = choices.option("datasets") if "datasets" in told else ""
        return {str(name): (option, ("datasets", i)) for i, name in enumerate(several)}
    group = document.get("dataset")
    nested = group.get("name") if isinstance(group, dict) else None
    alone = document.get("dataset.name", nested)
    return {"phantom" if alone is None else str(alone): ("", ("dataset", "name"))}


def check_options(file: StudyFile, names: tuple[str, ...], choices: Choices, problems: Problems) -> None:
    """Options that contradict each other or the study."""
    try:
        told = flatten(choices.overrides)
    except KeysError as error:
        told = choices.flat()
        problems.add_lines(f"{choices.option(key)}: {key} is {message}" for key, message in error.found.items())
    if choices.dataset is not None:
        for key in ("dataset.name", "datasets"):
            if key in told:
                problems.add_lines([f"--dataset {choices.dataset} and {choices.option(key)}: give one of them"])
    if choices.smoke and not file.document.get("smoke"):
        problems.add_lines(
            [f"--smoke: {file.path.name} has no `smoke` keys that say what its smallest run is; add them, or leave it"]
        )
    others = _tested_on(file, names, choices)
    for name, folder in choices.data_roots.items():
        if problem := _root_problem(name, names, others):
            problems.add_lines([f"--data-root {f'{name}=' if name else ''}{folder}: {problem}"])


def _tested_on(file: StudyFile, names: tuple[str, ...], choices: Choices) -> tuple[str, ...]:
    """The data sets that the study tests on besides."""
    plain = replace(choices, data_roots={})
    documents = [complete(file, name, plain, alone=len(names) == 1).document for name in names]
    return tuple(str(other["name"]) for document in documents if "name" in (other := _test_on(document)))


def _test_on(document: Mapping[str, Any]) -> Document:
    return _mapping(_mapping(document, "dataset"), "test_on")


def _root_problem(name: str, names: tuple[str, ...], others: tuple[str, ...]) -> str:
    of = name or (names[0] if len(names) == 1 else "")
    if not of:
        return f"the study has several data sets; say which: --data-root NAME=DIR with one of {', '.join(names)}"
    known = tuple(dict.fromkeys((*names, *others)))
    if of not in known:
        return f"the study has no data set {of!r}{near(of, known)}; it has {', '.join(known)}"
    if of in DATASETS and DATASETS[of].synthetic:
        return f"{of} is drawn, not read from a folder; name the data set with --dataset"
    return ""


# -- layers ----------------------------------------------------------------------------------------------------------


class Layers:
    """A document that later layers add to, with the origin of every key that is not the file's own."""

    def __init__(self, file: StudyFile) -> None:
        self._file = file
        self.document: Document = {}
        self._origins: dict[Path_, Origin] = {}
        self._problems: list[tuple[Places, str, str]] = []

    @property
    def places(self) -> Places:
        """Where the keys come from."""
        return Places(self._file.path.name, self._file.lines, self._origins)

    def add(self, values: Mapping[str, Any], origin: Callable[[str], Origin] | None = None) -> None:
        """Put values over what is there; without an origin they are the file's own."""
        there = Places(self._file.path.name, self._file.lines)
        try:
            flat = flatten(values)
            self.document = apply(self.document, flat)
        except KeysError as error:
            for key, message in error.found.items():
                if origin is not None:
                    there = Places(self._file.path.name, {}, {tuple(key.split(".")): origin(key)})
                self._problems.append((there, key, message))
            flat = self._add_one_by_one(values)
        for key in flat:
            path = tuple(key.split("."))
            self._origins = {p: o for p, o in self._origins.items() if p[: len(path)] != path}
            if origin is not None:
                self._origins[path] = origin(key)

    def _add_one_by_one(self, values: Mapping[str, Any]) -> Document:
        """Put over what can be, so that what else is wrong is found in the same look."""
        added: Document = {}
        for key, value in values.items():
            try:
                self.document = apply(self.document, {key: value})
                added |= flatten({key: value})
            except KeysError:  # reported by the caller
                continue
        return added

    def report(self, problems: Problems) -> None:
        """Add what kept layers from being put over the others."""
        problems.add_lines(f"{places.of(tuple(key.split('.')))}: {message}" for places, key, message in self._problems)


def complete(file: StudyFile, dataset: str, choices: Choices, *, alone: bool) -> Layers:
    """A study's document for one data set, with everything that it inherits and is told.

    Args:
        alone: the study has no other data set, so that a folder without a name is this one's.
    """
    layers = Layers(file)
    layers.add(_mapping(shipped_profiles().document, dataset), _line_of(shipped_profiles(), (dataset,)))
    own = {key: value for key, value in file.document.items() if key.split(".")[0] in Settings.model_fields}
    layers.add(own)
    rest = {key: value for key, value in file.document.items() if key not in own}
    layers.document |= rest  # names of rows and parts may hold dots
    layers.add(_mapping(_mapping(file.document, "profiles"), dataset), _line_of(file, ("profiles", dataset)))
    if choices.smoke:
        layers.add(_mapping(file.document, "smoke"), _line_of(file, ("smoke",)))
    for key, value in choices.overrides.items():
        layers.add({key: value}, _option(choices.option(key)))
    layers.document = apply(layers.document, {"dataset.name": dataset})
    root = choices.data_roots.get(dataset, choices.data_roots.get("") if alone else None)
    if root is not None:
        layers.add({"dataset.root": root}, _option(f"--data-root {root}"))
    other = str(_test_on(layers.document).get("name", dataset))
    if other != dataset and (root := choices.data_roots.get(other)) is not None:
        layers.add({"dataset.test_on.root": root}, _option(f"--data-root {other}={root}"))
    return layers


def check_spare_layers(file: StudyFile, names: tuple[str, ...], choices: Choices, problems: Problems) -> None:
    """Profiles and smoke settings are judged whether this launch uses them or not."""
    groups = tuple(Settings.model_fields)
    settable = (*groups, "rows")  # the same rows may need other settings on another data set
    for dataset, profile in _mapping(file.document, "profiles").items():
        if dataset not in DATASETS:
            problems.add(("profiles", dataset), f"unknown data set{near(dataset, DATASETS)}")
        _refuse_keys(("profiles", dataset), profile, problems, lambda key: key.split(".")[0] in settable, settable)
        if dataset in DATASETS and dataset not in names:
            spare = complete(file, dataset, replace(choices, smoke=False), alone=False)
            spare.report(problems)
            inherited = {k: v for k, v in spare.document.items() if k in groups}
            judged = Problems(spare.places)
            judged.validate(Settings, inherited)
            problems.add_lines(judged.found)
    _refuse_keys(("smoke",), file.document.get("smoke"), problems, lambda key: key not in _NOT_SMOKE, ())


_NOT_SMOKE = ("study", "datasets", "profiles", "smoke")


def _refuse_keys(
    at: Path_, values: object, problems: Problems, allowed: Callable[[str], bool], expected: tuple[str, ...]
) -> None:
    """Keys that would be ignored, or would change what the study is."""
    if not isinstance(values, dict):
        return
    try:
        keys = list(flatten(values))
    except KeysError as error:
        for key, message in error.found.items():
            problems.add((*at, key), message)
        return
    for key in keys:
        if key == "dataset.name" or not allowed(key):
            only = f"; only keys of {', '.join(expected)} can" if expected else ""
            problems.add((*at, key), f"cannot be set here{only}")


def _mapping(document: Mapping[str, Any], key: str) -> Document:
    """What a key holds if it is a mapping; what is none is found by validation."""
    value = document.get(key)
    return value if isinstance(value, dict) else {}


def _line_of(file: StudyFile, group: Path_) -> Callable[[str], Origin]:
    """Origins in a group of a file."""
    places = Places(file.path.name, file.lines)

    def origin(key: str) -> Origin:
        return Origin(places.in_file((*group, *key.split("."))), ".".join(map(str, (*group, key))))

    return origin


def _option(typed: str) -> Callable[[str], Origin]:
    """Origins in an option, which may set a whole group."""

    def origin(key: str) -> Origin:
        says_it = not typed.startswith("-o ") or typed == f"-o {key}" or typed.startswith(f"-o {key}=")
        return Origin(typed, "" if says_it else key, option=True)

    return origin
