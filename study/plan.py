"""From cells to a tree of stages with keys and costs. Pure: imports no torch, ray, mlflow or sklearn.

The key of the state after an epoch is the digest of the parent's key and the epoch's effective configuration; cells
whose chains begin alike share those epochs. A *stage* is a maximal run of epochs between branches of the tree and
changes of configuration.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from analysis.statistics import detectable_dz
from study.documents import StudyError
from study.spec import Cell, Execution, Study
from trainables.backbone_files import CONFIG, Backbone, BackboneError, file_sha256, find_backbone
from trainables.costs import IMAGES, Costs, vit_costs
from trainables.data.index import DataError, Index
from trainables.data.registry import load_index
from trainables.requests import Compute, Observer
from trainables.settings import Settings
from trainables.strategy import Phase, phase, total_epochs

ROOT_KEY = "root"


@dataclass(frozen=True)
class Material:
    """What a row's settings mean on a data set: its index, encoder and costs."""

    index: Index
    backbone: Backbone
    costs: Costs

    @cached_property
    def train_images(self) -> int:
        """Images of the training split."""
        return len(self.index.rows("train"))


@dataclass(frozen=True)
class Chain:
    """A cell's trajectory.

    Attributes:
        keys: key of the state after each epoch.
        phases: what trains in each epoch.
        observer: how the cell looks at the trajectory.
        key: of the cell: its data set, seed, last state and observer.
    """

    cell: Cell
    keys: tuple[str, ...]
    phases: tuple[Phase, ...]
    observer: Observer
    material: Material
    cache_identity: str

    @property
    def leaf(self) -> str:
        """Key of the last epoch."""
        return self.keys[-1]

    @property
    def key(self) -> str:
        """Deterministic key of the cell's run in the ledger."""
        return digest("cell", self.cell.row.name, self.cell.dataset, self.cell.seed, self.leaf, self.observer.name)


@dataclass(frozen=True)
class Stage:
    """A run of epochs with one configuration and no branch inside.

    Attributes:
        key: of the state after its last epoch.
        parent: key of the stage before, None for the first.
        first, last: epochs completed before and after it.
        cells: number of cells that contain it.
        units: training units this plan will spend on it.
    """

    key: str
    parent: str | None
    first: int
    last: int
    phase: Phase
    cells: int
    units: int


@dataclass(frozen=True)
class Cache:
    """A frozen prefix that the plan wants kept: data set's activations at one position."""

    identity: str
    position: int
    build_units: int
    bytes: int
    users: tuple[str, ...]  # keys of the epochs that read it
    pooled: bool  # small, and kept


@dataclass(frozen=True)
class Units:
    """Training cost, in units of `trainables.costs`."""

    alone: int
    shared: int
    floor: int


@dataclass(frozen=True)
class Plan:
    """A study's cells, stages, caches and costs."""

    study: Study
    chains: tuple[Chain, ...]
    stages: tuple[Stage, ...]
    caches: tuple[Cache, ...]
    units: Units
    images_to_decode: int
    disk_bytes: int
    compute: Compute
    sharing: bool
    children: dict[str, tuple[str, ...]] = field(repr=False, default_factory=dict)

    @property
    def shared_stages(self) -> int:
        """Stages that serve more than one cell."""
        return sum(stage.cells > 1 for stage in self.stages)

    def cache_positions(self, identity: str) -> tuple[int, ...]:
        """Positions worth caching under an identity."""
        return tuple(sorted(c.position for c in self.caches if c.identity == identity))

    def epoch_units(self, chain: Chain) -> list[int]:
        """Training units that this plan will spend on each epoch of a cell."""
        positions = self.cache_positions(chain.cache_identity)
        return [_epoch_units(chain, now, positions) for now in chain.phases]

    def as_json(self) -> dict[str, Any]:
        """What `--plan --json` prints."""
        units = self.units
        return {
            "study": self.study.name,
            "rows": [row.name for row in self.study.rows],
            "seeds": list(self.study.seeds),
            "datasets": list(self.study.datasets),
            "cells": len(self.chains),
            "stages": len(self.stages),
            "shared_stages": self.shared_stages,
            "sharing": self.sharing,
            "units": {"alone": units.alone, "shared": units.shared, "floor": units.floor},
            "images_to_decode": self.images_to_decode,
            "disk_bytes": self.disk_bytes,
            "detectable_dz": detectable_dz(len(self.study.seeds)),
            "compute": {
                "device": self.compute.device,
                "threads": self.compute.threads,
                "precision": self.compute.precision,
            },
        }


