"""Ray nodes on one machine for tests: a head and workers with addresses, a token, ports and folders of theirs.

Addresses are of loopback, or of a network of the tests' own (`tests.networks`).

Every process is ended by its id, also when a test fails; `ray stop` would end every cluster of the machine.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.networks import Network

RAY = str(Path(sys.executable).with_name("ray"))
HEAD = 2  # last part of its address; workers have the next ones
START_SECONDS = 180  # for a node to join; machines that run tests are busy


@dataclass
class RayNode:
    """A node: the process of `ray start --block`, and those that it started."""

    address: str
    process: subprocess.Popen[bytes]
    log: Path
    first: list[psutil.Process] = field(default_factory=list)  # those that it began with

    def raylet(self) -> psutil.Process:
        """The node's own manager."""
        [raylet] = [p for p in self.processes() if p.name() == "raylet"]
        return raylet

    def workers(self, title: str) -> list[psutil.Process]:
        """Processes of the node whose command line begins so."""
        return [p for p in self.processes() if _title(p).startswith(title)]

    def processes(self) -> list[psutil.Process]:
        """All that is left of it but its first process, whose end would leave the others without a parent."""
        found = {process.pid: process for process in self.first if process.is_running()}
        with _gone_is_fine():
            found |= {p.pid: p for p in psutil.Process(self.process.pid).children(recursive=True)}
        return list(found.values())

    def end(self) -> None:
        """End it and all that it started."""
        left = self.processes()
        for process in [psutil.Process(self.process.pid), *left] if self.process.poll() is None else left:
            with _gone_is_fine():
                process.send_signal(signal.SIGKILL)
        self.process.wait()
        psutil.wait_procs(left, timeout=30)


@dataclass
class RayNodes:
    """A cluster: its head, which runs no trials, and its workers with one CPU each."""

    folder: Path  # short: paths of sockets are limited to 107 bytes
    port: int
    environment: dict[str, str]
    network: Network | None = None  # None: loopback
    nodes: list[RayNode] = field(default_factory=list)

    @property
    def address(self) -> str:
        """For `--address`."""
        return f"{self._host(HEAD)}:{self.port}"

    def start_head(self) -> RayNode:
        """Start the head node, or another one at the same address."""
        return self._start(["--head", f"--port={self.port}", "--num-cpus=0", "--include-dashboard=false"], number=HEAD)

    def start_worker(self, before: Sequence[str] = (), number: int | None = None) -> RayNode:
        """Start a worker node.

        Args:
            before: what its command line begins with, such as a change of name space.
            number: of the machine; None: another one.
        """
        return self._start([f"--address={self.address}", "--num-cpus=1"], before, number)

    def inside(self, node: RayNode) -> list[str]:
        """What a command line begins with whose process shall be on the machine of a node."""
        return [] if self.network is None else self.network.inside(int(node.address.rpartition(".")[2]))

    def _host(self, number: int) -> str:
        return f"127.0.0.{number}" if self.network is None else self.network.host(number)

    def _start(self, arguments: Sequence[str], before: Sequence[str] = (), number: int | None = None) -> RayNode:
        number = number or len(self.nodes) + HEAD
        host, there = self._host(number), [] if self.network is None else self.network.inside(number)
        ports = 21_000 + 500 * number + secrets.randbelow(400)
        log = self.folder / f"node{number}-{len(self.nodes)}.log"
        command = [*there, *before, RAY, "start", "--block", f"--node-ip-address={host}", *arguments]
        command += ["--object-store-memory=80000000", f"--min-worker-port={ports}", f"--max-worker-port={ports + 60}"]
        # A folder for each start: in one where a head was killed, Ray takes it for running while its workers live.
        command += ["--disable-usage-stats", f"--temp-dir={self.folder / f'{number}-{len(self.nodes)}'}"]
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, stdout=out, stderr=out, env=os.environ | self.environment, start_new_session=True
            )
        node = RayNode(host, process, log)
        self.nodes.append(node)
        _wait_until_started(node)
        return node

    def end(self) -> None:
        """End every node, workers first."""
        for node in reversed(self.nodes):
            node.end()


@contextmanager
def ray_nodes(
    workers: int, network: Network | None = None, settings: Mapping[str, str] | None = None
) -> Iterator[RayNodes]:
    """A cluster with so many worker nodes that ends with the body; `settings`: Ray's own, from the environment."""
    folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
    cluster = RayNodes(folder, _free_port(), environment | dict(settings or {}), network)
    try:
        cluster.start_head()
        for _ in range(workers):
            cluster.start_worker()
        yield cluster
    finally:
        cluster.end()
        shutil.rmtree(folder, ignore_errors=True)


def _wait_until_started(node: RayNode) -> None:
    deadline = time.monotonic() + START_SECONDS
    while b"This command will now block" not in node.log.read_bytes():
        if node.process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"node {node.address} did not start:\n{node.log.read_text()[-2000:]}")
        time.sleep(0.2)
    node.first = node.processes()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.2", 0))
        return int(probe.getsockname()[1])


def _title(process: psutil.Process) -> str:
    with _gone_is_fine():
        return " ".join(process.cmdline()).strip()
    return ""


@contextmanager
def _gone_is_fine() -> Iterator[None]:
    try:
        yield
    except psutil.NoSuchProcess:
        return
