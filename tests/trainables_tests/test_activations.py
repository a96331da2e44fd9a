"""The cache of frozen prefixes: equal to fresh activations to the bit, and what happens when it is not."""

from __future__ import annotations

import dataclasses
import multiprocessing
import re
import resource
import shutil
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from tiny_trials import (
    CPU,
    activations,
    begin,
    finish,
    keys_of,
    outcome,
    tiny_settings,
    tiny_task,
    trajectory,
    trial_request,
)

from study.store import Store
from trainables.activations import Activations, PrefixCache
from trainables.backbones import PooledViT
from trainables.cache_files import cache_name, record_of, release
from trainables.classification import Classification
from trainables.costs import IMAGES
from trainables.data.opened import Data
from trainables.requests import CacheRequest, Observer
from trainables.settings import Settings

POOLED, TOKENS = 5, 2  # of a 4-block encoder: the head's input, and the tokens below the top two blocks
ALWAYS = CacheRequest("identity", (POOLED, TOKENS), when="always")
RAW = Observer(None, 0.0, None)


@pytest.fixture(scope="module")
def settings(encoder: Path) -> Settings:
    return tiny_settings(encoder)


@pytest.fixture(scope="module")
def task(settings: Settings, data: Data) -> Classification:
    return tiny_task(settings, data)


@pytest.fixture(scope="module")
def model(task: Classification) -> PooledViT:
    return task.build(0).eval()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def fresh(task: Classification, model: PooledViT, rows: npt.NDArray[np.intp], position: int) -> torch.Tensor:
    """Activations through transformers' own forward pass."""
    x = task.inputs(rows, CPU)
    with torch.no_grad():
        if position == POOLED:
            return model.encoder(x).last_hidden_state[:, 1:].mean(1)
        return model.encoder(x, output_hidden_states=True).hidden_states[position]


def cache_folder(folder: Path, position: int, dtype: str = "float32") -> Path:
    return folder / cache_name("identity", "contents", position, dtype)


def built(task: Classification, model: PooledViT, folder: Path, position: int = POOLED) -> Path:
    activations(task, ALWAYS, folder).enter(model, position)
    return cache_folder(folder, position)


def entered(
    task: Classification, model: PooledViT, folder: Path, position: int = POOLED, request: CacheRequest = ALWAYS
) -> Activations:
    served = activations(task, request, folder)
    served.enter(model, position)
    return served


# -- equality --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", [POOLED, TOKENS])
def test_cached_activations_equal_fresh_ones_to_the_bit(
    position: int, task: Classification, model: PooledViT, tmp_path: Path
) -> None:
    served = entered(task, model, tmp_path, position)
    assert served.used_key() == cache_folder(tmp_path, position).name
    rng = np.random.default_rng(0)
    for size in (32, 29, 1, 22):
        rows = rng.permutation(task.rows("train"))[:size]
        x, at, start = served.fetch(model, rows)
        assert at == start == position
        assert torch.equal(x, fresh(task, model, rows, position))
    assert served.take_events() == []


def test_pooled_vectors_serve_every_split_and_tokens_what_is_read_every_epoch(
    task: Classification, model: PooledViT, tmp_path: Path
) -> None:
    for position, expected in ((POOLED, [POOLED, POOLED, POOLED]), (TOKENS, [TOKENS, TOKENS, IMAGES])):
        served = entered(task, model, tmp_path, position)
        starts = []
        for split in ("train", "val", "test"):
            x, at, start = served.fetch(model, task.rows(split))
            starts.append(start)
            if start == IMAGES:
                assert at == position, "fewer than a full batch: computed as part of one"
                assert torch.equal(x, fresh(task, model, task.rows(split), position))
        assert starts == expected