def make_plan(study: Study, *, storage: Path, sharing: bool = True, download: bool = False) -> Plan:
    """Plan a study.

    Args:
        study: validated.
        storage: where caches and splits lie; nothing is written.
        sharing: False plans every cell alone, without caches.
        download: fetch the weights of hub ids now, so that keys are final.

    Raises:
        StudyError: data or backbone missing, a depth beyond the encoder, two rows that cannot differ, with all such
            problems at once.
    """
    materials = _materials(study, storage, download)
    compute = resolve_compute(study.execution, [row.settings[d] for row in study.rows for d in study.datasets])
    chains = tuple(
        _chain(cell, materials[cell.dataset, cell.row.index], study.execution, compute, sharing)
        for cell in study.cells()
    )
    _check_rows_act(chains, sharing)
    children = _followers(chains)
    caches = _caches(chains, study.execution, storage) if sharing else ()
    positions: dict[str, set[int]] = defaultdict(set)
    for wanted in caches:
        positions[wanted.identity].add(wanted.position)
    stages = _stages(chains, children, positions)
    decode = _images_to_decode(chains, storage)
    units = _units(chains, stages, caches)
    disk = _disk_bytes(chains, caches, children, storage)
    return Plan(study, chains, stages, caches, units, decode, disk, compute, sharing, children)


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
    """Digest of the code that results depend on: every module of trainables but the pretraining script."""
    import trainables

    root = Path(trainables.__file__).parent
    h = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        if path.name != "pretrain.py":
            h.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return h.hexdigest()


@cache
def library_versions() -> dict[str, str]:
    """Versions of what computes, for the record."""
    names = ("torch", "transformers", "ray", "optuna", "mlflow", "scikit-learn", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


# -- material --------------------------------------------------------------------------------------------------------


def _materials(study: Study, storage: Path, download: bool) -> dict[tuple[str, int], Material]:
    problems: list[str] = []
    found: dict[tuple[str, int], Material] = {}
    for dataset in study.datasets:
        for row in study.rows:
            try:
                found[dataset, row.index] = _material(row.settings[dataset], storage, download)
            except (DataError, BackboneError, StudyError) as error:
                problems += str(error).split("\n")
    if problems:
        raise StudyError(dict.fromkeys(problems))
    return found


def _material(settings: Settings, storage: Path, download: bool) -> Material:
    index = _index(settings.dataset.model_dump_json(), storage / "splits")
    backbone = _backbone(settings.model.backbone, download)
    strategy = settings.strategy
    if strategy.unfreezing != "none" and strategy.depth != "all" and strategy.depth > backbone.layers:
        raise StudyError(
            [f"strategy.depth: {strategy.depth} blocks, but backbone {backbone.name!r} has {backbone.layers}"]
        )
    unknown = [name for name in settings.weighting.boosts if name not in (*index.classes, *index.dropped)]
    if unknown:
        raise StudyError([f"weighting.boosts: {index.dataset} has no class {', '.join(unknown)}"])
    if settings.dataset.image_size < backbone.patch:
        raise StudyError(
            [f"dataset.image_size: {settings.dataset.image_size} px is below one {backbone.patch} px patch"]
        )
    costs = vit_costs(
        hidden=backbone.hidden,
        layers=backbone.layers,
        mlp_ratio=backbone.mlp_ratio,
        patch=backbone.patch,
        image_size=settings.dataset.image_size,
        head_hidden=settings.model.head_hidden,
        classes=len(index.classes),
    )
    return Material(index, backbone, costs)


@cache
def _index(dataset_json: str, splits: Path) -> Index:
    from trainables.settings import DatasetSettings

    return load_index(DatasetSettings.model_validate_json(dataset_json), splits if splits.is_dir() else None)


@cache
def _backbone(name: str, download: bool) -> Backbone:
    return find_backbone(name, download=download)


# -- chains ----------------------------------------------------------------------------------------------------------


def _chain(cell: Cell, material: Material, execution: Execution, compute: Compute, sharing: bool) -> Chain:
    settings = cell.settings
    blocks = len(material.costs.blocks)
    ground = _ground(cell, material, compute)
    phases, tokens = _epoch_tokens(settings.model_dump_json(), blocks)
    salt = "" if sharing else f"{cell.row.name}|{cell.dataset}"
    tolerance = execution.cache_dtype if sharing and execution.cache_dtype != "float32" else ""
    key = digest(ROOT_KEY, ground, cell.seed, salt, tolerance)
    keys = []
    for token in tokens:
        key = hashlib.sha256(f"{key}|{token}".encode()).hexdigest()
        keys.append(key)
    return Chain(
        cell=cell,
        keys=tuple(keys),
        phases=phases,
        observer=Observer.of(settings.ema, settings.stopping),
        material=material,
        cache_identity=_cache_identity(settings, material, compute),
    )


def _ground(cell: Cell, material: Material, compute: Compute) -> str:
    """Digest of what holds for the whole trajectory, apart from the seed."""
    s = cell.settings
    return _ground_digest(
        s.dataset.model_dump_json(exclude={"root"}),
        s.model.model_dump_json(exclude={"backbone", "mean", "std"}),
        s.optimiser.model_dump_json(include={"batch_size", "weight_decay", "clip_norm"}),
        s.task,
        material.index.digest(),
        *_encoder(s, material.backbone),
        compute,
    )


def _encoder(settings: Settings, backbone: Backbone) -> tuple[object, ...]:
    """What the encoder's activations depend on besides the images: its weights, its shape, and the pixel statistics."""
    model = settings.model
    config = None if backbone.folder is None else file_sha256(backbone.folder / CONFIG)
    return backbone.weights_digest(), config, model.mean or backbone.mean, model.std or backbone.std


@cache
def _ground_digest(*parts: object) -> str:
    return digest("ground", *parts, sources_digest())


@cache
def _epoch_tokens(settings_json: str, blocks: int) -> tuple[tuple[Phase, ...], tuple[str, ...]]:
    """Phases of all epochs, and for each epoch the text of its effective configuration."""
    settings = Settings.model_validate_json(settings_json)
    phases = tuple(phase(settings.strategy, blocks, e) for e in range(total_epochs(settings.strategy)))
    return phases, tuple(_effective(settings, now) for now in phases)


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
        *_encoder(settings, material.backbone),
        data.image_size,
        data.fit,
        compute,
    )


