"""Observers of one trajectory, what a trial writes and when, and what its results name."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_trials import (
    CPU,
    NormTask,
    begin,
    finish,
    keys_of,
    outcome,
    tiny_settings,
    tiny_task,
    trial_request,
)
from torch import Tensor

from study.store import Store, result_name
from trainables.classification import Classification
from trainables.data.opened import Data
from trainables.device_memory import GPU_MEMORY
from trainables.requests import Observer, Watch
from trainables.results import CellResult, TrainingError
from trainables.settings import EmaSettings, Settings, StoppingSettings

LEAF = keys_of("trajectory", 6)[-1]
FAST, SLOW = 0.5, 1 - 1e-7  # SLOW stands still from the first step of stage 2
OBSERVERS = tuple(Observer(decay, 1e-3, patience) for decay in (FAST, SLOW) for patience in (1, None))
RAW = Observer(None, 0.0, None)


@pytest.fixture(scope="module")
def settings(encoder: Path) -> Settings:
    return tiny_settings(encoder, weighting={"enabled": True})


@pytest.fixture(scope="module")
def task(settings: Settings, data: Data) -> Classification:
    return tiny_task(settings, data)


@pytest.fixture(scope="module")
def together(settings: Settings, task: Classification, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """One trajectory under five observers."""
    store = Store(tmp_path_factory.mktemp("together"))
    finish(begin(trial_request(settings, [*OBSERVERS, RAW]), task, store))
    return store


def result(store: Store, observer: Observer, leaf: str = LEAF) -> CellResult:
    found = store.load_result(leaf, observer.name)
    assert found is not None
    return found


def weights_file(store: Store, observer: Observer) -> Path:
    return store.predictions(LEAF, observer.name).parent / "weights.safetensors"


@pytest.mark.parametrize("observer", [*OBSERVERS, RAW], ids=lambda o: o.name)
def test_an_observer_among_others_sees_what_it_would_see_alone(
    observer: Observer, settings: Settings, task: Classification, together: Store, tmp_path: Path
) -> None:
    store = Store(tmp_path)
    finish(begin(trial_request(settings, [observer]), task, store))
    alone, shared = outcome(result(store, observer)), outcome(result(together, observer))
    for facts in (alone, shared):  # the validation of copies that are not its own costs units and is recorded
        for record in facts["history"]:
            record.pop("evaluation_units")
            record["effective"].pop("averages")
            own = ("val/raw/", f"val/{observer.copy}/")
            record["metrics"] = {
                name: value
                for name, value in record["metrics"].items()
                if not name.startswith("val/") or name.startswith(own)
            }
    assert alone == shared
    mine, theirs = load_file(weights_file(store, observer)), load_file(weights_file(together, observer))
    assert set(mine) == set(theirs)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


def test_patience_of_one_ends_an_observer_whose_weights_stand_still(together: Store) -> None:
    impatient, patient = (result(together, Observer(SLOW, 1e-3, patience)) for patience in (1, None))
    assert (impatient.best_epoch, impatient.last_epoch, impatient.stopped_early) == (3, 4, True)
    assert (patient.last_epoch, patient.stopped_early) == (6, False)
    assert len(impatient.history) == 4
    assert impatient.trajectory_sha256 == patient.history[3].trajectory_sha256
    assert patient.trajectory_sha256 == patient.history[5].trajectory_sha256


def test_copies_are_evaluated_as_they_are_named(together: Store) -> None:
    digests = {result(together, Observer(decay, 1e-3, None)).weights_sha256 for decay in (FAST, SLOW)}
    assert len(digests | {result(together, RAW).weights_sha256}) == 3
    raw = result(together, RAW)
    assert raw.weights_sha256 == raw.history[raw.best_epoch - 1].trajectory_sha256
    assert result(together, OBSERVERS[0]).copy == "ema 0.5 tau 0.001"


@pytest.mark.parametrize("observer", [*OBSERVERS, RAW], ids=lambda o: o.name)
def test_the_best_epoch_is_the_first_maximum_on_validation_in_stage_2(observer: Observer, together: Store) -> None:
    r = result(together, observer)
    values = [record.metrics[f"val/{observer.copy}/macro_auc"] for record in r.history[2:]]
    assert r.best_epoch == 3 + values.index(max(values))
    assert r.metrics["val/macro_auc"] == max(values)


@pytest.mark.parametrize("observer", [*OBSERVERS, RAW], ids=lambda o: o.name)
def test_the_test_figures_follow_from_the_saved_weights_and_the_saved_predictions(
    observer: Observer, together: Store, task: Classification, data: Data
) -> None:
    r = result(together, observer)
    weights = load_file(weights_file(together, observer))
    model = task.build(0)
    tensors: dict[str, Tensor] = model.state_dict()
    assert set(weights) < set(tensors)
    model.load_state_dict({**tensors, **weights})
    model.eval()
    rows = np.flatnonzero(data.index.split == 2)
    with torch.no_grad():
        pooled = model.encoder(task.inputs(rows, CPU)).last_hidden_state[:, 1:].mean(1)
        scores = torch.sigmoid(model.classifier(pooled)).numpy()
    with np.load(together.predictions(LEAF, observer.name)) as file:
        kept = {name: file[name] for name in file.files}
    assert kept["scores"] == pytest.approx(scores, abs=1e-6)
    assert kept["names"].tolist() == data.index.names[rows].tolist()
    assert kept["groups"].tolist() == data.index.groups[rows].tolist()
    assert kept["labels"].tolist() == data.index.labels[rows].tolist()
    aucs = []
    for c, name in enumerate(kept["classes"].tolist()):
        positive, negative = (kept["scores"][kept["labels"][:, c] == y, c] for y in (1, 0))
        pairs = (positive[:, None] > negative) + 0.5 * (positive[:, None] == negative)
        aucs.append(pairs.mean())
        assert r.metrics[f"test/auc/{name}"] == pytest.approx(aucs[-1], abs=1e-12)
    assert r.metrics["test/macro_auc"] == pytest.approx(np.mean(aucs), abs=1e-12)
    assert r.weights_sha256 == digest_of(model.state_dict())


def digest_of(tensors: dict[str, Tensor]) -> str:
    h = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        array = tensor.numpy()
        h.update(f"{name}|{tensor.dtype}|{tuple(array.shape)}|".encode() + array.tobytes())
    return h.hexdigest()


def test_the_weights_kept_for_a_depth_below_all_leave_the_base_out(together: Store) -> None:
    names = set(load_file(weights_file(together, RAW)))
    assert names
    assert not any("embeddings" in name or "encoder.layernorm" in name for name in names)


def test_a_trial_whose_results_exist_trains_nothing_and_writes_nothing(
    settings: Settings, task: Classification, together: Store
) -> None:
    before = {path: path.stat().st_mtime_ns for path in together.root.rglob("*") if path.is_file()}
    trial = begin(trial_request(settings, [*OBSERVERS, RAW]), task, together)
    assert trial.done
    assert trial.epoch == 0  # no state is left to start from, and none is needed
    assert {path: path.stat().st_mtime_ns for path in together.root.rglob("*") if path.is_file()} == before


def test_no_state_outlives_the_results_unless_others_start_from_it(
    settings: Settings, task: Classification, together: Store, tmp_path: Path
) -> None:
    assert not any(together.has_state(key) for key in keys_of("trajectory", 6))
    store, keys = Store(tmp_path), keys_of("trajectory", 6)
    finish(begin(trial_request(settings, [RAW], keep=frozenset({keys[1]})), task, store))
    assert [n for n, key in enumerate(keys, start=1) if store.has_state(key)] == [2]


def test_results_are_written_when_their_observer_stops_and_once_only(
    settings: Settings, task: Classification, tmp_path: Path
) -> None:
    store, impatient = Store(tmp_path), Observer(SLOW, 1e-3, 1)
    trial = begin(trial_request(settings, [impatient, RAW]), task, store)
    seen = []
    written: set[int] = set()
    while not trial.done:
        trial.step()
        seen.append((store.has_result(LEAF, impatient.name), store.has_result(LEAF, RAW.name)))
        if seen[-1][0]:
            written.add((weights_file(store, impatient).parent / "result.json").stat().st_mtime_ns)
    nothing, one, both = (False, False), (True, False), (True, True)
    assert seen == [nothing, nothing, nothing, one, one, both]
    assert len(written) == 1


def test_a_trajectory_ends_when_all_its_observers_have_stopped(
    settings: Settings, task: Classification, tmp_path: Path
) -> None:
    observers = [Observer(SLOW, 1e-3, patience) for patience in (1, 2)]
    trial = finish(begin(trial_request(settings, observers), task, Store(tmp_path)))
    assert trial.epoch == 5


def test_a_result_that_was_lost_is_made_again_as_it_was(
    settings: Settings, task: Classification, together: Store, tmp_path: Path
) -> None:
    store = Store(tmp_path)
    finish(begin(trial_request(settings, [*OBSERVERS, RAW]), task, store))
    file = weights_file(store, RAW)
    file.write_bytes(file.read_bytes()[:-1])
    assert store.load_result(LEAF, RAW.name) is None
    finish(begin(trial_request(settings, [*OBSERVERS, RAW]), task, store))
    assert outcome(result(store, RAW)) == outcome(result(together, RAW))


def test_an_observer_that_leads_to_two_cells_writes_both(
    settings: Settings, task: Classification, tmp_path: Path
) -> None:
    store, observer = Store(tmp_path), Observer(SLOW, 1e-3, 1)
    leaves = (LEAF, "f" * 64)
    request = dataclasses.replace(trial_request(settings, [observer]), watches=(Watch(observer, leaves),))
    finish(begin(request, task, store))
    first, second = (outcome(result(store, observer, leaf)) for leaf in leaves)
    assert first == second


def test_best_weights_with_batch_norm_carry_their_running_statistics(encoder: Path, tmp_path: Path) -> None:
    settings = tiny_settings(
        encoder, optimiser={"batch_size": 16}, strategy={"head_epochs": 1, "tune_epochs": 5, "depth": "all", "step": 2}
    )
    norm, observers = NormTask(), [RAW, Observer(0.9, 3.0, None)]
    store = Store(tmp_path)
    finish(begin(trial_request(settings, observers), norm, store))
    for observer in observers:
        r = result(store, observer)
        model = norm.build(0)
        weights = load_file(weights_file(store, observer))
        model.load_state_dict({**model.state_dict(), **weights})
        model.eval()
        with torch.no_grad():
            scores = torch.sigmoid(model.predict(model.advance(norm.x[64:], -1, 4))).numpy()
        with np.load(store.predictions(LEAF, observer.name)) as file:
            assert np.array_equal(file["scores"], scores)
        assert r.weights_sha256 == digest_of(model.state_dict())


class AllNegative(NormTask):
    """A validation split without positives: no AUC is defined in any epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.labels[48:64] = 0


