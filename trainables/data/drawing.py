"""Drawing a phantom on disk: once, whole or not at all, and checked before it is used again."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from trainables.settings import DatasetSettings

_log = logging.getLogger(__name__)

_DIGEST = "DIGEST"  # file that states the sha256 of all the others
_SOURCES = ("scenes.py", "chest_scene.py", "derm_scene.py", "phantom.py")


def drawn_root(settings: DatasetSettings, draw: Callable[[DatasetSettings, Path], None], folder: Path) -> Path:
    """Return the folder of a drawn phantom, drawing it if it is not there or was damaged.

    Drawing goes to a folder of its own that is renamed when complete, so a killed process leaves nothing that could be
    taken for a phantom; a lock keeps others waiting meanwhile. The name holds a digest of the drawing code.
    """
    folder.mkdir(parents=True, exist_ok=True)
    root = folder / f"{settings.name}-hospital{settings.hospital}-images{settings.images or 'default'}-{_code_digest()}"
    if _is_whole(root):
        return root
    with FileLock(folder / f".{root.name}.lock"):
        if not _is_whole(root):
            _draw_anew(settings, draw, root)
    return root


def _draw_anew(settings: DatasetSettings, draw: Callable[[DatasetSettings, Path], None], root: Path) -> None:
    for leftover in root.parent.glob(f".{root.name}.partial-*"):  # of killed processes: we hold the lock
        shutil.rmtree(leftover)
    partial = root.with_name(f".{root.name}.partial-{os.getpid()}")
    partial.mkdir()
    draw(settings, partial)
    (partial / _DIGEST).write_text(_contents_digest(partial) + "\n", encoding="utf-8")
    if root.exists():
        _log.warning("%s: its files do not fit their digest; drawn anew", root)
        shutil.rmtree(root)
    partial.rename(root)


def _is_whole(root: Path) -> bool:
    stated = root / _DIGEST
    return stated.is_file() and stated.read_text(encoding="utf-8").strip() == _contents_digest(root)


def _contents_digest(root: Path) -> str:
    """sha256 over the paths and bytes of all files but the digest itself."""
    h = hashlib.sha256()
    for parent, folders, files in os.walk(root):
        folders.sort()
        for name in sorted(files):
            if name != _DIGEST:
                path = Path(parent, name)
                contents = path.read_bytes()
                h.update(f"{path.relative_to(root).as_posix()}\0{len(contents)}\0".encode())
                h.update(contents)
    return h.hexdigest()


def _code_digest() -> str:
    here = Path(__file__).parent
    return hashlib.sha256(b"".join((here / name).read_bytes() for name in _SOURCES)).hexdigest()[:12]
