"""Memory of a driver that runs for weeks: what a trial leaves behind is given back when the trial has ended.

Tune and the ledger's database leave a quarter of a megabyte of cycles a trial. Python looks for them once a quarter of
all objects are new; by then they are many, and scattered among what stays, so that their memory is not used again.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager

M_ARENA_MAX = -8  # of glibc's malloc.h


def keep_one_heap() -> None:
    """Have all threads take their memory from one heap, where the C library can; for threads yet to come, and for good.

    Ray starts thirty threads in a driver. glibc would open a heap for each, up to eight a core, and what trials leave
    would lie scattered over them: memory that is free in one is not used by another.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_ARENA_MAX, 1)


@contextmanager
def cleared_away() -> Iterator[None]:
    """Leave what is there by now, modules above all, out of searches for garbage, which take half a second with it."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def clear_away() -> None:
    """Free what is not referenced any more, and give whole pages of it back to the system where the C library can."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
