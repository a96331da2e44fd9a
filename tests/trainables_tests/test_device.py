"""What is left out of searches for cycles stays, and what comes and goes is still found."""

from __future__ import annotations

import gc
import weakref

from trainables.device import release_memory, settle


class Knot:
    def __init__(self) -> None:
        self.itself = self


def test_modules_are_searched_once_and_trials_that_end_every_time() -> None:
    settled = gc.get_freeze_count()
    before = weakref.ref(Knot())
    settle("a task of this test")
    assert before() is None, "what nobody refers to is not kept for good"
    assert gc.get_freeze_count() > max(settled, 100_000), "torch alone brings as many"
    again = gc.get_freeze_count()
    settle("a task of this test")
    assert gc.get_freeze_count() == again
    after = weakref.ref(Knot())
    release_memory()
    assert after() is None
