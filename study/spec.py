"""A study as declared: study file → frozen, validated specification → cells. Imports no torch, ray or mlflow."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator

from study.documents import Document, KeysError, StudyError, StudyFile, apply, read_document
from study.layers import Choices, check_options, check_spare_layers, complete, dataset_names
from study.problems import Places, Problems, near, text_keys
from study.rows import LeaveOneOut, Name, RowDocument, RowDraft, RowsDocument, expand
from study.searches.settings import SearchSettings, check_search
from trainables.baseline_files import own_size
from trainables.model_files import BackboneError
from trainables.settings import Frozen, Settings, TestOnSettings

__all__ = ["Cell", "Choices", "Row", "Study", "StudyDocument", "find_study", "load_study", "shipped_studies"]

MOST_CELLS = 100_000  # of which each takes some 40 kB to plan
SHIPPED = Path(__file__).parent / "studies"


class Execution(Frozen):
    """How trials are run; the number of threads, the device and the precision are part of every stage's key."""

    cpus: Annotated[float, Field(gt=0, le=10_000)] = Field(
        1, description="CPUs a trial; it computes with that many threads"
    )
    gpus: Annotated[float, Field(ge=0, le=10_000)] | Literal["auto"] | None = Field(
        None,
        description="GPUs a trial, fractions too; default 1 or 0; auto: 1 until the memory of trials like it was "
        "measured, then the fraction that fits",
    )
    autoscale_to: int | None = Field(
        None,
        ge=1,
        le=100_000,
        description="trials at a time that an autoscaler may bring nodes for: so many are asked for, also while no "
        "node can hold them; default: as many as fit on the nodes that are there",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where this machine has a GPU")
    max_failures: int = Field(2, ge=0, le=10_000, description="times a trial whose worker died is started again")
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
    published: str | tuple[str, ...] | None = Field(
        None, description="file, or files, of analysis/published to set beside ours"
    )
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
    search: SearchSettings | None = Field(None, description="makes the study a search around its first row")

    @field_validator("seeds", "datasets")
    @classmethod
    def _differ(cls, values: tuple[int, ...] | tuple[str, ...] | None) -> tuple[int, ...] | tuple[str, ...] | None:
        twice = [str(value) for value, times in Counter(values or ()).items() if times > 1]
        if twice:
            raise ValueError(f"{', '.join(twice)} given twice; each may stand there once")
        return values


TEXT_KEYS = text_keys(StudyDocument, RowDocument, LeaveOneOut)


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
    search: SearchSettings | None = None

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


def shipped_studies() -> dict[str, Path]:
    """Name → file of the studies that come with the project."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}


def shipped_joint_studies() -> dict[str, Path]:
    """Name → file of the joint studies that come with the project; see `study.joint`."""
    return {path.stem: path for path in sorted((SHIPPED / "joint").glob("*.yaml"))}


def find_study(name: str) -> Path:
    """File of a shipped study by name, or the file itself.

    Raises:
        StudyError: neither a shipped study nor a file.
    """
    shipped = shipped_studies()
    if name in shipped:
        return shipped[name]
    shipped |= shipped_joint_studies()  # in what is said
    path = Path(name)
    if os.path.isfile(name):  # noqa: PTH113 (Path raises for a name too long to be one)
        return path
    if os.path.exists(name) or path.suffix in (".yaml", ".yml") or path.name != name:  # noqa: PTH110
        what = "is no file" if os.path.exists(name) else "no such file"  # noqa: PTH110
        raise StudyError([f"{name}: {what}; give a study file, or one of {', '.join(shipped)}"])
    raise StudyError([f"{name}: no such study or file{near(name, shipped)}; shipped studies: {', '.join(shipped)}"])


def load_study(path: Path, choices: Choices | None = None) -> Study:
    """Read, complete and validate a study.

    Raises:
        StudyError: with every problem, each with file, line or key, and what was expected.
    """
    choices = choices or Choices()
    file = read_document(path, TEXT_KEYS)
    problems = Problems(Places(path.name, file.lines))
    names = dataset_names(file, choices, problems)
    check_options(file, names, choices, problems)
    check_spare_layers(file, names, choices, problems)
    documents: dict[str, StudyDocument] = {}
    for name in names:
        layers = complete(file, name, choices, alone=len(names) == 1)
        layers.report(problems)
        problems.places = layers.places
        validated = problems.validate(StudyDocument, layers.document)
        if validated is not None:
            documents |= _looks(name, validated, problems)
        else:
            _check_rows_alone(layers.document, problems)
    if not choices.smoke:
        _check_smoke(file, names[0], choices, problems)
    problems.raise_if_any()
    _refuse_too_many_cells(documents, problems)
    return _assemble(documents, problems, choices.smoke)


def _looks(name: str, document: StudyDocument, problems: Problems) -> dict[str, StudyDocument]:
    """A data set as the study looks at it: once, or at home and elsewhere where models are tested on another too."""
    data = document.dataset
    if data.tested == "away":
        problems.add(("dataset", "tested"), "the study sets it, which has cells of both; leave it out")
    if data.test_on is None:
        return {name: document}
    away = document.model_copy(update={"dataset": data.model_copy(update={"tested": "away"})})
    return {name: document, f"{name}→{_away_name(name, data.test_on)}": away}


def _away_name(name: str, other: TestOnSettings) -> str:
    """The other data set's name; not its folder, which may be moved without changing what a cell is."""
    if other.name != name:
        return other.name
    return f"hospital {other.hospital}" if other.root is None else f"another {other.name}"


def _refuse_too_many_cells(documents: dict[str, StudyDocument], problems: Problems) -> None:
    first = next(iter(documents.values()))
    cells = first.rows.count() * len(first.seeds) * len(documents)
    if cells > MOST_CELLS:
        problems.add(("rows",), f"{cells:,} cells (rows × seeds × data sets); at most {MOST_CELLS:,} make a study")
        problems.raise_if_any()


def _check_smoke(file: StudyFile, dataset: str, choices: Choices, problems: Problems) -> None:
    """Settings of --smoke are judged now, not when they are first used."""
    if isinstance(file.document.get("smoke"), dict):
        layers = complete(file, dataset, replace(choices, smoke=True), alone=True)
        judged = Problems(layers.places)
        layers.report(judged)
        judged.validate(StudyDocument, layers.document)
        problems.add_lines(judged.found)


def _assemble(documents: dict[str, StudyDocument], problems: Problems, smoke: bool) -> Study:
    """Rows with complete settings for every data set; StudyError with whatever is wrong with them."""
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
    if first.search is not None and drafts and (around := settings[drafts[0].name]):
        check_search(first.search, next(iter(around.values())), first.seeds, tuple(documents), problems)
    problems.raise_if_any()
    rows = tuple(
        Row(d.name, i, _typed(d.changes, settings[d.name]), d.marks, settings[d.name]) for i, d in enumerate(drafts)
    )
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
        search=first.search,
    )


