"""What a storage keeps, wherever it lies: the same promises of a folder and of an object store, looked at from behind.

The object store is a server over loopback that speaks S3; what goes wrong goes wrong in the server or in its objects.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from study.documents import StudyError
from study.storage import object_store as module
from study.storage.object_store import MANIFEST, ObjectStore
from study.storage.places import Address, AwayError
from study.storage.seals import sealed, unsealed
from study.storage.sharing import bring, reach, share
from study.store import PREDICTIONS, RESULT, STATE, TENSORS, WEIGHTS, Store, kept_in, result_name, state_name
from tests.object_stores import KEY as KEY_ID
from tests.object_stores import SECRET, address_of, object_store
from tests.object_stores import Store as Server
from tests.store_samples import KEY, LEAF, OBSERVER, always, checkpoint, result, said
from tests.studies_for_tests import ROOT
from trainables.cache_files import write_record
from trainables.results import TrainingError

STATES = [TENSORS, STATE]
RESULTS = [RESULT, PREDICTIONS, WEIGHTS]


class Behind:
    """A storage, and what lies there behind the project's back."""

    def __init__(self, address: Address, server: Server | None) -> None:
        self.address, self.server = address, server

    def files(self) -> dict[str, bytes]:
        """Name → contents of all that is kept of states and results, and of what was begun."""
        if self.server is not None:
            found = self.server.objects()
        else:
            root = self.address.folder
            found = {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}
        return {name: data for name, data in found.items() if name.split("/")[0] in ("states", "results", "partial")}

    def find(self, end: str) -> str:
        """The one name that ends so."""
        (found,) = [name for name in self.files() if name.rpartition("/")[2] == end]
        return found

    def write(self, name: str, data: bytes) -> None:
        """Replace a file's contents."""
        if self.server is not None:
            self.server.write(name, data)
        else:
            (self.address.folder / name).write_bytes(data)

    def remove(self, name: str) -> None:
        """Remove a file."""
        if self.server is not None:
            self.server.delete(name)
        else:
            (self.address.folder / name).unlink()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with object_store(tmp_path / "own") as store:
        yield store


@pytest.fixture(params=["folder", "object store"])
def kept(request: pytest.FixtureRequest, tmp_path: Path) -> Behind:
    if request.param == "folder":
        return Behind(Address(tmp_path / "storage"), None)
    store = request.getfixturevalue("server")
    return Behind(address_of(store), store)


def saved(storage: Address | Store, epoch: int = 2) -> Store:
    store = storage if isinstance(storage, Store) else Store(storage)
    store.save(KEY, checkpoint(epoch))
    store.save_result(LEAF, OBSERVER, result(), b"predictions", {"w": torch.arange(6.0)})
    return store


def read(store: Store, file: str) -> str | None:
    """What a reader gets of the state or the result that a file belongs to, as text."""
    if file in STATES:
        found = store.newest([KEY], always)
        return None if found is None else said(found)
    loaded = store.load_result(LEAF, OBSERVER)
    return None if loaded is None else json.dumps(dataclasses.asdict(loaded))


# -------------------------------------------------------------------------------------------------- what is kept


def test_states_and_results_come_back_as_they_were_to_every_process(kept: Behind) -> None:
    saved(kept.address)
    store = Store(kept.address)
    found = store.newest([KEY], always)
    assert found is not None and said(found) == said(checkpoint())
    history = store.history(KEY)
    assert history is not None
    assert json.dumps([vars(r) for r in history]) == json.dumps([vars(r) for r in checkpoint().history])
    loaded = store.load_result(LEAF, OBSERVER)
    assert loaded is not None and json.dumps(vars(loaded), default=vars) == json.dumps(vars(result()), default=vars)
    assert store.predictions(LEAF, OBSERVER).read_bytes() == b"predictions"
    assert store.load_result(LEAF, "raw patience 7") is None and store.history("n" * 64) is None
    assert not store.has_state("n" * 64) and not store.has_result(KEY, OBSERVER)


def test_the_newest_usable_state_is_found_and_a_dropped_one_is_gone(kept: Behind) -> None:
    store, keys = Store(kept.address), [f"{i}" * 64 for i in range(3)]
    for i in (0, 1):
        store.save(keys[i], checkpoint(epoch=i + 1))
    newest = store.newest(keys, always)
    assert newest is not None and newest.state.epoch == 2
    assert store.newest(keys, lambda c: c.state.epoch < 2).state.epoch == 1  # type: ignore[union-attr]
    store.drop(keys[1])
    store.drop(keys[1])
    assert not store.has_state(keys[1]) and store.history(keys[1]) is None
    assert {name.split("/")[1] for name in kept.files()} == {keys[0][:40]}


