"""From cells to a tree of stages with costs. Pure: imports no torch, ray, mlflow or sklearn.

A *stage* is a maximal run of epochs between branches of the tree of keys (see `study.chains`) and changes of
configuration.
"""

from __future__ import annotations

import gc
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from analysis.statistics import detectable_dz
from study.chains import (
    ROOT_KEY,
    Chain,
    chain_of,
    check_rows_act,
    course_of,
    materials_of,
    resolve_compute,
)
from study.spec import Execution, Study
from trainables.costs import IMAGES
from trainables.data.index import Index
from trainables.requests import Compute
from trainables.strategy import Phase


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
    def cache_bytes(self) -> int:
        """Of `disk_bytes` those that any machine can make again: decoded images and caches."""
        return _image_bytes(self.chains) + sum(c.bytes for c in self.caches)

    @property
    def shared_stages(self) -> int:
        """Stages that serve more than one cell."""
        return sum(stage.cells > 1 for stage in self.stages)

    def cache_positions(self, identity: str) -> tuple[int, ...]:
        """Positions worth caching under an identity."""
        return tuple(sorted(self._cached.get(identity, ())))

    def epoch_units(self, chain: Chain) -> tuple[int, ...]:
        """Training units that this plan will spend on each epoch of a cell."""
        return chain.course.units(self._cached.get(chain.cache_identity, frozenset()))

    @cached_property
    def _cached(self) -> dict[str, frozenset[int]]:
        """Identity → positions that are cached."""
        return _positions(self.caches)

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


