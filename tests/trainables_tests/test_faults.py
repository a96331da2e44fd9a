"""What is said and kept when training diverges or memory is refused."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
from tiny_trials import begin, keys_of, tiny_settings, tiny_task, trajectory, trial_request

from study.executors import Worker
from study.store import Store
from trainables.classification import Classification
from trainables.data.opened import Data
from trainables.device import memory_refused
from trainables.loop import DivergedError
from trainables.requests import Observer
from trainables.results import TrainingError

RAW = Observer(None, 0.0, None)


# -- divergence ------------------------------------------------------------------------------------------------------


def test_a_moment_that_overflows_is_found_though_the_loss_is_a_number(encoder: Path, data: Data) -> None:
    """Squares of gradients beyond 1.8e19 are infinite in fp32; AdamW then stands still, and no loss shows it."""

    class Steep(Classification):
        def loss(self, *arguments: object) -> torch.Tensor:
            loss = super().loss(*arguments)  # type: ignore[arg-type]
            return loss + (loss * 1e30 - (loss * 1e30).detach())  # its value, with gradients 1e30 times as large

    settings = tiny_settings(encoder, optimiser={"clip_norm": None})
    with pytest.raises(DivergedError, match=r"optimiser/.*/exp_avg_sq is not finite after the last step of epoch 1"):
        trajectory(tiny_task(settings, data, Steep), settings).train_epoch()


def test_before_the_first_epoch_no_state_is_claimed_and_the_rate_of_stage_1_is_named(
    encoder: Path, data: Data, tmp_path: Path
) -> None:
    settings = tiny_settings(encoder, optimiser={"head_lr": 1e30, "clip_norm": None})
    trial = begin(trial_request(settings, [RAW]), tiny_task(settings, data), Store(tmp_path))
    with pytest.raises(TrainingError) as raised:
        trial.step()
    said = str(raised.value)
    assert "in epoch 1" in said and "no epoch was finished before" in said
    assert "lower optimiser.head_lr (1e+30), or set optimiser.clip_norm and train all of it again" in said


def test_plain_fine_tuning_that_diverges_names_both_rates_and_no_head_stage(
    encoder: Path, data: Data, tmp_path: Path
) -> None:
    plain = {"unfreezing": "plain", "depth": "all"}
    settings = tiny_settings(encoder, optimiser={"encoder_lr": 1e30}, strategy=plain)
    trial = begin(trial_request(settings, [RAW]), tiny_task(settings, data), Store(tmp_path))
    with pytest.raises(TrainingError) as raised:
        trial.step()
    said = str(raised.value)
    assert "lower optimiser.encoder_lr (1e+30) or optimiser.head_lr (0.003), and train all of it again" in said
    assert "head stage" not in said


def test_from_the_last_good_state_training_goes_on_with_lower_rates(encoder: Path, data: Data, tmp_path: Path) -> None:
    settings = tiny_settings(encoder, optimiser={"encoder_lr": 1e30, "tune_head_lr": 1e-3})
    store = Store(tmp_path)
    trial = begin(trial_request(settings, [RAW]), tiny_task(settings, data), store)
    trial.step()
    trial.step()
    with pytest.raises(TrainingError) as raised:
        trial.step()
    key = keys_of("trajectory", 6)[1]
    assert f"the state after epoch 2 is kept and sound ({key[:12]})" in str(raised.value)
    assert "lower optimiser.encoder_lr (1e+30) or optimiser.tune_head_lr (0.001)" in str(raised.value)
    kept = store.newest([key], lambda _: True)
    assert kept is not None and all(torch.isfinite(t).all() for t in kept.state.tensors.values())
    calmer = tiny_settings(encoder, optimiser={"encoder_lr": 1e-4, "tune_head_lr": 1e-3})
    onward = trajectory(tiny_task(calmer, data), calmer)
    onward.restore(kept.state)
    record = onward.train_epoch()
    assert record.epoch == 3 and record.metrics["train/loss"] < 10


# -- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "refused"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (MemoryError(), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: 8 bytes"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_an_allocation_that_was_refused_is_told_from_other_errors(error: Exception, refused: bool) -> None:
    assert memory_refused(error) is refused


def test_the_allocator_of_this_machine_refuses_in_words_that_are_known() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 58, dtype=torch.uint8)
    assert memory_refused(raised.value)


def test_a_worker_whose_gpu_is_full_says_what_to_change_and_takes_the_next_trial(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, full = Classification.loss, [True]

    def refuse(self: Classification, *arguments: object) -> torch.Tensor:
        if full:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation")
        return loss(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Classification, "loss", refuse)
    worker = Worker(Store(tmp_path))
    request = trial_request(tiny_settings(encoder), [RAW])
    worker.take(request)
    assert worker.step() is None  # its set-up
    with pytest.raises(TrainingError) as raised:
        worker.step()
    said = str(raised.value)
    assert said.startswith("out of memory in epoch 1: a batch is 32 images of 32 px: lower optimiser.batch_size or ")
    assert "device cpu" in said and " GB free (CUDA out of memory. Tried to allocate 2.00 GiB.)" in said
    full.clear()
    worker.take(request)
    assert worker.step() is None
    record = worker.step()
    assert record is not None and record.epoch == 1
