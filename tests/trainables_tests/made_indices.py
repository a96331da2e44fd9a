"""Indices of images for tests of what reads them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from trainables.data.index import Index


def made_index(names: Sequence[str], classes: tuple[str, ...] = ("Mass",), **changes: Any) -> Index:
    """An index of grey images to train on, each a group of its own, without any label; `changes`: other fields."""
    plain = Index(
        dataset="chestxray14",
        classes=classes,
        names=np.array(names),
        groups=np.array(names),
        labels=np.zeros((len(names), len(classes)), np.int8),
        split=np.zeros(len(names), np.uint8),
        group_kind="image",
        single_label=False,
        channels=1,
        synthetic=False,
    )
    return dataclasses.replace(plain, **changes)
