"""Names, records and release of activation caches: what a driver needs to know of them without torch."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from filelock import FileLock

RECORD = "built.json"
DATA = "data.npy"
ROWS = "rows.npz"


def cache_name(identity: str, contents: str, position: int, dtype: str) -> str:
    """Name of a cache: what the activations depend on, the digest of the images' contents, and the position."""
    return f"{hashlib.sha256(f'{identity}|{contents}'.encode()).hexdigest()[:24]}-{position}-{dtype}"


def record_of(folder: Path) -> dict[str, Any]:
    """What building a cache cost so far ('units', 'builds') and whether its data is 'present'; empty if never built."""
    try:
        return dict(json.loads((folder / RECORD).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Replace a cache's record."""
    temporary = folder / f"{RECORD}.{os.getpid()}"
    temporary.write_text(json.dumps(record), encoding="utf-8")
    temporary.replace(folder / RECORD)


def claim_blocks(path: Path) -> None:
    """Have the disk set aside all of a file's bytes: writing to a map of a full disk ends the process by a signal.

    Raises:
        OSError: there is no room for them.
    """
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)


def lock(folder: Path) -> FileLock:
    """The lock under which a cache is built or released; freed by the system when its holder dies."""
    return FileLock(str(folder / "lock"))


def release(folder: Path) -> None:
    """Delete a cache's data after its last use; what it cost stays on record."""
    if not record_of(folder):
        return
    with lock(folder):
        write_record(folder, record_of(folder) | {"present": False})
        for name in (DATA, ROWS):
            (folder / name).unlink(missing_ok=True)
