"""From the names in a table to files on disk."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from trainables.data.index import DataError, Index

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")


def locate_files(index: Index, root: Path, folders: Sequence[Path]) -> list[Path]:
    """Find every image of the index.

    A plain name is looked up in `folders`, with or without its extension, the first folder winning; a name with slashes
    is a path under root.

    Raises:
        DataError: missing images, or a name that leaves the root.
    """
    names: list[str] = index.names.tolist()
    _refuse_escapes(index.dataset, root, names)
    plain = _scan(folders)
    found = [_under(root, name) if "/" in name else plain.get(name) for name in names]
    missing = [name for name, path in zip(names, found, strict=True) if path is None]
    if missing:
        looked = ", ".join(f"{folder.relative_to(root)}/" for folder in folders) or "no image folder"
        raise DataError(
            f"{index.dataset}: {len(missing)} of {len(names)} images are not under {root} (looked in {looked}); the "
            f"first missing is {missing[0]}. Complete the download, or set dataset.root to the folder that holds them"
        )
    return [Path(path) for path in found if path is not None]


def _under(root: Path, name: str) -> str | None:
    path = root / name
    return str(path) if path.is_file() else None


def _scan(folders: Sequence[Path]) -> dict[str, str]:
    """Image files by name and by name without extension."""
    found: dict[str, str] = {}
    for folder in folders:
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda e: e.name):
                stem, suffix = os.path.splitext(entry.name)  # noqa: PTH122 (112,120 paths: five times as fast)
                if suffix.lower() in IMAGE_SUFFIXES:
                    found.setdefault(entry.name, entry.path)
                    found.setdefault(stem, entry.path)
    return found


def _refuse_escapes(dataset: str, root: Path, names: Sequence[str]) -> None:
    for name in names:
        if ("/" in name or name == "..") and (name.startswith("/") or ".." in PurePosixPath(name).parts):
            raise DataError(f"{dataset}: image name {name!r} leaves the data set's folder {root}; name files inside it")
