"""The store: whole or absent whatever happens, damage noticed and made good, and no result mixed with another's."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import os
import random
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from small_studies import document, planned

from study.documents import StudyError
from study.executors import LocalExecutor
from study.plan import Plan
from study.schedule import Schedule
from study.storage.places import Address
from study.store import PREDICTIONS, RESULT, STATE, TENSORS, WEIGHTS, Store
from tests.object_stores import address_of, object_store
from tests.store_samples import KEY, LEAF, OBSERVER, always, checkpoint, result, said
from trainables.data.chestxray14 import CLASSES
from trainables.requests import Observer
from trainables.results import CellResult, EpochRecord, TrainingError
from trainables.trial import Checkpoint


def saved(folder: Path) -> Store:
    store = Store(folder)
    store.save(KEY, checkpoint())
    store.save_result(LEAF, OBSERVER, result(), b"predictions", {"w": torch.arange(6.0)})
    return store


# -------------------------------------------------------------------------------------------------- what is kept


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    store = saved(tmp_path)
    found = store.newest([KEY], always)
    assert found is not None
    assert said(found) == said(checkpoint())
    assert store.has_state(KEY)


def test_tensors_that_share_memory_or_are_strided_come_back_as_they_were(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    made = checkpoint()
    made.state.tensors |= {"a": base, "b": base, "c": base.T, "d": base[:, 1]}
    store = Store(tmp_path)
    store.save(KEY, made)
    found = store.newest([KEY], always)
    assert found is not None
    assert said(found) == said(made)


def test_a_result_comes_back_as_it_was(tmp_path: Path) -> None:
    store = saved(tmp_path)
    found = store.load_result(LEAF, OBSERVER)
    assert found is not None
    assert json.dumps(dataclasses.asdict(found)) == json.dumps(dataclasses.asdict(result()))
    assert found.undefined == ("Hernia",)
    assert store.predictions(LEAF, OBSERVER).read_bytes() == b"predictions"
    assert store.load_result(LEAF, "raw patience 7") is None
    assert store.load_result(KEY, OBSERVER) is None


def test_the_newest_usable_state_is_found_and_a_dropped_one_is_gone(tmp_path: Path) -> None:
    store = Store(tmp_path)
    keys = [f"{i}" * 64 for i in range(4)]
    for i in (0, 1, 2):
        store.save(keys[i], checkpoint(epoch=i + 1))

    def newest(usable: Callable[[Checkpoint], bool] = always) -> int | None:
        found = store.newest(keys, usable)
        return None if found is None else found.state.epoch

    assert newest() == 3
    assert newest(lambda c: c.state.epoch < 3) == 2
    assert newest(lambda c: False) is None
    store.drop(keys[2])
    store.drop(keys[2])
    assert newest() == 2
    assert not store.has_state(keys[2])


def test_saving_again_leaves_nothing_behind(tmp_path: Path) -> None:
    store = saved(tmp_path)
    for epoch in (1, 2, 3):
        store.save(KEY, checkpoint(epoch))
    saved(tmp_path)
    store.drop(KEY)
    assert list((tmp_path / "partial").iterdir()) == []


# --------------------------------------------------------------------------------------------------------- damage

FILES = [
    ("state", TENSORS),
    ("state", STATE),
    ("result", RESULT),
    ("result", PREDICTIONS),
    ("result", WEIGHTS),
]


def place(store: Store, kind: str, name: str) -> Path:
    (found,) = (store.root / f"{kind}s").rglob(name)
    return found


def read(store: Store, kind: str) -> str | None:
    """What a reader gets of the state or the result, as text."""
    if kind == "state":
        found = store.newest([KEY], always)
        return None if found is None else said(found)
    loaded = store.load_result(LEAF, OBSERVER)
    return None if loaded is None else json.dumps(dataclasses.asdict(loaded))


@pytest.mark.parametrize(("kind", "name"), FILES)
def test_a_flipped_bit_is_noticed_and_said_and_the_key_is_absent_then(
    tmp_path: Path, kind: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = saved(tmp_path)
    whole, expected = place(store, kind, name).read_bytes(), read(store, kind)
    positions = random.Random(name).sample(range(len(whole) * 8), k=min(40, len(whole) * 8))
    noticed = 0
    for position in positions:
        damaged = bytearray(whole)
        damaged[position // 8] ^= 1 << (position % 8)
        saved(tmp_path)
        place(store, kind, name).write_bytes(damaged)
        caplog.clear()
        found = read(store, kind)
        if found is None:
            noticed += 1
            assert len([r for r in caplog.records if r.levelno == logging.WARNING and "damaged" in r.message]) == 1
            assert not store.has_state(KEY) if kind == "state" else not store.has_result(LEAF, OBSERVER)
        else:
            assert found == expected, "a changed value passed for the stored one"
    assert noticed >= 0.95 * len(positions), "all but changes of spelling that JSON allows"


@pytest.mark.parametrize(("kind", "name"), FILES)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_file_cut_short_is_noticed(tmp_path: Path, kind: str, name: str, share: float) -> None:
    store = saved(tmp_path)
    path = place(store, kind, name)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert read(store, kind) is None


@pytest.mark.parametrize(("kind", "name"), FILES)
def test_a_missing_file_is_noticed(tmp_path: Path, kind: str, name: str) -> None:
    store = saved(tmp_path)
    place(store, kind, name).unlink()
    assert read(store, kind) is None
    saved(tmp_path)
    assert read(store, kind) is not None, "and can be written again"


def test_a_damaged_state_gives_way_to_the_one_before(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.save("1" * 64, checkpoint(1))
    store.save("2" * 64, checkpoint(2))
    path = tmp_path / "states" / ("2" * 40) / TENSORS
    path.write_bytes(path.read_bytes()[:-1])
    found = store.newest(["1" * 64, "2" * 64], always)
    assert found is not None
    assert found.state.epoch == 1
    assert not store.has_state("2" * 64)


# ------------------------------------------------------------------------------------------------ kills and company


def forked(task: Callable[[], None]) -> int:
    """Run a task in a forked process, which ends with status 0 if it comes to its end."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            torch.set_num_threads(1)
            task()
            status = 0
        finally:
            os._exit(status)
    return pid


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_save_killed_at_any_moment_leaves_the_key_whole_or_absent(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(tmp_path)
    chance = random.Random(0)
    seen: list[int | None] = []

    def save_all(epoch: int) -> None:
        before = tmp_path / "results" / LEAF[:40]
        if before.exists():  # a result of another trajectory would be refused
            before.rename(tmp_path / f"away {time.monotonic_ns()}")
        store.save(KEY, checkpoint(epoch, size=20_000))
        store.save_result(LEAF, OBSERVER, result("a", str(epoch)), os.urandom(100_000), {"w": torch.ones(20_000)})
        store.drop(KEY) if epoch == 5 else None

    def save_for_ever() -> None:
        for epoch in itertools.cycle(range(1, 6)):
            save_all(epoch)

    started = time.monotonic()
    for epoch in range(1, 6):
        save_all(epoch)
    round_s = 1.5 * (time.monotonic() - started)  # flushing takes as long as the disk is busy
    for _ in range(16):
        pid = forked(save_for_ever)
        time.sleep(chance.uniform(0.001, round_s))
        os.kill(pid, signal.SIGKILL)
        assert ended(pid) == -signal.SIGKILL
        found = store.newest([KEY], always)
        seen.append(None if found is None else found.state.epoch)
        if found is not None:
            assert said(found) == said(checkpoint(found.state.epoch, size=20_000))
        store.load_result(LEAF, OBSERVER)
    assert not caplog.records, "nothing was ever found damaged"
    assert len(set(seen)) >= 3, f"the kills came at different moments: {seen}"


def test_two_processes_may_save_and_drop_the_same_key_at_once(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def save_often() -> None:
        for _ in range(60):
            store.save(KEY, checkpoint(3))
            store.save_result(LEAF, OBSERVER, result(), b"p", {"w": torch.ones(2)})

    def drop_often() -> None:
        for _ in range(200):
            store.drop(KEY)

    pids = [forked(task) for task in (save_often, save_often, drop_often)]
    assert [ended(pid) for pid in pids] == [0, 0, 0]
    assert read(store, "result") is not None
    store.save(KEY, checkpoint(3))
    assert read(store, "state") == said(checkpoint(3))
    assert list((tmp_path / "partial").iterdir()) == []


def test_what_is_saved_a_second_time_stays_where_it_is_so_that_no_reader_finds_nothing(tmp_path: Path) -> None:
    """As by a worker that was cut off and given up, beside the one that took its trial over."""
    store = saved(tmp_path)
    folders = [place(store, kind, name).parent for kind, name in (("state", STATE), ("result", RESULT))]
    there = [folder.stat().st_ino for folder in folders]
    later = checkpoint()
    slower = [dataclasses.replace(epoch, seconds=9.0) for epoch in later.history]
    store.save(KEY, dataclasses.replace(later, history=slower, provenance={"hardware": "another node's"}))
    twice = dataclasses.replace(result(), history=[dataclasses.replace(e, seconds=9.0) for e in result().history])
    store.save_result(LEAF, OBSERVER, twice, b"predictions", {"w": torch.arange(6.0)})
    assert [folder.stat().st_ino for folder in folders] == there
    assert read(store, "state") == said(checkpoint())


@pytest.mark.parametrize("change", ["tensors", "facts", "damage"])
def test_what_is_saved_a_second_time_replaces_what_differs_or_is_damaged(tmp_path: Path, change: str) -> None:
    store, new = saved(tmp_path), checkpoint()
    if change == "tensors":
        new.state.tensors["model/head.weight"] += 1
    elif change == "facts":
        new.state.averages["ema 0.9 tau 20"] += 1
    else:
        place(store, "state", STATE).write_bytes(b"{}")
    store.save(KEY, new)
    assert read(store, "state") == said(new)


def test_a_full_disk_is_an_error_that_leaves_the_key_as_it_was(tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: writing fails in the middle of a file."""
    store = Store(tmp_path)
    store.save(KEY, checkpoint(1))

    def save_too_much() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        with pytest.raises(OSError, match="File too large"):
            store.save(KEY, checkpoint(2, size=50_000))

    assert ended(forked(save_too_much)) == 0
    assert read(store, "state") == said(checkpoint(1))
    assert list((tmp_path / "partial").iterdir()) == []


def test_a_state_is_on_the_disk_before_its_entry_is_and_its_entry_before_the_save_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a power cut leaves depends on this order; the real calls are made, and written down."""
    store = Store(tmp_path)
    done: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def flushed(descriptor: int) -> None:
        done.append(f"flush {Path(f'/proc/self/fd/{descriptor}').readlink().relative_to(tmp_path)}")
        fsync(descriptor)

    def renamed(path: Path, target: Path) -> Path:
        done.append(f"rename {path.relative_to(tmp_path)} {target.relative_to(tmp_path)}")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "replace", renamed)
    store.save(KEY, checkpoint())
    (rename,) = [event for event in done if event.startswith("rename ")]
    partial = rename.split()[1]
    before, after = done[: done.index(rename)], done[done.index(rename) + 1 :]
    contents = [f"flush {partial}/{TENSORS}", f"flush {partial}/{STATE}"]
    assert [event for event in before if partial in event] == [*contents, f"flush {partial}"]
    assert "flush ." in before, "the new folder states/ has an entry of its own"
    assert after == ["flush states"]


def test_what_killed_processes_left_half_written_is_removed_once_it_is_old(tmp_path: Path) -> None:
    store = saved(tmp_path)
    (tmp_path / ".git").mkdir()  # not ours
    kept = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    halves = ["partial/{}/state.json", ".mlflow.db.{}/mlflow.db", "ablation/report/.report.html.{}", "splits/.x.csv.{}"]
    young, old = ([tmp_path / half.format(name) for half in halves] for name in ("17", "18"))
    for path in (*young, *old):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
    yesterday = time.time() - 86_400
    for path in (*old, *(path.parent for path in old[:2]), tmp_path / ".git"):
        os.utime(path, (yesterday, yesterday))
    store.sweep()
    assert [path.exists() for path in old] == [False] * 4
    assert [path.exists() for path in young] == [True] * 4
    assert all((tmp_path / path).exists() for path in kept)


def test_a_storage_that_can_take_no_further_state_says_so_with_the_size_of_one(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.save(KEY, checkpoint(size=200_000))  # 3.2 MB
    store.require_room()

    def without_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))
        with pytest.raises(StudyError, match=r"File too large; a state takes 3\.2 MB, .* make room, and run the same"):
            store.require_room()

    assert ended(forked(without_room)) == 0
    assert list(tmp_path.glob("tmp*")) == [], "the probe is gone"


# ------------------------------------------------------------------------------------------------- what is refused


def test_a_replay_that_differs_is_refused_and_not_kept(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.save_result(LEAF, "raw patience 7", result("a", "b", "c", observer="raw patience 7"), b"", {})
    with pytest.raises(TrainingError, match=r"epoch 2 was trained again and came out different .*another --storage"):
        store.save_result(LEAF, OBSERVER, result("a", "x", "c"), b"", {})
    assert not store.has_result(LEAF, OBSERVER)
    store.save_result(LEAF, OBSERVER, result("a", "b"), b"", {})  # one that stopped earlier
    store.save_result("m" * 64, OBSERVER, result("x", "y"), b"", {})  # another trajectory
    assert store.has_result(LEAF, OBSERVER)
    assert store.has_result("m" * 64, OBSERVER)


def test_a_damaged_result_of_another_observer_does_not_keep_a_result_from_being_saved(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.save_result(LEAF, "raw patience 7", result("a", "b", observer="raw patience 7"), b"", {})
    place(store, "result", RESULT).write_text('{"history": [', encoding="utf-8")
    store.save_result(LEAF, OBSERVER, result("a", "b"), b"", {})
    assert store.load_result(LEAF, OBSERVER) is not None


def test_images_that_have_changed_are_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.check_contents("i" * 64, "c" * 64)
    Store(tmp_path).check_contents("i" * 64, "c" * 64)
    store.check_contents("j" * 64, "0" * 64)
    with pytest.raises(StudyError, match="the images have changed since this storage's results were made") as caught:
        Store(tmp_path).check_contents("i" * 64, "d" * 64)
    assert len(caught.value.problems) == 1


def test_a_record_of_contents_that_a_power_cut_emptied_is_said_and_written_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(tmp_path)
    store.check_contents("i" * 64, "c" * 64)
    (tmp_path / "contents" / ("i" * 40)).write_bytes(b"")
    store.check_contents("i" * 64, "c" * 64)
    assert "is damaged and written anew" in caplog.text
    with pytest.raises(StudyError, match="the images have changed"):
        store.check_contents("i" * 64, "d" * 64)


@pytest.mark.parametrize("below", [".", "deeper/still"])
def test_a_storage_that_cannot_be_written_is_one_clear_error(tmp_path: Path, below: str) -> None:
    """A file in the way stands for a folder without permission, which would not keep the superuser out."""
    (tmp_path / "file").write_text("", encoding="utf-8")
    root = tmp_path / "file" / below
    with pytest.raises(StudyError) as caught:
        Store(root)
    (problem,) = caught.value.problems
    assert problem.startswith(f"--storage {root}: cannot be written (")
    assert problem.endswith("give a writable folder")


def test_a_storage_without_room_for_a_byte_is_one_clear_error(tmp_path: Path) -> None:
    def open_without_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        with pytest.raises(StudyError, match="cannot be written"):
            Store(tmp_path)

    assert ended(forked(open_without_room)) == 0


def test_observers_have_folders_of_their_own_that_every_file_system_takes(tmp_path: Path) -> None:
    names = [Observer(d, t, p).name for d in (None, 0.9, 0.99, 1e-5) for t in (20.0, 1e6, 1e-6) for p in (None, 7)]
    folders = {name: Store(tmp_path).predictions(LEAF, name).parent.name for name in names}
    assert len(set(folders.values())) == len(set(names)) == 20  # τ means nothing without an average
    assert all(len(f) < 200 and set(f) <= set("abcdefghijklmnopqrstuvwxyzNone0123456789.+-") for f in folders.values())


# ---------------------------------------------------------------------------------------------- made good by running


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 4-block encoder of width 16 at 32 px with random weights."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(5)
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, image_size=32, patch_size=8
    )
    transformers.Dinov2Model(config).save_pretrained(folder)
    return folder


class Silent:
    """A listener that counts epochs."""

    def __init__(self) -> None:
        self.epochs = 0
        self.errors: list[str] = []

    def started(self, node: Any) -> None:
        pass

    def epoch(self, node: Any, epoch: EpochRecord) -> None:
        self.epochs += 1

    def finished(self, node: Any) -> None:
        pass

    def failed(self, node: Any, error: str) -> None:
        self.errors.append(error)


def run(plan: Plan, storage: Path | Address) -> tuple[int, dict[str, CellResult]]:
    """Run what a storage lacks, as the driver does; number of epochs trained, and results by row."""
    store, heard = Store(storage), Silent()

    def has_result(chain: Any) -> bool:
        return store.load_result(chain.leaf, chain.observer.name) is not None

    pending = [c for c in plan.chains if not has_result(c)]
    LocalExecutor().run(Schedule(plan, pending, has_result, store.has_state), store, heard)
    assert heard.errors == []
    found = {c.cell.row.name: store.load_result(c.leaf, c.observer.name) for c in plan.chains}
    return heard.epochs, {name: r for name, r in found.items() if r is not None}


def two_rows(folder: Path, encoder: Path) -> Plan:
    rows = [{"name": "two blocks", "set": {"strategy.depth": 2}}, {"name": "all four", "set": {"strategy.depth": 4}}]
    kept = ("Atelectasis", "Effusion", "Infiltration", "Nodule")
    return planned(
        folder,
        document(
            rows,
            seeds=[0],
            dataset={"images": 160, "image_size": 32, "drop_classes": sorted(set(CLASSES) - set(kept))},
            model={"backbone": str(encoder), "head_hidden": 16},
            strategy={"head_epochs": 1, "tune_epochs": 2, "step": 2},
            stopping={"patience": None},
        ),
    )


def test_damaged_states_and_results_are_trained_again_to_the_same_bits(
    tmp_path: Path, encoder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan = two_rows(tmp_path, encoder)
    storage = tmp_path / "outputs"
    epochs, first = run(plan, storage)
    assert (epochs, set(first)) == (1 + 1 + 1 + 1, {"two blocks", "all four"})  # head, k = 2, then k = 2 or 4
    assert run(plan, storage)[0] == 0

    store = Store(storage)
    shared, four = plan.chains[0].keys[1], plan.chains[1]
    assert four.keys[1] == shared
    for path in (
        store.predictions(four.leaf, four.observer.name),
        storage / "states" / shared[:40] / TENSORS,
    ):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
    caplog.clear()
    epochs, again = run(plan, storage)
    assert epochs == 1 + 1, "from the end of the head stage"
    assert sum("damaged" in r.message for r in caplog.records) == 2
    for name, before in first.items():
        now = again[name]
        assert (now.weights_sha256, now.trajectory_sha256) == (before.weights_sha256, before.trajectory_sha256)
        assert json.dumps(now.metrics) == json.dumps(before.metrics)


def test_a_study_in_an_object_store_trains_what_it_trains_in_a_folder_and_makes_damage_good(
    tmp_path: Path, encoder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan = two_rows(tmp_path, encoder)
    _, expected = run(plan, tmp_path / "outputs")
    with object_store(tmp_path / "own") as server:
        storage = address_of(server)
        epochs, found = run(plan, storage)
        assert epochs == 4 and run(plan, storage)[0] == 0
        shared, four = plan.chains[0].keys[1], plan.chains[1]
        for below in (f"results/{four.leaf[:40]}", f"states/{shared[:40]}"):
            (name,) = [n for n in server.objects(below) if n.endswith((PREDICTIONS, TENSORS))]
            data = server.objects(name)[name]
            server.write(name, data[:-1] + bytes([data[-1] ^ 1]))
        epochs, again = run(plan, storage)
        assert epochs == 1 + 1, "from the end of the head stage"
        assert sum("damaged" in r.message for r in caplog.records) == 2
    for name, before in expected.items():
        for now in (found[name], again[name]):
            assert (now.weights_sha256, now.trajectory_sha256) == (before.weights_sha256, before.trajectory_sha256)
            assert json.dumps(now.metrics) == json.dumps(before.metrics)
