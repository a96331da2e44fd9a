"""The ledger on an MLflow server: the same records as on a file, also when the server goes away in between."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from analysis import records
from analysis.records import find_runs, load
from analysis.tracking import LedgerError
from study.ledger import Epoch, Ledger
from tests.ledger_samples import CLASSES, ROWS, START_MS, Sample, contents, digest, new_database, run_study
from tests.mlflow_servers import Server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.stop()


def test_a_server_holds_what_a_file_holds_and_repetition_changes_nothing(server: Server, tmp_path: Path) -> None:
    sample = Sample(rows=ROWS, seeds=(0, 1), ending={(ROWS[0], 1): "FAILED", (ROWS[1], 0): "PRUNED"})
    local = new_database(tmp_path)
    for uri in (local, server.uri):
        run_study(Ledger(uri), sample, tmp_path)
    there, here = load(server.uri, "ablation"), load(local, "ablation")
    assert there.header == here.header
    assert there.cells.drop(columns="mlflow_run_id").equals(here.cells.drop(columns="mlflow_run_id"))
    assert there.history.equals(here.history)
    assert [(row.name, row.marks, row.changes) for row in there.rows] == [
        (r.name, r.marks, r.changes) for r in here.rows
    ]
    before = contents(server.database)
    run_study(Ledger(server.uri), sample, tmp_path)
    assert contents(server.database) == before


def test_predictions_are_downloaded_when_they_are_read_and_only_once(server: Server, tmp_path: Path) -> None:
    sample = replace(Sample(), name="predictions")
    run_study(Ledger(server.uri), sample, tmp_path)
    found = load(server.uri, "predictions")
    run_id = found.cells["mlflow_run_id"].iloc[0]
    path = found.predictions[run_id]
    with np.load(path) as arrays:
        assert arrays["scores"].shape == (4, len(CLASSES))
    modified = path.stat().st_mtime_ns
    assert found.predictions[run_id] == path
    assert path.stat().st_mtime_ns == modified
    assert len({*found.predictions.values()}) == 4


def test_epochs_told_twice_and_values_without_a_number_pass_through_a_server(server: Server) -> None:
    sample = replace(Sample(), name="twice")
    key = sample.cell_headers()[0].key
    for _ in range(2):
        ledger = Ledger(server.uri)
        ledger.open(sample.header(), sample.row_headers(), sample.cell_headers())
        for _ in range(2):
            ledger.log_epochs(key, [Epoch(1, START_MS, {"train/loss": math.nan, "val/loss": math.inf, "mAP@50": 0.1})])
            ledger.flush()
    history = load(server.uri, "twice").history.set_index("metric")["value"]
    assert len(history) == 3
    assert math.isnan(history["train/loss"])
    assert (history["val/loss"], history["mAP@50"]) == (math.inf, 0.1)


def test_histories_longer_than_an_answer_are_read_in_parts(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = replace(Sample(seeds=(0, 1, 2)), name="long")
    run_study(Ledger(server.uri), sample)
    whole = load(server.uri, "long").history
    monkeypatch.setattr(records, "SERVER_RESULTS", 5)
    assert load(server.uri, "long").history.equals(whole)
    monkeypatch.setattr(records, "SERVER_RESULTS", 3)
    with pytest.raises(LedgerError, match="more than one can read"):
        load(server.uri, "long")


def test_a_server_that_is_away_for_a_while_is_waited_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    server, sample = Server(tmp_path), Sample(rows=ROWS[:1])
    server.start()
    ledger = Ledger(server.uri)
    ledger.open(sample.header(), sample.row_headers(), sample.cell_headers())
    server.stop()
    returning = threading.Timer(3, server.start)
    returning.start()
    try:
        with caplog.at_level(logging.WARNING):
            for cell in sample.cell_headers():  # creates runs: none twice
                ledger.log_epochs(cell.key, sample.told_epochs(cell))
                ledger.finish(cell.key, sample.outcome(cell))
        ledger.close(sample.header())
        assert "locked or away" in caplog.text
        assert len(find_runs(ledger._client, ledger._experiment_id)) == 3
        assert load(server.uri, "ablation").cells["status"].eq("FINISHED").all()
    finally:
        returning.join()
        server.stop()
    ledger.PATIENCE_S = 1
    with pytest.raises(LedgerError, match="refused; end the process that locks the database, or start its server"):
        ledger.open(sample.header(), sample.row_headers(), sample.cell_headers())


def test_the_address_of_the_ui_is_the_experiments(server: Server) -> None:
    sample = replace(Sample(), name="address")
    ledger = Ledger(server.uri)
    ledger.open(sample.header(), sample.row_headers(), sample.cell_headers())
    assert ledger.ui_command() == f"{server.uri}/#/experiments/{ledger._experiment_id}/runs?viewStateShareKey=spft"
    assert ledger.run_id(digest("row", "chestxray14", ROWS[0]))