def _typed(changes: Document, settings: dict[str, Settings]) -> Document:
    """Changes as the settings hold them: text that stands for a number is one there."""
    if not settings:
        return changes
    plain = next(iter(settings.values())).model_dump()
    return {key: reduce(lambda group, part: group[part], key.split("."), plain) for key in changes}


def _check_rows_alone(completed: Document, problems: Problems) -> None:
    """What is wrong with the rows of a file whose baseline is wrong too, so that one look mends both."""
    try:
        rows = RowsDocument.model_validate(completed.get("rows"))
    except ValidationError:
        return  # said already
    if rows.count() > MOST_CELLS:
        return
    baseline = Settings()
    for group in Settings.model_fields.keys() & completed.keys():
        with suppress(ValidationError):
            baseline = Settings.model_validate(baseline.model_dump() | {group: completed[group]})
    for draft in expand(rows):
        _row_settings(baseline.model_dump(), draft, problems)


def _row_settings(baseline: Document, draft: RowDraft, problems: Problems) -> Settings | None:
    groups = tuple(Settings.model_fields)
    fixed = [
        key
        for key in draft.changes
        if key in ("dataset.name", "dataset.root", "dataset.tested") or key.startswith("dataset.test_on")
    ]
    unknown = [key for key in draft.changes if key.split(".")[0] not in groups]
    for key in fixed:
        problems.add((*draft.at, key), "a row cannot change the data set: name several under `datasets`")
    for key in unknown:
        nearest = near(key.split(".")[0], groups)
        problems.add((*draft.at, key), f"row {draft.name!r} can change only keys of {', '.join(groups)}{nearest}")
    if unknown or fixed:
        return None
    try:
        completed = apply(baseline, draft.changes)
    except KeysError as error:
        for key, message in error.found.items():
            problems.add((*draft.at, key), message)
        return None
    return _with_own_size(problems.validate(Settings, completed, draft.at, draft.inherited), draft, problems)


def _with_own_size(settings: Settings | None, draft: RowDraft, problems: Problems) -> Settings | None:
    """Images of the size that the row's encoder was pretrained with, where the row asks for them."""
    if settings is None or not settings.model.own_size or settings.model.small:
        return settings
    try:
        size = own_size(settings.model.backbone)
    except BackboneError as error:
        problems.add((*draft.at, "model.backbone"), str(error))
        return None
    if size is None:
        return settings
    dataset = settings.dataset.model_copy(update={"image_size": size})
    return settings.model_copy(update={"dataset": dataset})


def _check_rows_differ(
    drafts: Sequence[RowDraft], settings: dict[str, dict[str, Settings]], dataset: str, problems: Problems
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
