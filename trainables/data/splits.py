"""Splits over groups, stratified by label: iterative stratification (Sechidis, Tsoumakas & Vlahavas, ECML 2011).

The published algorithm assigns examples; here whole groups (patients, lesions) are assigned, and what is balanced is
the number of images: of each class, and in all. A group never spans two splits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trainables.data.index import SPLITS, DataError

SHARES = (0.8, 0.1, 0.1)  # of train, val, test
_NAMED = 5  # groups that an error names

Counts = npt.NDArray[np.int64]


def split_groups(
    groups: npt.NDArray[np.str_], labels: npt.NDArray[np.int8], seed: int, shares: Sequence[float] = SHARES
) -> npt.NDArray[np.uint8]:
    """Assign every group to a split.

    Whatever the order of the rows, the same groups go to the same splits. A class of at least as many groups as there
    are splits gets a positive group in each wherever moving one group at a time can achieve it (always, if no image has
    two classes).

    Args:
        groups: (N,) group of each image.
        labels: (N, C), 1 where the class is present; other values count as absent.
        seed: of the order in which equally good choices are made.
        shares: (S,) parts of the whole, in the order of the splits; they sum to 1.

    Returns:
        (N,) uint8 position of each image's split.
    """
    _, member = np.unique(groups, return_inverse=True)
    sizes = np.bincount(member).astype(np.int64)
    positives = np.zeros((len(sizes), labels.shape[1]), np.int64)
    np.add.at(positives, member, labels == 1)
    order = np.random.default_rng(seed).permutation(len(sizes))
    stratifier = _Stratifier(positives[order], sizes[order], np.asarray(shares, np.float64))
    assigned = np.empty(len(sizes), np.uint8)
    assigned[order] = stratifier.run()
    return assigned[member]


def sample_groups(groups: npt.NDArray[np.str_], images: int, seed: int) -> npt.NDArray[np.intp]:
    """Rows of a random sample of whole groups that holds about `images` images, in ascending order.

    At least one group is taken; the sample is the one among growing samples whose size is nearest to `images`.
    """
    _, member = np.unique(groups, return_inverse=True)
    if images >= len(groups):
        return np.arange(len(groups))
    order = np.random.default_rng([seed, 1]).permutation(int(member.max()) + 1)
    totals = np.bincount(member)[order].cumsum()
    taken = order[: int(np.abs(totals - images).argmin()) + 1]
    return np.flatnonzero(np.isin(member, taken))


@dataclass(frozen=True)
class Leak:
    """A group with images in several splits: the splits' names, and the number of its images."""

    group: str
    splits: tuple[str, ...]
    images: int


def find_leaks(groups: npt.NDArray[np.str_], split: npt.NDArray[np.uint8]) -> list[Leak]:
    """Groups that span splits, in alphabetical order."""
    names, first, member = np.unique(groups, return_index=True, return_inverse=True)
    torn = np.unique(member[split != split[first][member]])
    return [
        Leak(
            str(names[group]), tuple(SPLITS[s] for s in np.unique(split[member == group])), int((member == group).sum())
        )
        for group in torn
    ]


def refuse_leaks(leaks: Sequence[Leak], group_kind: str) -> None:
    """Raise DataError if there is any, naming how many and the first ones."""
    if not leaks:
        return
    named = ", ".join(f"{group_kind} {leak.group} in {' and '.join(leak.splits)}" for leak in leaks[:_NAMED])
    more = ", …" if len(leaks) > _NAMED else ""
    raise DataError(
        f"{len(leaks)} {group_kind}(s) have images in two splits ({named}{more}): the split leaks; assign each "
        f"{group_kind} to one split"
    )


@dataclass
class _Stratifier:
    """The greedy assignment of G groups to S splits.

    Attributes:
        positives: (G, C) images of each class in a group.
        sizes: (G,) images in a group.
        shares: (S,)
    """

    positives: Counts
    sizes: Counts
    shares: npt.NDArray[np.float64]

    def run(self) -> npt.NDArray[np.uint8]:
        """(G,) split of each group."""
        self._has = self.positives > 0
        self._assigned = np.full(len(self.sizes), -1, np.int64)
        self._room = np.outer(self.shares, self.positives.sum(0))  # (S, C) images still wanted of each class
        self._space = self.shares * self.sizes.sum()  # (S,) images still wanted
        self._members = np.zeros((len(self.shares), self.positives.shape[1]), np.int64)  # positive groups a split
        self._assign_positives()
        self._assign_negatives()
        self._cover()
        return self._assigned.astype(np.uint8)

    def _assign_positives(self) -> None:
        """Rarest class first, as it has the least freedom; within it the largest groups, as they fit worst."""
        while True:
            remaining = self._has[self._assigned < 0].sum(0)
            if not remaining.any():
                return
            rarest = int(np.where(remaining > 0, remaining, np.iinfo(np.int64).max).argmin())
            waiting = np.flatnonzero((self._assigned < 0) & self._has[:, rarest])
            waiting = waiting[np.argsort(-self.positives[waiting, rarest], kind="stable")]
            for left, group in zip(range(len(waiting), 0, -1), waiting.tolist(), strict=True):
                self._assign(group, self._choose(rarest, left))

    def _choose(self, cls: int, left: int) -> int:
        """The split that wants the class most; once only as many groups are left as splits lack one, one of those."""
        lacking = self._members[:, cls] == 0
        allowed = lacking if lacking.sum() > 0 and left <= lacking.sum() else np.ones_like(lacking)
        # Ties go to the split that wants images most (Sechidis et al., algorithm 1, lines 13-17).
        return int(max(np.flatnonzero(allowed), key=lambda s: (round(self._room[s, cls], 9), self._space[s])))

    def _assign_negatives(self) -> None:
        """Groups without any class fill up the splits, the largest first."""
        waiting = np.flatnonzero(self._assigned < 0)
        for group in waiting[np.argsort(-self.sizes[waiting], kind="stable")].tolist():
            self._assign(group, int(self._space.argmax()))

    def _assign(self, group: int, split: int) -> None:
        if (old := self._assigned[group]) >= 0:
            self._room[old] += self.positives[group]
            self._space[old] += self.sizes[group]
            self._members[old] -= self._has[group]
        self._assigned[group] = split
        self._room[split] -= self.positives[group]
        self._space[split] -= self.sizes[group]
        self._members[split] += self._has[group]

    def _cover(self) -> None:
        """Move single groups into splits that lack a class, unless a class loses its last group in a split by it."""
        enough = self._has.sum(0) >= len(self.shares)
        for cls in np.flatnonzero(enough & (self._members == 0).any(0)).tolist():
            for split in np.flatnonzero(self._members[:, cls] == 0).tolist():
                group = self._spare(cls)
                if group is not None:
                    self._assign(group, split)

    def _spare(self, cls: int) -> int | None:
        """The smallest group of the class without which its split still has every class it has now."""
        candidates = np.flatnonzero(self._has[:, cls])
        others = self._members[self._assigned[candidates]]
        free = candidates[~((others == 1) & self._has[candidates] & (self._has.sum(0) >= len(self.shares))).any(1)]
        return int(free[np.argsort(self.sizes[free], kind="stable")[0]]) if len(free) else None
