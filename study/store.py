"""Stage states and cell results by key: the only file that knows what is kept where. Every write is all or nothing.

Layout of a storage:

    states/<key>/       a trajectory after some epoch: tensors.safetensors, state.json (with the tensors' digest)
    results/<leaf>/<observer>/   a cell's result: result.json, predictions.npz, weights.safetensors
    contents/           digests of the images that results were made from
    splits/             written splits
    <study>/report/     tables and figures
    <study>/pictures/   test images that the report shows

and of a machine's own part, which is the same folder unless the storage is on a URI:

    images/  activations/  phantoms/     what can be made again
    partial/            what is being written; renamed into place when it is whole and on the disk
    locks/              who runs which study here
    mlflow.db, mlartifacts/   the default ledger
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from study.documents import StudyError
from study.storage.durable import make_folder
from study.storage.places import LEAST_ROOM, LOCAL, Address, AwayError, LocalFolder, place_of
from study.storage.seals import sealed, unsealed
from study.storage.sharing import bring, cache_units, note_caches, share

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
GO_ON = "run the same command again: nothing is damaged, and it goes on from the last epochs that were saved"


class Store:
    """A storage. Implements `trainables.trial.Stash`; processes of one machine share it, and all that see its place.

    Attributes:
        address: where it lies.
        root: folder of this machine's own part: caches, locks, reports; of everything where no URI was given.
        place: what keeps states and results.
    """

    def __init__(self, storage: Address | Path, *, caches: bool = True) -> None:
        """Use a folder, making it if need be, or an object store that is there.

        Raises:
            StudyError: it cannot be made or written to.
        """
        address = Address.of(storage)
        self._caches = caches
        self._noted: dict[str, int] = {}
        self.root = address.folder.resolve()
        self.address = Address(self.root, address.uri)
        self.place = place_of(self.address)
        own = LocalFolder(self.root)
        try:
            own.require(LEAST_ROOM)
            if address.uri is not None:
                self.place.require(LEAST_ROOM)
        except AwayError as error:
            raise StudyError([str(error)]) from error
        except OSError as error:
            where = "" if address.uri is None else f" its folder on this machine, {self.root} (see {LOCAL}),"
            told = f"cannot be written ({error.strerror}); {own.advice(error)}"
            raise StudyError([f"--storage {address.shown}:{where} {told}"]) from error

    def require_room(self) -> None:
        """Make sure that another state can be written, as after something could not be.

        Raises:
            StudyError: it cannot; says why and what to do.
        """
        wanted = max(LEAST_ROOM, self.place.largest("states", TENSORS))
        try:
            self.place.require(wanted)
        except OSError as error:
            told = f"{error.strerror}; {self.place.advice(error, wanted)}"
            raise StudyError([f"--storage {self.address.shown}: {told}, and {GO_ON}"]) from error

    def sweep(self) -> None:
        """Remove what killed processes had begun to write, once nobody can be writing it any more."""
        LocalFolder(self.root).sweep()
        if self.address.uri is not None:
            self.place.sweep()

    def bring_splits(self) -> None:
        """Have the storage's splits on this machine: a data set is split once, wherever it is trained."""
        bring(self.address, "splits", self.place)

    def share_splits(self) -> None:
        """Give the storage the splits that were made on this machine.

        Raises:
            StudyError: it has others, as where another machine has split the same data at the same time.
        """
        share(self.address, "splits", self.place, replace=False)

    def note_caches(self) -> None:
        """Give the storage the record of what this machine's activation caches have cost."""
        note_caches(self.address, self.place, self._noted)

    def cache_units(self, names: Iterable[str]) -> dict[str, int]:
        """Name of an activation cache → units that building it has cost, on all machines together."""
        return cache_units(self.address, self.place, names)

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
        """Written splits, on this machine."""
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
        return self.place.has(state_name(key), STATE)

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
            except AwayError:
                raise
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
        self.place.publish(state_name(key), {TENSORS: data, STATE: sealed(facts)})

    def _load_state(self, key: str) -> Checkpoint:
        from safetensors.torch import load

        from trainables.loop import State
        from trainables.results import EpochRecord
        from trainables.trial import Checkpoint

        told, data = self.place.read(state_name(key), STATE, TENSORS)
        facts = unsealed(told, STATE)
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
            (told,) = self.place.read(state_name(key), STATE)
            return [EpochRecord(**record) for record in unsealed(told, STATE)["history"]]
        except AwayError:
            raise
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def drop(self, key: str) -> None:
        """Forget a state."""
        self.place.discard(state_name(key))

    # -- results ------------------------------------------------------------------------------------------------------

    def has_result(self, leaf: str, observer: str) -> bool:
        """Whether a cell's result is there."""
        return self.place.has(result_name(leaf, observer), RESULT)

    def load_result(self, leaf: str, observer: str) -> CellResult | None:
        """A cell's result, None where there is none or it is damaged (deleted then, and said)."""
        from trainables.results import CellResult, EpochRecord

        bundle = result_name(leaf, observer)
        if not self.place.has(bundle, RESULT):
            return None
        try:
            (told,) = self.place.read(bundle, RESULT)
            facts = unsealed(told, RESULT)
            self.place.check(bundle, facts.pop("files"))
            facts["history"] = [EpochRecord(**record) for record in facts["history"]]
            facts["undefined"] = tuple(facts["undefined"])
            return CellResult(**facts)
        except AwayError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            name = bundle.rpartition("/")[2]
            log.warning("the result %s is damaged (%s); it is deleted and made again", name, error)
            self.place.discard(bundle)
            return None

    def predictions(self, leaf: str, observer: str) -> Path:
        """File of a result's test predictions, on this machine."""
        return self.place.file(result_name(leaf, observer), PREDICTIONS)

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
        self.place.publish(result_name(leaf, observer), {**files, RESULT: sealed(facts)})

    def _check_same_trajectory(self, leaf: str, result: CellResult) -> None:
        from trainables.results import TrainingError

        for bundle in self.place.bundles(f"results/{leaf[:40]}"):
            try:
                (told,) = self.place.read(bundle, RESULT)
                other = unsealed(told, RESULT)
            except AwayError:
                raise
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
        name = f"contents/{index_digest[:40]}"
        recorded = self.place.get(name)
        if recorded is None or not re.fullmatch(rb"[0-9a-f]{64}", recorded):
            if recorded is not None:
                log.warning("%s is damaged and written anew; every state and result holds the digest too", name)
            self.place.put(name, contents_digest.encode())
        elif recorded != contents_digest.encode():
            raise StudyError(
                ["the images have changed since this storage's results were made; use another --storage for them"]
            )

    # -- small parts --------------------------------------------------------------------------------------------------

    def _made(self, *parts: str) -> Path:
        return make_folder(self.root.joinpath(*parts))


