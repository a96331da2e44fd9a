"""A study as declared: study file → frozen, validated specification → cells. Imports no torch, ray or mlflow."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError, field_validator

from study.documents import Document, Path_, StudyError, apply, flatten, key_lines, number, read_document
from study.rows import Name, RowDraft, RowsDocument, expand
from trainables.data.registry import DATASETS
from trainables.settings import Frozen, Settings

SHIPPED = Path(__file__).parent / "studies"
PROFILES = Path(__file__).parent / "profiles.yaml"
_Model = TypeVar("_Model", bound=BaseModel)


class Execution(Frozen):
    """How trials are run; the number of threads, the device and the precision are part of every stage's key."""

    cpus: Annotated[float, Field(gt=0)] = Field(1, description="CPUs a trial; it computes with that many threads")
    gpus: Annotated[float, Field(ge=0)] | None = Field(None, description="GPUs a trial, fractions too; default 1 or 0")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where this machine has a GPU")
    max_failures: int = Field(2, ge=0, description="times a trial whose worker died is started again")
    token_cache: Literal["auto", "always", "never"] = Field(
        "auto", description="caches of token activations: auto where measured reading beats recomputing"
    )
    cache_dtype: Literal["float32", "float16"] = Field("float32", description="float16: a labelled tolerance mode")
    allow_mixed: bool = Field(False, description="go on from states of other hardware or library versions")
    cache_disk_share: Annotated[float, Field(gt=0, le=0.25)] = Field(0.25, description="of the free disk")


class Report(Frozen):
    """What the tables show."""

    compare: Literal["previous", "first", "none"] = Field("previous", description="reference row of the paired Δ")
    per_class: bool = False
    published: str | None = Field(None, description="file of analysis/published to set beside ours")
    notes: tuple[str, ...] = ()


