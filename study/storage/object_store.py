"""Bundles in an object store, through fsspec: the part of a storage that all machines share without a file system.

An object appears whole or not at all, but there is no rename, so a bundle of several is published by a manifest:

    <bundle>/<token>/<file>      what was written; the token is new for every publication
    <bundle>/manifest.json       names the objects that count, with sizes and digests; written last, sealed, small

A reader trusts nothing that no manifest names: a writer that dies leaves objects that nobody reads and `sweep` removes
later. Writing a bundle again replaces its manifest, which is one object, and only then removes what the old one named;
a reader that was in between reads the new one. The store must show every write to every later read and listing, as S3
does and all that copy it.

Whatever the store refuses is tried again for a while, since stores restart and credentials are renewed; then it is an
`AwayError` that says why and what to do. Credentials are found by the store's client; none is read or shown here.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from copy import copy
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from analysis.credentials import without_credentials
from study.storage.durable import make_folder, write_file
from study.storage.places import ABANDONED_S, AwayError
from study.storage.seals import sealed, unsealed

log = logging.getLogger(__name__)
T = TypeVar("T")

MANIFEST = "manifest.json"
PATIENCE_S = 180.0  # for a store that is away while training: a restart, a failover, credentials that are renewed
SHORT_S = 5.0  # for one that is looked at before anything was begun, or after it was waited for
PAUSE_S, LONGEST_PAUSE_S = 0.2, 5.0  # between attempts
CONNECT_S, ANSWER_S = 5, 60  # for the store to take a connection, and to go on with an answer
INCONSISTENT = "use a store that shows every write to all who read after it"
SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")

Entry = dict[str, Any]  # of a manifest: object, size, sha256, mark


class ObjectStore:
    """A prefix of an object store. Implements `study.storage.places.Place`."""

    def __init__(self, uri: str, folder: Path) -> None:
        """Connect when it is first used.

        Args:
            uri: scheme://bucket/prefix, without credentials.
            folder: on this machine, for copies of what only a file will do.
        """
        self.uri = uri
        self._folder = folder
        self._patience_s = PATIENCE_S
        scheme, _, self._root = uri.partition("://")
        self._files, self._failures = _client(scheme)

    # -- bundles ------------------------------------------------------------------------------------------------------

    def has(self, bundle: str, name: str) -> bool:
        """See `Place`: whether it was published."""
        return bool(self._tried(self._files.exists, self._path(bundle, MANIFEST)))

    def read(self, bundle: str, *names: str) -> list[bytes]:
        """See `Place`; every digest is checked."""
        manifest = self._manifest(bundle)
        while True:
            try:
                return [self._checked(bundle, name, manifest) for name in names]
            except FileNotFoundError:
                before, manifest = manifest, self._manifest(bundle)
                if manifest == before:
                    raise

    def check(self, bundle: str, digests: Mapping[str, str]) -> None:
        """See `Place`: the objects are those that the store confirmed when they were written.

        A store tells of each object its size and a mark that changes with every write of other contents (of S3, the
        ETag): an object that has both is not downloaded, another one is, and its digest decides.
        """
        manifest = self._manifest(bundle)
        while True:
            try:
                return self._check(bundle, manifest, digests)
            except FileNotFoundError:  # published again meanwhile
                before, manifest = manifest, self._manifest(bundle)
                if manifest == before:
                    raise

    def _check(self, bundle: str, manifest: Mapping[str, Any], digests: Mapping[str, str]) -> None:
        listed = self._listed(bundle)
        for name, expected in digests.items():
            entry = _entry(manifest, name)
            if entry["sha256"] != expected:
                raise ValueError(f"the digest of {name} does not match")
            found = listed.get(f"{bundle}/{entry['object']}")
            if found is None or (found["size"], _mark(found)) != (entry["size"], entry["mark"]):
                self._checked(bundle, name, manifest)

    def file(self, bundle: str, name: str) -> Path:
        """See `Place`: a copy, fetched once for every publication."""
        with suppress(FileNotFoundError, ValueError):
            entry = _entry(self._manifest(bundle), name)
            path = self._folder / "fetched" / bundle / str(entry["object"])
            if not path.is_file():
                (data,) = self.read(bundle, name)
                make_folder(path.parent)
                partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
                write_file(partial, data)
                partial.replace(path)
                _remove_older(path.parent)
            return path
        return self._folder / "fetched" / bundle / name

    def bundles(self, below: str) -> list[str]:
        """See `Place`; those further below too."""
        end = f"/{MANIFEST}"
        return [name.removesuffix(end) for name in self._listed(below) if name.endswith(end)]

    def publish(self, bundle: str, files: Mapping[str, bytes]) -> None:
        """See `Place`: objects first, then the manifest that names them, then what it has replaced is removed."""
        try:
            replaced = self._manifest(bundle)
        except (FileNotFoundError, ValueError):
            replaced = {}
        token = secrets.token_hex(8)
        for name, data in files.items():
            self.put(f"{bundle}/{token}/{name}", data)
        listed = self._listed(f"{bundle}/{token}")
        manifest = {}
        for name, data in files.items():
            there = listed.get(f"{bundle}/{token}/{name}", {})
            if there.get("size") != len(data):
                raise AwayError(errno.EIO, f"{bundle}/{name} is not what was just written", self.uri, INCONSISTENT)
            digest = hashlib.sha256(data).hexdigest()
            manifest[name] = {"object": f"{token}/{name}", "size": len(data), "sha256": digest, "mark": _mark(there)}
        self.put(f"{bundle}/{MANIFEST}", sealed({"files": manifest}))
        self._remove(f"{bundle}/{entry['object']}" for entry in replaced.values())

    def discard(self, bundle: str) -> None:
        """See `Place`: without its manifest a bundle is gone."""
        try:
            objects: Iterable[str] = [f"{bundle}/{entry['object']}" for entry in self._manifest(bundle).values()]
        except FileNotFoundError:
            return
        except ValueError:
            objects = [name for name in self._listed(bundle) if not name.endswith(f"/{MANIFEST}")]
        self._remove([f"{bundle}/{MANIFEST}", *objects])

    # -- single objects -----------------------------------------------------------------------------------------------

    def get(self, name: str) -> bytes | None:
        """See `Place`."""
        try:
            return bytes(self._tried(self._files.cat_file, self._path(name)))
        except FileNotFoundError:
            return None

    def put(self, name: str, data: bytes) -> None:
        """See `Place`."""
        with self._bucket_needed():
            self._tried(self._files.pipe_file, self._path(name), data)

    def create(self, name: str, data: bytes) -> bool:
        """Write an object that is not there yet; False if it is, also where this very call has written it before."""
        with self._bucket_needed():
            try:
                self._tried(self._files.pipe_file, self._path(name), data, mode="create")
            except FileExistsError:
                return False
        return True

    def names(self, below: str) -> list[str]:
        """See `Place`."""
        return sorted(self._listed(below))

    def remove(self, *names: str) -> None:
        """See `Place`."""
        self._remove(names)

    def ages_s(self, names: Iterable[str]) -> dict[str, float]:
        """Seconds since objects were last written, by the store's own clock; those that are gone are left out."""
        written = {}
        for name in names:
            with suppress(FileNotFoundError):
                written[name] = self._written(name)
        now = self._now() if written else None
        return {name: (now - then).total_seconds() for name, then in written.items() if now is not None}

    # -- the store itself ---------------------------------------------------------------------------------------------

    def hurried(self) -> ObjectStore:
        """The same, without much patience."""
        other = copy(self)
        other._patience_s = min(SHORT_S, self._patience_s)
        return other

    def require(self, size: int) -> None:
        """Write an object and read it again; room is the store's own matter.

        Raises:
            AwayError: it cannot, after a short time.
        """
        name, data, quick = f"partial/{secrets.token_hex(8)}", secrets.token_bytes(16), self.hurried()
        quick.put(name, data)
        if quick.get(name) != data:
            raise AwayError(errno.EIO, "what was just written is not what is read", self.uri, INCONSISTENT)
        quick.remove(name)

    def largest(self, below: str, name: str) -> int:
        """See `Place`: room is not limited."""
        return 0

    def advice(self, error: OSError, size: int = 0) -> str:
        """See `Place`."""
        return error.remedy if isinstance(error, AwayError) else "look at the store"

    def sweep(self) -> None:
        """See `Place`: what no manifest names and is old is removed; manifests of bundles in order stay unread."""
        listed = {name for below in ("states", "results", "partial") for name in self._listed(below)}
        suspects = [name for name in listed if name.startswith("partial/")]
        tokens: dict[str, dict[str, list[str]]] = {}
        for name in listed.difference(suspects):
            bundle, _, end = name.rpartition("/")
            if end != MANIFEST:
                bundle, _, token = bundle.rpartition("/")
                tokens.setdefault(bundle, {}).setdefault(token, []).append(name)
        for bundle, written in tokens.items():
            if len(written) > 1 or f"{bundle}/{MANIFEST}" not in listed:
                named: set[str] = set()
                with suppress(FileNotFoundError, ValueError):
                    named = {f"{bundle}/{entry['object']}" for entry in self._manifest(bundle).values()}
                suspects += [name for names in written.values() for name in names if name not in named]
        self._remove(name for name, age_s in self.ages_s(suspects).items() if age_s > ABANDONED_S)

    # -- small parts --------------------------------------------------------------------------------------------------

    def _path(self, *names: str) -> str:
        return "/".join((self._root, *names))

    def _manifest(self, bundle: str) -> dict[str, Entry]:
        data = self.get(f"{bundle}/{MANIFEST}")
        if data is None:
            raise FileNotFoundError(f"{self.uri}/{bundle} is not there")
        return dict(unsealed(data, MANIFEST)["files"])

    def _checked(self, bundle: str, name: str, manifest: Mapping[str, Entry]) -> bytes:
        entry = _entry(manifest, name)
        data = self.get(f"{bundle}/{entry['object']}")
        if data is None:
            raise FileNotFoundError(f"{name} is gone")
        if hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise ValueError(f"the digest of {name} does not match")
        return data

    def _listed(self, below: str) -> dict[str, Entry]:
        """Name → what a listing tells of each object below a name."""
        with self._bucket_needed():
            found = self._tried(self._files.find, self._path(below), detail=True)
        inside = f"{self._path(below)}/"  # where nothing is found, fsspec tells of the name itself
        return {path.removeprefix(f"{self._root}/"): told for path, told in found.items() if path.startswith(inside)}

    def _remove(self, names: Iterable[str]) -> None:
        for name in names:
            with suppress(FileNotFoundError):
                self._tried(self._files.rm_file, self._path(name))

    @contextmanager
    def _bucket_needed(self) -> Iterator[None]:
        """What cannot be written or listed for not being there is the bucket."""
        try:
            yield
        except FileNotFoundError as error:
            bucket = self._root.partition("/")[0]
            raise AwayError(
                errno.ENOENT, f"there is no bucket {bucket}", self.uri, "make it, or mend the address"
            ) from error

    def _written(self, name: str) -> datetime:
        found: datetime = self._tried(self._files.modified, self._path(name))
        return found

    def _now(self) -> datetime:
        """The time of the store's own clock."""
        name = f"partial/{secrets.token_hex(8)}"
        self.put(name, b"")
        now = self._written(name)
        self._remove([name])
        return now

    def _tried(self, call: Callable[..., T], *arguments: Any, **options: Any) -> T:
        """Do something until the store lets it, or patience ends; says once that it waits, and once that it need not.

        Raises:
            FileNotFoundError, FileExistsError: that is the answer.
            AwayError: it did not within the patience.
        """
        began, pause_s, said = time.monotonic(), PAUSE_S, False
        while True:
            try:
                found = call(*arguments, **options)
            except (FileNotFoundError, FileExistsError):
                self._say_back(began, said)
                raise
            except self._failures as error:
                away = _explained(error, self.uri)
                if time.monotonic() - began + pause_s > self._patience_s:
                    raise away from error
            else:
                self._say_back(began, said)
                return found
            if not said and self._patience_s > SHORT_S:
                said = True
                log.warning("%s: %s; trying again for %.0f s", self.uri, away.strerror, self._patience_s)
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _say_back(self, began: float, said: bool) -> None:
        if said:
            log.warning("%s: answers again after %.0f s", self.uri, time.monotonic() - began)


