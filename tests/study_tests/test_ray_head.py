"""When a head node counts as gone, or as another one; with real clusters: tests/end_to_end/test_cluster_faults.py."""

from __future__ import annotations

import logging

import pytest

from study.cluster.ray_head import AWAY_S, Head

PATIENCE = 30.0


class Cluster:
    """A head that is asked every second."""

    def __init__(self) -> None:
        self.now, self.session = 0.0, "session_1"
        self.up, self.refuses = True, False
        self.head = Head(self._answer, "--address head:6379", PATIENCE, lambda: self.now)

    def _answer(self) -> str:
        if not self.up:
            raise ConnectionError("refused")
        if self.refuses:
            raise RuntimeError("RPC error: WrongClusterID: Perhaps the client is accessing GCS after it has restarted.")
        return self.session

    def passes(self, seconds: int) -> str | None:
        """What is said in the course of so many seconds, if the study is stopped."""
        for _ in range(seconds):
            self.now += 1
            self.head.question()
            if (lost := self.head.turn()) is not None:
                return str(lost)
        return None


def test_a_head_that_answers_is_no_reason_to_stop_for_hours(caplog: pytest.LogCaptureFixture) -> None:
    assert Cluster().passes(10_000) is None
    assert caplog.records == []


def test_a_head_that_is_away_for_less_than_the_patience_is_said_once_and_so_is_its_return(
    caplog: pytest.LogCaptureFixture,
) -> None:
    cluster = Cluster()
    cluster.passes(10)
    for _ in range(2):
        cluster.up = False
        assert cluster.passes(int(PATIENCE) - 1) is None
        cluster.up = True
        assert cluster.passes(10) is None
    said = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    away = "--address head:6379: the head node does not answer; giving it 30 s"
    assert said == [away, "--address head:6379: the head node answers again"] * 2
    cluster.up = False
    assert cluster.passes(int(AWAY_S)) is None
    assert len([r for r in caplog.records if r.levelno == logging.WARNING]) == 4, "a hiccup is not worth a word"


def test_a_head_that_stays_away_stops_the_study_with_what_to_do() -> None:
    cluster = Cluster()
    cluster.passes(10)
    cluster.up = False
    assert cluster.passes(int(PATIENCE)) is None
    said = cluster.passes(2)
    assert said is not None
    assert "--address head:6379: the head node has not answered for 30 s; nothing that was finished is lost" in said
    assert "`ray start --head`" in said


def test_a_head_that_was_started_again_stops_the_study_at_its_first_answer() -> None:
    cluster = Cluster()
    cluster.passes(10)
    cluster.up = False
    cluster.passes(8)
    cluster.up, cluster.session = True, "session_2"
    said = cluster.passes(1)
    assert said is not None
    assert "the head node was started again, and knows nothing of what was running" in said


def test_a_head_that_refuses_who_belongs_to_the_one_before_was_started_again() -> None:
    cluster = Cluster()
    cluster.passes(10)
    cluster.refuses = True
    said = cluster.passes(1)
    assert said is not None
    assert "the head node was started again, and knows nothing of what was running" in said


def test_a_driver_that_was_suspended_for_an_hour_does_not_take_its_own_silence_for_the_heads() -> None:
    cluster = Cluster()
    cluster.passes(10)
    cluster.now += 3600
    assert cluster.passes(10) is None
