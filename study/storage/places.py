"""Where a storage lies, and how its bytes get there whole or not at all: in a folder, or in an object store by URI.

What is kept comes in bundles: files that belong together under a name such as `states/<key>`. A place publishes a
bundle as a whole; a reader finds all of it or nothing, whatever happens to the writer. `study.store` says what the
bundles are called and hold. A folder publishes by a rename, here; an object store, which cannot rename, by a manifest
that is written last (`study.storage.object_store`, imported where a URI is given).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from study.documents import StudyError
from study.storage.durable import flush_folder, make_folder, write_file
from study.storage.seals import unsealed

SCHEMES = {"s3": ("s3fs", "s3")}  # scheme of a URI → the module that serves it, and the extra that installs it
LOCAL = "SPFT_LOCAL"  # environment of a node: folder below which it keeps what a storage on a URI leaves to it
DEFAULT_LOCAL = "outputs"

LEAST_ROOM = 1 << 20  # bytes that a storage must be able to take, before a study and after something went wrong
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What is being written, by its makers' names for it; what is older than some hours is of processes that were killed.
UNFINISHED = (
    *("partial/*", ".mlflow.db.*", ".ray_auth_token.*", "splits/.*", "locks/.*"),
    *("*/report/.*", "*/pictures/.*", "fetched/*/*/*/*/.*"),
)
ABANDONED_S = 6 * 3600


# -- addresses -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Address:
    """What `--storage` names.

    Attributes:
        folder: on this machine: the storage itself, or where caches, locks and reports lie beside one on a URI.
        uri: of the prefix in an object store that holds what all machines share; None: the folder is all there is.
    """

    folder: Path
    uri: str | None = None

    @classmethod
    def of(cls, storage: Address | Path) -> Address:
        """A folder is an address too."""
        return storage if isinstance(storage, Address) else cls(storage)

    @classmethod
    def at(cls, uri: str) -> Address:
        """The address of a URI as it was typed.

        Raises:
            StudyError: it cannot be one; credentials in it are not repeated.
        """
        scheme, _, rest = uri.partition("://")
        if scheme not in SCHEMES:
            expected = " or ".join(f"{known}://BUCKET/PREFIX" for known in SCHEMES)
            raise StudyError([f"--storage {scheme}://…: expected a folder or {expected}"])
        if "@" in rest:
            raise StudyError(
                [
                    f"--storage {scheme}://…@…: credentials do not belong into an address, which is shown and kept; "
                    "give them as the store's clients expect them (docs/storage.md)"
                ]
            )
        parts = rest.rstrip("/").split("/")
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]", parts[0]):
            raise StudyError(
                [f"--storage {uri}: {parts[0]!r} is no name of a bucket; expected {scheme}://BUCKET/PREFIX"]
            )
        if not all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9!_.()+=-]{0,199}", part) for part in parts[1:]):
            said = "letters, digits and !_.()+=- between slashes"
            raise StudyError([f"--storage {uri}: its prefix has something else than {said}"])
        module, extra = SCHEMES[scheme]
        if find_spec(module) is None:
            raise StudyError([f"--storage {uri}: needs {module}, which is missing: pip install -e '.[{extra}]'"])
        return cls(_beside(scheme, parts), f"{scheme}://{'/'.join(parts)}")

    @property
    def shown(self) -> str:
        """As `--storage` names it."""
        return self.uri or str(self.folder)

    def here(self) -> Address:
        """The same storage as this machine sees it, which may keep its own part elsewhere than the driver's does."""
        if self.uri is None or not os.environ.get(LOCAL):
            return self
        scheme, _, rest = self.uri.partition("://")
        return Address(_beside(scheme, rest.split("/")), self.uri)


def _beside(scheme: str, parts: list[str]) -> Path:
    """The folder on this machine that belongs to a URI."""
    base = os.environ.get(LOCAL) or DEFAULT_LOCAL
    return Path(os.path.abspath(os.path.expanduser(base))).joinpath(scheme, *parts)  # noqa: PTH100, PTH111


# -- places ----------------------------------------------------------------------------------------------------------


class AwayError(OSError):
    """An object store does not do what it was asked for; `strerror` says why, `remedy` what to do."""

    def __init__(self, number: int, reason: str, uri: str, remedy: str) -> None:
        super().__init__(number, reason, uri)
        self.remedy = remedy

    def __str__(self) -> str:
        return f"--storage {self.filename}: {self.strerror}; {self.remedy}"

    def __reduce__(self) -> tuple[type[AwayError], tuple[object, ...]]:
        return AwayError, (self.errno, self.strerror, self.filename, self.remedy)


class Place(Protocol):
    """Keeps bundles, and single small files beside them, by names with `/` in them.

    Every call may raise OSError; `FileNotFoundError` means that something is not there, never that the place is away.
    """

    def has(self, bundle: str, name: str) -> bool:
        """Whether a bundle is there and holds a file of that name, whole or not."""

    def read(self, bundle: str, *names: str) -> list[bytes]:
        """Files of one publication of a bundle.

        Raises:
            FileNotFoundError: the bundle or one of its files is not there.
            ValueError: it is damaged.
        """

    def check(self, bundle: str, digests: Mapping[str, str]) -> None:
        """Make sure that a bundle's files are those with the digests (name → sha256) that were published.

        Raises:
            FileNotFoundError, ValueError: they are not; see `read`.
        """

    def file(self, bundle: str, name: str) -> Path:
        """A file of a bundle as a file on this machine, to be read only; it need not exist if the bundle does not."""

    def bundles(self, below: str) -> list[str]:
        """Names of the bundles right below a name."""

    def publish(self, bundle: str, files: Mapping[str, bytes]) -> None:
        """Put a bundle in place as a whole, instead of the one that may be there; for good when it returns."""

    def discard(self, bundle: str) -> None:
        """Remove a bundle as a whole; one that is gone already is no matter."""

    def get(self, name: str) -> bytes | None:
        """A single file; None where there is none."""

    def put(self, name: str, data: bytes) -> None:
        """Write a single file, whole or not at all."""

    def remove(self, *names: str) -> None:
        """Remove single files; those that are gone already are no matter."""

    def names(self, below: str) -> list[str]:
        """Names of all files below a name, of bundles too."""

    def require(self, size: int) -> None:
        """Make sure that so many bytes can be written."""

    def largest(self, below: str, name: str) -> int:
        """Bytes of the largest file of that name in the bundles below a name, where room for another one is limited."""

    def advice(self, error: OSError, size: int = 0) -> str:
        """What to do about a place that cannot be written; `size`: bytes that were wanted, if that is worth saying."""

    def sweep(self) -> None:
        """Remove what killed processes had begun to write, once nobody can be writing it any more."""


