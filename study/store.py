"""Stage states and cell results by key: the only file that knows paths. Every write is all or nothing.

Layout of a storage folder:

    states/<key>/       a trajectory after some epoch: tensors.safetensors, state.json (with the tensors' digest)
    results/<leaf>/<observer>/   a cell's result: result.json, predictions.npz, weights.safetensors
    images/  activations/  phantoms/  splits/     what can be made again
    partial/            what is being written; renamed into place when it is whole and on the disk
    locks/              who runs which study here
    <study>/report/     tables and figures
    <study>/pictures/   test images that the report shows
    mlflow.db, mlartifacts/   the default ledger
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from study.documents import StudyError
from study.durable import flush_folder, make_folder, write_file

if TYPE_CHECKING:
    from torch import Tensor

    from trainables.results import CellResult, EpochRecord
    from trainables.trial import Checkpoint

log = logging.getLogger(__name__)

TENSORS = "tensors.safetensors"
STATE = "state.json"
RESULT = "result.json"
PREDICTIONS = "predictions.npz"
WEIGHTS = "weights.safetensors"

LEAST_ROOM = 1 << 20  # bytes that a storage must be able to take, before a study and after something went wrong
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What is being written, by its makers' names for it; what is older than some hours is of processes that were killed.
UNFINISHED = ("partial/*", ".mlflow.db.*", ".ray_auth_token.*", "splits/.*", "locks/.*", "*/report/.*", "*/pictures/.*")
ABANDONED_S = 6 * 3600


class Store:
    """A storage folder. Implements `trainables.trial.Stash`; processes of one machine or file system may share it."""

    def __init__(self, root: Path, *, caches: bool = True) -> None:
        """Use `root`, making it if need be.

        Raises:
            StudyError: the folder cannot be made or written to.
        """
        self.root = root.resolve()
        self._caches = caches
        try:
            make_folder(self.root)
            self._set_aside(LEAST_ROOM)
        except OSError as error:
            remedy = "make room there" if error.errno in NO_ROOM else "give a writable folder"
            raise StudyError([f"--storage {root}: cannot be written ({error.strerror}); {remedy}"]) from error

    def require_room(self) -> None:
        """Make sure that another state can be written, as after something could not be.

        Raises:
            StudyError: it cannot; says why and what to do.
        """
        wanted = max(LEAST_ROOM, self._largest_state())
        try:
            self._set_aside(wanted)
        except OSError as error:
            free = shutil.disk_usage(self.root).free
            lack = f"a state takes {wanted / 1e6:.1f} MB, {free / 1e6:.1f} MB are free; make room"
            remedy = lack if error.errno in NO_ROOM else "make it writable"
            raise StudyError(
                [
                    f"--storage {self.root}: {error.strerror}; {remedy}, and run the same command again: nothing is "
                    "damaged, and it goes on from the last epochs that were saved"
                ]
            ) from error

    def _largest_state(self) -> int:
        """Bytes."""
        largest = 0
        for tensors in (self.root / "states").glob(f"*/{TENSORS}"):
            with contextlib.suppress(FileNotFoundError):  # dropped meanwhile
                largest = max(largest, tensors.stat().st_size)
        return largest

    def _set_aside(self, size: int) -> None:
        """Have the disk give as many bytes, and give them back."""
        with tempfile.TemporaryFile(dir=self.root) as probe:
            os.posix_fallocate(probe.fileno(), 0, size)

    def sweep(self) -> None:
        """Remove what killed processes had begun to write, once nobody can be writing it any more."""
        for leftover in [path for pattern in UNFINISHED for path in self.root.glob(pattern)]:
            with contextlib.suppress(FileNotFoundError):  # its writer or another driver was faster
                newest = max(path.stat().st_mtime for path in (leftover, *leftover.rglob("*")))
                if time.time() - newest > ABANDONED_S:
                    shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()

    # -- folders ------------------------------------------------------------------------------------------------------

    @property
    def images(self) -> Path:
        """Decoded images."""
        return self._made("images")

    @property
    def phantoms(self) -> Path:
        """Drawn data sets."""
        return self._made("phantoms")

    @property
    def splits(self) -> Path:
        """Written splits."""
        return self._made("splits")

    @property
    def tune(self) -> Path:
        """Ray Tune's own files; nothing of ours depends on them."""
        return self._made("tune")

    def activations(self) -> Path:
        """Activation caches of this node."""
        return self._made("activations")

    @property
    def locks(self) -> Path:
        """Who runs which study."""
        return self._made("locks")

    def report(self, study: str) -> Path:
        """Tables, figures and report of a study."""
        return self._made(study, "report")

    def default_tracking_uri(self) -> str:
        """The embedded ledger."""
        return f"sqlite:///{self.root / 'mlflow.db'}"

    def artifacts(self) -> Path:
        """Artifacts of the embedded ledger."""
        return self._made("mlartifacts")

    def cache_folder(self) -> Path | None:
        """See `trainables.trial.Stash`."""
        return self.activations() if self._caches else None

    # -- states -------------------------------------------------------------------------------------------------------

    def has_state(self, key: str) -> bool:
        """Whether a state is there, whole or not."""
        return (self._state(key) / STATE).is_file()

    def newest(self, keys: Sequence[str], usable: Callable[[Checkpoint], bool]) -> Checkpoint | None:
        """The checkpoint of the last of `keys` that is whole and usable; a damaged one is deleted, and said.

        A worker that was given up, because its node was cut off, may still save a deeper state meanwhile and drop the
        one that is being read here: then it is looked for again, and what that worker trained is not trained twice.
        """
        refused: set[str] = set()
        while True:
            found, depth = None, 0
            for at, key in reversed(list(enumerate(keys, start=1))):
                checkpoint = None if key in refused else self._read_state(key)
                if checkpoint is not None and usable(checkpoint):
                    found, depth = checkpoint, at
                    break
                if checkpoint is not None:
                    refused.add(key)
            if not any(self.has_state(key) for key in keys[depth:] if key not in refused):
                return found

    def _read_state(self, key: str) -> Checkpoint | None:
        """A state; None where it is not there, also where it was dropped meanwhile, or damaged (deleted and said)."""
        for again in (True, False):  # it may have been replaced between two of its files
            if not self.has_state(key):
                return None
            try:
                return self._load_state(key)
            except (OSError, ValueError, KeyError, TypeError) as error:
                if not again and self.has_state(key):
                    log.warning("the state %s is damaged (%s); it is deleted and trained again", key[:12], error)
                    self.drop(key)
        return None

    def save(self, key: str, checkpoint: Checkpoint) -> None:
        """Keep a checkpoint under its key."""
        from safetensors.torch import save

        tensors = dict(checkpoint.state.tensors)
        for i, best in enumerate(checkpoint.best.values()):
            tensors |= {f"best/{i}/{name}": tensor for name, tensor in best.items()}
        data = save(_unaliased(tensors))
        facts = {
            "epoch": checkpoint.state.epoch,
            "averages": checkpoint.state.averages,
            "class_state": checkpoint.state.class_state,
            "history": [dataclasses.asdict(record) for record in checkpoint.history],
            "provenance": checkpoint.provenance,
            "best": [list(at) for at in checkpoint.best],
            "sha256": hashlib.sha256(data).hexdigest(),
        }
        self._publish(self._state(key), {TENSORS: data, STATE: _sealed(facts)})

    def _load_state(self, key: str) -> Checkpoint:
        from safetensors.torch import load

        from trainables.loop import State
        from trainables.results import EpochRecord
        from trainables.trial import Checkpoint

        folder = self._state(key)
        facts = _unsealed(folder / STATE)
        data = (folder / TENSORS).read_bytes()
        if hashlib.sha256(data).hexdigest() != facts["sha256"]:
            raise ValueError("its digest does not match")
        tensors = load(data)
        best: dict[tuple[str, int], dict[str, Tensor]] = {}
        for i, (copy, epoch) in enumerate(facts["best"]):
            prefix = f"best/{i}/"
            best[copy, epoch] = {n[len(prefix) :]: t for n, t in tensors.items() if n.startswith(prefix)}
        own = {n: t for n, t in tensors.items() if not n.startswith("best/")}
        state = State(facts["epoch"], own, facts["averages"], facts["class_state"])
        return Checkpoint(state, [EpochRecord(**r) for r in facts["history"]], facts["provenance"], best)

    def history(self, key: str) -> list[EpochRecord] | None:
        """Records of the epochs up to a state; None where it is not there or damaged, which its next user says."""
        from trainables.results import EpochRecord

        try:
            return [EpochRecord(**record) for record in _unsealed(self._state(key) / STATE)["history"]]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def drop(self, key: str) -> None:
        """Forget a state."""
        self._discard(self._state(key))

    # -- results ------------------------------------------------------------------------------------------------------

    def has_result(self, leaf: str, observer: str) -> bool:
        """Whether a cell's result is there."""
        return (self._result(leaf, observer) / RESULT).is_file()

    def load_result(self, leaf: str, observer: str) -> CellResult | None:
        """A cell's result, None where there is none or it is damaged (deleted then, and said)."""
        from trainables.results import CellResult, EpochRecord

        folder = self._result(leaf, observer)
        if not (folder / RESULT).is_file():
            return None
        try:
            facts = _unsealed(folder / RESULT)
            for name, expected in facts.pop("files").items():
                if hashlib.sha256((folder / name).read_bytes()).hexdigest() != expected:
                    raise ValueError(f"the digest of {name} does not match")
            facts["history"] = [EpochRecord(**record) for record in facts["history"]]
            facts["undefined"] = tuple(facts["undefined"])
            return CellResult(**facts)
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("the result %s is damaged (%s); it is deleted and made again", folder.name, error)
            self._discard(folder)
            return None

    def predictions(self, leaf: str, observer: str) -> Path:
        """File of a result's test predictions."""
        return self._result(leaf, observer) / PREDICTIONS

    def save_result(
        self, leaf: str, observer: str, result: CellResult, predictions: bytes, weights: dict[str, Tensor]
    ) -> None:
        """Keep a cell's result.

        Raises:
            TrainingError: another observer's result of this trajectory has other weights at an epoch both saw.
        """
        from safetensors.torch import save

        self._check_same_trajectory(leaf, result)
        files = {PREDICTIONS: predictions, WEIGHTS: save(_unaliased(weights))}
        facts = dataclasses.asdict(result)
        facts["files"] = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
        self._publish(self._result(leaf, observer), {**files, RESULT: _sealed(facts)})

    def _check_same_trajectory(self, leaf: str, result: CellResult) -> None:
        from trainables.results import TrainingError

        for path in self._made("results", leaf[:40]).glob(f"*/{RESULT}"):
            try:
                other = _unsealed(path)
            except (OSError, ValueError):
                continue  # damaged: said and made again when it is loaded
            for ours, theirs in zip(result.history, other["history"], strict=False):
                if ours.trajectory_sha256 != theirs["trajectory_sha256"]:
                    raise TrainingError(
                        f"epoch {ours.epoch} was trained again and came out different (weights "
                        f"{ours.trajectory_sha256[:12]}, on record {theirs['trajectory_sha256'][:12]}): hardware or "
                        "library versions have changed; use another --storage"
                    )

    # -- contents -----------------------------------------------------------------------------------------------------

    def check_contents(self, index_digest: str, contents_digest: str) -> None:
        """Record the digest of a data set's image contents; later runs must find the same.

        Raises:
            StudyError: the images have changed since results were made from them.
        """
        path = self._made("contents") / index_digest[:40]
        recorded = path.read_bytes() if path.is_file() else b""
        if not re.fullmatch(rb"[0-9a-f]{64}", recorded):
            if path.is_file():
                log.warning("%s is damaged and written anew; every state and result holds the digest too", path)
            self._write(path, contents_digest.encode())
        elif recorded != contents_digest.encode():
            raise StudyError(
                ["the images have changed since this storage's results were made; use another --storage for them"]
            )

    # -- small parts --------------------------------------------------------------------------------------------------

    def _made(self, *parts: str) -> Path:
        return make_folder(self.root.joinpath(*parts))

    def _state(self, key: str) -> Path:
        return state_folder(self.root, key)

    def _result(self, leaf: str, observer: str) -> Path:
        return result_folder(self.root, leaf, observer)

    def _temporary(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self._made("partial")))

    def _write(self, path: Path, data: bytes) -> None:
        temporary = self._temporary()
        try:
            write_file(temporary / "file", data)
            (temporary / "file").replace(path)
            flush_folder(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _publish(self, folder: Path, files: dict[str, bytes]) -> None:
        """Write files beside and put their folder in place with one rename.

        Files, their entries and the renamed entry are on the disk, in this order, when it returns: a power cut leaves
        the folder whole or absent, and what the caller drops next was replaced for good.
        """
        temporary = self._temporary()
        try:
            for name, data in files.items():
                write_file(temporary / name, data)
            flush_folder(temporary)
            make_folder(folder.parent)
            self._put(temporary, folder)
            flush_folder(folder.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _put(self, temporary: Path, folder: Path) -> None:
        """Rename a folder into place, also if other processes do the same.

        What is there already stays if it is the same, so that nobody who looks for it finds nothing; else it goes.
        """
        while True:
            try:
                temporary.replace(folder)
                return
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            if _is_same(temporary, folder):
                shutil.rmtree(temporary, ignore_errors=True)
                return
            self._discard(folder)

    def _discard(self, folder: Path) -> None:
        """Remove a folder with one rename, so that nobody sees half of it; one that is gone already is no matter."""
        grave = self._temporary()
        with contextlib.suppress(FileNotFoundError):
            folder.replace(grave / "dropped")
        shutil.rmtree(grave, ignore_errors=True)


def state_folder(root: Path, key: str) -> Path:
    """Folder of a state."""
    return root / "states" / key[:40]


def result_folder(root: Path, leaf: str, observer: str) -> Path:
    """Folder of a cell's result."""
    return root / "results" / leaf[:40] / re.sub(r"[^A-Za-z0-9.+]+", "-", observer)


def pictures_file(root: Path, study: str, dataset: str) -> Path:
    """File of the test images of a data set that a study's report shows."""
    return root / study / "pictures" / f"{dataset}.npz"


def _is_same(new: Path, old: Path) -> bool:
    """Whether two folders hold the same training, whole: all but what it cost and where it was done."""
    try:
        for file in new.iterdir():
            if file.suffix != ".json":
                if file.read_bytes() != (old / file.name).read_bytes():
                    return False
            elif _lasting(file) != _lasting(old / file.name):
                return False
    except (OSError, ValueError):
        return False
    return True


def _lasting(path: Path) -> str:
    """Sealed facts without the clock and the machine, as text: NaN equals NaN."""
    facts = _unsealed(path)
    return json.dumps({name: facts[name] for name in sorted(facts) if name not in ("history", "provenance")})


def _sealed(facts: dict[str, Any]) -> bytes:
    """Facts as JSON, with their own digest."""
    plain = json.loads(json.dumps(facts))
    return json.dumps(plain | {"seal": _seal(plain)}).encode()


def _unsealed(path: Path) -> dict[str, Any]:
    """Facts as they were sealed.

    Raises:
        ValueError: not JSON, or not what was written.
    """
    facts = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(facts, dict) or facts.pop("seal", None) != _seal(facts):
        raise ValueError(f"the digest of {path.name} does not match")
    return facts


def _seal(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _unaliased(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Safetensors refuses tensors that share memory: contiguous ones, and copies of what is there already."""
    owned: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.contiguous()
        memory = plain.untyped_storage().data_ptr()
        owned[name] = plain.clone() if memory in seen else plain
        seen.add(memory)
    return owned