@pytest.mark.parametrize("positions", [(POOLED,), (POOLED, TOKENS)], ids=["pooled", "pooled and tokens"])
def test_a_trial_is_the_same_with_and_without_caches(
    positions: tuple[int, ...], task: Classification, settings: Settings, data: Data, tmp_path: Path
) -> None:
    weighted = settings.model_copy(update={"weighting": settings.weighting.model_copy(update={"enabled": True})})
    observers = [RAW, Observer(0.9, 3.0, None)]
    plain, cached = Store(tmp_path / "plain"), Store(tmp_path / "cached")
    finish(begin(trial_request(weighted, observers), task, plain))
    request = trial_request(weighted, observers, cache=CacheRequest("identity", positions, when="always"))
    finish(begin(request, task, cached))
    for observer in observers:
        leaf = keys_of("trajectory", 6)[-1]
        mine, theirs = (outcome(store.load_result(leaf, observer.name)) for store in (cached, plain))
        used = [record.pop("cache") for record in mine["history"]]
        assert [record.pop("cache") for record in theirs["history"]] == [None] * 6
        assert [u is not None for u in used] == [POOLED in positions] * 2 + [TOKENS in positions] + [False] * 3
        for facts in (mine, theirs):  # cheaper with a cache, see below
            for record in facts["history"]:
                del record["units"], record["evaluation_units"]
        assert mine == theirs


def test_the_key_names_everything_that_activations_depend_on(task: Classification, tmp_path: Path) -> None:
    keys = {
        activations(task, dataclasses.replace(ALWAYS, **changes), tmp_path).key(position)
        for changes in ({}, {"identity": "another"}, {"dtype": "float16"})
        for position in (POOLED, TOKENS)
    }
    assert len(keys) == 6
    assert cache_name("identity", "contents", 5, "float32") != cache_name("identity", "other contents", 5, "float32")


# -- lies ------------------------------------------------------------------------------------------------------------


def rewrite(folder: Path, change: Any, *, with_checksums: bool) -> None:
    """Change a cache's data in place, with checksums that fit the change or the former data."""
    data = np.load(folder / "data.npy")
    change(data)
    np.save(folder / "data.npy", data)
    if with_checksums:
        with np.load(folder / "rows.npz") as file:
            rows = file["rows"]
        np.savez(folder / "rows.npz", rows=rows, checksums=np.array([zlib.crc32(r.tobytes()) for r in data], np.uint32))


@pytest.mark.parametrize("position", [POOLED, TOKENS])
def test_a_cache_that_lies_with_fitting_checksums_is_not_used(
    position: int, task: Classification, model: PooledViT, tmp_path: Path
) -> None:
    folder = built(task, model, tmp_path, position)

    def nudge(data: npt.NDArray[np.float32]) -> None:
        data[...] = np.nextafter(data, np.float32(np.inf))  # the smallest lie there is

    rewrite(folder, nudge, with_checksums=True)
    served = entered(task, model, tmp_path, position)
    assert served.used_key() is None
    assert served.fetch(model, task.rows("train")[:8]).start == IMAGES
    assert served.take_events() == [f"activations at position {position} are recomputed: cached and fresh ones differ"]
    assert served.take_events() == []


def test_a_cache_of_other_weights_is_not_used(task: Classification, model: PooledViT, tmp_path: Path) -> None:
    built(task, model, tmp_path)
    other = task.build(0).eval()
    with torch.no_grad():
        other.encoder.encoder.layer[0].mlp.fc1.bias += 1e-3
    served = entered(task, other, tmp_path)
    assert served.used_key() is None
    assert "cached and fresh ones differ" in served.take_events()[0]
    assert torch.equal(served.fetch(other, task.rows("train")[:32]).values, task.inputs(task.rows("train")[:32], CPU))


