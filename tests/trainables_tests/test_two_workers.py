"""A worker that was cut off and given up goes on beside the one that took its trial over: to the same bits, unnoticed.

Both write to one storage. The first finishes at least the epoch that it was in, saves its state, and drops the state
before it, which the second may just be reading.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tiny_trials import begin, finish, keys_of, outcome, tiny_settings, tiny_task, trial_request

from study.store import Store
from trainables.classification import Classification
from trainables.data.opened import Data
from trainables.requests import Observer, TrialRequest
from trainables.trial import Trial

EPOCHS, HEAD = 6, 2
OBSERVERS = (Observer(None, 0.0, None), Observer(0.9, 3.0, 2))
KEYS = keys_of("trajectory", EPOCHS)


@pytest.fixture(scope="module")
def task(encoder: Path, data: Data) -> Classification:
    return tiny_task(tiny_settings(encoder), data)


@pytest.fixture(scope="module")
def request_of_all(encoder: Path) -> TrialRequest:
    """As the plan asks: the end of the head stage is kept, since others start there; every other state is dropped."""
    return trial_request(tiny_settings(encoder), OBSERVERS, keep=frozenset(KEYS[HEAD - 1 : HEAD]))


@pytest.fixture(scope="module")
def before(request_of_all: TrialRequest, task: Classification, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Storages in which the trial stands after each number of epochs, the last one finished."""
    folder, root = tmp_path_factory.mktemp("trained"), tmp_path_factory.mktemp("before")
    trial = begin(request_of_all, task, Store(folder))
    for epoch in range(EPOCHS):
        copied(folder, root / str(epoch))
        trial.step()
    copied(folder, root / str(EPOCHS))
    return [root / str(epoch) for epoch in range(EPOCHS + 1)]


@pytest.fixture(autouse=True)
def nothing_is_damaged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.WARNING):
        yield
    assert [record.message for record in caplog.records if "damaged" in record.message] == []


def as_undisturbed(storage: Path, before: list[Path]) -> None:
    """The results of the run that nobody disturbed, and of the states only those that others start from."""
    ours, theirs = Store(storage), Store(before[-1])
    for observer in OBSERVERS:
        assert outcome(ours.load_result(KEYS[-1], observer.name)) == outcome(
            theirs.load_result(KEYS[-1], observer.name)
        )
    assert [epoch for epoch, key in enumerate(KEYS, start=1) if ours.has_state(key)] == [HEAD]


def copied(storage: Path, to: Path) -> Path:
    return Path(shutil.copytree(storage, to))


@pytest.mark.parametrize("epoch", range(EPOCHS))
def test_whenever_the_one_that_was_cut_off_saves_its_epoch_the_other_trains_on_to_the_same_bits(
    epoch: int, request_of_all: TrialRequest, task: Classification, before: list[Path], tmp_path: Path
) -> None:
    """Cut off in the epoch after `epoch`, which it saves before the other one begins, or between epochs of its."""
    for late in sorted({0, min(1, EPOCHS - 1 - epoch), EPOCHS - 1 - epoch}):
        storage = copied(before[epoch], tmp_path / str(late))
        cut_off = begin(request_of_all, task, Store(storage))
        other = begin(request_of_all, task, Store(storage))
        assert other.epoch == epoch
        for _ in range(late):
            other.step()
        cut_off.step()
        finish(other)
        as_undisturbed(storage, before)


def test_one_that_goes_on_to_the_end_in_turns_with_the_other_is_no_matter(
    request_of_all: TrialRequest, task: Classification, before: list[Path], tmp_path: Path
) -> None:
    storage = copied(before[1], tmp_path / "storage")
    cut_off, other = (begin(request_of_all, task, Store(storage)) for _ in range(2))
    while not other.done:
        cut_off.step()
        other.step()
    as_undisturbed(storage, before)


# ------------------------------------------------------------------------------- at any moment of the other's set-up


@contextmanager
def moments(meanwhile: Callable[[int], None]) -> Iterator[None]:
    """Calls back with 0, 1, … before each look at a file, but not before those of the callback itself."""
    looked, busy = 0, False
    patch = pytest.MonkeyPatch()

    def hooked(real: Callable[..., Any]) -> Callable[..., Any]:
        def look(*arguments: Any, **named: Any) -> Any:
            nonlocal looked, busy
            if not busy:
                busy = True
                meanwhile(looked)
                looked, busy = looked + 1, False
            return real(*arguments, **named)

        return look

    for name in ("is_file", "read_bytes", "read_text"):
        patch.setattr(Path, name, hooked(getattr(Path, name)))
    try:
        yield
    finally:
        patch.undo()


def set_up_while(
    meanwhile: Callable[[Trial, int], None], request: TrialRequest, task: Classification, storage: Path
) -> Trial:
    """The trial of a worker that takes over, after something happened to the one before at a moment of its set-up."""
    cut_off = begin(request, task, Store(storage))
    store = Store(storage)
    with moments(lambda moment: meanwhile(cut_off, moment)):
        return begin(request, task, store)


@pytest.mark.parametrize("steps", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_no_epoch_is_lost_to_the_set_up_whatever_is_saved_and_dropped_during_it(
    steps: int, request_of_all: TrialRequest, task: Classification, before: list[Path], tmp_path: Path
) -> None:
    """It begins where the first one stood when the set-up began, or later; what is dropped meanwhile is no damage."""
    epoch, count = 3, 0

    def counted(_: Trial, moment: int) -> None:
        nonlocal count
        count = moment + 1

    set_up_while(counted, request_of_all, task, copied(before[epoch], tmp_path / "counted"))
    assert count > EPOCHS, "every state was looked for, and one was read"
    begun = []
    for moment in range(count):

        def interrupted(cut_off: Trial, now: int, at: int = moment) -> None:
            for _ in range(steps if now == at else 0):
                cut_off.step()

        storage = copied(before[epoch], tmp_path / str(moment))
        other = set_up_while(interrupted, request_of_all, task, storage)
        begun.append(other.epoch)
        assert epoch <= other.epoch <= epoch + steps, f"after moment {moment}"
    assert set(begun) == {epoch, epoch + steps}, "moments before the state was found, and after"
    finish(other)
    as_undisturbed(storage, before)


def test_one_that_ends_the_trial_while_the_other_sets_up_leaves_nothing_to_train(
    request_of_all: TrialRequest, task: Classification, before: list[Path], tmp_path: Path
) -> None:
    storage = copied(before[EPOCHS - 1], tmp_path / "storage")

    def ends(cut_off: Trial, moment: int) -> None:
        if moment == 1:
            cut_off.step()

    assert set_up_while(ends, request_of_all, task, storage).done
    as_undisturbed(storage, before)
