"""The data sets by name: their facts, their index, and their images' place.

A new data set is one file with an `ADAPTER` and one line in `_ADAPTERS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from trainables.data import chestxray14, ham10000, phantom
from trainables.data.adapter import Adapter, DatasetInfo, Table
from trainables.data.files import locate_files
from trainables.data.index import SPLITS, DataError, Index
from trainables.data.split_file import keep_split, split_file
from trainables.data.splits import assert_disjoint, sample_groups, split_groups
from trainables.data.tables import root_of
from trainables.settings import DatasetSettings

_ADAPTERS: dict[str, Adapter] = {
    adapter.info.name: adapter
    for adapter in (
        chestxray14.ADAPTER,
        ham10000.ADAPTER,
        phantom.CHEST,
        phantom.DERM,
    )
}

DATASETS: dict[str, DatasetInfo] = {name: adapter.info for name, adapter in _ADAPTERS.items()}

_VAL_OF_OFFICIAL_TRAIN = 1 / 9  # 80:10, as in our own split


def load_index(settings: DatasetSettings, splits_folder: Path | None = None) -> Index:
    """Read the table, split it, and drop what is to be dropped; touches no image.

    The split is made before classes are dropped, so that dropping one moves no image to another split.

    Args:
        settings: which data set, how many images, which split, which classes.
        splits_folder: the split is written there once, and read and verified from then on.

    Raises:
        DataError: unknown data set or class, unusable table, a kept split that does not fit the table, a group in two
            splits, or a class that cannot be learnt or measured in some split.
    """
    adapter = _adapter(settings.name)
    info = adapter.info
    _refuse_unknown_classes(info, settings.drop_classes)
    if settings.split == "official" and info.synthetic:
        raise DataError(f"{info.name}: there is no official split; set dataset.split=grouped")
    table = adapter.read_table(settings)
    if settings.images is not None and not info.synthetic:
        table = table.take(sample_groups(table.groups, settings.images, settings.split_seed))
    if splits_folder is None:
        split = _split(table, settings)
    else:
        path = split_file(settings, splits_folder)
        split = keep_split(path, settings, table, lambda: _split(table, settings))
    assert_disjoint(table.groups, split, info.group_kind)
    index = _index(info, table, split, settings.drop_classes)
    _refuse_unmeasurable(index)
    return index


def prepare(settings: DatasetSettings, index: Index, folder: Path) -> Path:
    """Return the root under which the index's images lie; a phantom is drawn under `folder` first, once.

    Several processes may prepare one phantom at the same time; one that is killed leaves nothing half-made.

    Raises:
        DataError: real data without a root, or with images missing.
    """
    adapter = _adapter(settings.name)
    if adapter.draw is not None:
        from trainables.data.drawing import drawn_root

        root = drawn_root(settings, adapter.draw, folder)
    else:
        root = root_of(settings.name, settings.root)
    locate(index, root)
    return root


def locate(index: Index, root: Path) -> list[Path]:
    """Paths of the index's images under root, in its order; names may lack their extension.

    Raises:
        DataError: images that are missing (how many, the first one, where was looked), or names that leave the root.
    """
    return locate_files(index, root, _adapter(index.dataset).image_folders(root))


def _adapter(name: str) -> Adapter:
    if name not in _ADAPTERS:
        raise DataError(f"dataset.name: unknown data set {name!r}; known are {', '.join(_ADAPTERS)}")
    return _ADAPTERS[name]


def _refuse_unknown_classes(info: DatasetInfo, dropped: Sequence[str]) -> None:
    unknown = [name for name in dropped if name not in info.classes]
    if unknown:
        raise DataError(
            f"dataset.drop_classes: {info.name} has no class {', '.join(map(repr, unknown))}; "
            f"its classes are {', '.join(info.classes)}"
        )
    if set(dropped) == set(info.classes):
        raise DataError(
            f"dataset.drop_classes: drops all {len(info.classes)} classes of {info.name}; keep at least one"
        )


def _split(table: Table, settings: DatasetSettings) -> npt.NDArray[np.uint8]:
    if table.official is None:
        return split_groups(table.groups, table.labels, settings.split_seed)
    split = table.official.copy()
    rest = np.flatnonzero(split == SPLITS.index("train"))
    shares = (1 - _VAL_OF_OFFICIAL_TRAIN, _VAL_OF_OFFICIAL_TRAIN)
    split[rest] = split_groups(table.groups[rest], table.labels[rest], settings.split_seed, shares)
    return split


def _index(info: DatasetInfo, table: Table, split: npt.NDArray[np.uint8], drop: Sequence[str]) -> Index:
    kept = [column for column, name in enumerate(info.classes) if name not in drop]
    labels = np.ascontiguousarray(table.labels[:, kept])
    rows = np.flatnonzero(labels.any(1)) if info.single_label else np.arange(len(table))
    return Index(
        dataset=info.name,
        classes=tuple(info.classes[column] for column in kept),
        names=table.names[rows],
        groups=table.groups[rows],
        labels=labels[rows],
        split=split[rows],
        group_kind=info.group_kind,
        single_label=info.single_label,
        channels=info.channels,
        synthetic=info.synthetic,
        dropped=tuple(name for name in info.classes if name in drop),
        notes=info.notes,
    )


def _refuse_unmeasurable(index: Index) -> None:
    """Every class needs a positive and a negative in each split: to be learnt, chosen by, and measured."""
    sizes = np.array([len(index.rows(split)) for split in SPLITS])
    positives = np.stack([index.labels[index.rows(split)].sum(0, dtype=np.int64) for split in SPLITS])
    bad = np.flatnonzero(((positives == 0) | (positives == sizes[:, None])).any(0)).tolist()
    if not bad:
        return
    counts = "; ".join(
        f"{index.classes[c]} {', '.join(f'{split} {positives[s, c]}' for s, split in enumerate(SPLITS))}" for c in bad
    )
    images = ", ".join(f"{split} {size}" for split, size in zip(SPLITS, sizes, strict=True))
    names = ",".join(index.classes[c] for c in bad)
    raise DataError(
        f"{index.dataset}: {len(bad)} class(es) without a positive or without a negative in some split. Positives: "
        f"{counts}; images: {images}. Leave them out with dataset.drop_classes=[{names}], or take more images"
    )
