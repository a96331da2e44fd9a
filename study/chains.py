"""Cells as chains of keys: what a row's settings mean on a data set, and the digest of the state after every epoch.

The key of the state after an epoch is the digest of the key before it and of the epoch's effective configuration, so
cells whose training begins alike have keys that begin alike. Imports no torch, ray, mlflow or sklearn.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from study.documents import StudyError
from study.spec import Cell, Execution, Study
from trainables.costs import IMAGES, Costs
from trainables.data.index import SPLITS, DataError, Index
from trainables.data.registry import load_away, load_index
from trainables.model_files import BackboneError
from trainables.requests import Compute, Observer
from trainables.settings import ONLY_IN_TASK, READING, DatasetSettings, Settings
from trainables.strategy import Phase, phase, total_epochs
from trainables.task_kind import ModelError, ModelFacts, TaskKind
from trainables.tasks import TASKS
from trainables.views import VIEWS

ROOT_KEY = "root"
TASK_GROUPS = {group for group, names in ONLY_IN_TASK if not names}


@dataclass(frozen=True)
class Material:
    """What a row's settings mean on a data set: its index, model, classes, and the digest of its boxes or masks."""

    index: Index
    model: ModelFacts
    classes: tuple[str, ...]
    targets_digest: str
    annotated: npt.NDArray[np.bool_] | None  # images that take part; None: all
    away: Index | None = None  # the other data set's test split, where cells are tested there

    @property
    def observed_at(self) -> str:
        """Name and digest of what is tested on, if it is another data set."""
        return "" if self.away is None else f"{self.away.dataset} {self.away.digest()[:12]}"

    @property
    def synthetic(self) -> bool:
        """Whether any of the images are drawn."""
        return self.index.synthetic or (self.away is not None and self.away.synthetic)

    @property
    def costs(self) -> Costs:
        """Of the model's parts."""
        return self.model.costs

    @cached_property
    def images(self) -> dict[str, int]:
        """Split → images of it that take part."""
        counted = {split: self.index.rows(split) for split in SPLITS}
        if self.annotated is not None:
            counted = {split: rows[self.annotated[rows]] for split, rows in counted.items()}
        return {split: len(rows) for split, rows in counted.items()}

    @property
    def train_images(self) -> int:
        """Images of the training split that take part."""
        return self.images["train"]


@dataclass(frozen=True, eq=False)
class Course:
    """What the cells of a row on a data set have in common, whatever their seed: worked out once for all of them.

    Attributes:
        phases: what trains in each epoch.
        tokens: text of the effective configuration of each epoch.
        observer: how the row looks at its trajectories.
        ground: digest of what holds for a whole trajectory, apart from the seed.
        cache_identity: digest of what the encoder's activations depend on.
        views: in how many views training shows an image.
    """

    material: Material
    phases: tuple[Phase, ...]
    tokens: tuple[str, ...]
    observer: Observer
    ground: str
    cache_identity: str
    views: int = 1
    _units: dict[frozenset[int], tuple[int, ...]] = field(default_factory=dict, repr=False)

    @cached_property
    def frozen_positions(self) -> tuple[int, ...]:
        """For each epoch the last position that its training does not change."""
        return tuple(self.material.costs.frozen_position(now.unfrozen, now.base) for now in self.phases)

    @cached_property
    def readers(self) -> dict[int, tuple[int, ...]]:
        """Position whose activations are worth keeping → epochs that would read them."""
        found: dict[int, list[int]] = {}
        for epoch, position in enumerate(self.frozen_positions):
            if self.material.costs.worth_keeping(position):
                found.setdefault(position, []).append(epoch)
        return {position: tuple(epochs) for position, epochs in found.items()}

    @cached_property
    def ends(self) -> tuple[bool, ...]:
        """For each epoch whether a stage must end with it: the last one, and those after which another phase begins."""
        return (*(now != then for now, then in pairwise(self.phases)), True)

    @cached_property
    def least_units(self) -> tuple[int, ...]:
        """Training units of each epoch from perfect caches."""
        return self.units(frozenset(self.frozen_positions))

    def units(self, cached: frozenset[int] = frozenset()) -> tuple[int, ...]:
        """Training units of each epoch where activations are cached at some positions."""
        if cached not in self._units:
            costs, images = self.material.costs, self.material.train_images
            self._units[cached] = tuple(
                images * costs.training(frozen if frozen in cached else IMAGES, now.unfrozen, now.base)
                for now, frozen in zip(self.phases, self.frozen_positions, strict=True)
            )
        return self._units[cached]


