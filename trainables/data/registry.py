"""The data sets by name: their facts, their index, and their images' place.

A new data set is one file with an `ADAPTER` and one line in `_ADAPTERS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from trainables.data import (
    any_table,
    chestxray14,
    chexpert,
    coco_folder,
    ham10000,
    jsrt,
    phantom,
    tbx11k,
    vindr_cxr,
    yolo_folder,
)
from trainables.data.adapter import Adapter, DatasetInfo, Table
from trainables.data.boxes import Boxes
from trainables.data.files import find_files, locate_files
from trainables.data.index import SPLITS, DataError, Index
from trainables.data.masks import Masks
from trainables.data.shared_labels import index_rows, restricted, shared_labels
from trainables.data.split_file import keep_split, split_file
from trainables.data.splits import Leak, find_leaks, refuse_leaks, sample_groups, split_groups
from trainables.data.tables import root_of
from trainables.settings import READING, DatasetSettings

_ADAPTERS: dict[str, Adapter] = {
    adapter.info.name: adapter
    for adapter in (
        chestxray14.ADAPTER,
        chexpert.ADAPTER,
        ham10000.ADAPTER,
        vindr_cxr.ADAPTER,
        tbx11k.ADAPTER,
        jsrt.ADAPTER,
        any_table.ADAPTER,
        coco_folder.ADAPTER,
        yolo_folder.ADAPTER,
        phantom.CHEST,
        phantom.DERM,
    )
}

DATASETS: dict[str, DatasetInfo] = {name: adapter.info for name, adapter in _ADAPTERS.items()}

_VAL_OF_OFFICIAL_TRAIN = 1 / 9  # 80:10, as in our own split
_SHOWN = 30  # classes whose counts an error shows


def load_index(settings: DatasetSettings, splits_folder: Path | None = None, *, labels_learnt: bool = True) -> Index:
    """Read the table, split it, and drop what is to be dropped; touches no image.

    The split is made before classes are dropped, so that dropping one moves no image to another split.

    Args:
        settings: which data set, how many images, which split, which classes.
        splits_folder: the split is written there once, and read and verified from then on.
        labels_learnt: whether the labels are what is learnt and measured. A task that learns from boxes or masks asks
            nothing of them, and says itself what it needs.

    Raises:
        DataError: unknown data set or class, unusable table, a kept split that does not fit the table, a group in two
            splits, or a class that cannot be learnt or measured in some split.
    """
    index, given_test = _split_index(settings, splits_folder)
    if settings.test_on is not None:
        shared = _shared(index, settings)
        share = f"{len(shared)} of its {len(index.classes)} labels, which {settings.test_on.name} has too"
        note = f"Trained on {share}: {', '.join(shared)}."
        index = restricted(index, {name: name for name in shared})
        index = replace(index, notes=(*index.notes, note))
    if labels_learnt and (problem := unmeasurable(index, given_test=given_test)) is not None:
        raise DataError(problem)
    return index


def load_away(settings: DatasetSettings, splits_folder: Path | None = None) -> Index:
    """The test split of `settings.test_on`, under the labels that `load_index` trains on, in its order.

    Its training and validation images are left out: nobody looks at them.

    Raises:
        DataError: as `load_index`; the two are one data set; or a test split that cannot be measured.
    """
    assert settings.test_on is not None, "asked for where the settings name another data set"
    away = away_settings(settings)
    _refuse_one_data_set(settings, away)
    home, _ = _split_index(settings, splits_folder)
    try:
        index, given_test = _split_index(away, splits_folder)
    except DataError as error:  # it speaks of the data set's own settings, which stand elsewhere here
        raise DataError(str(error).replace("dataset.", "dataset.test_on.")) from error
    shared = _shared(home, settings)
    index = restricted(index, {theirs: ours for ours, theirs in shared.items()})
    index = index_rows(index, index.rows("test"))
    absent = _undefined_in_test(index)
    if len(absent) == len(index.classes) or (absent and not given_test):
        raise DataError(
            f"dataset.test_on: the test split of {away.name}, {len(index)} images, cannot measure {', '.join(absent)}: "
            "take more images (dataset.test_on.images), or leave the classes out with dataset.drop_classes"
        )
    return index


def away_settings(settings: DatasetSettings) -> DatasetSettings:
    """The other data set, as the network sees images."""
    assert settings.test_on is not None, "asked for where the settings name another data set"
    source = settings.test_on.model_dump(exclude={"labels"})
    seen = {"image_size": settings.image_size, "fit": settings.fit, "cache_gb": settings.cache_gb}
    return DatasetSettings(**source, **seen)


def _refuse_one_data_set(home: DatasetSettings, away: DatasetSettings) -> None:
    if home.name != away.name:
        return
    synthetic = _adapter(home.name).info.synthetic
    if home.hospital != away.hospital if synthetic else root_of(home.name, home.root) != root_of(away.name, away.root):
        return
    remedy = "give another dataset.test_on.hospital" if synthetic else "give another dataset.test_on.root"
    raise DataError(
        f"dataset.test_on: it is {home.name} itself, on which training looks at the same patients; {remedy}"
    )


def _shared(home: Index, settings: DatasetSettings) -> dict[str, str]:
    """Our label → theirs."""
    assert settings.test_on is not None, "asked for where the settings name another data set"
    theirs = _class_names(away_settings(settings).model_dump_json())
    names = (settings.name, settings.test_on.name)
    return shared_labels(home.classes, theirs, settings.test_on.labels, names=names)


@cache
def _class_names(dataset_json: str) -> tuple[str, ...]:
    """Classes of a data set, as its table says."""
    settings = DatasetSettings.model_validate_json(dataset_json)
    table = read_table(settings)
    return (table.info or _adapter(settings.name).info).classes


def _split_index(settings: DatasetSettings, splits_folder: Path | None) -> tuple[Index, bool]:
    """The index with all its classes, and whether others gave its test split."""
    table = read_table(settings).usable()
    index = split_table(table, settings, splits_folder)
    refuse_leaks(leaks_of(table, index), index.group_kind)
    return index, table.official is not None


def read_table(settings: DatasetSettings) -> Table:
    """The data set's table, sampled if `dataset.images` asks for it; rows that cannot be used are in its `refused`.

    Raises:
        DataError: unknown data set, settings that it does not read, or a table that cannot be used at all.
    """
    adapter = _adapter(settings.name)
    info = adapter.info
    _refuse_foreign_options(adapter, settings)
    if settings.split == "official" and info.synthetic:
        raise DataError(f"{info.name}: there is no official split; set dataset.split=grouped")
    if info.classes:
        _refuse_unknown_classes(info, settings.drop_classes)
    table = adapter.read_table(settings)
    if settings.images is not None and not info.synthetic:
        table = table.take(sample_groups(table.groups, settings.images, settings.split_seed))
    return table


def split_table(table: Table, settings: DatasetSettings, splits_folder: Path | None = None) -> Index:
    """The index of a table: split, and without the dropped classes. Groups may leak; nothing is said of classes.

    Raises:
        DataError: no rows, an unknown class to drop, or a kept split that does not fit the table.
    """
    info = table.info or _adapter(settings.name).info
    _refuse_unknown_classes(info, settings.drop_classes)
    if len(table) == 0:
        raise DataError(f"{info.name}: no image is left in its table; check dataset.root and the settings")
    if splits_folder is None:
        split = _split(table, settings)
    else:
        path = split_file(settings, splits_folder)
        split = keep_split(path, settings, table, lambda: _split(table, settings))
    return _index(info, table, split, settings.drop_classes)


def prepare(settings: DatasetSettings, index: Index, folder: Path) -> Path:
    """Return the root under which the index's images lie; a phantom is drawn under `folder` first, once.

    Several processes may prepare one phantom at the same time; one that is killed leaves nothing half-made.

    Raises:
        DataError: real data without a root, or with images missing.
    """
    root = place(settings, folder)
    locate(index, root)
    return root


def place(settings: DatasetSettings, folder: Path) -> Path:
    """The data set's root; a phantom is drawn under `folder` first, once.

    Raises:
        DataError: real data without a root.
    """
    adapter = _adapter(settings.name)
    if adapter.draw is None:
        return root_of(settings.name, settings.root)
    from trainables.data.drawing import drawn_root

    return drawn_root(settings, adapter.draw, folder)


def locate(index: Index, root: Path) -> list[Path]:
    """Paths of the index's images under root, in its order; names may lack their extension.

    Raises:
        DataError: images that are missing (how many, the first one, where was looked), or names that leave the root.
    """
    return locate_files(index, root, _adapter(index.dataset).image_folders(root))


def find(index: Index, root: Path) -> list[Path | None]:
    """As `locate`, with None for each image that is missing."""
    return find_files(index, root, _adapter(index.dataset).image_folders(root))


def read_boxes(settings: DatasetSettings) -> Boxes | None:
    """The data set's boxes, in pixels of the original images; None where it, or this copy, has none.

    Raises:
        DataError: a table or file of boxes that cannot be used at all.
    """
    reader = _adapter(settings.name).read_boxes
    return None if reader is None else reader(settings)


def read_masks(settings: DatasetSettings) -> Masks | None:
    """The data set's masks, decoded when they are asked for; None where it has none.

    Raises:
        DataError: a table or folder of masks that cannot be used.
    """
    reader = _adapter(settings.name).read_masks
    return None if reader is None else reader(settings)


def _adapter(name: str) -> Adapter:
    if name not in _ADAPTERS:
        raise DataError(f"dataset.name: unknown data set {name!r}; known are {', '.join(_ADAPTERS)}")
    return _ADAPTERS[name]


def _refuse_foreign_options(adapter: Adapter, settings: DatasetSettings) -> None:
    """A setting that the data set does not read would be without effect, and nobody would notice."""
    fields = type(settings).model_fields
    given = [key for key in fields if key in READING and getattr(settings, key) != fields[key].default]
    problems = []
    for key in given:
        if key not in adapter.options:
            readers = " and ".join(a.info.name for a in _ADAPTERS.values() if key in a.options)
            problems.append(f"dataset.{key}: {adapter.info.name} does not read it; it is a setting of {readers}")
    if problems:
        raise DataError("\n".join(problems))


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
    strata = table.labels if table.strata is None else table.strata
    if table.official is None:
        return split_groups(table.groups, strata, settings.split_seed)
    split = table.official.copy()
    if (split == SPLITS.index("val")).any():
        return split
    rest = np.flatnonzero(split == SPLITS.index("train"))
    if len(rest):
        shares = (1 - _VAL_OF_OFFICIAL_TRAIN, _VAL_OF_OFFICIAL_TRAIN)
        split[rest] = split_groups(table.groups[rest], strata[rest], settings.split_seed, shares)
    return split


def _index(info: DatasetInfo, table: Table, split: npt.NDArray[np.uint8], drop: Sequence[str]) -> Index:
    kept = [column for column, name in enumerate(info.classes) if name not in drop]
    labels = np.ascontiguousarray(table.labels[:, kept])
    rows = np.flatnonzero(labels.any(1)) if info.single_label else np.arange(len(table))
    index = Index(
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
        claims=info.claims,
    )
    absent = _undefined_in_test(index) if table.official is not None else []
    if not absent:
        return index
    note = f"Not measurable in the given test split, and left out of the macro: {', '.join(absent)}."
    return replace(index, notes=(*index.notes, note))


def _undefined_in_test(index: Index) -> list[str]:
    positives, negatives = index.class_counts("test")
    return [index.classes[c] for c in np.flatnonzero((positives == 0) | (negatives == 0))]


def leaks_of(table: Table, index: Index) -> list[Leak]:
    """Groups in two splits; a given split is looked at as it was given, before val is held out of its train part."""
    if table.official is None:
        return find_leaks(index.groups, index.split)
    return find_leaks(table.groups, table.official)


def unmeasurable(index: Index, *, given_test: bool) -> str | None:
    """Why the index cannot be learnt from or measured on, with the remedy; None if it can.

    Every class needs a positive and a negative in each split: to be learnt, chosen by, and measured. A test split that
    others gave may lack some (CheXpert's has no fracture): they are left out of the macro by name, if any is left.
    """
    counts = {split: index.class_counts(split) for split in SPLITS}
    lacking = {split: (positives == 0) | (negatives == 0) for split, (positives, negatives) in counts.items()}
    if given_test and not lacking["test"].all():
        lacking["test"] = np.zeros_like(lacking["test"])
    bad = np.flatnonzero(np.any(list(lacking.values()), axis=0)).tolist()
    if not bad:
        return None
    shown = "; ".join(
        f"{index.classes[c]} {', '.join(f'{split} {counts[split][0][c]}' for split in SPLITS)}" for c in bad[:_SHOWN]
    )
    more = f"; and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
    images = ", ".join(f"{split} {len(index.rows(split))}" for split in SPLITS)
    names = ",".join(index.classes[c] for c in bad)
    remedy = f"Leave them out with dataset.drop_classes=[{names}], or take more images"
    if len(bad) == len(index.classes):
        remedy = "No class is left: take more images, or another split"
    return (
        f"{index.dataset}: {len(bad)} class(es) without a positive or without a negative in some split. Positives: "
        f"{shown}{more}; images: {images}. {remedy}"
    )
