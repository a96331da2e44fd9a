"""A run that was taken down at any epoch boundary and begun again equals the one that never was, to the bit."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_trials import begin, finish, keys_of, outcome, timeless, tiny_settings, tiny_task, trial_request

from study.store import Store
from trainables.classification import Classification
from trainables.data.opened import Data
from trainables.requests import Observer, TrialRequest
from trainables.results import TrainingError
from trainables.settings import Settings
from trainables.trial import Checkpoint, Trial

EPOCHS = 6  # two of the head, then k = 2, 4, 4, 4: blocks come after epochs 2 and 3
RAW = Observer(None, 0.0, None)
IMPATIENT = Observer(1 - 1e-7, 1e-3, 1)  # an average that stands still: its first epoch is best, its second stops it
AVERAGED = Observer(0.9, 3.0, 2)
OBSERVERS = (RAW, IMPATIENT, AVERAGED)


@pytest.fixture(scope="module")
def settings(restless_encoder: Path) -> Settings:
    return tiny_settings(restless_encoder, weighting={"enabled": True, "eta": 2.0})


@pytest.fixture(scope="module")
def task(settings: Settings, data: Data) -> Classification:
    return tiny_task(settings, data)


@pytest.fixture(scope="module")
def request_of_all(settings: Settings) -> TrialRequest:
    return trial_request(settings, OBSERVERS, keep=frozenset(keys_of("trajectory", EPOCHS)))


@pytest.fixture(scope="module")
def unbroken(request_of_all: TrialRequest, task: Classification, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The store of the run that nothing interrupted, with the state after every epoch."""
    store = Store(tmp_path_factory.mktemp("unbroken"))
    finish(begin(request_of_all, task, store))
    return store


def checkpoint(store: Store, epoch: int) -> Checkpoint:
    found = store.newest(keys_of("trajectory", EPOCHS)[epoch - 1 : epoch], lambda _: True)
    assert found is not None, f"no state after epoch {epoch}"
    return found


def assert_equal_checkpoints(ours: Checkpoint, theirs: Checkpoint) -> None:
    assert ours.state.epoch == theirs.state.epoch
    assert ours.state.averages == theirs.state.averages
    assert ours.state.class_state == theirs.state.class_state
    assert set(ours.state.tensors) == set(theirs.state.tensors)
    for name, tensor in ours.state.tensors.items():
        assert torch.equal(tensor, theirs.state.tensors[name]), name
    assert set(ours.best) == set(theirs.best)
    for at, weights in ours.best.items():
        assert all(torch.equal(tensor, theirs.best[at][name]) for name, tensor in weights.items())
    assert [timeless(r) for r in ours.history] == [timeless(r) for r in theirs.history]


def assert_equal_results(ours: Store, theirs: Store, observers: tuple[Observer, ...] = OBSERVERS) -> None:
    leaf = keys_of("trajectory", EPOCHS)[-1]
    for observer in observers:
        assert outcome(ours.load_result(leaf, observer.name)) == outcome(theirs.load_result(leaf, observer.name))
        with (
            np.load(ours.predictions(leaf, observer.name)) as mine,
            np.load(theirs.predictions(leaf, observer.name)) as other,
        ):
            assert mine["scores"].tobytes() == other["scores"].tobytes()


def test_the_unbroken_run_has_what_the_boundaries_are_to_be_tested_with(unbroken: Store) -> None:
    last, leaf = checkpoint(unbroken, EPOCHS), keys_of("trajectory", EPOCHS)[-1]
    assert [r.metrics["unfrozen_blocks"] for r in last.history] == [0, 0, 2, 4, 4, 4]
    assert len({r.trajectory_sha256 for r in last.history}) == EPOCHS
    stopped = unbroken.load_result(leaf, IMPATIENT.name)
    assert stopped is not None
    assert (stopped.best_epoch, stopped.last_epoch, stopped.stopped_early) == (3, 4, True)
    weights = [checkpoint(unbroken, epoch).state.class_state for epoch in range(1, EPOCHS + 1)]
    assert weights[:2] == [None, None]
    assert len({tuple(w) for w in weights[2:] if w is not None}) == 4


@pytest.mark.parametrize("boundary", range(1, EPOCHS + 1))
def test_a_run_resumed_after_any_epoch_equals_the_unbroken_one(
    boundary: int, request_of_all: TrialRequest, task: Classification, unbroken: Store, tmp_path: Path
) -> None:
    store = Store(tmp_path)
    trial = begin(request_of_all, task, store)
    for _ in range(boundary):
        trial.step()
    del trial
    torch.manual_seed(boundary)  # what the process before left in the generator is gone
    resumed = begin(request_of_all, task, store)
    assert resumed.epoch == boundary
    finish(resumed)
    for epoch in range(1, EPOCHS + 1):
        assert_equal_checkpoints(checkpoint(store, epoch), checkpoint(unbroken, epoch))
    assert_equal_results(store, unbroken)


