"""Why a worker is gone, from what Ray reported of real losses, in words that say what to change."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from study.cluster import worker_faults
from study.schedule import Schedule
from tests.studies_for_tests import TINY, planned
from trainables.requests import TrialRequest

SHORT_OF_MEMORY = """1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 192.0.2.2, \
ID: 8b0c) was 8.53GB used / 23.54GB limit (0.362181)
OOM kill reason: Memory usage 8980897792B exceeded threshold of 8973158400B (35.5% of 25276502016B limit)
Selected to kill: (Actor(018a): job ID=01000000, task name=A.__init__, pid=397, actual memory used={own}GB)
"""
KILLED = """The actor died unexpectedly before finishing this task.
\tclass_name: TrialActor
\tpid: 28537
\tip: 192.0.2.2
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker \
unexpectedly exits with a connection error code 2. End of file."""
NODE_DIED = """The actor died unexpectedly before finishing this task.
\tclass_name: TrialActor
\tip: 127.0.0.4
The actor died because its node has died. Node Id: 9069bff4
\tthe actor's node was terminated unexpectedly: health check failed."""
UNREACHABLE = """The actor 2ddc68b6 is unavailable: The actor is temporarily unavailable: RpcError: RPC error: Socket \
closed rpc_code: 14. The task may or may not have been executed on the actor."""
NO_CODE = """The actor died because of an error raised in its creation task, \x1b[36mray::TrialActor\x1b[39m
ModuleNotFoundError: No module named 'study'"""


@pytest.fixture
def request_of_a_trial(tmp_path: Path) -> TrialRequest:
    plan = planned(tmp_path, {**TINY, "seeds": [0]})
    return Schedule(plan, plan.chains, lambda _: False, lambda _: False).nodes[0].request


@pytest.mark.parametrize(("own", "again"), [("1.41", True), ("15.2", False)])
def test_a_worker_that_held_most_of_the_memory_is_not_tried_again(
    own: str, again: bool, request_of_a_trial: TrialRequest
) -> None:
    fault = worker_faults.killed_for_memory(request_of_a_trial, SHORT_OF_MEMORY.replace("{own}", own))
    assert fault.again is again
    assert f"(8.53 of 23.54 GB in use, {float(own):g} GB of it by the worker)" in fault.reason
    assert "device cpu" in fault.reason and "a batch is 32 images of 64 px" in fault.reason
    for key in ("optimiser.batch_size", "dataset.image_size", "execution.cpus"):
        assert key in fault.reason


def test_on_a_gpu_the_share_of_it_is_what_to_change(request_of_a_trial: TrialRequest) -> None:
    compute = dataclasses.replace(request_of_a_trial.compute, device="cuda")
    assert "execution.gpus" in worker_faults.lighter(dataclasses.replace(request_of_a_trial, compute=compute))


@pytest.mark.parametrize(
    ("report", "said"),
    [
        (KILLED, "its worker process on 192.0.2.2 was killed or crashed; the kernel kills where memory is short: a "),
        (NODE_DIED, "its node died (127.0.0.4)"),
        (UNREACHABLE, "its worker cannot be reached any more: its process, its node or the network failed"),
        (NO_CODE, "its worker died: ModuleNotFoundError: No module named 'study'"),
        ("", "its worker died: no reason is known"),
    ],
)
def test_of_rays_many_lines_the_one_that_tells_something_is_said(
    report: str, said: str, request_of_a_trial: TrialRequest
) -> None:
    fault = worker_faults.died(request_of_a_trial, report)
    assert fault.reason.startswith(said)
    assert fault.again
