"""Best epoch and patience: hand cases, undefined values, ties, and properties."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainables.stopping import Followed, follow

NAN = float("nan")
histories = st.lists(st.sampled_from([0.1, 0.2, 0.3, 0.4, 0.5, NAN]), max_size=20)


@pytest.mark.parametrize(
    ("values", "patience", "best", "stopped"),
    [
        ([], 3, None, None),
        ([0.5], 1, 0, None),
        ([0.5, 0.4], 1, 0, 1),
        ([0.5, 0.6, 0.7], 1, 2, None),
        ([0.5, 0.4, 0.6], 2, 2, None),
        ([0.5, 0.4, 0.3, 0.9], 2, 0, 2),
        ([0.5, 0.6, 0.4, 0.4, 0.4], 3, 1, 4),
        ([0.5, 0.6, 0.4, 0.4], 3, 1, None),
        ([0.9, 0.1, 0.1, 0.1, 0.1], None, 0, None),
    ],
)
def test_an_observer_stops_patience_epochs_after_its_best(
    values: list[float], patience: int | None, best: int | None, stopped: int | None
) -> None:
    assert follow(values, patience) == Followed(best, stopped)


def test_of_equal_values_the_earliest_is_best_and_a_tie_is_no_improvement() -> None:
    assert follow([0.5, 0.7, 0.7, 0.7], 2) == Followed(1, 3)


def test_an_undefined_value_uses_up_patience_and_is_never_best() -> None:
    assert follow([NAN, 0.5, NAN, NAN], 2) == Followed(1, 3)
    assert follow([NAN, NAN, 0.5], None) == Followed(2, None)


def test_values_that_are_never_defined_stop_after_patience_without_a_best() -> None:
    assert follow([NAN, NAN, NAN], 2) == Followed(None, 1)
    assert follow([NAN, NAN], None) == Followed(None, None)


def test_minus_infinity_counts_as_a_value() -> None:
    assert follow([-math.inf, NAN], None) == Followed(0, None)


@given(histories, histories, st.integers(1, 8))
def test_what_comes_after_the_stop_never_changes_the_outcome(
    values: list[float], later: list[float], patience: int
) -> None:
    outcome = follow(values, patience)
    if outcome.stopped is not None:
        assert follow(values + later, patience) == outcome
        assert follow(values[: outcome.stopped + 1], patience) == outcome


@given(histories, st.integers(1, 8), st.integers(0, 8))
def test_more_patience_never_stops_earlier_and_never_finds_worse(values: list[float], patience: int, more: int) -> None:
    short, long = follow(values, patience), follow(values, patience + more)
    if short.stopped is None:
        assert long == short
    elif long.stopped is not None:
        assert long.stopped >= short.stopped
    if short.best is not None:
        assert long.best is not None
        assert values[long.best] >= values[short.best]


@given(histories, st.none() | st.integers(1, 8))
def test_the_best_is_the_first_maximum_of_what_was_looked_at(values: list[float], patience: int | None) -> None:
    outcome = follow(values, patience)
    seen = values if outcome.stopped is None else values[: outcome.stopped + 1]
    defined = [v for v in seen if not math.isnan(v)]
    assert outcome.best == (seen.index(max(defined)) if defined else None)


@given(histories, st.integers(1, 8))
def test_following_epoch_by_epoch_equals_looking_back_from_the_end(values: list[float], patience: int) -> None:
    whole = follow(values, patience)
    stops = [n for n in range(len(values) + 1) if follow(values[:n], patience).stopped is not None]
    assert (min(stops) - 1 if stops else None) == whole.stopped