@pytest.mark.parametrize("size", [1, 22, 31])
def test_fewer_rows_than_a_batch_are_computed_as_part_of_a_full_one(
    size: int, task: Classification, model: PooledViT, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[int] = []
    advance = PooledViT.advance
    monkeypatch.setattr(
        PooledViT, "advance", lambda self, x, *positions: (computed.append(len(x)), advance(self, x, *positions))[1]
    )
    uncached = activations(task)
    uncached.stand_at(TOKENS)
    rows = task.rows("train")[:size]
    x, at, start = uncached.fetch(model, rows)
    assert (len(x), at, start, computed) == (size, TOKENS, IMAGES, [32])
    assert torch.equal(x, fresh(task, model, rows, TOKENS))


def test_a_trajectory_over_a_lying_cache_is_that_without_one(
    task: Classification, model: PooledViT, settings: Settings, tmp_path: Path
) -> None:
    folder = built(task, model, tmp_path)
    rewrite(folder, lambda data: np.multiply(data, 1.5, out=data), with_checksums=True)
    honest = trajectory(task, settings).train_epoch()
    lied_to = trajectory(task, settings, served=activations(task, ALWAYS, tmp_path)).train_epoch()
    assert lied_to.trajectory_sha256 == honest.trajectory_sha256
    assert lied_to.units == honest.units
    assert lied_to.cache is None
    assert "differ" in lied_to.events[0]


# -- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_flipped_bit_is_noticed_recomputed_and_recorded(
    split: str, task: Classification, model: PooledViT, tmp_path: Path
) -> None:
    folder = built(task, model, tmp_path)
    rows = task.rows(split)
    with np.load(folder / "rows.npz") as file:
        place = int(np.flatnonzero(file["rows"] == rows[3])[0])
    raw = bytearray((folder / "data.npy").read_bytes())
    header = len(raw) - 160 * 16 * 4
    raw[header + (16 * place + 5) * 4] ^= 1  # the lowest bit of one value of one image
    (folder / "data.npy").write_bytes(raw)
    served = entered(task, model, tmp_path)
    assert served.used_key() is not None
    for _ in range(2):  # it is not taken for sound the second time either
        served.take_events()
        x, _, start = served.fetch(model, rows[:8])
        assert start == POOLED
        assert torch.equal(x, fresh(task, model, rows[:8], POOLED))
        assert served.take_events() == [f"1 damaged rows of the cache {folder.name} are recomputed"]


def test_damage_everywhere_still_trains_the_same_trajectory_and_is_on_record(
    task: Classification, model: PooledViT, settings: Settings, tmp_path: Path
) -> None:
    rewrite(built(task, model, tmp_path), lambda data: np.add(data, 1, out=data), with_checksums=False)
    honest = trajectory(task, settings)
    damaged = trajectory(task, settings, served=activations(task, ALWAYS, tmp_path))
    for _ in range(2):
        record, expected = damaged.train_epoch(), honest.train_epoch()
        assert record.trajectory_sha256 == expected.trajectory_sha256
        assert record.metrics == expected.metrics
        assert any("damaged rows" in event for event in record.events)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("file", ["data.npy", "rows.npz", "built.json"])
@pytest.mark.parametrize("harm", [truncate, empty, Path.unlink])
def test_a_cache_whose_file_is_cut_emptied_or_gone_is_built_again(
    file: str, harm: Any, task: Classification, model: PooledViT, tmp_path: Path
) -> None:
    folder = built(task, model, tmp_path)
    harm(folder / file)
    served = entered(task, model, tmp_path)
    assert served.used_key() == folder.name
    assert torch.equal(served.fetch(model, task.rows("val"))[0], fresh(task, model, task.rows("val"), POOLED))
    assert record_of(folder)["present"] is True


def test_a_build_that_was_killed_half_way_is_begun_again(
    task: Classification, model: PooledViT, tmp_path: Path
) -> None:
    part = cache_folder(tmp_path, POOLED) / "part"
    part.mkdir(parents=True)
    (part / "data.npy").write_bytes(b"half")
    served = entered(task, model, tmp_path)
    assert served.used_key() is not None
    assert not part.exists()


# -- building and releasing ------------------------------------------------------------------------------------------


def _build_together(task: Classification, folder: Path, gate: Any) -> None:
    torch.set_num_threads(1)
    model = task.build(0).eval()
    gate.wait(240)
    served = entered(task, model, folder)
    assert served.used_key() is not None
    assert torch.equal(served.fetch(model, task.rows("val"))[0], fresh(task, model, task.rows("val"), POOLED))