class LocalFolder:
    """A folder of a file system; processes of several machines may share it if they share the file system."""

    def __init__(self, root: Path) -> None:
        """Nothing is made before something is written."""
        self.root = root

    def has(self, bundle: str, name: str) -> bool:
        """See `Place`."""
        return (self.root / bundle / name).is_file()

    def read(self, bundle: str, *names: str) -> list[bytes]:
        """See `Place`."""
        return [(self.root / bundle / name).read_bytes() for name in names]

    def check(self, bundle: str, digests: Mapping[str, str]) -> None:
        """See `Place`: reads every byte."""
        for name, expected in digests.items():
            if hashlib.sha256((self.root / bundle / name).read_bytes()).hexdigest() != expected:
                raise ValueError(f"the digest of {name} does not match")

    def file(self, bundle: str, name: str) -> Path:
        """See `Place`: the file itself."""
        return self.root / bundle / name

    def bundles(self, below: str) -> list[str]:
        """See `Place`."""
        return [f"{below}/{path.name}" for path in (self.root / below).glob("*") if path.is_dir()]

    def publish(self, bundle: str, files: Mapping[str, bytes]) -> None:
        """Write files beside and put their folder in place with one rename.

        Files, their entries and the renamed entry are on the disk, in this order, when it returns: a power cut leaves
        the folder whole or absent, and what the caller drops next was replaced for good.
        """
        folder, temporary = self.root / bundle, self._temporary()
        try:
            for name, data in files.items():
                write_file(temporary / name, data)
            flush_folder(temporary)
            make_folder(folder.parent)
            self._rename(temporary, folder)
            flush_folder(folder.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    def discard(self, bundle: str) -> None:
        """Remove a folder with one rename, so that nobody sees half of it."""
        grave = self._temporary()
        with contextlib.suppress(FileNotFoundError):
            (self.root / bundle).replace(grave / "dropped")
        shutil.rmtree(grave, ignore_errors=True)

    def get(self, name: str) -> bytes | None:
        """See `Place`."""
        path = self.root / name
        return path.read_bytes() if path.is_file() else None

    def put(self, name: str, data: bytes) -> None:
        """See `Place`."""
        path, temporary = self.root / name, self._temporary()
        make_folder(path.parent)
        try:
            write_file(temporary / "file", data)
            (temporary / "file").replace(path)
            flush_folder(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def remove(self, *names: str) -> None:
        """See `Place`."""
        for name in names:
            (self.root / name).unlink(missing_ok=True)

    def names(self, below: str) -> list[str]:
        """See `Place`."""
        files = (path for path in (self.root / below).rglob("*") if path.is_file())
        return sorted(str(path.relative_to(self.root)) for path in files)

    def require(self, size: int) -> None:
        """Have the disk give as many bytes, and give them back."""
        with tempfile.TemporaryFile(dir=make_folder(self.root)) as probe:
            os.posix_fallocate(probe.fileno(), 0, size)

    def largest(self, below: str, name: str) -> int:
        """See `Place`."""
        largest = 0
        for path in (self.root / below).glob(f"*/{name}"):
            with contextlib.suppress(FileNotFoundError):  # dropped meanwhile
                largest = max(largest, path.stat().st_size)
        return largest

    def advice(self, error: OSError, size: int = 0) -> str:
        """See `Place`."""
        if error.errno not in NO_ROOM:
            return "make it writable" if size else "give a writable folder"
        if not size:
            return "make room there"
        free = shutil.disk_usage(self.root).free
        return f"a state takes {size / 1e6:.1f} MB, {free / 1e6:.1f} MB are free; make room"

    def sweep(self) -> None:
        """See `Place`."""
        for leftover in [path for pattern in UNFINISHED for path in self.root.glob(pattern)]:
            with contextlib.suppress(FileNotFoundError):  # its writer or another driver was faster
                newest = max(path.stat().st_mtime for path in (leftover, *leftover.rglob("*")))
                if time.time() - newest > ABANDONED_S:
                    shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()

    # -- small parts --------------------------------------------------------------------------------------------------

    def _temporary(self) -> Path:
        return Path(tempfile.mkdtemp(dir=make_folder(self.root / "partial")))

    def _rename(self, temporary: Path, folder: Path) -> None:
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
            self.discard(str(folder.relative_to(self.root)))


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
    facts = unsealed(path.read_bytes(), path.name)
    return json.dumps({name: facts[name] for name in sorted(facts) if name not in ("history", "provenance")})


def place_of(address: Address) -> Place:
    """The place of a storage; nothing is made or asked before it is used."""
    if address.uri is None:
        return LocalFolder(address.folder)
    from study.storage.object_store import ObjectStore

    return ObjectStore(address.uri, address.folder)
