"""What a node must have before a trial may run there: storage, data and encoder in its sight, the same code beside it.

`look` runs on the node, sent there by value: the code of this project may be missing or another one there, so nothing
of it is imported before that is found out. `differences` compares on the driver.
"""

from __future__ import annotations

import platform
import secrets
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from study.storage.places import Address


@dataclass(frozen=True)
class Wanted:
    """What the driver sees.

    Attributes:
        storage: folder of results, or of the machine's own part where they lie in the object store `uri`; `note`: name
            of a file in it or there, `secret`: what the file says.
        data: folders of data sets.
        encoders: folders or hub ids.
    """

    storage: str
    note: str
    secret: str
    data: tuple[str, ...]
    encoders: tuple[str, ...]
    uri: str | None = None


@dataclass(frozen=True)
class Seen:
    """What a node sees.

    Attributes:
        storage: why the storage is not the driver's or cannot be written there; None if all is well.
        data: folder → how many entries it has; None where there is no such folder.
        encoders: name → digest of its weights, or why there is none; only where `sources` is known.
        sources: digest of the code that results depend on, None where the code cannot be imported.
        versions: of Python and of the libraries that compute.
    """

    storage: str | None
    data: dict[str, int | None]
    encoders: dict[str, str]
    sources: str | None
    versions: dict[str, str]


@contextmanager
def wanted(storage: Address | Path, data: Iterable[str], encoders: Iterable[str]) -> Iterator[Wanted]:
    """Leave a note in the storage while nodes are asked for it."""
    from study.storage.places import Address, place_of

    address, secret = Address.of(storage), secrets.token_hex(16)
    place, note = place_of(address), f"partial/note-{secrets.token_hex(8)}"
    place.put(note, secret.encode())
    try:
        yield Wanted(str(address.folder), note, secret, tuple(data), tuple(encoders), address.uri)
    finally:
        place.remove(note)


def look(for_what: Wanted) -> Seen:
    """What this process sees of it."""
    sources = _sources()
    return Seen(
        storage=_storage_fault(for_what) if for_what.uri is None else _store_fault(for_what, sources),
        data={folder: _entries(Path(folder)) for folder in for_what.data},
        encoders={} if sources is None else {name: _weights(name) for name in for_what.encoders},
        sources=sources,
        versions=_versions(("torch", "numpy", "transformers", "ray")),
    )


def _storage_fault(for_what: Wanted) -> str | None:
    folder = Path(for_what.storage)
    if not folder.is_dir():
        return "is not there"
    try:
        if (folder / for_what.note).read_text() != for_what.secret:
            return "is another folder there"
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\0")
    except FileNotFoundError:
        return "is another folder there"
    except OSError as error:
        return f"cannot be used there ({error.strerror})"
    return None


def _store_fault(for_what: Wanted, sources: str | None) -> str | None:
    """What the node cannot do with an object store; needs the project's code, which is missed elsewhere."""
    if sources is None:
        return None
    from study.documents import StudyError
    from study.storage.places import Address, AwayError
    from study.store import Store

    try:
        if Address.at(str(for_what.uri)).uri != for_what.uri:
            return "cannot be named there"
        place = Store(Address(Path(for_what.storage), for_what.uri).here()).place
        found = place.get(for_what.note)
    except StudyError as error:
        return error.problems[0].removeprefix(f"--storage {for_what.uri}: ")
    except AwayError as error:
        return f"{error.strerror}; {error.remedy}"
    except OSError as error:
        return str(error.strerror or error)
    return (
        None
        if found == for_what.secret.encode()
        else "is another store there; give all nodes the same AWS_ENDPOINT_URL"
    )


def _entries(folder: Path) -> int | None:
    try:
        return sum(1 for _ in folder.iterdir())
    except OSError:
        return None


def _sources() -> str | None:
    try:
        from study.chains import sources_digest
    except ImportError:
        return None
    return sources_digest()


def _weights(encoder: str) -> str:
    from trainables.backbone_files import find_backbone
    from trainables.model_files import BackboneError

    try:
        return find_backbone(encoder, download=True).weights_digest()
    except BackboneError as error:
        return str(error)


def _versions(names: Iterable[str]) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found


def differences(node: str, for_what: Wanted, here: Seen, there: Seen) -> list[str]:
    """What keeps a node from doing what the driver's machine would do, each with its remedy."""
    problems = []
    if there.storage is not None:
        told = f"{for_what.storage} {there.storage}; give a folder of a file system that all nodes share"
        problems.append(f"{node}: --storage {told if for_what.uri is None else f'{for_what.uri}: {there.storage}'}")
    for folder, seen in there.data.items():
        if seen != here.data[folder]:
            what = "is not there" if seen is None else f"has {seen} entries there, here {here.data[folder]}"
            problems.append(f"{node}: data root {folder} {what}; mount or copy it to the same place on all nodes")
    for name, weights in there.encoders.items():
        if weights != here.encoders[name]:
            problems.append(f"{node}: encoder {name} is another one there ({weights}); give all nodes the same files")
    if there.sources != here.sources:
        what = "is missing there" if there.sources is None else "differs there"
        problems.append(f"{node}: the code of this project {what}; install the same version on all nodes")
    for name, ours in here.versions.items():
        if there.versions[name] != ours:
            problems.append(
                f"{node}: {name} is {there.versions[name]} there, here {ours}; install the same on all nodes"
            )
    return problems