@cache
def _identity_digest(*parts: object) -> str:
    return digest("activations", *parts, sources_digest())


def _check_rows_act(chains: Sequence[Chain], sharing: bool) -> None:
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


# -- the tree --------------------------------------------------------------------------------------------------------


def _followers(chains: Iterable[Chain]) -> dict[str, tuple[str, ...]]:
    """Key → keys that follow it, over all epochs of all cells."""
    seen: set[str] = set()
    followers: dict[str, list[str]] = defaultdict(list)
    for chain in chains:
        before = ROOT_KEY
        for key in chain.keys:
            if key not in seen:
                seen.add(key)
                followers[before].append(key)
            before = key
    return {key: tuple(keys) for key, keys in followers.items()}


def _stages(
    chains: Sequence[Chain], children: dict[str, tuple[str, ...]], positions: dict[str, set[int]]
) -> tuple[Stage, ...]:
    drafts: dict[str, Stage] = {}
    cells: dict[str, int] = defaultdict(int)
    for chain in chains:
        parent, first = None, 0
        for epoch, key in enumerate(chain.keys):
            now = chain.phases[epoch]
            ends = epoch + 1 == len(chain.keys) or len(children.get(key, ())) != 1 or chain.phases[epoch + 1] != now
            if not ends:
                continue
            cells[key] += 1
            if key not in drafts:
                units = (epoch + 1 - first) * _epoch_units(chain, now, positions[chain.cache_identity])
                drafts[key] = Stage(key, parent, first, epoch + 1, now, 0, units)
            parent, first = key, epoch + 1
    return tuple(Stage(s.key, s.parent, s.first, s.last, s.phase, cells[s.key], s.units) for s in drafts.values())


def _epoch_units(chain: Chain, now: Phase, positions: Iterable[int]) -> int:
    costs = chain.material.costs
    frozen = costs.frozen_position(now.unfrozen, now.base)
    start = frozen if frozen in positions else IMAGES
    return chain.material.train_images * costs.training(start, now.unfrozen, now.base)


def _units(chains: Sequence[Chain], stages: Sequence[Stage], caches: Sequence[Cache]) -> Units:
    alone = sum(_epoch_units(chain, now, ()) for chain in chains for now in chain.phases)
    shared = sum(stage.units for stage in stages) + sum(c.build_units for c in caches)
    return Units(alone, shared, _floor(chains))


