"""Why a trial lost its worker, in words that say what to change. Plain text in and out: no torch, no ray."""

from __future__ import annotations

import re
from typing import NamedTuple

from study.schedule import Node
from trainables.requests import TrialRequest


class Fault(NamedTuple):
    """Why a trial stopped, and whether another worker may do better."""

    reason: str
    again: bool


def hung(node: Node, doing: str, timeout: float | None, where: str = "") -> Fault:
    """A step that took too long; `doing`: 'set-up' or 'epoch 3', `where`: the place in the code, if it is known."""
    place = f" (it was at {where})" if where else ""
    return Fault(
        f"{doing} of {node.name!r} was not finished within {timeout:g} s and counts as hung{place}: "
        "give more with --timeout if it takes that long",
        again=True,
    )


def lighter(request: TrialRequest) -> str:
    """How much a trial computes at once, and what makes it need less memory."""
    more = "execution.gpus" if request.compute.device == "cuda" else "execution.cpus"
    return (
        f"a batch is {request.settings.optimiser.batch_size} images of {request.settings.dataset.image_size} px: lower "
        f"optimiser.batch_size or dataset.image_size, or let fewer trials share a machine with a larger {more}"
    )


def killed_for_memory(request: TrialRequest, report: str) -> Fault:
    """Ray's memory monitor ended the worker; `report`: what it says of the node and of those that it ended.

    A worker that held most of the node's memory would again; one that was ended for others' use of it need not.
    """
    node = re.search(r"was ([\d.]+)\s?GB used / ([\d.]+)\s?GB limit", report)
    own = max(map(float, re.findall(r"actual memory used=([\d.]+)\s?GB", report)), default=0.0)
    figures = f" ({node[1]} of {node[2]} GB in use, {own:g} GB of it by the worker)" if node else ""
    return Fault(
        f"its worker (device {request.compute.device}) was killed because its node ran out of memory{figures}: "
        f"{lighter(request)}",
        again=node is None or own < float(node[2]) / 2,
    )


def died(request: TrialRequest, report: str) -> Fault:
    """A worker that is gone; `report`: what Ray says of it, many lines of which one tells something."""
    address = re.search(r"^\s*ip: (\S+)", report, re.MULTILINE)
    at = f" on {address[1]}" if address else ""
    if "node has died" in report or "node was terminated" in report:
        return Fault(f"its node died{f' ({address[1]})' if address else ''}", again=True)
    if "worker process has died" in report:
        return Fault(
            f"its worker process{at} was killed or crashed; the kernel kills where memory is short: {lighter(request)}",
            again=True,
        )
    if "is unavailable" in report:
        return Fault("its worker cannot be reached any more: its process, its node or the network failed", again=True)
    lines = [line.strip() for line in report.splitlines() if line.strip()]
    return Fault(f"its worker{at} died: {lines[-1] if lines else 'no reason is known'}", again=True)
