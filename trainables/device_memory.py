"""How a GPU's memory is shared out among processes: numbers that drivers and workers agree on. Imports no torch."""

from __future__ import annotations

CARD_KEPT = 0.05  # of a GPU's memory that no trial is given: its driver's own, and what allocators round up
CONTEXT_BYTES = (
    600 << 20
)  # what CUDA and its libraries take in each process beside tensors; at least so much is counted
GPU_MEMORY = "gpu_memory"  # name in a result's provenance


def allowed_fraction(share: float, card: int) -> float:
    """Fraction of a GPU's memory that the tensors of a process may take which was given a part of it.

    With 1/n for each of n processes, tensors and contexts of all of them fit on the card.

    Args:
        share: of the GPU, as it was asked of Ray; 1 and more: the process has it for itself.
        card: memory of the GPU, bytes.
    """
    if share >= 1:
        return 1.0
    return max(0.0, share * (1 - CARD_KEPT) - CONTEXT_BYTES / card)
