"""Groups of images whose files say nothing of patients: each its own, or what a pattern finds in its name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import PurePosixPath

import numpy as np
import numpy.typing as npt

from trainables.data.adapter import DatasetInfo
from trainables.data.index import DataError
from trainables.data.tables import texts

ALONE = "Every image is its own group: one patient's may be in two splits."


def grouped_by_name(
    info: DatasetInfo, names: Sequence[str], pattern: str | None
) -> tuple[npt.NDArray[np.str_], DatasetInfo]:
    """(N,) groups, and the data set's facts with what they are.

    Args:
        names: of the images; folders in them are not looked at.
        pattern: regular expression, searched for in each name: its first group, or all of it, is the image's group.
            None: every image is its own.

    Raises:
        DataError: a name in which it finds nothing.
    """
    if pattern is None:
        return texts(list(names)), replace(info, notes=(ALONE, *info.notes))
    expression = re.compile(pattern)
    found = [expression.search(PurePosixPath(name).name) for name in names]
    groups = [(match[1 if expression.groups else 0] or "") if match else "" for match in found]
    nothing = [name for name, group in zip(names, groups, strict=True) if not group]
    if nothing:
        raise DataError(
            f"{info.name}: dataset.group_pattern: {pattern!r} finds nothing in {len(nothing)} of {len(names)} image "
            f"names, first {nothing[0]!r}; give one that finds the patient in every name"
        )
    said = f"Groups are what {pattern!r} finds in the images' names; none has images in two splits."
    return texts(groups), replace(info, group_kind="group", notes=(said, *info.notes))