def test_a_run_begun_anew_for_every_single_epoch_equals_the_unbroken_one(
    request_of_all: TrialRequest, task: Classification, unbroken: Store, tmp_path: Path
) -> None:
    request = dataclasses.replace(request_of_all, keep=frozenset(request_of_all.keys[-1:]))
    store = Store(tmp_path)
    for epoch in range(EPOCHS):
        trial = begin(request, task, store)
        assert trial.epoch == epoch
        trial.step()
        kept = [n for n, key in enumerate(request.keys, start=1) if store.has_state(key)]
        assert kept == [epoch + 1]
    assert_equal_checkpoints(checkpoint(store, EPOCHS), checkpoint(unbroken, EPOCHS))
    assert_equal_results(store, unbroken)


@pytest.mark.parametrize("fork", [2, 4])
def test_a_child_trial_goes_on_where_another_trial_ended(
    fork: int, request_of_all: TrialRequest, task: Classification, unbroken: Store, tmp_path: Path
) -> None:
    store = Store(tmp_path)
    parent = dataclasses.replace(request_of_all, keys=request_of_all.keys[:fork])
    finish(begin(parent, task, store))
    child = begin(dataclasses.replace(request_of_all, first=fork), task, store)
    assert child.epoch == fork
    finish(child)
    assert_equal_results(store, unbroken)


def test_a_damaged_state_is_passed_over_for_the_one_before(
    request_of_all: TrialRequest, task: Classification, unbroken: Store, tmp_path: Path
) -> None:
    shutil.copytree(unbroken.root / "states", tmp_path / "states")
    for epoch in (5, 6):
        file = tmp_path / "states" / request_of_all.keys[epoch - 1][:40] / "tensors.safetensors"
        data = bytearray(file.read_bytes())
        data[-5] ^= 1
        file.write_bytes(data)
    store = Store(tmp_path)
    trial = begin(request_of_all, task, store)
    assert trial.epoch == 4
    finish(trial)
    assert_equal_results(store, unbroken)


def test_an_observer_added_later_replays_from_where_stage_2_begins(
    request_of_all: TrialRequest, task: Classification, unbroken: Store, settings: Settings, tmp_path: Path
) -> None:
    store = Store(tmp_path)
    finish(begin(trial_request(settings, [RAW], keep=frozenset(request_of_all.keys)), task, store))
    trial = begin(request_of_all, task, store)
    assert trial.epoch == 2  # the states after it lack the averaged copies
    before = outcome(store.load_result(request_of_all.keys[-1], RAW.name))
    finish(trial)
    assert_equal_results(store, unbroken, (IMPATIENT, AVERAGED))
    assert outcome(store.load_result(request_of_all.keys[-1], RAW.name)) == before


def test_a_replay_that_differs_from_the_record_is_refused(
    request_of_all: TrialRequest, settings: Settings, data: Data, unbroken: Store, tmp_path: Path
) -> None:
    shutil.copytree(unbroken.root / "results", tmp_path / "results")
    shutil.rmtree(next((tmp_path / "results").glob("*/raw*")))
    other = settings.model_copy(
        update={"optimiser": settings.optimiser.model_copy(update={"head_lr": 1.0001 * settings.optimiser.head_lr})}
    )
    trial = begin(dataclasses.replace(request_of_all, settings=other), tiny_task(other, data), Store(tmp_path))
    with pytest.raises(TrainingError, match="epoch 1 was trained again and came out different"):
        finish(trial)


def test_states_of_other_hardware_images_or_libraries_are_refused_unless_asked_for(
    request_of_all: TrialRequest, task: Classification, unbroken: Store, tmp_path: Path
) -> None:
    def store_with(**provenance: str) -> Store:
        store, before = Store(tmp_path / "-".join(provenance)), checkpoint(unbroken, 3)
        store.save(request_of_all.keys[2], dataclasses.replace(before, provenance={**before.provenance, **provenance}))
        return store

    for name in ("hardware", "torch"):
        store = store_with(**{name: "another"})
        with pytest.raises(TrainingError, match=rf"after epoch 3 comes from {name} 'another'.*allow_mixed=true"):
            begin(request_of_all, task, store)
        assert begin(dataclasses.replace(request_of_all, mixed=True), task, store).epoch == 3
    images = store_with(contents_digest="another")
    with pytest.raises(TrainingError, match="the images have changed"):
        begin(dataclasses.replace(request_of_all, mixed=True), task, images)


@pytest.mark.slow
def test_two_runs_in_two_processes_are_equal_to_the_bit(
    request_of_all: TrialRequest, task: Classification, unbroken: Store, tmp_path: Path
) -> None:
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_run, args=(request_of_all, task, tmp_path))
    process.start()
    process.join(300)
    assert process.exitcode == 0
    assert_equal_checkpoints(checkpoint(Store(tmp_path), EPOCHS), checkpoint(unbroken, EPOCHS))


def _run(request: TrialRequest, task: Classification, root: Path) -> None:
    trial: Trial = begin(request, task, Store(root))
    finish(trial)
