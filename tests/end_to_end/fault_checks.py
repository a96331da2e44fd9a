"""What holds after any fault: the numbers of an undisturbed run, and a ledger with every run once and ended."""

from __future__ import annotations

import shutil
import threading
import time
from collections import Counter, defaultdict
from pathlib import Path

import pandas as pd
from mlflow import MlflowClient

from analysis import schema
from analysis.records import find_runs, load
from analysis.report import write_report
from study.plan import Plan
from tests.ledger_samples import new_database
from tests.studies_for_tests import Ran

HASHES = ["weights_sha256", "trajectory_sha256", "best_epoch", "status"]


def prepared(storage: Path, undisturbed: Ran) -> Path:
    """A storage with the data of a study and an empty ledger, for faults that come after: drawing takes seconds."""
    for part in ("phantoms", "images", "contents", "splits"):
        shutil.copytree(undisturbed.storage / part, storage / part)
    new_database(storage)
    return storage


def cells_of(storage: Path, study: str = "ablation", tracking_uri: str | None = None) -> pd.DataFrame:
    """A study's cells.csv, built from its ledger anew."""
    folder = storage / f"compared-{study}"
    write_report(load(tracking_uri or f"sqlite:///{storage / 'mlflow.db'}", study), folder)
    return pd.read_csv(folder / "cells.csv").set_index(["row", "seed"]).sort_index()


def same_results(storage: Path, undisturbed: Ran, tracking_uri: str | None = None, study: str = "ablation") -> None:
    """Equal weights, trajectories, test metrics and curves in every cell."""
    ours, theirs = cells_of(storage, study, tracking_uri), undisturbed.cells()
    pd.testing.assert_frame_equal(ours[HASHES], theirs[HASHES])
    metrics = [c for c in theirs.columns if c == "macro_auc" or c.startswith("auc/")]
    pd.testing.assert_frame_equal(ours[metrics], theirs[metrics], check_exact=True)
    uri = tracking_uri or f"sqlite:///{storage / 'mlflow.db'}"
    pd.testing.assert_series_equal(curves(uri, study), curves(undisturbed.uri, "ablation"), check_exact=True)


def curves(uri: str, study: str) -> pd.Series:
    """(row, seed, metric, epoch) → value, of all but what an epoch cost."""
    history = load(uri, study).history
    history = history[~history["metric"].str.startswith("cost/")]
    return history.set_index(["row", "seed", "metric", "epoch"])["value"].sort_index()


def every_run_once(uri: str, plan: Plan) -> None:
    """A run for each row and each cell, found by its key, none twice, none still running."""
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(plan.study.name)
    runs = find_runs(client, experiment.experiment_id)
    keys = Counter(run.data.tags[schema.TAG_KEY] for run in runs)
    assert len(keys) == len(plan.study.rows) + len(plan.chains)
    assert {chain.key for chain in plan.chains} <= set(keys)
    assert set(keys.values()) == {1}
    assert {run.info.status for run in runs} == {"FINISHED"}


class EpochsSaved:
    """Watches a storage for states: how often the state after each epoch of each trajectory was saved."""

    def __init__(self, storage: Path) -> None:
        self._states = storage / "states"
        self._times: dict[str, set[int]] = defaultdict(set)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stopped.is_set():
            for state in self._states.glob("*/state.json"):
                try:
                    self._times[state.parent.name].add(state.stat().st_mtime_ns)
                except FileNotFoundError:
                    continue  # dropped meanwhile: it was seen before, or its successor is there
            time.sleep(0.01)

    @property
    def total(self) -> int:
        """States saved so far."""
        return sum(len(times) for times in self._times.values())

    def stop(self) -> dict[str, int]:
        """Key of an epoch → times it was saved."""
        self._stopped.set()
        self._thread.join()
        return {key: len(times) for key, times in self._times.items()}