def test_builders_at_once_in_one_process_build_once(task: Classification, tmp_path: Path) -> None:
    gate = threading.Barrier(3)
    with ThreadPoolExecutor(3) as pool:
        for done in [pool.submit(_build_together, task, tmp_path, gate) for _ in range(3)]:
            done.result(240)
    assert record_of(cache_folder(tmp_path, POOLED))["builds"] == 1


@pytest.mark.slow
def test_builders_at_once_in_several_processes_build_once(task: Classification, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    gate = context.Barrier(2)
    processes = [context.Process(target=_build_together, args=(task, tmp_path, gate)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0, 0]
    assert record_of(cache_folder(tmp_path, POOLED))["builds"] == 1


def test_a_second_reader_builds_nothing(task: Classification, model: PooledViT, tmp_path: Path) -> None:
    folder = built(task, model, tmp_path)
    written = (folder / "data.npy").stat().st_mtime_ns
    assert entered(task, model, tmp_path).used_key() == folder.name
    assert (folder / "data.npy").stat().st_mtime_ns == written
    assert record_of(folder)["builds"] == 1


def test_release_deletes_the_data_and_keeps_the_record_of_units(
    task: Classification, model: PooledViT, tmp_path: Path
) -> None:
    folder = built(task, model, tmp_path, TOKENS)
    embedding, block = round(16 * 3 * 64 * 16 / 1000), round((12 * 17 * 16**2 + 2 * 17**2 * 16) / 1000)
    units = 125 * (embedding + 2 * block)  # training images only, as the plan counts
    assert record_of(folder) == {"units": units, "builds": 1, "present": True}
    release(folder)
    assert record_of(folder) == {"units": units, "builds": 1, "present": False}
    assert not (folder / "data.npy").exists()
    assert not (folder / "rows.npz").exists()
    release(folder)
    release(tmp_path / "never built")
    assert not (tmp_path / "never built").exists()
    built(task, model, tmp_path, TOKENS)  # needed again after all: it costs again, and says so
    assert record_of(folder) == {"units": 2 * units, "builds": 2, "present": True}


def test_units_of_an_epoch_are_those_above_the_cached_prefix(
    task: Classification, settings: Settings, tmp_path: Path
) -> None:
    t = trajectory(task, settings, served=activations(task, ALWAYS, tmp_path))
    records = [t.train_epoch() for _ in range(4)]
    embedding, block = round(16 * 3 * 64 * 16 / 1000), round((12 * 17 * 16**2 + 2 * 17**2 * 16) / 1000)
    mlp = round((16 * 16 + 16 * 16 + 16 * 4) / 1000)
    above = [mlp, mlp, 2 * block + mlp, embedding + 4 * block + mlp]
    backward = [2 * mlp, 2 * mlp, 2 * (2 * block + mlp), 2 * (4 * block + mlp)]
    assert [r.units for r in records] == [125 * (f + b) for f, b in zip(above, backward, strict=True)]
    assert [r.evaluation_units for r in records] == [22 * f for f in above]


# -- when a cache is not worth it, or cannot be kept -----------------------------------------------------------------


class SlowInputs(Classification):
    """The task on a machine where computing an activation takes a tenth of a second."""

    def inputs(self, rows: npt.NDArray[np.intp], device: torch.device) -> torch.Tensor:
        time.sleep(0.1)
        return super().inputs(rows, device)


def test_auto_uses_a_cache_that_is_read_faster_than_computed(
    settings: Settings, model: PooledViT, data: Data, tmp_path: Path
) -> None:
    auto = dataclasses.replace(ALWAYS, when="auto")
    served = entered(tiny_task(settings, data, SlowInputs), model, tmp_path, request=auto)
    assert served.used_key() is not None
    assert served.take_events() == []


def test_auto_leaves_a_cache_that_is_read_slower_than_computed(
    task: Classification, model: PooledViT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = PrefixCache.read

    def from_a_slow_disk(cache: PrefixCache, rows: npt.NDArray[np.intp]) -> Any:
        time.sleep(0.2)
        return quick(cache, rows)

    monkeypatch.setattr(PrefixCache, "read", from_a_slow_disk)
    served = entered(task, model, tmp_path, request=dataclasses.replace(ALWAYS, when="auto"))
    assert served.used_key() is None
    assert re.fullmatch(r"activations at position 5 are recomputed: reading takes [0-9.]+×", *served.take_events())
    assert entered(task, model, tmp_path, request=ALWAYS).used_key() is not None


def check_recomputed(served: Activations, task: Classification, model: PooledViT, reason: str) -> None:
    assert served.used_key() is None
    assert torch.equal(served.fetch(model, task.rows("train")[:32]).values, task.inputs(task.rows("train")[:32], CPU))
    (event,) = served.take_events()
    assert event.startswith("activations at position 5 are recomputed: their cache could not be kept")
    assert reason in event
    served.enter(model, POOLED)
    assert served.take_events() == []  # said once, and not tried again


def test_a_disk_that_refuses_the_file_is_said_and_activations_are_recomputed(
    task: Classification, model: PooledViT, tmp_path: Path
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        served = entered(task, model, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    check_recomputed(served, task, model, "File too large")
    assert entered(task, model, tmp_path).used_key() is not None  # half a file left behind does no harm


def test_a_folder_that_cannot_be_made_is_said_and_activations_are_recomputed(
    task: Classification, model: PooledViT, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no folder")
    check_recomputed(entered(task, model, tmp_path / "file"), task, model, "Not a directory")


def test_no_more_than_a_quarter_of_the_free_disk_is_taken(
    task: Classification, model: PooledViT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 160 * 16 * 4
    for free, fits in ((4 * size, True), (4 * size - 1, False)):
        usage = shutil.disk_usage(tmp_path)._replace(free=free)
        with monkeypatch.context() as patched:
            patched.setattr(shutil, "disk_usage", lambda _, usage=usage: usage)
            served = entered(task, model, tmp_path / str(free))
        if fits:
            assert served.used_key() is not None
        else:
            check_recomputed(served, task, model, "a quarter of the free disk")


# -- the tolerance mode ----------------------------------------------------------------------------------------------


def test_half_precision_is_a_mode_of_its_own_within_a_tolerance(
    task: Classification, model: PooledViT, tmp_path: Path
) -> None:
    half = dataclasses.replace(ALWAYS, dtype="float16")
    exact, close = entered(task, model, tmp_path), entered(task, model, tmp_path, request=half)
    assert exact.used_key() != close.used_key() == cache_folder(tmp_path, POOLED, "float16").name
    rows = task.rows("train")[:20]
    x, _, start = close.fetch(model, rows)
    expected = fresh(task, model, rows, POOLED)
    assert (start, x.dtype) == (POOLED, torch.float32)
    assert torch.equal(x, expected.half().float())
    assert not torch.equal(x, expected)


def test_half_precision_beyond_its_tolerance_is_not_used(
    task: Classification, model: PooledViT, tmp_path: Path
) -> None:
    half = dataclasses.replace(ALWAYS, dtype="float16")
    entered(task, model, tmp_path, request=half)
    folder = cache_folder(tmp_path, POOLED, "float16")
    rewrite(folder, lambda data: np.multiply(data, np.float16(1.02), out=data), with_checksums=True)
    served = entered(task, model, tmp_path, request=half)
    assert served.used_key() is None
    assert "differ" in served.take_events()[0]


def test_positions_that_were_not_asked_for_are_computed_and_leave_no_files(
    task: Classification, model: PooledViT, tmp_path: Path
) -> None:
    served = entered(task, model, tmp_path, TOKENS, CacheRequest("identity", (POOLED,), when="always"))
    assert served.used_key() is None
    assert served.fetch(model, task.rows("val")).start == IMAGES
    assert list(tmp_path.iterdir()) == []