def _client(scheme: str) -> tuple[Any, tuple[type[BaseException], ...]]:
    """The file system of a scheme, and what it raises where the store fails; retries are left to `ObjectStore`."""
    import fsspec
    from aiohttp import ClientError as TransportError
    from botocore.exceptions import BotoCoreError, ClientError

    timeouts = {"connect_timeout": CONNECT_S, "read_timeout": ANSWER_S, "retries": {"total_max_attempts": 1}}
    files = fsspec.filesystem(scheme, skip_instance_cache=True, use_listings_cache=False, config_kwargs=timeouts)
    files.retries = 1
    return files, (OSError, BotoCoreError, ClientError, TransportError)


def _remove_older(folder: Path) -> None:
    """Remove copies of earlier publications of a bundle."""
    for old in folder.parent.iterdir():
        if old != folder:
            shutil.rmtree(old, ignore_errors=True)


def _entry(manifest: Mapping[str, Entry], name: str) -> Entry:
    if name not in manifest:
        raise FileNotFoundError(f"{name} was not written")
    if not re.fullmatch(rf"[0-9a-f]{{16}}/{re.escape(name)}", manifest[name]["object"]):
        raise ValueError(f"its manifest names {manifest[name]['object']!r} for {name}")
    return manifest[name]


def _mark(listed: Entry) -> str:
    """What a listing tells of an object that changes with each write of other contents."""
    return str(listed.get("ETag", "")).strip('"')


def _explained(error: BaseException, uri: str) -> AwayError:
    """Why a store did not do something and what to do, without any credential."""
    kind = type(error).__name__
    said = _without_secrets(str(getattr(error, "strerror", None) or error or kind).splitlines()[0])
    rights = "that they may list, read, write and delete there"
    if "Credentials" in kind:
        where = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or a role of the machine"
        return AwayError(errno.EACCES, f"no credentials are found ({said})", uri, f"give them: {where}")
    if isinstance(error, PermissionError):
        return AwayError(errno.EACCES, f"the store refuses it ({said})", uri, f"check the credentials, and {rights}")
    if kind.endswith(("ConnectionError", "ConnectTimeoutError", "TimeoutError", "ConnectionClosedError")):
        remedy = "start it, or mend AWS_ENDPOINT_URL or the network"
        return AwayError(errno.ETIMEDOUT, f"the store cannot be reached ({said})", uri, remedy)
    return AwayError(errno.EIO, f"the store fails ({said})", uri, "wait until it serves again")


def _without_secrets(text: str) -> str:
    for name in SECRETS:
        if len(value := os.environ.get(name, "")) > 3:
            text = text.replace(value, "…")
    return without_credentials(text)
