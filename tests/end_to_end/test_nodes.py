"""The ablation over several nodes: refused before training where it could not run, and whole when a node dies."""

from __future__ import annotations

import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
from fault_checks import prepared

from tests.ray_nodes import RAY, RayNode, RayNodes, ray_nodes
from tests.studies_for_tests import ROOT, TINY, Ran
from trainables.data.registry import load_index, prepare
from trainables.settings import DatasetSettings

LAUNCH = [sys.executable, str(ROOT / "study" / "launch.py"), "ablation"]
SMALL = [part for key, value in TINY.items() for part in ("-o", f"{key}={value}".replace(" ", ""))]
HASHES = ["weights_sha256", "trajectory_sha256", "best_epoch"]


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayNodes]:
    with ray_nodes(workers=2) as cluster:
        yield cluster


@dataclass(frozen=True)
class Told:
    """A command that runs, and what it has said so far."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def words(self) -> str:
        """Both streams, without the line breaks of a terminal."""
        return " ".join(self.log.read_text().split())

    def wait_for(self, condition: Callable[[], object], seconds: float = 400) -> None:
        """Wait until something holds while the command runs."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None and time.monotonic() < deadline, self.words
            time.sleep(0.1)


@contextmanager
def launched(folder: Path, address: str, *options: str, environment: dict[str, str] | None = None) -> Iterator[Told]:
    """The ablation over a cluster, with its storage in `folder`; ended with the body."""
    command = [*LAUNCH, *SMALL, "--storage", str(folder / "storage"), "--address", address, *options]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    log = folder / "log.txt"
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=clean | (environment or {}))
    try:
        yield Told(process, log)
    finally:
        process.kill()
        process.wait()


def refusal(folder: Path, address: str, *options: str, seconds: float, **environment: dict[str, str]) -> str:
    """What a command says that must end with status 2 within `seconds` of an idle machine, without training."""
    started = time.monotonic()
    with launched(folder, address, *options, **environment) as told:
        told.process.wait(timeout=180)
    busy = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
    assert told.process.returncode == 2, told.words
    assert time.monotonic() - started < seconds * busy
    assert "Traceback" not in told.words
    assert not any((folder / "storage" / "states").glob("*"))
    return told.words


# ------------------------------------------------------------------------------------- addresses that cannot be right


def test_a_port_where_nobody_listens_is_said_at_once(tmp_path: Path) -> None:
    said = refusal(tmp_path, "127.0.0.1:9", seconds=10)
    assert "error --address 127.0.0.1:9: nothing answers there (Connection refused)" in said


@pytest.mark.slow
def test_a_port_where_something_else_listens_is_said_within_seconds(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        at = f"127.0.0.1:{listener.getsockname()[1]}"
        said = refusal(tmp_path, at, seconds=10, environment={"RAY_AUTH_MODE": "disabled"})
    assert "what listens there does not answer as Ray does" in said


@pytest.mark.slow
@pytest.mark.parametrize("token", ["none", "another"])
def test_a_token_that_is_not_the_clusters_is_said_with_where_it_is_set(
    token: str, nodes: RayNodes, tmp_path: Path
) -> None:
    path = tmp_path / "token"
    if token == "another":
        path.write_text(secrets.token_hex(32))
    given = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}
    environment = given if token == "another" else {"RAY_AUTH_MODE": "disabled"}
    said = refusal(tmp_path, nodes.address, environment=environment, seconds=10)
    assert f"error --address {nodes.address}: the cluster refuses our token" in said
    assert "RAY_AUTH_TOKEN_PATH" in said


@pytest.mark.slow
def test_resources_that_no_node_has_are_named(nodes: RayNodes, tmp_path: Path) -> None:
    said = refusal(tmp_path, nodes.address, "-o", "execution.cpus=2", environment=nodes.environment, seconds=10)
    assert "a trial asks for 2 CPU, no node of the cluster has that (in all: 2 CPU)" in said


# ------------------------------------------------------------------------------------------------- what a node lacks


@pytest.fixture
def blind_node(nodes: RayNodes, tmp_path: Path) -> Iterator[RayNode]:
    """A node in a name space of its own, where storage, data and one source file are not what they are here."""
    if subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("this user may not make mount name spaces")
    for name in ("storage", "data"):
        (tmp_path / name).mkdir()
    source = ROOT / "trainables" / "ema.py"
    (tmp_path / "ema.py").write_text(source.read_text() + "\n# another version\n")
    hidden = [f"mount -t tmpfs none {shlex.quote(str(tmp_path / name))}" for name in ("storage", "data")]
    hidden.append(f"mount --bind {shlex.quote(str(tmp_path / 'ema.py'))} {shlex.quote(str(source))}")
    node = nodes.start_worker(["unshare", "-m", "sh", "-c", " && ".join([*hidden, 'exec "$@"']), "sh"])
    yield node
    node.end()


