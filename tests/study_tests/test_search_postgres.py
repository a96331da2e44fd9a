"""A search that a real PostgreSQL server keeps: the trials of one in a journal file, also when the server goes away."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from test_search import DECLARED, SPACE, run, settings, told, told_apart

from study.documents import StudyError
from study.interrupts import StudyHaltedError
from study.search import Trials
from study.searches.trial_storage import Place, check_place, storage_watched
from tests.postgres_servers import PASSWORD, PostgresServer, postgres, why_not

pytestmark = [pytest.mark.slow, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]

TRIALS = 9


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with postgres() as running:
        yield running


def opened(server: PostgresServer, name: str) -> Trials:
    return Trials.open(Place(server.url), name, settings(trials=TRIALS), SPACE, DECLARED)


def test_it_keeps_a_search_as_the_journal_does(server: PostgresServer, tmp_path: Path) -> None:
    """Every proposal by another connection; several searches in one database."""
    names = [f"s-{uuid4().hex}" for _ in range(2)]
    for _ in range(TRIALS // 3):
        for name in names:
            trials = opened(server, name)
            told(trials, trials.propose())
    journal = told_apart(run(tmp_path, trials=TRIALS))
    for name in names:
        assert told_apart(opened(server, name).all()) == journal
    check_place(Place(server.url), names[0], DECLARED)
    with pytest.raises(StudyError, match="begun with other baseline"):
        check_place(Place(server.url), names[0], DECLARED | {"baseline": {"depth": 6}})


def test_a_server_that_crashes_on_the_way_is_said_and_the_search_goes_on_when_it_is_back(
    server: PostgresServer, tmp_path: Path
) -> None:
    name, place = f"s-{uuid4().hex}", Place(server.url)
    trials = opened(server, name)
    told(trials, trials.propose())
    second = trials.propose()
    trials.finish(second[0].number, [0.5])
    server.stop(at_once=True)
    with pytest.raises(StudyHaltedError) as halted, storage_watched(place):
        trials.finish(second[1].number, [0.6])
    assert "run the same command again" in str(halted.value)
    assert PASSWORD not in str(halted.value)
    with pytest.raises(StudyError, match="cannot be used") as refused:
        check_place(place, name, DECLARED)
    assert PASSWORD not in str(refused.value)

    server.start()
    trials = opened(server, name)
    kept = trials.completed()
    assert [t.status for t in kept] == ["FINISHED"] * 4 + ["RUNNING"] * 2
    assert kept[3].values == (0.5,), "what was told before the crash"
    told(trials, [t for t in kept if t.status == "RUNNING"])
    while trials.count < TRIALS:
        told(trials, trials.propose())
    journal = run(tmp_path, trials=TRIALS)
    assert [(t.number, t.trajectory) for t in trials.all()] == [(t.number, t.trajectory) for t in journal]
    assert [t.chosen for t in trials.all()[:6]] == [t.chosen for t in journal[:6]]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ((PASSWORD, "another"), "password authentication failed"),
        (("/postgres", "/nowhere"), 'database "nowhere" does not exist'),
    ],
    ids=["password", "database"],
)
def test_an_address_that_is_wrong_is_one_message_without_a_password(
    server: PostgresServer, wrong: tuple[str, str], said: str
) -> None:
    with pytest.raises(StudyError) as refused:
        check_place(Place(server.url.replace(*wrong)), "s", DECLARED)
    (problem,) = refused.value.problems
    assert said in problem
    assert "--optuna-storage" in problem
    assert PASSWORD not in problem and ":another@" not in problem
