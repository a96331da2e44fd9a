"""Activations of frozen prefixes, computed once: pooled vectors for head-only training, tokens at a block boundary.

Below a boundary that no training crosses, activations of a fixed image are constant; they are kept in a memory map
that all rows, seeds and processes of a node share, those of training images in every view that training shows.
Libraries choose their algorithms by the size of a batch, and with them the last bits; so a frozen prefix is always
computed in batches of full size, the last one filled up. A probe on real batches checks that cached and fresh
activations are equal to the bit, and measures that reading beats recomputing; where either fails, the prefix is
recomputed and the reason is recorded. Every row carries a checksum, verified when it is first read.
"""

from __future__ import annotations

import logging
import shutil
import time
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trainables.cache_files import DATA, ROWS, cache_name, claim_blocks, lock, record_of, write_record
from trainables.costs import IMAGES
from trainables.device import autocast
from trainables.requests import CacheRequest, Compute
from trainables.task import Rows, StagedModel, Task

log = logging.getLogger(__name__)

TOLERANCE = 5e-3  # of the largest magnitude, for activations kept in fp16: a labelled tolerance mode


class Fetched(NamedTuple):
    """Activations of a batch.

    Attributes:
        values: on the device.
        position: they are at.
        start: position from which computing them began: IMAGES, or `position` where a cache served.
    """

    values: Tensor
    position: int
    start: int


@dataclass
class PrefixCache:
    """One position's activations of the cached rows."""

    folder: Path
    data: np.memmap[Any, Any]
    checksums: npt.NDArray[np.uint32]
    place: npt.NDArray[np.int64]  # row of the index → row of the cache, −1 where not cached
    verified: npt.NDArray[np.bool_] = field(init=False)

    def __post_init__(self) -> None:
        self.verified = np.zeros(len(self.data), dtype=np.bool_)

    def covers(self, rows: Rows) -> bool:
        """Whether all rows are cached."""
        return bool(rows.max() < len(self.place) and (self.place[rows] >= 0).all())

    def read(self, rows: Rows) -> tuple[npt.NDArray[np.floating], list[int]]:
        """Activations of rows, and the positions within `rows` whose checksum is wrong."""
        at = self.place[rows]
        values = self.data[at]
        unseen = np.flatnonzero(~self.verified[at])
        wrong = [int(i) for i in unseen if zlib.crc32(values[i].tobytes()) != self.checksums[at[i]]]
        self.verified[at] = True
        return values, wrong


