"""Where and how a trial computes: device, threads, autocast and determinism, fixed before anything is built."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
from functools import cache

import psutil
import torch

from trainables.device_memory import CONTEXT_BYTES, allowed_fraction
from trainables.requests import Compute
from trainables.results import TrainingError

# What torch says, as a plain RuntimeError, where memory is refused: the CPU's allocator, CUDA, cuBLAS, cuDNN.
REFUSALS = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


def start(compute: Compute, gpu_share: float = 1.0) -> torch.device:
    """Apply threads and determinism to this process and return the device; what memory it takes is counted from here.

    Args:
        gpu_share: part of the GPU that this process was given; it can then take no more of its memory.

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
    _share_memory(gpu_share)
    return torch.device("cuda", torch.cuda.current_device())


def seed_dropout(device: torch.device, seed: int) -> None:
    """Seed the generators that a step draws from: the CPU's, and its GPU's.

    `torch.manual_seed` does the same for every kind of device there is, which takes milliseconds a step.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


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


# -- memory ----------------------------------------------------------------------------------------------------------


def memory_refused(error: BaseException) -> bool:
    """Whether an error means that an allocation was refused, on the GPU or in main memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in REFUSALS)


def _share_memory(gpu_share: float) -> None:
    """Keep this process to its part of the GPU: what it would take from others is refused to it instead."""
    _, card = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(allowed_fraction(gpu_share, card))
    torch.cuda.reset_peak_memory_stats()


def memory_taken(compute: Compute, gpu_share: float) -> tuple[int, int] | None:
    """The most memory of its GPU that this process took since `start`, and all that the GPU has, bytes.

    None on CPUs, and where the process has a part of a GPU: what others take cannot be told from its own there. The
    peak is that of the allocator's reserve; what CUDA and its libraries take beside it is seen on the card as a whole.
    """
    if compute.device != "cuda" or gpu_share < 1:
        return None
    free, card = torch.cuda.mem_get_info()
    beside = card - free - torch.cuda.memory_reserved()
    return torch.cuda.max_memory_reserved() + max(beside, CONTEXT_BYTES), card


def release_memory() -> None:
    """Give back what is no longer referenced, also to others on the same GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@cache
def settle(task: str) -> None:
    """Leave what is there by now, modules above all, out of every later search for cycles: it stays for good.

    Among the objects of torch and transformers such a search takes about half a second, at the start of every trial.

    Args:
        task: once for each, since each has its own libraries.
    """
    gc.collect()
    gc.freeze()


def memory_left(compute: Compute) -> str:
    """How much memory the device has left, such as 'GPU NVIDIA L4 has 0.3 GB of 24.0 GB free'."""
    if compute.device == "cuda":
        free, total = torch.cuda.mem_get_info()
        where = f"GPU {torch.cuda.get_device_name()}"
    else:
        memory = psutil.virtual_memory()
        free, total, where = memory.available, memory.total, "the machine (device cpu)"
    return f"{where} has {free / 1e9:.1f} GB of {total / 1e9:.1f} GB free"
