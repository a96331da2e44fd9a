"""A search as a Ray Tune script with OptunaSearch: what ours is measured against. Nothing of our executors is used.

    python -m tests.benchmarks.plain_ray_search STORAGE TRIALS [-o KEY=VALUE …]

Written as the documentation of Ray Tune recommends: OptunaSearch with a define-by-run space and a seeded TPE sampler,
as many trials at a time as there are CPUs, a class Trainable with `reuse_actors`, MLflow's callback. Every trial trains
one configuration by itself, with the plain loop; images are drawn and decoded once before. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # in a process of its own; else Ray leaves a token in the home folder
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

import optuna
import ray
import torch
from mlflow import MlflowClient
from ray import tune
from ray.air.integrations.mlflow import MLflowLoggerCallback
from ray.tune.search.optuna import OptunaSearch

from search_spaces.space import changed
from study.documents import apply, parse_override
from study.spec import Choices, find_study, load_study
from tests.benchmarks.plain_ray_tune import PROJECT, folders_of
from tests.benchmarks.plain_training import PlainTraining, checkpoint_of
from tests.benchmarks.search_space import DECAYS, ETA, HEAD_LR_TIMES, TIMES
from trainables.data.opened import open_data
from trainables.settings import Settings


class TrialTrainable(tune.Trainable):  # type: ignore[misc]  # ray ships no types
    """One configuration; the process and its open images serve the next trial too."""

    def setup(self, config: dict[str, Any], baseline: str, seed: int, storage: str) -> None:
        """Open the images and build the first model; `baseline`: settings as JSON."""
        torch.set_num_threads(1)
        self._baseline = Settings.model_validate_json(baseline)
        self._seed = seed
        self._data = open_data(self._baseline.dataset, folders_of(Path(storage)))
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Build another configuration in the same process."""
        settings = Settings.model_validate(changed(self._baseline.model_dump(), new_config))
        self._training = PlainTraining(settings, self._data, self._seed)
        return True

    def step(self) -> dict[str, Any]:
        """An epoch; its value is the best validation so far, of the average once there is one."""
        told = self._training.train_epoch()
        best = told.val_auc if self._training.best is None else self._training.best[0]
        return {"loss": told.loss, "val_auc": best, "done": self._training.done}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """As a script would."""
        torch.save(checkpoint_of(self._training), Path(checkpoint_dir) / "state.pt")

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """No trial is resumed here."""
        raise NotImplementedError("this script only measures undisturbed runs")


def suggest(trial: optuna.Trial, *, encoder_lr: float, head_lr: float) -> None:
    """The space of the comparison as Optuna's define-by-run function."""
    low, high = TIMES["optimiser.encoder_lr"]
    trial.suggest_float("optimiser.encoder_lr", low * encoder_lr, high * encoder_lr, log=True)
    low, high = TIMES["optimiser.tune_head_lr"]
    trial.suggest_float("optimiser.tune_head_lr", low * head_lr, high * head_lr, log=True)
    trial.suggest_categorical("optimiser.head_lr", [times * head_lr for times in HEAD_LR_TIMES])
    if trial.suggest_categorical("weighting.enabled", [False, True]):
        trial.suggest_float("weighting.eta", *ETA)
    trial.suggest_categorical("ema.decay", list(DECAYS))


def main() -> None:
    """Run the search and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("storage", type=Path)
    parser.add_argument("trials", type=int)
    parser.add_argument("-o", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    overrides = apply({}, dict(parse_override(text) for text in options.overrides))
    study = load_study(find_study("search"), Choices(overrides))
    assert study.search is not None, "the shipped search declares one"
    storage = options.storage.resolve()
    (dataset,) = study.datasets
    baseline = study.rows[0].settings[dataset]
    open_data(baseline.dataset, folders_of(storage), workers=os.cpu_count() or 1)
    started = time.perf_counter()
    found = _tuner(baseline, study.search.trial_seed, options.trials, storage).fit()
    seconds = time.perf_counter() - started
    if found.errors:
        sys.exit(f"{len(found.errors)} trials failed, first: {found.errors[0]}")
    trials = [{"epochs": r.metrics["training_iteration"], "val_auc": r.metrics["val_auc"]} for r in found]
    print(json.dumps({"fit_seconds": seconds, "trials": trials}))


def _tuner(baseline: Settings, seed: int, trials: int, storage: Path) -> tune.Tuner:
    temporary = tempfile.mkdtemp(prefix="ray")  # short: socket paths are limited
    environment = {"env_vars": {"PYTHONPATH": str(PROJECT)}}
    ray.init(runtime_env=environment, include_dashboard=False, log_to_driver=False, _temp_dir=temporary)
    sampler = optuna.samplers.TPESampler(seed=0, multivariate=True, group=True, constant_liar=True)
    rates = baseline.optimiser
    space = partial(suggest, encoder_lr=rates.encoder_lr, head_lr=rates.head_lr)  # Tune pickles it
    algorithm = OptunaSearch(space=space, metric="val_auc", mode="max", sampler=sampler)
    trainable = tune.with_parameters(
        TrialTrainable, baseline=baseline.model_dump_json(), seed=seed, storage=str(storage)
    )
    tracking_uri = f"sqlite:///{storage / 'mlflow.db'}"
    artifacts = (storage / "mlartifacts").as_uri()  # by default MLflow would keep them in the working directory
    MlflowClient(tracking_uri).create_experiment("search", artifact_location=artifacts)
    return tune.Tuner(
        tune.with_resources(trainable, {"cpu": 1}),
        tune_config=tune.TuneConfig(
            search_alg=algorithm, num_samples=trials, reuse_actors=True, max_concurrent_trials=os.cpu_count()
        ),
        run_config=tune.RunConfig(
            name="plain",
            storage_path=str(storage / "tune"),
            callbacks=[MLflowLoggerCallback(tracking_uri=tracking_uri, experiment_name="search")],
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=True),
            verbose=0,
        ),
    )


if __name__ == "__main__":
    main()
