"""One driver a study on an object store: a lease that is renewed while its holder lives.

Leases are numbered: `claims/<study>/<number>.json`. The highest one counts. To take a study over is to create the next
number, which an object store lets exactly one of all who try do. The holder writes its own object anew every `BEAT_S`
and looks whether a higher one is there: then it was taken for dead, as after a long cut of the network, and stops.
Ages are told by the store's own clock. A lease that is given back, or not renewed for `LEASE_S`, may be taken over; one
of a process that died on this machine at once, since the lock that it held here is free.

So two drivers never both begin; they overlap for at most `BEAT_S` when one that was cut off for `LEASE_S` comes back.
Even then no result is wrong: what both write under a key is the same, and it is published as a whole.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from study.documents import StudyError
from study.interrupts import StudyHaltedError
from study.storage.claim import held_by
from study.storage.object_store import ObjectStore
from study.storage.places import AwayError

log = logging.getLogger(__name__)

BEAT_S = 15.0
LEASE_S = 90.0


@contextmanager
def leased(
    store: ObjectStore, lock: Path, study: str, command: str, halt: Callable[[Exception], None]
) -> Iterator[None]:
    """Hold a study of an object store for as long as the context lasts.

    Args:
        lock: file whose lock this process holds, as every driver of the study on this machine would.
        command: what a second driver is told to wait for.
        halt: takes the error that another driver has taken the study over.

    Raises:
        StudyError: another driver runs it; at once, with host, process, start and command.
        AwayError: the store cannot be asked.
    """
    lease = _Lease(store, lock, study, command)
    lease.take()
    ended = threading.Event()
    beat = threading.Thread(target=_renew, args=(lease, ended, halt), name="lease", daemon=True)
    beat.start()
    try:
        yield
    finally:
        ended.set()
        beat.join(timeout=BEAT_S)
        lease.give_back()


def _renew(lease: _Lease, ended: threading.Event, halt: Callable[[Exception], None]) -> None:
    while not ended.wait(BEAT_S):
        try:
            lease.renew()
        except AwayError as error:
            log.info("the lease cannot be renewed: %s", error)  # training says so as well, once it needs the store
        except Exception as error:  # also one that nobody thought of: nothing must train on under a lapsed lease
            halt(error)
            return


class _Lease:
    def __init__(self, store: ObjectStore, lock: Path, study: str, command: str) -> None:
        self._store = store.hurried()
        self._study, self._folder, self._name = study, f"claims/{study}", ""
        self._facts = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.time(), "command": command}
        self._facts |= {"token": secrets.token_hex(8), "lock": _identity(lock)}

    def take(self) -> None:
        """Create the next number, unless the last one is held."""
        before = self._numbers()
        if before:
            self._refuse_held(before[max(before)])
        number = max(before, default=0) + 1
        self._name = f"{self._folder}/{number:08d}.json"
        if not self._store.create(self._name, self._told()) and self._read(self._name) != self._facts:
            raise self._held(self._read(self._name))
        if self._store.create(self._name, self._told()):
            log.warning(
                "%s: the store lets an object be created twice: drivers of %s on other machines are not kept away",
                self._store.uri,
                self._study,
            )
        numbers = self._numbers()
        if (top := max(numbers, default=number)) > number:  # others took it, and gave it back, since it was listed
            raise self._held(self._read(numbers[top]))
        self._store.remove(*before.values())

    def renew(self) -> None:
        """Write it anew.

        Raises:
            StudyHaltedError: another driver holds a higher number.
        """
        self._store.put(self._name, self._told())
        numbers = self._numbers()
        if numbers and numbers[max(numbers)] != self._name:
            holder = held_by(self._read(numbers[max(numbers)]))
            raise StudyHaltedError(
                f"{self._study} was taken over in {self._store.uri}{holder.partition(': wait')[0]}: this machine "
                "had not reached the store for a while; nothing that was finished is lost"
            )

    def give_back(self) -> None:
        """Let the next one have it; where the store is away it ends by itself."""
        try:
            self._store.put(self._name, self._told(released=True))
        except AwayError as error:
            log.info("the lease is not given back: %s", error)

    def _refuse_held(self, name: str) -> None:
        facts = self._read(name)
        if facts.get("released") or facts.get("lock") == self._facts["lock"]:
            return
        age_s = self._store.ages_s([name]).get(name, LEASE_S)
        if age_s < LEASE_S:
            raise self._held(facts)

    def _held(self, facts: dict[str, Any]) -> StudyError:
        note = f"; if that machine is gone, its claim ends {LEASE_S:g} s after its last sign of life"
        return StudyError([f"{self._study} is being run in this storage already{held_by(facts)}{note}"])

    def _numbers(self) -> dict[int, str]:
        names = {name.rpartition("/")[2].removesuffix(".json"): name for name in self._store.names(self._folder)}
        return {int(number): name for number, name in names.items() if number.isdecimal()}

    def _read(self, name: str) -> dict[str, Any]:
        try:
            return dict(json.loads(self._store.get(name) or b"{}"))
        except ValueError:
            return {}

    def _told(self, **more: Any) -> bytes:
        return json.dumps(self._facts | more).encode()


def _identity(lock: Path) -> str:
    """A file on a machine, since it was started: what the same file is for another process there alone."""
    found = lock.stat()
    boot = Path("/proc/sys/kernel/random/boot_id")
    machine = boot.read_text().strip() if boot.is_file() else socket.gethostname()
    return f"{machine} {found.st_dev} {found.st_ino}"
