"""Writing files so that they survive a power cut: contents first, then the folder entry that makes them count."""

from __future__ import annotations

import errno
import os
from pathlib import Path


def write_file(path: Path, data: bytes) -> None:
    """Write a file and flush it to the disk; its folder's entry for it is not flushed yet."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk: files made, renamed and removed in it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF):  # file systems that flush files alone
            raise
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> Path:
    """Make a folder with its parents, each one flushed in its own parent; what is there already costs nothing."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        flush_folder(folder.parent)
    return folder