@contextmanager
def uncollected() -> Iterator[None]:
    """Pause Python's search for unreachable cycles while objects are built that all stay.

    Among the million objects of a plan of 10,000 cells it takes a third of the time and finds nothing.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@uncollected()
def make_plan(
    study: Study, *, storage: Path, sharing: bool = True, download: bool = False, repeats: bool = False
) -> Plan:
    """Plan a study.

    Args:
        study: validated.
        storage: where caches and splits lie; nothing is written.
        sharing: False plans every cell alone, without caches.
        download: fetch the weights of hub ids now, so that keys are final.
        repeats: rows may train exactly as others do, as trials of a search may.

    Raises:
        StudyError: data or backbone missing, a depth beyond the encoder, two rows that cannot differ, with all such
            problems at once.
    """
    materials = materials_of(study, storage, download)
    compute = resolve_compute(study.execution, [row.settings[d] for row in study.rows for d in study.datasets])
    courses = {
        (dataset, row.index): course_of(row.settings[dataset], materials[dataset, row.index], compute)
        for dataset in study.datasets
        for row in study.rows
    }
    chains = tuple(
        chain_of(cell, courses[cell.dataset, cell.row.index], study.execution, sharing) for cell in study.cells()
    )
    if not repeats:
        check_rows_act(chains, sharing)
    # The floor is that of the study, however it is run.
    shareable = chains if sharing else [chain_of(c.cell, c.course, study.execution, sharing=True) for c in chains]
    children = _followers(chains)
    caches = _caches(chains, study.execution, storage) if sharing else ()
    stages = _stages(chains, children, _positions(caches))
    decode = _images_to_decode(chains, storage)
    units = _units(chains, stages, caches, _floor(shareable))
    disk = _disk_bytes(chains, caches, children, storage)
    return Plan(study, chains, stages, caches, units, decode, disk, compute, sharing, children)


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
    chains: Sequence[Chain], children: dict[str, tuple[str, ...]], cached: dict[str, frozenset[int]]
) -> tuple[Stage, ...]:
    drafts: dict[str, tuple[str | None, int, int, Phase, int]] = {}
    cells: dict[str, int] = defaultdict(int)
    branching = _branching(children)
    for chain in chains:
        parent, first = None, 0
        prices = chain.course.units(cached.get(chain.cache_identity, frozenset()))
        for last, (key, ends) in enumerate(zip(chain.keys, chain.course.ends, strict=True), start=1):
            if not ends and key not in branching:
                continue
            cells[key] += 1
            if key not in drafts:
                drafts[key] = (parent, first, last, chain.phases[last - 1], sum(prices[first:last]))
            parent, first = key, last
    return tuple(
        Stage(key, parent, first, last, now, cells[key], units)
        for key, (parent, first, last, now, units) in drafts.items()
    )


def _branching(children: dict[str, tuple[str, ...]]) -> set[str]:
    """Keys that more than one other follows."""
    return {key for key, following in children.items() if len(following) > 1}


def _units(chains: Sequence[Chain], stages: Sequence[Stage], caches: Sequence[Cache], floor: int) -> Units:
    alone = sum(sum(chain.course.units()) for chain in chains)
    shared = sum(stage.units for stage in stages) + sum(c.build_units for c in caches)
    return Units(alone, shared, floor)


def _floor(chains: Sequence[Chain]) -> int:
    """Every distinct epoch once from perfect caches, and one pass through the deepest prefix a data set and view."""
    epochs: dict[str, int] = {}
    passes: dict[str, int] = {}
    for chain in chains:
        course, material = chain.course, chain.material
        epochs.update(zip(chain.keys, course.least_units, strict=True))
        seen = min(course.views, len(chain.keys))  # an epoch shows each image in one view
        once = seen * material.train_images * material.costs.forward(IMAGES, max(course.frozen_positions))
        passes[chain.cache_identity] = max(passes.get(chain.cache_identity, 0), once)
    return sum(epochs.values()) + sum(passes.values())


# -- caches and disk ---------------------------------------------------------------------------------------------------


def _caches(chains: Sequence[Chain], execution: Execution, storage: Path) -> tuple[Cache, ...]:
    """Pooled vectors always; token boundaries by benefit, as long as they fit in a share of the free disk."""
    readers: dict[tuple[str, int], dict[str, Chain]] = defaultdict(dict)
    for chain in chains:
        for position, epochs in chain.course.readers.items():
            users = readers[chain.cache_identity, position]
            for epoch in epochs:
                users[chain.keys[epoch]] = chain
    budget = int(execution.cache_disk_share * _free_bytes(storage))
    pooled, tokens = [], []
    for (identity, position), users in readers.items():
        chain = next(iter(users.values()))
        wanted = _cache(chain, identity, position, tuple(users), execution)
        views = chain.course.views  # a cache is a pass a view, and spares one an epoch
        if wanted.pooled and len(users) >= views:
            pooled.append(wanted)
        elif not wanted.pooled and execution.token_cache != "never" and len(users) > views:
            tokens.append(((len(users) - views) * wanted.build_units // views, wanted))
    kept = list(pooled)
    budget -= sum(c.bytes for c in pooled)
    for _, wanted in sorted(tokens, key=lambda pair: (-pair[0], pair[1].identity, pair[1].position)):
        if wanted.bytes <= budget:
            kept.append(wanted)
            budget -= wanted.bytes
    return tuple(kept)


def _positions(caches: Iterable[Cache]) -> dict[str, frozenset[int]]:
    """Identity → positions that are cached."""
    positions: dict[str, set[int]] = defaultdict(set)
    for wanted in caches:
        positions[wanted.identity].add(wanted.position)
    return {identity: frozenset(kept) for identity, kept in positions.items()}


def _cache(chain: Chain, identity: str, position: int, users: tuple[str, ...], execution: Execution) -> Cache:
    costs, material = chain.material.costs, chain.material
    pooled = costs.pooled and position == costs.features
    shown = chain.course.views * material.train_images
    images = shown + material.images["val"] + (material.images["test"] if pooled else 0)
    size = 4 if execution.cache_dtype == "float32" else 2
    build = shown * costs.forward(IMAGES, position)
    return Cache(identity, position, build, images * costs.values(position) * size, users, pooled)


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
        data = chain.cell.settings.dataset
        for index in _looked_at(chain):
            at = (index.digest(), data.image_size, data.fit)
            if at not in seen:
                seen[at] = images_to_decode(index, data.image_size, data.fit, storage / "images")
    return sum(seen.values())


def _looked_at(chain: Chain) -> tuple[Index, ...]:
    """The data sets whose images a cell needs."""
    material = chain.material
    return (material.index,) if material.away is None else (material.index, material.away)


def _disk_bytes(
    chains: Sequence[Chain], caches: Sequence[Cache], children: dict[str, tuple[str, ...]], storage: Path
) -> int:
    """Decoded images, caches, states kept at branches, one running state a cell at most, evaluated weights."""
    states: dict[str, int] = {}
    weights = 0
    slots = os.cpu_count() or 1
    running: list[int] = []
    branching = _branching(children)
    for chain in chains:
        trained = _trained_bytes(chain, chain.phases[-1])
        weights += trained
        running.append(5 * trained)  # raw, two moments, an average, a best
        for key, now in zip(chain.keys, chain.phases, strict=True):
            if key in branching:
                states[key] = 3 * _trained_bytes(chain, now)
    largest = sum(sorted(running, reverse=True)[:slots])
    again = _image_bytes(chains) + sum(c.bytes for c in caches)
    return again + sum(states.values()) + weights + largest


def _image_bytes(chains: Sequence[Chain]) -> int:
    """Decoded images, each data set's once a size."""
    from trainables.data.images import cache_bytes

    images = {
        (index.digest(), c.cell.settings.dataset.image_size): cache_bytes(index, c.cell.settings.dataset.image_size)
        for c in chains
        for index in _looked_at(c)
    }
    return sum(images.values())


def _trained_bytes(chain: Chain, now: Phase) -> int:
    return 4 * chain.material.costs.trained_parameters(now.unfrozen)
