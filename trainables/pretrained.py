"""Pretrained networks, read once a process: every trial gets a copy of its own.

Making a network and reading its weights was most of a trial's start: 0.1 s for an encoder of 12 small blocks, which is
copied in a fifth of that. What is kept costs its weights in main memory, once for each kind of network.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable
from typing import TypeVar, cast

from torch import nn

Network = TypeVar("Network", bound=nn.Module)

_kept: dict[str, tuple[Hashable, nn.Module]] = {}


def copy_of(kind: str, identity: Hashable, load: Callable[[], Network]) -> Network:
    """A network of the caller's own, equal bit by bit to every other one of the same identity.

    Args:
        kind: of network; the last one of each kind is kept.
        identity: all that `load` depends on, weights by their digest.
        load: makes the network; not called while one of this identity is kept. What it raises is passed on.
    """
    kept = _kept.get(kind)
    if kept is None or kept[0] != identity:
        _kept.pop(kind, None)  # two at a time are one too many in memory
        kept = _kept[kind] = identity, load()
    return cast(Network, copy.deepcopy(kept[1]))
