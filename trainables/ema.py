"""Averaged copies of the weights: several decays at once, beside a trajectory that they never touch.

θ' ← d_t·θ' + (1 − d_t)·θ after each optimiser step of stage 2, with d_t = d·(1 − exp(−t/τ)) (method.md, part 4); at
t = 0, θ' = θ. Only tensors that train (and floating buffers that change) are kept: frozen ones equal the raw weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


def decay_at(decay: float, tau: float, t: int) -> float:
    """d_t = d · (1 − exp(−t / τ)) for step t ≥ 1."""
    return decay * (1.0 - math.exp(-t / tau))


class Average:
    """One averaged copy, with its own decay.

    Attributes:
        decay, tau: settings of the copy.
        t: optimiser steps averaged so far.
        tensors: name → averaged tensor, on the device of the raw one.
    """

    def __init__(self, decay: float, tau: float) -> None:
        self.decay = decay
        self.tau = tau
        self.t = 0
        self.tensors: dict[str, Tensor] = {}

    def track(self, live: Mapping[str, Tensor]) -> None:
        """Start averaging tensors not tracked yet; until now they equalled their raw values, so those are copied."""
        for name, tensor in live.items():
            if tensor.is_floating_point() and name not in self.tensors:
                self.tensors[name] = tensor.detach().clone()

    @torch.no_grad()
    def update(self, live: Mapping[str, Tensor]) -> None:
        """One step towards the live tensors; lerp leaves equal values exactly equal."""
        self.t += 1
        weight = 1.0 - decay_at(self.decay, self.tau, self.t)
        names = list(self.tensors)
        torch._foreach_lerp_([self.tensors[n] for n in names], [live[n].detach() for n in names], weight)
