"""A local ledger read from its tables holds what MLflow's own client reads, without mlflow being imported."""

from __future__ import annotations

import math
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient

from analysis import schema
from analysis.ledger_tables import LedgerTables, open_tables
from analysis.records import find_runs, load
from analysis.tracking import LedgerError
from study.ledger import Epoch, Ledger
from tests.ledger_samples import ROWS, START_MS, Sample, new_database, run_study

ROOT = Path(__file__).resolve().parents[2]
EXTREMES = {"train/loss": math.nan, "val/macro_auc": math.inf, "lr/head": -math.inf}


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two studies; of one an earlier declaration, a deleted run, values that are no numbers, an epoch told twice."""
    folder = tmp_path_factory.mktemp("ledger")
    uri = new_database(folder)
    run_study(Ledger(uri), replace(Sample(), name="depth"))
    run_study(Ledger(uri), Sample(rows=ROWS[:3]))
    ledger, sample = Ledger(uri), Sample(rows=ROWS[:2], seeds=(0, 1, 2))
    ledger.open(sample.header(), sample.row_headers(), sample.cell_headers())
    fresh = next(cell for cell in sample.cell_headers() if cell.seed == 2)
    ledger.log_epochs(fresh.key, [Epoch(1, START_MS, EXTREMES), Epoch(2, START_MS + 1, {"train/loss": 0.5})])
    ledger.log_epochs(fresh.key, [Epoch(2, START_MS + 9, {"train/loss": 0.25})])
    ledger.flush()
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("ablation")
    client.delete_run(client.create_run(experiment.experiment_id, tags={schema.TAG_CURRENT: "true"}).info.run_id)
    return folder / "mlflow.db"


@pytest.fixture
def tables(database: Path) -> Iterator[LedgerTables]:
    with open_tables(database) as opened:
        yield opened


def plain(values: dict[str, float]) -> dict[str, float | str]:
    """NaN compares equal."""
    return {name: "nan" if math.isnan(value) else value for name, value in values.items()}


def test_runs_are_those_of_the_client_in_its_order(database: Path, tables: LedgerTables) -> None:
    client = MlflowClient(f"sqlite:///{database}")
    experiment = client.get_experiment_by_name("ablation")
    assert tables.experiment("ablation") == (experiment.experiment_id, dict(experiment.tags))
    theirs = find_runs(client, experiment.experiment_id, f"tags.`{schema.TAG_CURRENT}` = 'true'")
    ours = tables.current_runs(experiment.experiment_id)
    assert [run.run_id for run in ours] == [run.info.run_id for run in theirs]
    assert len(ours) == 2 + 5, "two rows, and the five of six cells that have started"
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine.artifact_uri, mine.tags) == (other.info.artifact_uri, other.data.tags)
        assert plain(dict(mine.metrics)) == plain(other.data.metrics)


def test_histories_are_those_of_the_client_with_the_last_value_of_each_epoch(
    database: Path, tables: LedgerTables
) -> None:
    client = MlflowClient(f"sqlite:///{database}")
    found = tables.experiment("ablation")
    assert found is not None
    runs = tables.current_runs(found[0])
    read = tables.history([run.run_id for run in runs])
    for run in runs:
        expected: dict[tuple[str, int], float] = {}
        for key in sorted(k for k in run.metrics if not k.startswith((schema.TEST, schema.BEST))):
            told = sorted(client.get_metric_history(run.run_id, key), key=lambda m: (m.step, m.timestamp))
            expected |= {(key, metric.step): metric.value for metric in told}
        ours = {at: math.nan if value is None else value for at, value in read[run.run_id].items()}
        assert list(ours) == list(expected), "sorted by key and epoch"
        assert all(
            a == b or (math.isnan(a) and math.isnan(b)) for a, b in zip(ours.values(), expected.values(), strict=True)
        )


def test_values_that_are_no_numbers_come_back_as_they_were_logged(database: Path) -> None:
    history = load(f"sqlite:///{database}", "ablation").history
    cell = history[(history["seed"] == 2)].set_index(["metric", "epoch"])["value"]
    assert math.isnan(cell["train/loss", 1])
    assert (cell["val/macro_auc", 1], cell["lr/head", 1]) == (math.inf, -math.inf)
    assert cell["train/loss", 2] == 0.25


def test_only_studies_of_ours_are_listed(tables: LedgerTables) -> None:
    assert sorted(tables.studies()) == ["ablation", "depth"], "not MLflow's Default"
    assert tables.experiment("no such study") is None


def test_a_deleted_study_is_none(tmp_path: Path) -> None:
    uri = new_database(tmp_path)
    ledger = Ledger(uri)
    run_study(ledger, Sample())
    MlflowClient(uri).delete_experiment(MlflowClient(uri).get_experiment_by_name("ablation").experiment_id)
    with open_tables(tmp_path / "mlflow.db") as opened:
        assert opened.experiment("ablation") is None
        assert opened.studies() == []


def test_what_is_read_is_of_one_moment_also_while_a_driver_writes(tmp_path: Path) -> None:
    uri = new_database(tmp_path)
    run_study(Ledger(uri), Sample())
    with closing(sqlite3.connect(tmp_path / "mlflow.db", timeout=0)) as writer:
        with open_tables(tmp_path / "mlflow.db") as opened:
            before = opened.studies()
            with pytest.raises(sqlite3.OperationalError, match="locked"):
                writer.execute("UPDATE experiments SET lifecycle_stage = 'deleted'")
                writer.commit()
            writer.rollback()
            assert opened.studies() == before
        writer.execute("UPDATE experiments SET lifecycle_stage = 'deleted'")
        writer.commit()


def test_a_database_without_a_table_that_is_needed_is_refused_with_the_remedy(tmp_path: Path) -> None:
    uri = new_database(tmp_path)
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        database.execute("ALTER TABLE experiment_tags RENAME TO labels")
        database.commit()
    with pytest.raises(
        LedgerError, match=r"cannot be read: no such table: experiment_tags; .*mlflow db upgrade sqlite"
    ):
        load(uri, "ablation")


def test_reading_a_local_ledger_imports_no_mlflow(database: Path) -> None:
    code = (
        "import sys; from analysis.records import load; "
        f"load({f'sqlite:///{database}'!r}, 'ablation'); print('mlflow' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
