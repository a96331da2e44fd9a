"""Files that one machine writes and others need, copied between its folder and a storage on a URI.

Splits, reports, and what activation caches have cost. In a storage that is a folder they lie where they belong already,
and nothing is copied.
"""

from __future__ import annotations

import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from study.documents import StudyError
from study.storage.durable import make_folder, write_file
from study.storage.places import LOCAL, Address, AwayError, Place, place_of
from trainables.cache_files import record_of


def bring(
    address: Address, below: str, place: Place | None = None, into: Path | None = None, *, replace: bool = False
) -> None:
    """Copy the files below a name that this machine does not have.

    Args:
        into: folder to put them under, if not the address's own.
        replace: those too that it has: another machine may have written them anew.

    Raises:
        AwayError: the store cannot be read.
        StudyError: a name there leads out of the folder.
    """
    if address.uri is None:
        return
    place, folder = place or place_of(address), into or address.folder
    for name in place.names(below):
        if ".." in name.split("/"):
            raise StudyError([f"{address.uri}/{name}: no file of a storage is called so; remove it"])
        path = folder / name
        data = place.get(name) if replace or not path.is_file() else None
        if data is not None:
            make_folder(path.parent)
            partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
            write_file(partial, data)
            partial.replace(path)


def share(address: Address, below: str, place: Place | None = None, *, replace: bool = True) -> None:
    """Copy this machine's files below a name to the store, those that are not as they are here.

    Args:
        replace: other files of the same names; else they are refused.

    Raises:
        AwayError: the store cannot be written.
        StudyError: it has other files.
    """
    if address.uri is None:
        return
    place = place or place_of(address)
    for path in sorted((address.folder / below).rglob("*")):
        if path.is_file() and not path.name.startswith("."):
            name, data = str(path.relative_to(address.folder)), path.read_bytes()
            there = place.get(name)
            if not replace and there not in (None, data):
                raise StudyError([f"{path} is not the one in {address.uri}; remove it, and run the same command again"])
            if there != data:
                place.put(name, data)


def share_study(address: Address, study: str) -> None:
    """Copy a study's report, and the images that it shows, to the store.

    Raises:
        AwayError: the store cannot be written.
    """
    if address.uri is not None:
        place = place_of(address)
        for part in ("report", "pictures"):
            share(address, f"{study}/{part}", place)


def reach(address: Address) -> None:
    """Find out within seconds whether a storage on a URI can be read, and have its splits here for planning.

    Raises:
        StudyError: it cannot be.
    """
    if address.uri is None:
        return
    from study.storage.object_store import ObjectStore

    try:
        bring(address, "splits", ObjectStore(address.uri, address.folder).hurried())
    except AwayError as error:
        raise StudyError([str(error)]) from error
    except OSError as error:
        told = f"{error.filename or address.folder}: {error.strerror}; name another folder by {LOCAL}"
        raise StudyError([f"--storage {address.uri}: {told}"]) from error


@contextmanager
def written_report(address: Address, study: str) -> Iterator[Path]:
    """The folder of a study's report as the storage has it: of one on a URI a copy, wherever it was written.

    Raises:
        AwayError: the store cannot be read.
    """
    if address.uri is None:
        yield address.folder / study / "report"
        return
    copy = Path(tempfile.mkdtemp(prefix="spft-report-"))
    try:
        bring(address, f"{study}/report", into=copy)
        yield copy / study / "report"
    finally:
        shutil.rmtree(copy, ignore_errors=True)


# -- what activation caches have cost, wherever they were built ------------------------------------------------------


def note_caches(address: Address, place: Place, noted: dict[str, int]) -> None:
    """Tell a storage on a URI the units that this machine's activation caches have cost.

    Args:
        noted: name of a cache → units that were told already; brought up to date.

    Raises:
        AwayError: the store cannot be written.
    """
    if address.uri is None:
        return
    folder = address.folder / "activations"
    for path in folder.glob("*"):
        units = int(record_of(path).get("units", 0))
        if units != noted.get(path.name, 0):
            place.put(f"caches/{path.name}/{_machine(folder)}", str(units).encode())
            noted[path.name] = units


def cache_units(address: Address, place: Place, names: Iterable[str]) -> dict[str, int]:
    """Units that building caches has cost: on this machine, and on those that have told.

    Raises:
        AwayError: the store cannot be read.
    """
    folder = address.folder / "activations"
    units = {name: int(record_of(folder / name).get("units", 0)) for name in names}
    if address.uri is not None:
        for told in place.names("caches"):
            _, name, machine = told.split("/")
            if name in units and machine != _machine(folder):
                units[name] += int(place.get(told) or 0)
    return units


def _machine(folder: Path) -> str:
    """A name for the machine that a folder is on, by a file in it: machines that share the folder are one."""
    path = make_folder(folder) / ".machine"
    if not path.is_file():
        partial = path.with_name(f".machine.{secrets.token_hex(4)}")
        write_file(partial, secrets.token_hex(8).encode())
        with suppress(FileExistsError):  # another process was first
            path.hardlink_to(partial)
        partial.unlink()
    return path.read_text()