class StudyDocument(Settings):
    """A study file. The settings at its top are the baseline that every row starts from."""

    study: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,60}$")] = Field(
        ..., description="name: folder of its report and experiment of its ledger"
    )
    title: Name
    description: str = ""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**63)], ...], Field(min_length=1)] = (0, 1, 2)
    datasets: tuple[str, ...] | None = Field(None, description="several data sets; default: dataset.name alone")
    rows: RowsDocument
    profiles: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="data set → settings of this study on it, by dotted key; they win over it"
    )
    smoke: dict[str, Any] = Field(default_factory=dict, description="settings of --smoke, by dotted key")
    execution: Execution = Execution()
    report: Report = Report()

    @field_validator("seeds")
    @classmethod
    def _seeds_differ(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        twice = sorted({seed for seed in seeds if seeds.count(seed) > 1})
        if twice:
            raise ValueError(f"{', '.join(map(str, twice))} given twice")
        return seeds


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        changes: dotted key → value, against the study's baseline.
        marks: part → whether it is on.
        settings: data set → complete settings of the row's cells.
    """

    name: str
    index: int
    changes: dict[str, Any]
    marks: dict[str, bool]
    settings: dict[str, Settings]


@dataclass(frozen=True)
class Cell:
    """Row × seed × data set."""

    row: Row
    seed: int
    dataset: str

    @property
    def settings(self) -> Settings:
        """Complete settings of the cell, its seed apart."""
        return self.row.settings[self.dataset]

    def __str__(self) -> str:
        return f"{self.row.name} · {self.dataset} · seed {self.seed}"


@dataclass(frozen=True)
class Study:
    """A validated study, ready to be planned."""

    name: str
    title: str
    description: str
    seeds: tuple[int, ...]
    datasets: tuple[str, ...]
    rows: tuple[Row, ...]
    execution: Execution
    report: Report
    smoke: bool

    @property
    def parts(self) -> tuple[str, ...]:
        """Columns of marks."""
        return tuple(self.rows[0].marks) if self.rows else ()

    def cells(self) -> tuple[Cell, ...]:
        """Every cell, row by row."""
        return tuple(Cell(r, s, d) for d in self.datasets for r in self.rows for s in self.seeds)

    def comparisons(self) -> tuple[tuple[str, str], ...]:
        """(row, reference) pairs of the paired differences."""
        names = [row.name for row in self.rows]
        if self.report.compare == "previous":
            return tuple(zip(names[1:], names[:-1], strict=True))
        if self.report.compare == "first":
            return tuple((name, names[0]) for name in names[1:])
        return ()


@dataclass(frozen=True)
class Choices:
    """What the command line says beside the file."""

    overrides: Mapping[str, Any] = field(default_factory=dict)
    dataset: str | None = None
    data_roots: Mapping[str, str] = field(default_factory=dict)
    smoke: bool = False


def shipped_studies() -> dict[str, Path]:
    """Name → file of the studies that come with the project."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}


@cache
def shipped_profiles() -> Document:
    """Data set → settings that every study on it starts from."""
    return read_document(PROFILES)


def find_study(name: str) -> Path:
    """File of a shipped study by name, or the file itself.

    Raises:
        StudyError: neither a shipped study nor a file.
    """
    shipped = shipped_studies()
    if name in shipped:
        return shipped[name]
    path = Path(name)
    if path.is_file():
        return path
    raise StudyError([f"{name}: no such study or file; shipped studies: {', '.join(shipped)}"])


def load_study(path: Path, choices: Choices | None = None) -> Study:
    """Read, complete and validate a study.

    Raises:
        StudyError: with every problem, each with file, line or key, and what was expected.
    """
    choices = choices or Choices()
    problems = _Problems(path)
    document: Document = number(read_document(path))
    names = _dataset_names(document, choices)
    _check_dataset_names(names, problems)
    documents: dict[str, StudyDocument] = {}
    for name in names:
        try:
            completed = _complete(document, name, choices, alone=len(names) == 1)
        except StudyError as error:
            problems.add_lines(error.problems)
            continue
        validated = problems.validate(StudyDocument, completed)
        if validated is not None:
            documents[name] = validated
        else:
            _check_rows_alone(completed, problems)
    problems.raise_if_any()
    study = _assemble(documents, problems, choices.smoke)
    problems.raise_if_any()
    return study


def _dataset_names(document: Document, choices: Choices) -> tuple[str, ...]:
    """Data sets of the study: --dataset, else -o dataset.name, else `datasets`, else `dataset.name`."""
    override = flatten(choices.overrides).get("dataset.name")
    chosen = choices.dataset or override
    if chosen is not None:
        return (str(chosen),)
    several = flatten(choices.overrides).get("datasets", document.get("datasets"))
    if isinstance(several, list | tuple) and several:
        return tuple(dict.fromkeys(map(str, several)))
    group = document.get("dataset")
    return (str(group.get("name", "phantom")) if isinstance(group, dict) else "phantom",)


def _check_dataset_names(names: Iterable[str], problems: _Problems) -> None:
    for name in names:
        if name not in DATASETS:
            problems.add(("dataset", "name"), f"unknown data set {name!r}; expected one of {', '.join(DATASETS)}")


def _complete(document: Document, dataset: str, choices: Choices, *, alone: bool) -> Document:
    """Shipped profile of the data set ← the file ← its own profile ← --smoke ← command line, later ones winning."""
    own = {key: value for key, value in document.items() if key.split(".")[0] in Settings.model_fields}
    rest = {key: value for key, value in document.items() if key not in own}  # names of rows and parts may hold dots
    completed = rest | apply(apply({}, shipped_profiles().get(dataset, {})), own)
    profiles = document.get("profiles")
    if isinstance(profiles, dict) and isinstance(profiles.get(dataset), dict):
        completed = apply(completed, profiles[dataset])
    if choices.smoke and isinstance(document.get("smoke"), dict):
        completed = apply(completed, document["smoke"])
    roots = choices.data_roots
    named: dict[str, Any] = {"dataset.name": dataset}
    root = roots.get(dataset, roots.get("") if alone else None)
    if root is not None:
        named["dataset.root"] = root
    return apply(completed, {**choices.overrides, **named})


class _Problems:
    """Collects everything wrong with a study file, so that one look mends it all."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines = key_lines(path)
        self._found: list[str] = []

    def add(self, at: Path_, message: str) -> None:
        """A problem at a key path."""
        line = self._line(at)
        place = f"{self._path.name}:{line}" if line else self._path.name
        dotted = ".".join(str(p) for p in at)
        self.add_lines([f"{place}: {dotted}: {message}" if dotted else f"{place}: {message}"])

    def add_lines(self, lines: Iterable[str]) -> None:
        """Problems that say where they are themselves."""
        self._found += [line for line in lines if line not in self._found]

    def validate(self, model: type[_Model], data: Document, at: Path_ = ()) -> _Model | None:
        """The validated model, or None with its errors added."""
        try:
            return model.model_validate(data)
        except ValidationError as error:
            for problem in error.errors(include_url=False):
                self.add((*at, *problem["loc"]), _expectation(problem))
            return None

    def raise_if_any(self) -> None:
        """Raise StudyError with all problems."""
        if self._found:
            raise StudyError(self._found)

    def _line(self, at: Path_) -> int | None:
        """Line of the longest part of a path that the file itself holds, its last keys joined by dots or not."""
        for end in range(len(at), 0, -1):
            for start in range(end - 1, -1, -1):
                joined = (*at[:start], ".".join(map(str, at[start:end])))
                if (line := self._lines.get(at[:end] if start == end - 1 else joined)) is not None:
                    return line
        return None


def _expectation(problem: Any) -> str:
    """Pydantic's message with the value that was found, in the words of a study file."""
    kind, message = problem["type"], str(problem["msg"]).removeprefix("Value error, ")
    if kind == "extra_forbidden":
        return "unknown key"
    if kind in ("missing", "value_error"):
        return message
    return f"{message}; found {_shown(problem['input'])}"


def _shown(value: Any) -> str:
    """A value as a message shows it: short, and whatever it is."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write out whole numbers of thousands of digits
        return "a number too long to show"
    return text if len(text) <= 200 else f"{text[:200]}…"


def _assemble(documents: dict[str, StudyDocument], problems: _Problems, smoke: bool) -> Study:
    """Rows with complete settings for every data set; what is wrong with a row is added to the problems."""
    first = next(iter(documents.values()))
    drafts = expand(first.rows)
    for name in (name for name, times in Counter(d.name for d in drafts).items() if times > 1):
        problems.add(("rows",), f"row {name!r} is declared twice")
    settings: dict[str, dict[str, Settings]] = {draft.name: {} for draft in drafts}
    for dataset, document in documents.items():
        baseline = {name: value for name, value in document.model_dump().items() if name in Settings.model_fields}
        for draft in drafts:
            completed = _row_settings(baseline, draft, problems)
            if completed is not None:
                settings[draft.name][dataset] = completed
        _check_rows_differ(drafts, settings, dataset, problems)
    rows = tuple(Row(d.name, i, d.changes, d.marks, settings[d.name]) for i, d in enumerate(drafts))
    return Study(
        name=first.study,
        title=first.title,
        description=first.description,
        seeds=first.seeds,
        datasets=tuple(documents),
        rows=rows,
        execution=first.execution,
        report=first.report,
        smoke=smoke,
    )


def _check_rows_alone(completed: Document, problems: _Problems) -> None:
    """What is wrong with the rows of a file whose baseline is wrong too, so that one look mends both."""
    try:
        rows = RowsDocument.model_validate(completed.get("rows"))
    except ValidationError:
        return  # said already
    baseline = Settings()
    for group in Settings.model_fields.keys() & completed.keys():
        with suppress(ValidationError):
            baseline = Settings.model_validate(baseline.model_dump() | {group: completed[group]})
    for draft in expand(rows):
        _row_settings(baseline.model_dump(), draft, problems)


def _row_settings(baseline: Document, draft: RowDraft, problems: _Problems) -> Settings | None:
    unknown = [key for key in draft.changes if key.split(".")[0] not in Settings.model_fields]
    for key in unknown:
        groups = ", ".join(Settings.model_fields)
        problems.add((*draft.at, key), f"row {draft.name!r} can change only keys of {groups}")
    named = [key for key in flatten(draft.changes) if key in ("dataset.name", "dataset.root")]
    for key in named:
        problems.add((*draft.at, key), "a row cannot change the data set: name several under `datasets`")
    if unknown or named:
        return None
    try:
        return problems.validate(Settings, apply(baseline, draft.changes), draft.at)
    except StudyError as error:
        for line in error.problems:
            problems.add(draft.at, line)
        return None


def _check_rows_differ(
    drafts: Sequence[RowDraft], settings: dict[str, dict[str, Settings]], dataset: str, problems: _Problems
) -> None:
    """A row that changes nothing is an error: no two rows may come to the same settings."""
    seen: dict[str, str] = {}
    for draft in drafts:
        completed = settings[draft.name].get(dataset)
        if completed is None:
            continue
        earlier = seen.setdefault(json.dumps(completed.model_dump(mode="json"), sort_keys=True), draft.name)
        if earlier != draft.name:
            problems.add(draft.at, f"row {draft.name!r} changes nothing: its settings equal those of row {earlier!r}")


def study_schema() -> dict[str, Any]:
    """JSON schema of study files, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **StudyDocument.model_json_schema()}
