"""The ledger of a study that grows: cells declared while others run, files kept, and no mean over trials."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from analysis import schema
from analysis.records import load
from study.ledger import CellHeader, Ledger, LedgerError, RowHeader
from tests.ledger_samples import Sample, contents, new_database, runs_of

TRIALS = Sample(name="search", rows=("trial 0", "trial 1", "trial 2"), seeds=(1000,))


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return new_database(tmp_path)


def parent() -> RowHeader:
    return replace(TRIALS.row_headers()[0], key="the search", name="search", of_trials=True)


def trials_of(count: int) -> list[CellHeader]:
    return [replace(cell, row_key="the search") for cell in TRIALS.cell_headers()[:count]]


def header(count: int) -> schema.StudyHeader:
    return TRIALS.header().model_copy(update={"rows": TRIALS.rows[:count], "search": True})


def begun(uri: str, count: int = 1) -> Ledger:
    ledger = Ledger(uri)
    ledger.open(header(count), [parent()], trials_of(count))
    return ledger


def finish(ledger: Ledger, count: int, before: int = 0) -> None:
    for cell in trials_of(count)[before:]:
        ledger.log_epochs(cell.key, TRIALS.told_epochs(cell))
        ledger.finish(cell.key, TRIALS.outcome(cell))


def test_trials_that_are_declared_later_are_children_of_the_same_run(uri: str) -> None:
    ledger = begun(uri)
    finish(ledger, 1)
    ledger.extend(header(3), trials_of(3))
    finish(ledger, 3, before=1)
    ledger.close(header(3))
    runs = {run.info.run_name: run for run in runs_of(ledger)}
    assert set(runs) == {"search", *(f"trial {i} · seed 1000" for i in range(3))}
    top = runs.pop("search")
    assert {run.data.tags["mlflow.parentRunId"] for run in runs.values()} == {top.info.run_id}
    assert (top.info.status, top.data.metrics) == ("FINISHED", {}), "trials have no mean"


def test_a_grown_study_is_read_with_all_its_trials(uri: str) -> None:
    ledger = begun(uri)
    ledger.extend(header(3), trials_of(3))
    finish(ledger, 2)
    records = load(uri, "search")
    assert records.header.search
    assert list(records.cells["row"]) == ["trial 0", "trial 1", "trial 2"]
    assert list(records.cells["status"]) == ["FINISHED", "FINISHED", "MISSING"]


def test_growing_again_by_the_same_trials_changes_nothing(uri: str) -> None:
    ledger = begun(uri)
    ledger.extend(header(3), trials_of(3))
    finish(ledger, 3)
    ledger.close(header(3))
    before = contents(uri)
    again = begun(uri, 3)
    again.extend(header(3), trials_of(3))
    finish(again, 3)
    again.close(header(3))
    assert contents(uri) == before


def test_a_trial_that_an_earlier_launch_had_is_taken_over_when_it_is_declared_later(uri: str) -> None:
    ledger = begun(uri, 2)
    finish(ledger, 2)
    again = begun(uri, 1)
    again.extend(header(2), trials_of(2))
    assert [again.status_of(cell.key) for cell in trials_of(2)] == ["FINISHED", "FINISHED"]
    assert {run.data.tags[schema.TAG_CURRENT] for run in runs_of(again)} == {"true"}
    assert len(runs_of(again)) == 3


def test_a_trial_of_an_unknown_row_is_refused(uri: str) -> None:
    ledger = begun(uri)
    stranger = replace(TRIALS.cell_headers()[1], row_key="nobody")
    with pytest.raises(LedgerError, match="names an unknown row nobody"):
        ledger.extend(header(2), [stranger])


def test_a_file_is_kept_at_a_run_and_replaced_by_one_of_its_name(uri: str, tmp_path: Path) -> None:
    ledger = begun(uri)
    file = tmp_path / "report.html"
    for text in ("first", "second"):
        file.write_text(text)
        ledger.attach("the search", file, "search")
    run = next(run for run in runs_of(ledger) if run.info.run_name == "search")
    kept = [a.path for a in ledger._client.list_artifacts(run.info.run_id, "search")]
    assert kept == ["search/report.html"]
    assert Path(ledger._client.download_artifacts(run.info.run_id, kept[0], str(tmp_path))).read_text() == "second"