def state_name(key: str) -> str:
    """Name of a state's bundle."""
    return f"states/{key[:40]}"


def result_name(leaf: str, observer: str) -> str:
    """Name of the bundle of a cell's result."""
    return f"results/{leaf[:40]}/{re.sub(r'[^A-Za-z0-9.+]+', '-', observer)}"


def state_folder(root: Path, key: str) -> Path:
    """Folder of a state, in a storage that is one."""
    return root / state_name(key)


def result_folder(root: Path, leaf: str, observer: str) -> Path:
    """Folder of a cell's result, in a storage that is one."""
    return root / result_name(leaf, observer)


def kept_in(storage: Address | Path) -> Callable[[str], bool]:
    """Whether a state or result lies in a storage, by its bundle's name, as of now; nothing is written.

    Raises:
        StudyError: an object store cannot be asked.
    """
    address = Address.of(storage)
    if address.uri is None:
        states = {state_name(state.name) for state in _folders(address.folder / "states")}
        leaves = _folders(address.folder / "results")
        return (
            states | {f"results/{leaf.name}/{seen.name}" for leaf in leaves for seen in _folders(leaf)}
        ).__contains__
    place = place_of(address)
    try:
        return {*place.bundles("states"), *place.bundles("results")}.__contains__
    except AwayError as error:
        raise StudyError([str(error)]) from error


def _folders(path: Path | os.DirEntry[str]) -> list[os.DirEntry[str]]:
    try:
        return [entry for entry in os.scandir(path) if entry.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []


def pictures_file(root: Path, study: str, dataset: str) -> Path:
    """File of the test images of a data set that a study's report shows."""
    return root / study / "pictures" / f"{dataset}.npz"


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