@dataclass(frozen=True)
class Chain:
    """A cell's trajectory.

    Attributes:
        keys: key of the state after each epoch.
        course: what it shares with the row's other seeds.
    """

    cell: Cell
    keys: tuple[str, ...]
    course: Course

    @property
    def phases(self) -> tuple[Phase, ...]:
        """What trains in each epoch."""
        return self.course.phases

    @property
    def observer(self) -> Observer:
        """How the cell looks at the trajectory."""
        return self.course.observer

    @property
    def material(self) -> Material:
        """Index, encoder and costs."""
        return self.course.material

    @property
    def cache_identity(self) -> str:
        """Digest of what the encoder's activations depend on."""
        return self.course.cache_identity

    @property
    def leaf(self) -> str:
        """Key of the last epoch."""
        return self.keys[-1]

    @cached_property
    def key(self) -> str:
        """Deterministic key of the cell's run in the ledger: of its data set, seed, last state and observer."""
        return digest("cell", self.cell.row.name, self.cell.dataset, self.cell.seed, self.leaf, self.observer.name)


def resolve_compute(execution: Execution, settings: Sequence[Settings]) -> Compute:
    """Device, threads and precision that trials of this study compute with.

    Raises:
        StudyError: rows ask for different precisions, or for bf16 without a GPU.
    """
    device = execution.device
    if device == "auto":
        device = "cuda" if execution.gpus != 0 and any(Path("/dev").glob("nvidia[0-9]*")) else "cpu"
    wanted = {s.optimiser.precision for s in settings}
    if len(wanted) > 1:
        raise StudyError([f"optimiser.precision: rows differ ({', '.join(sorted(wanted))}); one study has one"])
    precision = wanted.pop()
    if precision == "auto":
        precision = "bf16" if device == "cuda" else "fp32"
    if precision == "bf16" and device == "cpu":
        raise StudyError(["optimiser.precision: bf16 needs a GPU; use fp32 or auto on CPUs"])
    return Compute(device, max(1, int(execution.cpus)), precision)


def digest(*parts: object) -> str:
    """sha256 of parts, as JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


@cache
def sources_digest() -> str:
    """Digest of the code that results depend on: every module of trainables but the pretraining scripts."""
    import trainables

    root = Path(trainables.__file__).parent
    h = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        if not path.name.startswith("pretrain"):
            h.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return h.hexdigest()


@cache
def library_versions() -> dict[str, str]:
    """Versions of what computes, for the record."""
    names = ("torch", "transformers", "ray", "optuna", "mlflow", "scikit-learn", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


# -- material --------------------------------------------------------------------------------------------------------


def the_task(study: Study) -> TaskKind:
    """The task that every row of a study has.

    Raises:
        StudyError: rows differ, so that no metric could compare them.
    """
    tasks = {row.settings[dataset].task for row in study.rows for dataset in study.datasets}
    if len(tasks) > 1:
        raise StudyError([f"task: rows differ ({', '.join(sorted(tasks))}); one study has one"])
    return TASKS[tasks.pop()]


def materials_of(study: Study, storage: Path, download: bool) -> dict[tuple[str, int], Material]:
    """(data set, row index) → what the row's settings mean there.

    Raises:
        StudyError: with every problem of data, encoder and settings.
    """
    the_task(study)
    problems: list[str] = []
    found: dict[tuple[str, int], Material] = {}
    for dataset in study.datasets:
        for row in study.rows:
            try:
                found[dataset, row.index] = _material(row.settings[dataset], storage, download)
            except (DataError, BackboneError, ModelError, StudyError) as error:
                problems += str(error).split("\n")
    if problems:
        raise StudyError(dict.fromkeys(problems))
    return found


def _material(settings: Settings, storage: Path, download: bool) -> Material:
    data, splits = settings.dataset, storage / "splits"
    kind = TASKS[settings.task]
    home = data.model_copy(update={"tested": "home", "flips": "none"})  # neither is read from a table
    index = _index(home.model_dump_json(), splits, kind.labels_learnt)
    away = _away(data.model_dump_json(), splits) if data.tested == "away" else None
    classes = kind.classes(settings, index)
    model = kind.facts(settings, classes, download)
    strategy, blocks = settings.strategy, len(model.costs.blocks)
    if strategy.unfreezing != "none" and strategy.depth != "all" and strategy.depth > blocks:
        raise StudyError([f"strategy.depth: {strategy.depth} blocks, but backbone {model.name!r} has {blocks}"])
    unknown = [name for name in settings.weighting.boosts if name not in (*classes, *index.classes, *index.dropped)]
    if unknown:
        raise StudyError([f"weighting.boosts: {index.dataset} has no class {', '.join(unknown)}"])
    targets, annotated = kind.targets_digest(settings, index), kind.annotated(settings, index)
    return Material(index, model, classes, targets, annotated, away)


@cache
def _index(dataset_json: str, splits: Path, labels_learnt: bool) -> Index:
    folder = splits if splits.is_dir() else None
    return load_index(DatasetSettings.model_validate_json(dataset_json), folder, labels_learnt=labels_learnt)


@cache
def _away(dataset_json: str, splits: Path) -> Index:
    return load_away(DatasetSettings.model_validate_json(dataset_json), splits if splits.is_dir() else None)


# -- chains ----------------------------------------------------------------------------------------------------------


def course_of(settings: Settings, material: Material, compute: Compute) -> Course:
    """What a row's settings come to on a data set."""
    blocks = len(material.costs.blocks)
    phases = tuple(phase(settings.strategy, blocks, e) for e in range(total_epochs(settings.strategy)))
    effective = {now: _effective(settings, now) for now in dict.fromkeys(phases)}
    return Course(
        material=material,
        phases=phases,
        tokens=tuple(effective[now] for now in phases),
        observer=Observer.of(settings.ema, settings.stopping, material.observed_at),
        ground=_ground(settings, material, compute),
        cache_identity=_cache_identity(settings, material, compute),
        views=len(VIEWS[settings.dataset.flips]),
    )


