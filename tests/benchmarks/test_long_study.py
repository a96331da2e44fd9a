"""The long study's arithmetic by hand, and its plan."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.long_study import Sample, Step, control_plane_share, growth, wide_study
from tests.studies_for_tests import planned


def test_the_control_planes_share_is_what_steps_leave_of_the_slots_time() -> None:
    """Two workers, from 10 s, when both have begun, to 20 s, when one has ended: 20 s, of which 18 were worked."""
    first = [Step(12.0, 1, 4.0), Step(16.0, 1, 3.0), Step(20.0, 1, 4.0)]  # 8–12, 13–16, 16–20
    second = [Step(15.0, 2, 5.0), Step(19.0, 2, 3.0), Step(23.0, 2, 4.0)]  # 10–15, 16–19, 19–23
    assert control_plane_share(first + second) == pytest.approx(1 - (2 + 3 + 4 + 5 + 3 + 1) / 20)
    assert control_plane_share(first + second, steady=False) == pytest.approx(1 - (11 + 12) / (2 * 15))


def test_workers_that_came_or_went_are_no_slots() -> None:
    steps = [Step(10.0, 1, 10.0), Step(20.0, 2, 9.0), Step(19.0, 1, 9.0), Step(100.0, 2, 70.0)]
    with pytest.raises(RuntimeError, match="workers came or went"):
        control_plane_share(steps)


def test_growth_is_that_of_the_last_two_thirds() -> None:
    """What the first third adds, imports and the first trials, is no growth."""
    steps = [Step(90.0, 1, 90.0)]
    samples = [Sample(float(t), 100 + 10 * min(t, 30), 0.0) for t in range(91)]
    assert growth(samples, steps) == 0.0
    samples = [Sample(float(t), 1000 + (100 if t >= 80 else 0), 0.0) for t in range(91)]
    assert growth(samples, steps) == pytest.approx(0.1)


def test_the_study_has_300_cells_and_330_trials(tmp_path: Path) -> None:
    plan = planned(tmp_path, wide_study(10, 30))
    assert len(plan.chains) == 300
    assert sum(stage.parent is None for stage in plan.stages) == 30