def test_writing_again_replaces_and_leaves_nothing_behind(kept: Behind) -> None:
    store = saved(kept.address)
    before = len(kept.files())
    for epoch in (1, 3):
        saved(store, epoch)
    assert len(kept.files()) == before
    found = store.newest([KEY], always)
    assert found is not None and said(found) == said(checkpoint(3))
    store.drop(KEY)
    assert not [name for name in kept.files() if name.startswith(("states", "partial"))]


def test_what_a_plan_asks_for_is_what_is_kept_and_asking_writes_nothing(kept: Behind) -> None:
    kept_before = kept_in(kept.address)
    saved(kept.address)
    store = kept.server
    if store is not None:
        store.requests.clear()
    there = kept_in(kept.address)
    names = [state_name(KEY), result_name(LEAF, OBSERVER), state_name("n" * 64), result_name(LEAF, "raw patience 7")]
    assert [there(name) for name in names] == [True, True, False, False]
    assert store is None or ({method for method, _ in store.requests} == {"GET"} and not kept_before(names[0]))


def test_a_replay_that_differs_and_images_that_changed_are_refused(kept: Behind) -> None:
    store = Store(kept.address)
    store.save_result(LEAF, "raw patience 7", result("a", "b", observer="raw patience 7"), b"", {})
    with pytest.raises(TrainingError, match="epoch 2 was trained again and came out different"):
        store.save_result(LEAF, OBSERVER, result("a", "x"), b"", {})
    assert not store.has_result(LEAF, OBSERVER)
    store.check_contents("i" * 64, "c" * 64)
    Store(kept.address).check_contents("i" * 64, "c" * 64)
    with pytest.raises(StudyError, match="the images have changed"):
        Store(kept.address).check_contents("i" * 64, "d" * 64)


# --------------------------------------------------------------------------------------------------------- damage


