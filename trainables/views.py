"""Flipped views of training images, served from the pixels that were decoded once.

A row in a view is one number: `row + images · view`. View 0 is the image as it is, and the only one that validation and
test see; the others read the same bytes of the cache the other way round, with boxes and masks flipped along. So
whatever takes rows (batches, losses, caches of activations) takes views, and nothing is decoded or kept twice but what
is computed from them. No torch, so that a plan can count views.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from trainables.settings import Flips
from trainables.strategy import stream

Rows = npt.NDArray[np.intp]
_Array = TypeVar("_Array", bound=npt.NDArray[Any])


class View(NamedTuple):
    """Which sides of an image are exchanged: left and right, top and bottom."""

    mirrored: bool
    upended: bool


VIEWS: dict[Flips, tuple[View, ...]] = {
    "none": (View(False, False),),
    "horizontal": (View(False, False), View(True, False)),
    "vertical": (View(False, False), View(False, True)),
    "both": (View(False, False), View(True, False), View(False, True), View(True, True)),
}


@dataclass(frozen=True)
class Views:
    """The views of a data set's images.

    Attributes:
        images: N, rows of the index.
        flips: as in `dataset.flips`.
    """

    images: int
    flips: Flips = "none"

    @property
    def count(self) -> int:
        """Views an image has, itself included."""
        return len(VIEWS[self.flips])

    def every(self, rows: Rows) -> Rows:
        """(B · count,) every view of rows of images, view by view."""
        return np.concatenate([rows + self.images * view for view in range(self.count)])

    def drawn(self, rows: Rows, seed: int, epoch: int, step: int) -> Rows:
        """(B,) a view of each image, all equally likely; chosen by seed, epoch and step alone."""
        if self.count == 1:
            return rows
        rng = np.random.default_rng(stream("flips", seed, epoch, step))
        return rows + self.images * rng.integers(self.count, size=len(rows))

    def image(self, rows: Rows) -> Rows:
        """(B,) row of the index whose image each row shows."""
        return rows % self.images

    def alike(self, images: Rows, rows: Rows) -> Rows:
        """(B,) other images, each in the view in which `rows` show theirs."""
        return images + rows - self.image(rows)

    def pixels(self, cached: npt.NDArray[np.uint8], rows: Rows) -> npt.NDArray[np.uint8]:
        """(B, S, S, C) images of a cache of (N, S, S, C), in their views."""
        return self.turned(np.asarray(cached[self.image(rows)]), rows, axes=(1, 2))

    def turned(self, arrays: _Array, rows: Rows, axes: tuple[int, int] = (-2, -1)) -> _Array:
        """(B, …) arrays of images as they are, changed in place to the rows' views.

        Args:
            arrays: one a row; must own its values.
            rows: in views.
            axes: of height and width.
        """
        height, width = (axis % arrays.ndim for axis in axes)
        for number, view in enumerate(VIEWS[self.flips]):
            chosen = np.flatnonzero(rows // self.images == number)
            for axis, flipped in ((height, view.upended), (width, view.mirrored)):
                if flipped and len(chosen):
                    arrays[chosen] = np.flip(arrays[chosen], axis)
        return arrays

    def corners(self, boxes: npt.NDArray[np.float64], rows: Rows, size: int) -> npt.NDArray[np.float64]:
        """(K, 4) boxes x_min, y_min, x_max, y_max, px of a square of side `size`, as their rows' views show them.

        Args:
            boxes: as the images have them.
            rows: (K,) the row in a view that each box is of.
            size: px.
        """
        turned = boxes.copy()
        for number, view in enumerate(VIEWS[self.flips]):
            chosen = rows // self.images == number
            if view.mirrored:
                turned[np.ix_(chosen, [0, 2])] = size - turned[np.ix_(chosen, [2, 0])]
            if view.upended:
                turned[np.ix_(chosen, [1, 3])] = size - turned[np.ix_(chosen, [3, 1])]
        return turned

    def told(self) -> str:
        """What is done to training images, for the record."""
        if self.flips == "none":
            return "none"
        kinds = {"both": "horizontal and vertical"}.get(self.flips, self.flips)
        return f"{kinds} flips: one of {self.count} views, equally likely, in training alone"
