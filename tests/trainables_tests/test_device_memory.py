"""What a process takes of a GPU. No GPU runs here: CUDA's own counters are stood in for, our arithmetic is not."""

from __future__ import annotations

import pytest
import torch

from trainables import device
from trainables.device_memory import CONTEXT_BYTES, allowed_fraction
from trainables.requests import Compute

GB = 1_000_000_000
CARD = 24 * GB
CUDA, CPU = Compute("cuda", 1, "bf16"), Compute("cpu", 1, "fp32")


def card_with(monkeypatch: pytest.MonkeyPatch, *, free: int, reserved: int, peak: int) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, CARD))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: reserved)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: peak)


def test_the_peak_is_the_allocators_and_what_lies_beside_it_on_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """14 GB are taken, 13 of them by the allocator, which once had 15: with 1 GB of CUDA's own that was 16."""
    card_with(monkeypatch, free=CARD - 14 * GB, reserved=13 * GB, peak=15 * GB)
    assert device.memory_taken(CUDA, 1.0) == (16 * GB, CARD)


def test_a_context_is_counted_with_what_it_takes_on_larger_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    card_with(monkeypatch, free=CARD - 13 * GB, reserved=13 * GB, peak=15 * GB)
    assert device.memory_taken(CUDA, 1.0) == (15 * GB + CONTEXT_BYTES, CARD)


def test_on_a_part_of_a_gpu_and_on_cpus_nothing_is_measured() -> None:
    assert device.memory_taken(CUDA, 0.5) is None
    assert device.memory_taken(CPU, 1.0) is None


@pytest.mark.parametrize("share", [0.25, 1.0, 2.0])
def test_a_process_is_kept_to_its_part_and_counts_from_there(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    said: list[tuple[str, float]] = []
    card_with(monkeypatch, free=CARD, reserved=0, peak=0)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda part: said.append(("kept to", part)))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: said.append(("counted from", 0)))
    device._share_memory(share)
    expected = {0.25: 0.25 * 0.95 - CONTEXT_BYTES / CARD}.get(share, 1.0)
    assert said == [("kept to", pytest.approx(expected)), ("counted from", 0)]
    assert allowed_fraction(share, CARD) == pytest.approx(expected)