@pytest.mark.slow
def test_what_a_node_does_not_see_or_has_differently_is_named_before_training(
    nodes: RayNodes, blind_node: RayNode, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    settings = DatasetSettings(name="phantom", images=TINY["dataset.images"])
    drawn = prepare(settings, load_index(settings), tmp_path / "drawing")
    shutil.copytree(drawn, data, dirs_exist_ok=True)
    said = refusal(
        tmp_path,
        nodes.address,
        *("--dataset", "chestxray14", "--data-root", str(data), "--backbone", "tiny-phantom"),
        *("-o", "dataset.image_size=64", "-o", "optimiser.precision=fp32"),
        environment=nodes.environment,
        seconds=30,
    )
    problems = said.split("error ")[1:]
    assert len(problems) == 3, said
    assert all(problem.startswith(f"node {blind_node.address} (") for problem in problems)
    assert f"--storage {tmp_path / 'storage'} is another folder there" in problems[0]
    assert f"data root {data} has 0 entries there, here " in problems[1]
    assert "the code of this project differs there" in problems[2]


# ---------------------------------------------------------------------------------------------------- nodes that die


@pytest.mark.slow
def test_when_nodes_die_their_stages_go_on_elsewhere_and_every_bit_is_the_same(
    nodes: RayNodes, undisturbed: Ran, tmp_path: Path
) -> None:
    """One node dies while both train, later the other one too, and a new one comes."""
    one, other = nodes.nodes[1:3]
    states = prepared(tmp_path / "storage", undisturbed) / "states"
    with launched(tmp_path, nodes.address, environment=nodes.environment) as told:
        told.wait_for(lambda: any(states.glob("*")) and trains(one) and trains(other))
        one.raylet().send_signal(signal.SIGKILL)
        told.wait_for(lambda: "again ablation: " in told.words)
        ended = told.words.count("ended: ")
        told.wait_for(lambda: told.words.count("ended: ") > ended and trains(other))
        other.raylet().send_signal(signal.SIGKILL)
        told.wait_for(lambda: "no node is left that can hold a trial; waiting for one" in told.words)
        nodes.start_worker()
        told.process.wait(timeout=600)
    assert told.process.returncode == 0, told.words
    # Which of the two Ray sees first is chance: the connection to the worker that is gone, or the node.
    lost = r"again ablation: .*? epochs \S+: its (node died \(127\.0\.0\.[34]\)|worker cannot be reached any more)"
    assert len(re.findall(lost, told.words)) >= 2, told.words
    cells = pd.read_csv(tmp_path / "storage" / "ablation" / "report" / "cells.csv").set_index(["row", "seed"])
    assert set(cells["status"]) == {"FINISHED"}
    pd.testing.assert_frame_equal(cells.sort_index()[HASHES], undisturbed.cells()[HASHES])


def trains(node: RayNode) -> bool:
    """Whether a trial runs on a node."""
    return bool(node.workers("ray::TrialActor.train"))


# ----------------------------------------------------------------------------------------------- nodes that are to come


@pytest.mark.slow
def test_what_an_autoscaler_is_to_bring_nodes_for_is_asked_of_ray_before_there_is_one(tmp_path: Path) -> None:
    """No node can hold a trial yet: without the setting that is refused, with it as many wait in Ray as it says."""
    with ray_nodes(workers=0) as cluster:
        said = refusal(tmp_path, cluster.address, environment=cluster.environment, seconds=15)
        assert "a trial asks for 1 CPU, no node of the cluster has that" in said
        assert "execution.autoscale_to" in said
        options = ("-o", "execution.autoscale_to=2")
        with launched(tmp_path, cluster.address, *options, environment=cluster.environment) as told:
            told.wait_for(lambda: "waiting for one" in told.words)
            told.wait_for(lambda: asked_of_ray(cluster) == 2)
            assert not any((tmp_path / "storage" / "states").glob("*"))
            cluster.start_worker()
            told.process.wait(timeout=600)
        assert told.process.returncode == 0, told.words
    cells = pd.read_csv(tmp_path / "storage" / "ablation" / "report" / "cells.csv")
    assert len(cells) == 8 and set(cells["status"]) == {"FINISHED"}


def asked_of_ray(cluster: RayNodes) -> int:
    """How many trials wait for a node, as Ray tells an autoscaler."""
    command = [RAY, "status", f"--address={cluster.address}"]
    status = subprocess.run(command, env=os.environ | cluster.environment, capture_output=True, text=True, check=False)
    demands = re.findall(r"\{'CPU': 1\.0\} \* 1 \(PACK\): (\d+)\+ pending placement groups", status.stdout)
    return sum(map(int, demands))
