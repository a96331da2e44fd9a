"""The ablation as a Ray Tune script: what the project is measured against. Nothing of its executors is used.

    python -m tests.benchmarks.plain_ray_tune STORAGE [-o KEY=VALUE …]

Written as the documentation of Ray Tune and MLflow recommends: a class Trainable, `reuse_actors`, a grid over rows and
seeds, one CPU a trial, `MLflowLoggerCallback`, a checkpoint at the end. Every trial trains one cell by itself, with the
plain loop; images are drawn and decoded once before, as ours are, and read from the same decoded cache. Prints one
line of JSON: seconds of `Tuner.fit`, and each cell's test macro AUC.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # in a process of its own; else Ray leaves a token in the home folder
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

import ray
import torch
from mlflow import MlflowClient
from ray import tune
from ray.air.integrations.mlflow import MLflowLoggerCallback

from study.documents import apply, parse_override
from study.spec import Choices, Study, find_study, load_study
from tests.benchmarks.plain_training import PlainTraining, checkpoint_of
from trainables.data.opened import Folders, open_data
from trainables.settings import Settings

PROJECT = Path(__file__).resolve().parents[2]


def folders_of(storage: Path) -> Folders:
    """Where images are drawn and decoded to."""
    made = [storage / name for name in ("phantoms", "images", "splits")]
    for folder in made:
        folder.mkdir(parents=True, exist_ok=True)
    return Folders(*made)


class CellTrainable(tune.Trainable):  # type: ignore[misc]  # ray ships no types
    """One row with one seed; the process and its open images serve the next trial too."""

    def setup(self, config: dict[str, Any], settings: dict[str, str], storage: str) -> None:
        """Open the images and build the first cell; `settings`: row → its complete settings as JSON."""
        torch.set_num_threads(1)
        self._settings = {row: Settings.model_validate_json(text) for row, text in settings.items()}
        self._data = open_data(self._settings[config["row"]].dataset, folders_of(Path(storage)))
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Build another cell in the same process."""
        self._training = PlainTraining(self._settings[new_config["row"]], self._data, new_config["seed"])
        return True

    def step(self) -> dict[str, Any]:
        """An epoch; the last one is followed by the test."""
        told = self._training.train_epoch()
        metrics = {"loss": told.loss, "val_auc": told.val_auc, "done": self._training.done}
        if told.averaged_val_auc is not None:
            metrics["averaged_val_auc"] = told.averaged_val_auc
        if self._training.done:
            metrics["test_auc"] = self._training.test()
        return metrics

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """As a script would."""
        torch.save(checkpoint_of(self._training), Path(checkpoint_dir) / "state.pt")

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """No trial is resumed here."""
        raise NotImplementedError("this script only measures undisturbed runs")


def main() -> None:
    """Run the grid and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("storage", type=Path)
    parser.add_argument("-o", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    overrides = apply({}, dict(parse_override(text) for text in options.overrides))
    study = load_study(find_study("ablation"), Choices(overrides))
    storage = options.storage.resolve()
    (dataset,) = study.datasets
    settings = {row.name: row.settings[dataset] for row in study.rows}
    for one in settings.values():
        open_data(one.dataset, folders_of(storage), workers=os.cpu_count() or 1)
    started = time.perf_counter()
    grid = _tuner(study, settings, storage).fit()
    seconds = time.perf_counter() - started
    if grid.errors:
        sys.exit(f"{len(grid.errors)} trials failed, first: {grid.errors[0]}")
    cells = [
        {"row": result.config["row"], "seed": result.config["seed"], "macro_auc": result.metrics["test_auc"]}
        for result in grid
    ]
    print(json.dumps({"fit_seconds": seconds, "cells": cells}))


def _tuner(study: Study, settings: dict[str, Settings], storage: Path) -> tune.Tuner:
    temporary = tempfile.mkdtemp(prefix="ray")  # short: socket paths are limited
    environment = {"env_vars": {"PYTHONPATH": str(PROJECT)}}
    ray.init(runtime_env=environment, include_dashboard=False, log_to_driver=False, _temp_dir=temporary)
    space = {"row": tune.grid_search(list(settings)), "seed": tune.grid_search(list(study.seeds))}
    texts = {name: one.model_dump_json() for name, one in settings.items()}
    trainable = tune.with_parameters(CellTrainable, settings=texts, storage=str(storage))
    tracking_uri = f"sqlite:///{storage / 'mlflow.db'}"
    artifacts = (storage / "mlartifacts").as_uri()  # by default MLflow would keep them in the working directory
    MlflowClient(tracking_uri).create_experiment("ablation", artifact_location=artifacts)
    logger = MLflowLoggerCallback(tracking_uri=tracking_uri, experiment_name="ablation", save_artifact=True)
    return tune.Tuner(
        tune.with_resources(trainable, {"cpu": 1}),
        param_space=space,
        tune_config=tune.TuneConfig(metric="val_auc", mode="max", reuse_actors=True),
        run_config=tune.RunConfig(
            name="plain",
            storage_path=str(storage / "tune"),
            callbacks=[logger],
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=True),
            verbose=0,
        ),
    )


if __name__ == "__main__":
    main()
