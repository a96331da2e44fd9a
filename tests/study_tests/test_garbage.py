"""What a trial leaves behind in the driver is freed when it has ended, without looking through all modules for it."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref

import psutil
import pytest

from study.garbage import clear_away, cleared_away

HEAPS = """
import ctypes, sys, threading
from study.garbage import keep_one_heap
if sys.argv[1] == "one":
    keep_one_heap()
begun, ended = threading.Barrier(9), threading.Event()
def hold():
    kept = [bytes(5_000) for _ in range(100)]
    begun.wait()
    ended.wait()
threads = [threading.Thread(target=hold) for _ in range(8)]
for thread in threads:
    thread.start()
begun.wait()
libc = ctypes.CDLL(None)
libc.fopen.restype = ctypes.c_void_p
out = ctypes.c_void_p(libc.fopen(b"/dev/stdout", b"w"))
libc.malloc_info(0, out)
libc.fflush(out)
ended.set()
"""


class Node:
    """Refers to itself, as what an ORM or an executor leaves behind does."""

    def __init__(self, size: int = 0) -> None:
        self.itself = self
        self.data = bytes(size)


def test_cycles_that_came_meanwhile_are_freed_and_nothing_else_is_looked_at() -> None:
    before = gc.get_freeze_count()
    with cleared_away():
        assert gc.get_freeze_count() > before + 10_000  # modules of this process
        left = weakref.ref(Node())
        kept = Node()
        clear_away()
        assert left() is None and kept.itself is kept
        assert len(gc.get_objects()) < 10_000
    assert gc.get_freeze_count() == 0
    assert len(gc.get_objects()) > 10_000


def test_all_is_looked_at_again_after_an_error() -> None:
    with pytest.raises(KeyError), cleared_away():
        raise KeyError
    assert gc.get_freeze_count() == 0


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's own way to give memory back")
def test_memory_of_many_small_things_goes_back_to_the_system() -> None:
    """64 MB in pieces below the size from which the C library asks the system for each: it would keep them."""
    process = psutil.Process()
    with cleared_away():
        clear_away()
        before = process.memory_info().rss
        nodes = [Node(16_000) for _ in range(4_000)]
        held = process.memory_info().rss - before
        last = Node(16_000)  # what stays at the end of the heap keeps it from shrinking by itself
        del nodes
        clear_away()
        assert held > 50_000_000
        assert process.memory_info().rss - before < held / 4
        assert last.itself is last


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's own heaps")
@pytest.mark.parametrize(("heaps", "one"), [("many", False), ("one", True)])
def test_threads_share_one_heap(heaps: str, one: bool) -> None:
    told = subprocess.run([sys.executable, "-c", HEAPS, heaps], capture_output=True, text=True, check=True).stdout
    assert (told.count("<heap ") == 1) is one