def flipped(data: bytes) -> bytes:
    middle = 2 * len(data) // 3
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize("file", [*STATES, *RESULTS])
def test_damage_is_noticed_and_said_once_and_the_key_is_absent_until_it_is_written_again(
    kept: Behind, file: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = saved(kept.address)
    whole = read(store, file)
    for damage in ("flipped", "cut", "emptied", "missing"):
        caplog.clear()
        name = kept.find(file)
        data = kept.files()[name]
        if damage == "missing":
            kept.remove(name)
        else:
            kept.write(name, {"flipped": flipped(data), "cut": data[: len(data) // 2], "emptied": b""}[damage])
        assert read(store, file) is None, damage
        told = [r.message for r in caplog.records if r.levelno == logging.WARNING and "damaged" in r.message]
        if not (damage == "missing" and file in (STATE, RESULT) and kept.server is None):  # then nothing is there
            assert len(told) == 1 and "deleted and" in told[0]
        assert not (store.has_state(KEY) if file in STATES else store.has_result(LEAF, OBSERVER))
        saved(store)
        assert read(store, file) == whole


@pytest.mark.parametrize("file", [TENSORS, RESULT])
def test_a_damaged_manifest_is_no_manifest(server: Server, file: str) -> None:
    store = saved(address_of(server))
    bundle = state_name(KEY) if file == TENSORS else result_name(LEAF, OBSERVER)
    name = f"{bundle}/{MANIFEST}"
    server.write(name, flipped(server.objects()[name]))
    assert read(store, file) is None
    assert not [left for left in server.objects() if left.startswith(bundle)], "nothing is left of what it named"


def test_a_result_that_was_copied_to_another_bucket_is_read_to_the_last_byte_and_believed(server: Server) -> None:
    """A store that was copied shows other marks for the same bytes; as one does that was written in parts."""
    store, name = saved(address_of(server)), result_name(LEAF, OBSERVER)
    facts = unsealed(server.objects()[f"{name}/{MANIFEST}"], MANIFEST)
    for entry in facts["files"].values():
        entry["mark"] += "-1"
    server.write(f"{name}/{MANIFEST}", sealed(facts))
    assert store.load_result(LEAF, OBSERVER) is not None
    weights = next(key for key in server.objects() if key.endswith(WEIGHTS))
    server.write(weights, flipped(server.objects()[weights]))
    assert store.load_result(LEAF, OBSERVER) is None


def test_results_in_order_are_not_downloaded_to_be_checked(server: Server) -> None:
    store = saved(address_of(server))
    server.requests.clear()
    assert store.load_result(LEAF, OBSERVER) is not None
    fetched = [path.rpartition("/")[2] for method, path in server.requests if method == "GET" and "/results/" in path]
    assert WEIGHTS not in fetched and PREDICTIONS not in fetched and RESULT in fetched


def test_an_epoch_costs_about_a_dozen_requests_whatever_the_size_of_its_state(server: Server) -> None:
    """As docs/storage.md says."""
    store = Store(address_of(server))

    def requests(ask: Callable[[], object]) -> int:
        server.requests.clear()
        ask()
        return len(server.requests)

    for size in (50, 100_000):
        made = checkpoint(size=size)
        assert requests(lambda made=made: store.save(KEY, made)) == 6  # type: ignore[misc]
        assert (requests(lambda: store.has_state(KEY)), requests(lambda: store.has_state("n" * 64))) == (1, 2)
        assert requests(lambda: store.drop(KEY)) == 5


# ------------------------------------------------------------------------------------------- writers that do not end


def test_whatever_write_is_the_last_that_succeeds_a_reader_finds_the_old_or_the_new_state_whole(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A writer that is cut off after its n-th write to the store, for every n."""
    store, reader = saved(address_of(server)), Store(address_of(server))
    monkeypatch.setattr(store.place, "_patience_s", 0.0)
    seen: list[tuple[int, int]] = []
    for before in range(20):
        store.save(KEY, checkpoint(1))
        server.writes_left = before
        try:
            store.save(KEY, checkpoint(2))
            done = True
        except AwayError:
            done = False
        server.writes_left = None
        found = reader.newest([KEY], always)
        assert found is not None and said(found) == said(checkpoint(found.state.epoch))
        seen.append((before, found.state.epoch))
        if done:
            break
    assert done and [epoch for _, epoch in seen] == [1, 1, 1, *[2] * (len(seen) - 3)], "the manifest is the third write"
    assert not [r for r in caplog.records if "damaged" in r.message]


def test_what_cut_off_writers_left_is_swept_once_it_is_old_and_what_counts_stays(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = saved(address_of(server))
    counted = set(server.objects())
    monkeypatch.setattr(store.place, "_patience_s", 0.0)
    for key in (KEY, "o" * 64):  # beside a whole one, and alone
        server.writes_left = 1
        with pytest.raises(AwayError):
            store.save(key, checkpoint(1))
        server.writes_left = None
    server.write("partial/left", b"x")
    assert len(server.objects()) == len(counted) + 3
    store.sweep()
    assert len(server.objects()) == len(counted) + 3, "somebody may be writing it"
    monkeypatch.setattr(module, "ABANDONED_S", -1)
    store.sweep()
    assert set(server.objects()) == counted
    assert read(store, STATE) == said(checkpoint())


@pytest.mark.slow
def test_who_reads_while_a_state_is_written_again_finds_one_of_them_whole(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    store, reader = Store(address_of(server)), Store(address_of(server))
    store.save(KEY, checkpoint(1))
    ended = threading.Event()

    def write() -> None:
        for i in range(12):
            store.save(KEY, checkpoint(1 + i % 3))
        ended.set()

    thread = threading.Thread(target=write)
    thread.start()
    seen = set()
    while not ended.is_set():
        found = reader.newest([KEY], always)
        assert found is not None and said(found) == said(checkpoint(found.state.epoch))
        seen.add(found.state.epoch)
    thread.join()
    assert len(seen) > 1 and not caplog.records


KILLED = """
import sys
from tests.store_samples import KEY, checkpoint
from study.storage.places import Address
from study.store import Store
store = Store(Address.at(sys.argv[1]))
print("begun", flush=True)
epoch = 0
while True:
    epoch += 1
    store.save(KEY, checkpoint(1 + epoch % 5, size=50_000))
"""


@pytest.mark.slow
def test_a_writer_killed_at_some_moment_leaves_the_state_whole(server: Server) -> None:
    store = Store(address_of(server))
    store.save(KEY, checkpoint(1, size=50_000))
    command = [sys.executable, "-c", KILLED, server.uri]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None and writer.stdout.readline() == b"begun\n"
        time.sleep(1.23)
        writer.kill()
    found = store.newest([KEY], always)
    assert found is not None and said(found) == said(checkpoint(found.state.epoch, size=50_000))


# ------------------------------------------------------------------------------------------------- a store in trouble


@pytest.mark.parametrize("trouble", ["403", "503", "stopped"])
def test_a_store_that_is_away_for_a_while_is_waited_for_and_that_is_said(
    server: Server, trouble: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(address_of(server))
    if trouble == "stopped":
        server.stop()
    else:
        server.refuses = int(trouble)

    def mend() -> None:
        server.refuses = None
        if trouble == "stopped":
            server.start()

    timer = threading.Timer(1.5, mend)
    timer.start()
    store.save(KEY, checkpoint())
    timer.join()
    told = [record.message for record in caplog.records]
    assert len(told) == 2 and "trying again for" in told[0] and "answers again after" in told[1]
    assert read(store, STATE) == said(checkpoint())


def test_a_store_that_stays_away_is_an_error_and_no_damage(server: Server) -> None:
    store = saved(address_of(server))
    store.place._patience_s = 0.5  # type: ignore[attr-defined]
    server.stop()
    for ask in (
        lambda: store.newest([KEY], always),
        lambda: store.load_result(LEAF, OBSERVER),
        lambda: store.history(KEY),
        lambda: store.has_state(KEY),
        lambda: store.save_result(LEAF, OBSERVER, result(), b"", {}),
    ):
        with pytest.raises(AwayError, match="cannot be reached"):
            ask()
    with pytest.raises(StudyError, match=r"cannot be reached .* run the same command again: nothing is damaged"):
        store.require_room()
    server.start()
    store.require_room()
    assert read(store, STATE) == said(checkpoint()) and store.load_result(LEAF, OBSERVER) is not None


@pytest.mark.parametrize(
    ("trouble", "reason", "remedy"),
    [
        ("no credentials", "no credentials are found", "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
        ("forbidden", "the store refuses it (Access Denied)", "check the credentials"),
        ("no bucket", "there is no bucket no-such-bucket", "make it, or mend the address"),
        ("no server", "the store cannot be reached", "mend AWS_ENDPOINT_URL"),
    ],
)
def test_a_store_that_cannot_be_used_is_one_error_that_names_the_remedy_and_no_secret(
    server: Server, monkeypatch: pytest.MonkeyPatch, trouble: str, reason: str, remedy: str
) -> None:
    address = address_of(server)
    if trouble == "no credentials":
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "none")
    elif trouble == "forbidden":
        server.refuses = 403
    elif trouble == "no bucket":
        address = Address.at("s3://no-such-bucket/x")
    else:
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StudyError) as caught:
        Store(address)
    (problem,) = caught.value.problems
    assert problem.startswith(f"--storage {address.uri}: {reason}") and remedy in problem
    assert SECRET not in problem


def test_what_a_store_says_is_repeated_without_credentials(server: Server) -> None:
    said = module._explained(OSError(f"{KEY_ID}:{SECRET} at http://user:{SECRET}@host/x is wrong"), server.uri)
    assert "wrong" in str(said) and "host/x" in str(said)
    assert KEY_ID not in str(said) and SECRET not in str(said) and "user" not in str(said)


# ------------------------------------------------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("gs://bucket/x", "expected a folder or s3://BUCKET/PREFIX"),
        (f"s3://key:{SECRET}@bucket/x", "credentials do not belong into an address"),
        ("s3://", "is no name of a bucket"),
        ("s3://Bucket/x", "is no name of a bucket"),
        ("s3://bucket/../x", "its prefix has something else"),
        ("s3://bucket/x?versionId=1", "its prefix has something else"),
        ("s3://bucket//x", "its prefix has something else"),
    ],
)
def test_an_address_that_cannot_be_one_is_refused_without_repeating_credentials(typed: str, said: str) -> None:
    with pytest.raises(StudyError) as caught:
        Address.at(typed)
    (problem,) = caught.value.problems
    assert said in problem and SECRET not in problem


def test_a_machine_keeps_its_own_part_where_it_is_told_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SPFT_LOCAL", raising=False)
    monkeypatch.chdir(tmp_path)
    address = Address.at("s3://bucket/a/b/")
    assert address.uri == address.shown == "s3://bucket/a/b"
    assert address.folder == address.here().folder == tmp_path / "outputs" / "s3" / "bucket" / "a" / "b"
    monkeypatch.setenv("SPFT_LOCAL", str(tmp_path / "scratch"))
    assert address.here() == Address(tmp_path / "scratch" / "s3" / "bucket" / "a" / "b", address.uri)
    assert Address(tmp_path).here() == Address(tmp_path)


def test_splits_and_reports_go_to_the_store_and_from_there_to_other_machines(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = address_of(server)
    (ours.folder / "splits").mkdir(parents=True)
    (ours.folder / "splits" / "phantom.csv").write_text("ours")
    (ours.folder / "splits" / ".phantom.csv.17").write_text("half")
    share(ours, "splits")
    monkeypatch.setenv("SPFT_LOCAL", str(tmp_path / "other"))
    theirs = ours.here()
    assert theirs.folder != ours.folder
    reach(theirs)
    assert [p.name for p in (theirs.folder / "splits").iterdir()] == ["phantom.csv"]
    assert (theirs.folder / "splits" / "phantom.csv").read_text() == "ours"
    (theirs.folder / "splits" / "phantom.csv").write_text("kept")
    bring(theirs, "splits")
    with pytest.raises(StudyError, match=r"phantom\.csv is not the one in s3://.* remove it"):
        Store(theirs).share_splits()
    assert server.objects("splits") == {"splits/phantom.csv": b"ours"}
    assert (theirs.folder / "splits" / "phantom.csv").read_text() == "kept", "what is here is checked by its digest"


def test_a_result_that_is_written_again_while_it_is_checked_counts(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first look finds the manifest of before, whose objects are gone by the second."""
    store = saved(address_of(server))
    listed, again = module.ObjectStore._listed, [True]

    def late(place: module.ObjectStore, below: str) -> Any:
        if again and below == result_name(LEAF, OBSERVER):
            again.clear()
            saved(address_of(server))
        return listed(place, below)

    monkeypatch.setattr(module.ObjectStore, "_listed", late)
    assert store.load_result(LEAF, OBSERVER) is not None
    assert not again
    assert saved(address_of(server)).load_result(LEAF, OBSERVER) is not None


def test_pictures_that_another_machine_has_written_anew_are_brought(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = address_of(server)
    server.write("ablation/pictures/phantom.npz", b"new")
    (ours.folder / "ablation" / "pictures").mkdir(parents=True)
    (ours.folder / "ablation" / "pictures" / "phantom.npz").write_bytes(b"old")
    bring(ours, "ablation/pictures")
    assert (ours.folder / "ablation" / "pictures" / "phantom.npz").read_bytes() == b"old"
    bring(ours, "ablation/pictures", replace=True)
    assert (ours.folder / "ablation" / "pictures" / "phantom.npz").read_bytes() == b"new"


def test_of_the_copies_of_a_file_the_one_that_counts_is_kept(server: Server) -> None:
    store = saved(address_of(server))
    first = store.predictions(LEAF, OBSERVER)
    assert first.is_file()
    second = saved(address_of(server)).predictions(LEAF, OBSERVER)
    assert second.is_file() and second != first and not first.exists()


def test_names_that_lead_out_of_a_folder_are_not_followed(server: Server, tmp_path: Path) -> None:
    store, name = saved(address_of(server)), result_name(LEAF, OBSERVER)
    facts = unsealed(server.objects()[f"{name}/{MANIFEST}"], MANIFEST)
    facts["files"][PREDICTIONS]["object"] = f"../../../../../escaped/{PREDICTIONS}"
    server.write(f"{name}/{MANIFEST}", sealed(facts))
    assert not store.predictions(LEAF, OBSERVER).exists() and store.load_result(LEAF, OBSERVER) is None
    server.write("splits/../../escaped.csv", b"x")
    assert [found for found in store.place.names("splits") if ".." in found], "the server keeps such a name"
    with pytest.raises(StudyError, match="no file of a storage is called so"):
        store.bring_splits()
    assert not [path for path in tmp_path.rglob("*") if "escaped" in path.name]


def test_what_caches_cost_is_counted_once_for_each_machine_that_built_them(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def machine(name: str, units: int) -> Store:
        monkeypatch.setenv("SPFT_LOCAL", str(tmp_path / name))
        store = Store(Address.at(server.uri))
        (store.activations() / "cache").mkdir(exist_ok=True)
        write_record(store.activations() / "cache", {"units": units, "builds": 1, "present": True})
        store.note_caches()
        store.note_caches()
        return store

    one, two = machine("one", 30), machine("two", 12)
    again = machine("two", 20)  # built on after damage, by another process there
    assert two.cache_units(["cache"]) == one.cache_units(["cache"]) == again.cache_units(["cache"]) == {"cache": 50}
    assert one.cache_units(["another"]) == {"another": 0}
    assert len(server.objects("caches")) == 2


@pytest.mark.slow
def test_a_large_object_is_written_in_parts_and_comes_back(server: Server) -> None:
    place = Store(address_of(server)).place
    assert isinstance(place, ObjectStore)
    data = hashlib.shake_128(b"large").digest(120 << 20)
    place.publish("states/large", {TENSORS: data})
    assert any("uploadId" in path or method == "POST" for method, path in server.requests)
    place.check("states/large", {TENSORS: hashlib.sha256(data).hexdigest()})
    assert place.read("states/large", TENSORS) == [data]
