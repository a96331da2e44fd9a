"""Where and how a trial computes: device, threads, autocast and determinism, fixed before anything is built."""

from __future__ import annotations

import contextlib
import os

import torch

from trainables.requests import Compute
from trainables.results import TrainingError


def start(compute: Compute) -> torch.device:
    """Apply threads and determinism to this process and return the device.

    Raises:
        TrainingError: a GPU is asked for and this process sees none.
    """
    torch.set_num_threads(compute.threads)
    if compute.device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise TrainingError("execution.device is cuda, but this process sees no GPU; set execution.device=cpu")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with a workspace
    # warn_only: the gradient of bicubic position-embedding resampling has no deterministic CUDA kernel
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    return torch.device("cuda", torch.cuda.current_device())


def autocast(compute: Compute) -> contextlib.AbstractContextManager[object]:
    """bf16 autocast where the precision says so."""
    if compute.precision == "bf16":
        return torch.autocast(compute.device, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def hardware(compute: Compute) -> str:
    """Name of what computes, recorded with every state and result."""
    if compute.device == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU {torch.backends.cpu.get_cpu_capability()}"
