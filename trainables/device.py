"""Where and how a trial computes: device, threads, autocast and determinism, fixed before anything is built."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import Literal

import torch

from trainables.task import TrainingError

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Compute:
    """Device kind, number of threads and precision of a trial; all three are part of every stage's key."""

    device: Literal["cpu", "cuda"]
    threads: int
    precision: Precision

    def start(self) -> torch.device:
        """Apply threads and determinism to this process and return the device.

        Raises:
            TrainingError: a GPU is asked for and this process sees none.
        """
        torch.set_num_threads(self.threads)
        if self.device == "cpu":
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

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """bf16 autocast where the precision says so."""
        if self.precision == "bf16":
            return torch.autocast(self.device, dtype=torch.bfloat16)
        return contextlib.nullcontext()

    def hardware(self) -> str:
        """Name of what computes, recorded with every result."""
        if self.device == "cuda":
            return torch.cuda.get_device_name()
        return f"{torch.backends.cpu.get_cpu_capability()} CPU"
