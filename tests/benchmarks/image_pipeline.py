"""What images cost: decoded once into the cache, read from it, and waited for by training."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tests.benchmarks.loop_overhead import FULL as CELL
from tests.benchmarks.loop_overhead import open_cell
from tests.benchmarks.measuring import Effort, Figure, Measured, pairs_in_turn
from tests.benchmarks.processes import fresh_storage
from tests.studies_for_tests import TINY
from trainables.activations import Activations
from trainables.data.decode import decode
from trainables.data.images import ImageCache
from trainables.data.index import Index
from trainables.data.survey import survey_images
from trainables.loop import Trajectory
from trainables.requests import CacheRequest
from trainables.settings import Flips
from trainables.views import Views

ORIGINAL, SIZE, BATCH = 1024, 224, 32  # px: a distributed radiograph, and what an encoder takes
FLIPS: tuple[Flips, Flips] = ("none", "horizontal")
LEAST_FASTER, LEAST_BUILDING, MOST_WAITING = 20.0, 1.5, 0.05


def image_pipeline(effort: Effort) -> Measured:
    """Batches from the cache against decoding; building it against a plain pass over Pillow; waiting in an epoch."""
    images = 8 if effort.smallest else 192
    with fresh_storage() as storage:
        index = _write_images(storage / "data", images)
        paths = [storage / "data" / "images" / name for name in index.names.tolist()]
        pairs = pairs_in_turn(
            lambda: _plain_pass(paths), lambda: _building(index, storage), 1 if effort.smallest else effort.repeats
        )
        cache = ImageCache.open(index, storage / "data", image_size=SIZE, fit="crop", folder=storage / "kept")
        decoding = statistics.median(_decoding(paths) for _ in range(effort.repeats))
        reading, flipped = (
            statistics.median(_reading(cache, Views(len(index), flips)) for _ in range(effort.repeats))
            for flips in FLIPS
        )
        busy = {
            "plain pass": _processor(lambda: _plain_pass(paths)),
            "building": _processor(lambda: _building(index, storage)),
            "decoding": _processor(lambda: _decoding(paths)),
            "reading": _processor(lambda: _reading(cache, Views(len(index)))),
            "flipped reading": _processor(lambda: _reading(cache, Views(len(index), "horizontal"))),
            "checking": _processor(lambda: _checking(index, paths)),
        }
        checking = statistics.median(_checking(index, paths) for _ in range(effort.repeats))
    waiting = [_waiting(effort) for _ in range(effort.repeats)]
    return Measured(
        {
            "images a second from the cache, one core": Figure(images / reading, "1/s"),
            "over decoding 1024 px PNGs": Figure(decoding / reading, "×", at_least=LEAST_FASTER),
            "the same, flipped at random": Figure(decoding / flipped, "×", at_least=LEAST_FASTER),
            "building, over a plain pass of Pillow": Figure(
                statistics.median(plain / ours for plain, ours in pairs), "×", at_least=LEAST_BUILDING
            ),
            "building, processor time over the plain pass's": Figure(busy["building"] / busy["plain pass"], "×"),
            "images a second that `check` decodes, all cores": Figure(images / checking, "1/s"),
            "waiting in an epoch of head training": Figure(statistics.median(waiting), "share", at_most=MOST_WAITING),
        },
        {
            "images": images,
            "plain_and_building_seconds": pairs,
            "decoding_seconds": decoding,
            "reading_seconds": reading,
            "flipped_reading_seconds": flipped,
            "checking_seconds": checking,
            "processor_seconds": busy,
            "waiting_shares": waiting,
        },
    )


def _write_images(root: Path, count: int) -> Index:
    """Grey PNGs that compress as radiographs do: smooth, with noise of a few grey levels."""
    rng = np.random.default_rng(0)
    (root / "images").mkdir(parents=True)
    names = [f"{number:08d}_000.png" for number in range(count)]
    ramp = np.linspace(40, 200, ORIGINAL)[:, None] * np.hanning(ORIGINAL)[None]
    for name in names:
        pixels = np.clip(ramp + rng.normal(0, 3, ramp.shape), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(root / "images" / name)
    return Index(
        dataset="chestxray14",
        classes=("Mass",),
        names=np.array(names),
        groups=np.array(names),
        labels=np.zeros((count, 1), np.int8),
        split=np.zeros(count, np.uint8),
        group_kind="patient",
        single_label=False,
        channels=1,
        synthetic=False,
    )


def _plain_pass(paths: Sequence[Path]) -> float:
    """Seconds of the usual loop: open, convert, resize, stack."""
    started = time.perf_counter()
    np.stack(
        [np.asarray(Image.open(path).convert("L").resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for path in paths]
    )
    return time.perf_counter() - started


def _building(index: Index, storage: Path) -> float:
    """Seconds to build a cache anew on all cores, hashes and all."""
    folder = storage / f"cache {time.monotonic_ns()}"
    started = time.perf_counter()
    ImageCache.open(index, storage / "data", image_size=SIZE, fit="crop", folder=folder, workers=os.cpu_count() or 1)
    return time.perf_counter() - started


def _decoding(paths: Sequence[Path]) -> float:
    started = time.perf_counter()
    for path in paths:
        decode(path, SIZE, "crop", 1)
    return time.perf_counter() - started


def _reading(cache: ImageCache, views: Views) -> float:
    """Seconds for one epoch of shuffled batches, as far as float tensors, as a task reads them."""
    order = np.random.default_rng(1).permutation(views.images)
    started = time.perf_counter()
    for step, first in enumerate(range(0, len(order), BATCH)):
        rows = views.drawn(order[first : first + BATCH], 0, 0, step)
        torch.from_numpy(views.pixels(cache.pixels, rows)).to(torch.float32).div_(255.0)
    return time.perf_counter() - started


def _checking(index: Index, paths: Sequence[Path]) -> float:
    """Seconds in which `check` opens all images, on all cores: decoded at full size, and hashed."""
    started = time.perf_counter()
    survey = survey_images(index, paths, os.cpu_count() or 1)
    assert not survey.unreadable
    return time.perf_counter() - started


def _processor(work: Callable[[], float]) -> float:
    """Processor seconds of a piece of work, of all its threads: unlike seconds, they do not count what else runs."""
    started = time.process_time()
    work()
    return time.process_time() - started


def _waiting(effort: Effort) -> float:
    """Share of an epoch of head training in which the model waits for its batches; pooled vectors are cached."""
    chosen = {**TINY, "seeds": [0]} if effort.smallest else CELL
    with fresh_storage() as storage:
        cell = open_cell(storage, chosen)
        compute, device = cell.plan.compute, torch.device("cpu")
        request = CacheRequest("measured", (cell.task.costs.features,), when="always")
        served = Activations(
            cell.task, compute, device, request, storage / "activations", "measured", cell.settings.optimiser.batch_size
        )
        trajectory = Trajectory(cell.task, cell.settings, 0, compute, device, served, {})
        trajectory.train_epoch()  # builds the cache
        trajectory = Trajectory(cell.task, cell.settings, 0, compute, device, served, {})
        waited: list[float] = []
        fetch = served.fetch

        def timed(*arguments: object) -> object:
            started = time.perf_counter()
            fetched = fetch(*arguments)  # type: ignore[arg-type]
            waited.append(time.perf_counter() - started)
            return fetched

        served.fetch = timed  # type: ignore[method-assign,assignment]
        started = time.perf_counter()
        trajectory.train_epoch()
        return sum(waited) / (time.perf_counter() - started)