def chain_of(cell: Cell, course: Course, execution: Execution, sharing: bool) -> Chain:
    """A cell's chain of keys; without sharing no other cell has any of them."""
    salt = "" if sharing else f"{cell.row.name}|{cell.dataset}"
    tolerance = execution.cache_dtype if sharing and execution.cache_dtype != "float32" else ""
    key = digest(ROOT_KEY, course.ground, cell.seed, salt, tolerance)
    keys = []
    for token in course.tokens:
        key = hashlib.sha256(f"{key}|{token}".encode()).hexdigest()
        keys.append(key)
    return Chain(cell, tuple(keys), course)


def _ground(settings: Settings, material: Material, compute: Compute) -> str:
    """Digest of what holds for the whole trajectory, apart from the seed."""
    s = settings
    return _ground_digest(
        s.dataset.model_dump_json(exclude={"root", "test_on", "tested", "cache_gb", *READING}),
        s.model.model_dump_json(exclude={"backbone", "mean", "std", "weights", "small", "own_size"}),
        s.optimiser.model_dump_json(include={"batch_size", "weight_decay", "clip_norm"}),
        s.model_dump_json(include=TASK_GROUPS),
        material.index.digest(),
        material.classes,
        material.targets_digest,
        *_encoder(s, material.model),
        compute,
    )


def _encoder(settings: Settings, model: ModelFacts) -> tuple[object, ...]:
    """What the encoder's activations depend on besides the images: its weights, its shape, and the pixel statistics."""
    given = settings.model
    return settings.task, model.weights_digest, model.shape_digest, given.mean or model.mean, given.std or model.std


@cache
def _ground_digest(*parts: object) -> str:
    return digest("ground", *parts, sources_digest())


def _effective(settings: Settings, now: Phase) -> str:
    """What is in force in an epoch of this phase, and nothing that is not: so that equal training has equal keys."""
    optimiser = settings.optimiser
    effective: dict[str, Any] = {
        "segment": [now.segment, now.segment_start, now.segment_epochs],
        "unfrozen": now.unfrozen,
        "base": now.base,
        "schedule": optimiser.schedule,
        "head_lr": optimiser.head_lr,
    }
    if now.segment == "tune":
        effective["head_lr"] = optimiser.tune_head_lr or optimiser.head_lr
        if settings.weighting.enabled:
            effective["weighting"] = settings.weighting.model_dump()
    if now.unfrozen:
        effective["encoder_lr"] = optimiser.encoder_lr
    return json.dumps(effective, sort_keys=True)


def _cache_identity(settings: Settings, material: Material, compute: Compute) -> str:
    data = settings.dataset
    return _identity_digest(
        material.index.digest(),
        *_encoder(settings, material.model),
        data.image_size,
        data.fit,
        data.flips,
        compute,
    )


@cache
def _identity_digest(*parts: object) -> str:
    return digest("activations", *parts, sources_digest())


def check_rows_act(chains: Sequence[Chain], sharing: bool) -> None:
    """Two rows with the same trajectory and observer at a seed cannot differ: the later one changes nothing."""
    if not sharing:
        return
    seen: dict[tuple[str, str, int, str], str] = {}
    problems: dict[str, None] = {}
    for chain in chains:
        cell = chain.cell
        at = (cell.dataset, chain.leaf, cell.seed, chain.observer.name)
        earlier = seen.setdefault(at, cell.row.name)
        if earlier != cell.row.name:
            problems[
                f"rows: {cell.row.name!r} changes nothing that has an effect: it trains and is evaluated exactly as "
                f"{earlier!r} (changes: {_changes(cell)})"
            ] = None
    if problems:
        raise StudyError(problems)


def _changes(cell: Cell) -> str:
    return ", ".join(f"{key}={value}" for key, value in cell.row.changes.items()) or "none"