def test_a_metric_that_is_never_defined_fails_the_cell_and_says_why(encoder: Path, tmp_path: Path) -> None:
    settings = tiny_settings(encoder, optimiser={"batch_size": 16})
    trial = begin(trial_request(settings, [RAW]), AllNegative(), Store(tmp_path))
    with pytest.raises(TrainingError, match="validation macro_auc was undefined in every epoch of stage 2"):
        finish(trial)


def test_an_observer_is_what_its_settings_say() -> None:
    assert Observer.of(EmaSettings(), StoppingSettings()) == Observer(None, 0.0, 7)
    assert Observer.of(EmaSettings(decay=0.5), StoppingSettings()) == Observer(None, 0.0, 7)
    averaged = Observer.of(EmaSettings(enabled=True, decay=0.9999, tau=50), StoppingSettings(patience=None))
    assert averaged == Observer(0.9999, 50, None)
    assert averaged.name == "ema 0.9999 tau 50 patience None"
    assert len({o.name for o in (*OBSERVERS, RAW, averaged)}) == 6


def test_memory_is_on_record_where_epochs_were_trained_and_not_where_a_trial_was_only_evaluated(
    settings: Settings, task: Classification, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU of its own: set-up and evaluation take less than training, and would teach too little."""
    monkeypatch.setattr("trainables.device.memory_taken", lambda compute, share: (3_000, 10_000))
    store = Store(tmp_path)
    request = dataclasses.replace(trial_request(settings, [RAW]), keep=frozenset({LEAF}))
    finish(begin(request, task, store))
    assert json.loads(result(store, RAW).provenance[GPU_MEMORY])["peak_bytes"] == 3_000
    shutil.rmtree(store.root / result_name(LEAF, RAW.name))
    begin(request, task, store)
    assert GPU_MEMORY not in result(store, RAW).provenance