def _floor(chains: Sequence[Chain]) -> int:
    """Every distinct epoch once from perfect caches, and one pass through the deepest prefix a data set."""
    total, seen, passes = 0, set[str](), dict[str, int]()
    for chain in chains:
        costs, images = chain.material.costs, chain.material.train_images
        for key, now in zip(chain.keys, chain.phases, strict=True):
            frozen = costs.frozen_position(now.unfrozen, now.base)
            once = images * costs.forward(IMAGES, frozen)
            passes[chain.cache_identity] = max(passes.get(chain.cache_identity, 0), once)
            if key not in seen:
                seen.add(key)
                total += images * costs.training(frozen, now.unfrozen, now.base)
    return total + sum(passes.values())


# -- caches and disk ---------------------------------------------------------------------------------------------------


def _caches(chains: Sequence[Chain], execution: Execution, storage: Path) -> tuple[Cache, ...]:
    """Pooled vectors always; token boundaries by benefit, as long as they fit in a share of the free disk."""
    readers: dict[tuple[str, int], dict[str, Chain]] = defaultdict(dict)
    for chain in chains:
        for key, now in zip(chain.keys, chain.phases, strict=True):
            position = chain.material.costs.frozen_position(now.unfrozen, now.base)
            if position > 0:
                readers[chain.cache_identity, position][key] = chain
    budget = int(execution.cache_disk_share * _free_bytes(storage))
    pooled, tokens = [], []
    for (identity, position), users in readers.items():
        chain = next(iter(users.values()))
        wanted = _cache(chain, identity, position, tuple(users), execution)
        if position == chain.material.costs.features:
            pooled.append(wanted)
        elif execution.token_cache != "never" and len(users) > 1:
            tokens.append(((len(users) - 1) * wanted.build_units, wanted))
    kept = list(pooled)
    budget -= sum(c.bytes for c in pooled)
    for _, wanted in sorted(tokens, key=lambda pair: (-pair[0], pair[1].identity, pair[1].position)):
        if wanted.bytes <= budget:
            kept.append(wanted)
            budget -= wanted.bytes
    return tuple(kept)


def _cache(chain: Chain, identity: str, position: int, users: tuple[str, ...], execution: Execution) -> Cache:
    costs, index = chain.material.costs, chain.material.index
    pooled = position == costs.features
    images = len(index) if pooled else len(index) - len(index.rows("test"))
    values = costs.feature_values if pooled else costs.token_values
    size = 4 if execution.cache_dtype == "float32" else 2
    build = chain.material.train_images * costs.forward(IMAGES, position)
    return Cache(identity, position, build, images * values * size, users, pooled)


def _free_bytes(storage: Path) -> int:
    import shutil

    folder = storage
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _images_to_decode(chains: Sequence[Chain], storage: Path) -> int:
    from trainables.data.images import images_to_decode

    seen: dict[tuple[str, int, str], int] = {}
    for chain in chains:
        data, index = chain.cell.settings.dataset, chain.material.index
        at = (index.digest(), data.image_size, data.fit)
        if at not in seen:
            seen[at] = images_to_decode(index, data.image_size, data.fit, storage / "images")
    return sum(seen.values())


def _disk_bytes(
    chains: Sequence[Chain], caches: Sequence[Cache], children: dict[str, tuple[str, ...]], storage: Path
) -> int:
    """Decoded images, caches, states kept at branches, one running state a cell at most, evaluated weights."""
    from trainables.data.images import cache_bytes

    images = {
        (c.material.index.digest(), c.cell.settings.dataset.image_size): cache_bytes(
            c.material.index, c.cell.settings.dataset.image_size
        )
        for c in chains
    }
    states: dict[str, int] = {}
    weights = 0
    slots = os.cpu_count() or 1
    running: list[int] = []
    for chain in chains:
        trained = _trained_bytes(chain, chain.phases[-1])
        weights += trained
        running.append(5 * trained)  # raw, two moments, an average, a best
        for key, now in zip(chain.keys, chain.phases, strict=True):
            if len(children.get(key, ())) > 1:
                states[key] = 3 * _trained_bytes(chain, now)
    largest = sum(sorted(running, reverse=True)[:slots])
    return sum(images.values()) + sum(c.bytes for c in caches) + sum(states.values()) + weights + largest


def _trained_bytes(chain: Chain, now: Phase) -> int:
    costs = chain.material.costs
    return 4 * (costs.head_parameters + now.unfrozen * costs.block_parameters)
