"""Clusters in trouble, for real: a node cut off the network and back, a head node killed and started again."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from subprocess import PIPE

import pytest
from fault_checks import EpochsSaved, every_run_once, prepared, same_results

from tests.launches import Launch, command_of, launched
from tests.networks import Network, network, why_not
from tests.ray_nodes import HEAD, RayNode, RayNodes, ray_nodes
from tests.studies_for_tests import ROOT, Ran

TRAINS = "ray::TrialActor.train"
# A node counts as dead after about 4 × (1 + 2) s without an answer; by default it is a minute (docs/faults.md).
SOONER = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "4",
}

pytestmark = pytest.mark.slow


def patiently(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Wait for a condition, whether or not the study still runs."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:g} s in vain: {what}"
        time.sleep(0.05)


def at(nodes: RayNodes, storage: Path) -> AbstractContextManager[Launch]:
    """The ablation over a cluster, started on the head node."""
    return launched(
        storage,
        *("--address", nodes.address),
        executor="ray",
        environment=nodes.environment,
        before=nodes.inside(nodes.nodes[0]),
    )


def training(*nodes: RayNode) -> bool:
    """Whether a trial runs on each of the nodes."""
    return all(node.workers(TRAINS) for node in nodes)


@pytest.fixture
def cables() -> Iterator[Network]:
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    with network(machines=3) as made:
        yield made


@pytest.mark.timeout(1200)
def test_a_node_that_is_cut_off_trains_on_unheard_and_every_bit_is_the_same(
    cables: Network, undisturbed: Ran, tmp_path: Path
) -> None:
    """Its trial is given to the other node; then it finishes its epoch, into the same storage; then it is back."""
    storage, cut = prepared(tmp_path / "storage", undisturbed), HEAD + 2
    with ray_nodes(workers=2, network=cables, settings=SOONER) as nodes:
        near, far = nodes.nodes[1:]
        saved = EpochsSaved(storage)
        with at(nodes, storage) as launch:
            assert launch.until(lambda: any(storage.glob("states/*")) and training(near, far), 400), launch.output
            [worker] = far.workers(TRAINS)
            worker.suspend()  # so that its epoch takes longer than the cluster needs to give the node up
            cables.cut(cut)
            assert launch.until(lambda: "again ablation: " in launch.output), launch.output
            worker.resume()
            patiently(lambda: not training(far), 60, "the worker that was cut off finishes its epoch")
            assert far.process.poll() is None and worker.is_running(), "nobody could tell it that it was given up"
            cables.restore(cut)
            patiently(lambda: far.process.poll() is not None, 90, "a node that is back learns that it was given up")
            assert far.process.returncode != 0, "so that a service manager starts it again"
            assert launch.wait(600) == 0, launch.output
        times = saved.stop()
        assert nodes.start_worker(number=cut).process.poll() is None, "and may join again"
    lost = [line for line in launch.output.splitlines() if line.startswith("again ")]
    assert len(lost) == 1 and "its node died (10.77.0.4)" in lost[0], launch.output
    assert sum(times.values()) <= len(times) + 1, "at most the epoch that it was in was trained twice"
    same_results(storage, undisturbed)
    every_run_once(f"sqlite:///{storage / 'mlflow.db'}", undisturbed.plan)
    assert list((storage / "partial").iterdir()) == [], "nothing half-written is left"


@pytest.mark.timeout(1200)
def test_a_head_node_that_dies_and_is_started_again_is_said_in_time_and_the_same_command_goes_on(
    undisturbed: Ran, tmp_path: Path
) -> None:
    storage = prepared(tmp_path / "storage", undisturbed)
    with ray_nodes(workers=1) as nodes:
        head, worker = nodes.nodes
        saved = EpochsSaved(storage)
        with at(nodes, storage) as launch:
            assert launch.until(lambda: any(storage.glob("states/*")) and training(worker), 400), launch.output
            head.end()  # GCS, raylet and all, by SIGKILL
            began = time.monotonic()
            nodes.start_head()
            assert launch.wait(60) == 1, launch.output
            assert time.monotonic() - began < 60, "sooner than Ray, which would say nothing of use"
        said = f"error --address {nodes.address}: the head node (was started again|has not answered for 30 s)"
        assert re.search(said, launch.output), launch.output
        assert launch.output.endswith(f"To go on:\n  {command_of(launch)}\n"), launch.output
        assert "Traceback" not in launch.output
        worker.end()
        nodes.start_worker()
        with at(nodes, storage) as again:
            assert again.wait(600) == 0, again.output
        times = saved.stop()
    assert command_of(again) == command_of(launch)
    assert sum(times.values()) <= len(times) + 1, "at most the epoch that ran was trained twice"
    same_results(storage, undisturbed)
    every_run_once(f"sqlite:///{storage / 'mlflow.db'}", undisturbed.plan)


WAITS = """
import sys, ray
from study.interrupts import answered_signals
from study.cluster.ray_cluster import cluster
from study.spec import Choices, find_study, load_study

study = load_study(find_study("ablation"), Choices())
with answered_signals(), cluster(sys.argv[1], [study], verbose=False):
    print("connected", flush=True)
    while True:
        ray.nodes()
"""


def test_a_driver_that_waits_for_its_head_where_no_signal_reaches_it_is_ended_all_the_same() -> None:
    """As `ray.nodes()` does, which the driver asks now and then: Ray's own end of it would be without a word."""
    with ray_nodes(workers=0, settings={"RAY_gcs_rpc_server_reconnect_timeout_s": "20"}) as nodes:
        command, environment = [sys.executable, "-c", WAITS, nodes.address], os.environ | nodes.environment
        with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=PIPE, stderr=PIPE, text=True) as driver:
            try:
                assert driver.stdout is not None and driver.stdout.readline() == "connected\n"
                nodes.nodes[0].end()
                _, said = driver.communicate(timeout=30)
            finally:
                driver.kill()
    assert driver.returncode == 1
    assert f"error --address {nodes.address}: the head node has not answered for 10 s; nothing that was" in said
    assert "To go on:\n  python study/launch.py " in said
