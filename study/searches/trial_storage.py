"""Where Optuna keeps the study of a search: a journal file by default, or a database.

Beside `search` and `search_figures` it imports optuna: opening, mending and refusing storage is a matter of its own.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import optuna
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

from analysis.credentials import without_credentials
from study.documents import StudyError
from study.interrupts import StudyHaltedError
from study.storage.durable import make_folder

log = logging.getLogger(__name__)

JOURNAL = "optuna.log"
LOCK_SECONDS = 5  # after which the journal's lock is that of a process that was killed
DECLARATION = "declaration"


class Place(NamedTuple):
    """Where Optuna keeps the study.

    Attributes:
        address: URL of a database, or path of a journal file.
    """

    address: str

    @property
    def is_database(self) -> bool:
        """A database that SQLAlchemy connects to."""
        return "://" in self.address


def default_place(storage: Path, name: str) -> Place:
    """The journal file of a search in a storage folder."""
    return Place(str(storage.resolve() / name / JOURNAL))


def check_place(place: Place, name: str, declaration: Mapping[str, Any]) -> None:
    """Refuse a place where the search cannot be kept or gone on with, before anything starts.

    Raises:
        StudyError: naming the option, or what the search there was begun with.
    """
    study = kept_study(place, name)
    if study is not None and (DECLARATION in study.user_attrs or study.get_trials(deepcopy=False)):
        check_declaration(study, place, declaration)


@contextmanager
def storage_watched(place: Place) -> Iterator[None]:
    """A database that fails on the way is one clear message.

    Raises:
        StudyHaltedError: it failed; nothing that was finished is lost.
    """
    try:
        yield
    except optuna.exceptions.StorageInternalError as error:
        said = without_credentials(str(error.__cause__ or error).strip().splitlines()[0])
        raise StudyHaltedError(
            f"--optuna-storage {without_credentials(place.address)}: failed ({said}); when it is back, run the same "
            "command again: results are in the storage, and trials that were running go on"
        ) from error


def begun_study(
    place: Place,
    name: str,
    directions: Sequence[Literal["maximize", "minimize"]],
    pruner: optuna.pruners.BasePruner,
    declaration: Mapping[str, Any],
) -> optuna.Study:
    """The study at a place, made where there is none. Proposals come from drafts alone, so its sampler is idle.

    Raises:
        StudyError: the place cannot be used, or holds a search that was begun under another declaration.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if not place.is_database:
        make_folder(Path(place.address).parent)
        _drop_torn_tail(Path(place.address))
    study = optuna.create_study(
        storage=_storage(place),
        study_name=name,
        directions=directions,
        sampler=optuna.samplers.RandomSampler(),
        pruner=pruner,
        load_if_exists=True,
    )
    if DECLARATION not in study.user_attrs and not study.get_trials(deepcopy=False):
        study.set_user_attr(DECLARATION, json.loads(json.dumps(declaration)))
    check_declaration(study, place, declaration)
    return study


def kept_study(place: Place, name: str) -> optuna.Study | None:
    """A study that is there already."""
    if not place.is_database and not Path(place.address).is_file():
        return None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        return optuna.load_study(study_name=name, storage=_storage(place))
    except KeyError:
        return None


def _storage(place: Place) -> optuna.storages.BaseStorage:
    if place.is_database:
        return _database(place)
    lock = JournalFileSymlinkLock(place.address, grace_period=LOCK_SECONDS)
    return optuna.storages.JournalStorage(JournalFileBackend(place.address, lock_obj=lock))


def _database(place: Place) -> optuna.storages.BaseStorage:
    from sqlalchemy.exc import SQLAlchemyError

    try:
        return optuna.storages.RDBStorage(place.address)
    except (SQLAlchemyError, ImportError, ValueError) as error:
        cause = error.__cause__ if isinstance(error, ImportError) and error.__cause__ is not None else error
        said = without_credentials(str(cause).strip().splitlines()[0])
        raise StudyError(
            [
                f"--optuna-storage {without_credentials(place.address)}: cannot be used ({said}); expected a URL such "
                "as postgresql+psycopg://USER@HOST/DATABASE or sqlite:///FILE, whose driver is installed (extra "
                "`search`)"
            ]
        ) from error


def _drop_torn_tail(path: Path) -> None:
    """Cut off a last line that a killed driver has not finished: Optuna would write the next one behind it."""
    if not path.is_file():
        return
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        log.warning("%s: the last %d bytes were written when a driver was killed; dropped", path, len(data) - whole)
        with path.open("r+b") as file:
            file.truncate(whole)


def check_declaration(study: optuna.Study, place: Place, declared: Mapping[str, Any]) -> None:
    """The values of all trials must mean the same."""
    begun, declaration = study.user_attrs.get(DECLARATION), json.loads(json.dumps(declared))
    if begun is None:
        raise StudyError(
            [
                f"{without_credentials(place.address)}: holds an Optuna study {study.study_name!r} that is no search "
                "of this project; give this one another name (-o study=NAME)"
            ]
        )
    differing = [name for name in declaration.keys() | begun.keys() if declaration.get(name) != begun.get(name)]
    if differing:
        raise StudyError(
            [
                f"search {study.study_name!r} was begun with other {', '.join(sorted(differing))}: trials of both "
                "would not be comparable; give it another name (-o study=NAME) or another --storage"
            ]
        )
