"""The labels that two data sets have in common, by name, and an index brought down to them.

Names agree where they are the same but for case and punctuation (`Pleural_Thickening`, `Pleural thickening`), or where
both data sets mean one finding by two names. What means more or less than the other's label is not mapped: CheXpert's
`Lung Lesion` holds masses and nodules, VinDr-CXR's `Nodule/Mass` too. A study may map such labels itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from trainables.data.index import DataError, Index

# Names of one finding in the data sets that we read.
SYNONYMS = {
    "pleuraleffusion": "effusion",  # CheXpert, VinDr-CXR; ChestX-ray14 says Effusion
    "pulmonaryfibrosis": "fibrosis",  # VinDr-CXR; ChestX-ray14 says Fibrosis
}
# What a data set says of the other labels is no finding that could be found elsewhere.
NO_FINDINGS = frozenset({"nofinding"})
NORMAL = NO_FINDINGS | {"nofindings", "normal"}
NO_DISEASE = frozenset({"supportdevices"})  # seen in images without any finding too


def shared_labels(
    home: Sequence[str], away: Sequence[str], given: Mapping[str, str], *, names: tuple[str, str]
) -> dict[str, str]:
    """Label of the one data set → label of the other that means the same, in the order of the first.

    Args:
        home, away: class names of the two.
        given: further pairs, which win over those found by name.
        names: of the two data sets, for messages.

    Raises:
        DataError: a given label that is not there, or no label in common.
    """
    unknown = [f"{names[0]} has no class {a!r}" for a in given if a not in home]
    unknown += [f"{names[1]} has no class {b!r}" for b in given.values() if b not in away]
    if unknown:
        raise DataError(f"dataset.test_on.labels: {'; '.join(unknown)}")
    meant = {_meaning(name): name for name in away if name not in given.values()}
    pairs = {name: given.get(name) or meant.get(_meaning(name)) for name in home if _meaning(name) not in NO_FINDINGS}
    found = {mine: theirs for mine, theirs in pairs.items() if theirs is not None}
    if not found:
        raise DataError(
            f"dataset.test_on: {names[0]} and {names[1]} have no label in common ({', '.join(home)}; "
            f"{', '.join(away)}); map some by dataset.test_on.labels={{OURS: THEIRS}}"
        )
    return found


def restricted(index: Index, labels: Mapping[str, str]) -> Index:
    """An index with some of its classes alone, in the order given, under the names given.

    Args:
        labels: class of the index → name that it gets.
    """
    columns = [index.classes.index(name) for name in labels]
    kept = np.ascontiguousarray(index.labels[:, columns])
    rows = np.flatnonzero(kept.any(1)) if index.single_label else np.arange(len(index))
    left_out = tuple(name for name in index.classes if name not in labels)
    return replace(
        index_rows(index, rows),
        classes=tuple(labels.values()),
        labels=kept[rows],
        dropped=(*index.dropped, *left_out),
    )


def index_rows(index: Index, rows: np.ndarray[tuple[int], np.dtype[np.intp]]) -> Index:
    """An index of some of its rows."""
    return replace(
        index,
        names=index.names[rows],
        groups=index.groups[rows],
        labels=index.labels[rows],
        split=index.split[rows],
    )


def means_no_finding(name: str) -> bool:
    """Whether a label says that there is nothing to find."""
    return _meaning(name) in NORMAL


def is_finding(name: str) -> bool:
    """Whether a label contradicts that there is nothing to find."""
    return _meaning(name) not in NORMAL | NO_DISEASE


def _meaning(name: str) -> str:
    plain = re.sub(r"[^a-z0-9]", "", name.casefold())
    return SYNONYMS.get(plain, plain)