class Activations:
    """Serves the frozen prefix of a batch, from a cache where one serves, else as images to compute from."""

    def __init__(
        self,
        task: Task,
        compute: Compute,
        device: torch.device,
        request: CacheRequest,
        folder: Path | None,
        contents: str,
        batch_size: int,
    ) -> None:
        """Serve from caches in `folder` (None: never) what `request` allows, for images of digest `contents`."""
        self._task = task
        self._compute = compute
        self._device = device
        self._request = request
        self._folder = folder
        self._contents = contents
        self._batch_size = batch_size
        self._opened: dict[int, PrefixCache | None] = {}
        self._position = IMAGES
        self._events: list[str] = []  # what was recomputed, and why

    def enter(self, model: StagedModel, position: int) -> None:
        """Use the cache of a position from now on, building it first if no process has."""
        self._position = position
        if self._folder is None or position not in self._request.positions or position in self._opened:
            return
        try:
            cache = self._open(model, position)
        except OSError as error:
            cache = None
            self._say(f"activations at position {position} are recomputed: their cache could not be kept ({error})")
        self._opened[position] = cache if cache is not None and self._serves(model, cache, position) else None

    def stand_at(self, position: int) -> None:
        """Serve a position from a cache that is open already, else compute; builds nothing."""
        self._position = position

    def leave(self) -> None:
        """Close the memory maps."""
        self._opened.clear()

    def key(self, position: int) -> str:
        """Name of a position's cache."""
        return cache_name(self._request.identity, self._contents, position, self._request.dtype)

    def fetch(self, model: StagedModel, rows: Rows) -> Fetched:
        """Activations of rows on the device, from a cache or as far as they had to be computed here."""
        cache = self._opened.get(self._position)
        if cache is None or not cache.covers(rows):
            if self._position == IMAGES or len(rows) >= self._batch_size:
                return Fetched(self._task.inputs(rows, self._device), IMAGES, IMAGES)
            return Fetched(self._prefix(model, rows, self._position), self._position, IMAGES)
        values, wrong = cache.read(rows)
        tensor = torch.from_numpy(np.ascontiguousarray(values)).to(self._device).float()
        if wrong:
            self._say(f"{len(wrong)} damaged rows of the cache {cache.folder.name} are recomputed")
            tensor[wrong] = self._fresh(model, rows[wrong], self._position)
            cache.verified[cache.place[rows[wrong]]] = False
        return Fetched(tensor, self._position, self._position)

    def used_key(self) -> str | None:
        """Name of the cache in use at the present position, if one serves."""
        return self.key(self._position) if self._opened.get(self._position) is not None else None

    def take_events(self) -> list[str]:
        """What did not go as planned since the last call."""
        events, self._events = self._events, []
        return events

    # -- building ---------------------------------------------------------------------------------------------------

    def _cached_rows(self, position: int) -> Rows:
        """Pooled vectors are small, so the test split has them too; tokens are kept for what is read every epoch."""
        costs = self._task.costs
        held_out = ("val", "test") if costs.pooled and position == costs.features else ("val",)
        train = self._task.views.every(self._task.rows("train"))  # training shows them in every view
        return np.sort(np.concatenate([train, *(self._task.rows(s) for s in held_out)]))

    def _open(self, model: StagedModel, position: int) -> PrefixCache:
        assert self._folder is not None
        folder = self._folder / self.key(position)
        folder.mkdir(parents=True, exist_ok=True)
        with lock(folder):
            if not _complete(folder):
                self._build(model, position, folder)
            return _load(folder)  # before another driver may release it

    def _build(self, model: StagedModel, position: int, folder: Path) -> None:
        rows = self._cached_rows(position)
        part = folder / "part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        sample = self._fresh(model, rows[:1], position)
        shape = (len(rows), *sample.shape[1:])
        dtype = np.dtype(self._request.dtype)
        _require_space(folder, int(np.prod(shape)) * dtype.itemsize)
        data = np.lib.format.open_memmap(part / DATA, mode="w+", dtype=dtype, shape=shape)
        claim_blocks(part / DATA)
        checksums = np.empty(len(rows), dtype=np.uint32)
        for start in range(0, len(rows), self._batch_size):
            batch = rows[start : start + self._batch_size]
            values = self._fresh(model, batch, position).cpu().numpy().astype(dtype, copy=False)
            data[start : start + len(batch)] = values
            checksums[start : start + len(batch)] = [zlib.crc32(np.ascontiguousarray(v).tobytes()) for v in values]
        data.flush()
        del data
        np.savez(part / ROWS, rows=rows, checksums=checksums)
        self._publish(part, folder, position)

    def _publish(self, part: Path, folder: Path, position: int) -> None:
        """Move the finished files in place; the record comes last and is what makes the cache complete."""
        record = record_of(folder)
        shown = len(self._task.rows("train")) * self._task.views.count
        units = shown * self._task.costs.forward(IMAGES, position)
        for name in (DATA, ROWS):
            (part / name).replace(folder / name)
        part.rmdir()
        counted = {"units": record.get("units", 0) + units, "builds": record.get("builds", 0) + 1}
        write_record(folder, counted | {"present": True})

    def _fresh(self, model: StagedModel, rows: Rows, position: int) -> Tensor:
        return self._prefix(model, rows, position).float()

    def _prefix(self, model: StagedModel, rows: Rows, position: int) -> Tensor:
        """Activations of at most a full batch of rows, computed as part of a full one."""
        filled = np.resize(rows, max(len(rows), self._batch_size))
        with torch.no_grad(), autocast(self._compute):
            return model.advance(self._task.inputs(filled, self._device), IMAGES, position)[: len(rows)]

    # -- the probe --------------------------------------------------------------------------------------------------

    def _serves(self, model: StagedModel, cache: PrefixCache, position: int) -> bool:
        """Equal to fresh activations on shuffled batches of a full and of the last, partial size; and faster."""
        train = self._task.rows("train")
        order = np.random.default_rng(position).permutation(self._task.views.every(train))
        size = min(self._batch_size, len(train))
        partial = len(train) % self._batch_size or 1
        for rows in (order[:size], order[-partial:]):
            started = time.perf_counter()
            fresh = self._fresh(model, rows, position)
            computing = time.perf_counter() - started
            started = time.perf_counter()
            values, wrong = cache.read(rows)
            cached = torch.from_numpy(np.ascontiguousarray(values)).to(self._device).float()
            reading = time.perf_counter() - started
            if not wrong and not self._equal(cached, fresh):
                self._say(f"activations at position {position} are recomputed: cached and fresh ones differ")
                return False
            cache.verified[cache.place[rows[wrong]]] = False
        if self._request.when == "auto" and reading > computing:
            self._say(f"activations at position {position} are recomputed: reading takes {reading / computing:.1f}×")
            return False
        return True

    def _equal(self, cached: Tensor, fresh: Tensor) -> bool:
        if self._request.dtype == "float32":
            return torch.equal(cached, fresh)
        return bool((cached - fresh).abs().max() <= TOLERANCE * fresh.abs().max())

    def _say(self, message: str) -> None:
        log.warning(message)
        self._events.append(message)


def _complete(folder: Path) -> bool:
    if not record_of(folder).get("present"):
        return False
    try:
        _load(folder)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        log.warning("the cache %s is damaged (%s) and is built again", folder.name, error)
        return False
    return True


def _load(folder: Path) -> PrefixCache:
    data = np.load(folder / DATA, mmap_mode="r")
    with np.load(folder / ROWS) as file:
        rows, checksums = file["rows"], file["checksums"]
    if len(rows) != len(data):
        raise ValueError(f"{len(data)} rows where {len(rows)} were written")
    place = np.full(int(rows.max()) + 1, -1, dtype=np.int64)
    place[rows] = np.arange(len(rows))
    return PrefixCache(folder, data, checksums, place)


def _require_space(folder: Path, wanted: int) -> None:
    free = shutil.disk_usage(folder).free
    if wanted > free / 4:
        raise OSError(f"{wanted / 1e9:.1f} GB wanted, a quarter of the free disk is {free / 4e9:.1f} GB")
