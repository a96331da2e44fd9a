"""The cluster in containers for tests, by the targets that users have: `make up`, `make cluster-ablation`, `make down`.

It sets up nothing on a machine but what `make down ARGS=--volumes` takes away again; images stay, as after any build.
What the machine needs besides is given in the variable SPFT_TEST_MAKE, as arguments of make, e.g.
`PIP_CONF=/etc/pip.conf BUILD_ARGS=--network=host`.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.studies_for_tests import ROOT

IMAGE = "spft-studies:test"
READY_SECONDS = 300  # for all services to be healthy; machines that run tests are busy


@dataclass(frozen=True)
class Stack:
    """A running cluster: the names of its project and ports, and where its secrets lie."""

    project: str
    secrets: Path
    mlflow_port: int
    dashboard_port: int

    def make(self, target: str, *arguments: str) -> list[str]:
        """A command of make on this stack."""
        given = [f"IMAGE={IMAGE}", f"PROJECT={self.project}", f"SECRETS={self.secrets}"]
        return ["make", "--no-print-directory", target, *given, *make_arguments(), *arguments]

    @property
    def environment(self) -> dict[str, str]:
        """What compose.yaml reads from the environment."""
        ports = {"MLFLOW_PORT": str(self.mlflow_port), "DASHBOARD_PORT": str(self.dashboard_port)}
        return {**os.environ, **ports, "MAKEFLAGS": ""}

    def run(self, target: str, *arguments: str, timeout: float = 600) -> str:
        """Both streams of a target that has to succeed."""
        return done(self.make(target, *arguments), timeout=timeout, env=self.environment)

    @contextmanager
    def running(self, log: Path, target: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
        """A target in the background, ended with the body."""
        with log.open("wb") as out:
            process = subprocess.Popen(
                self.make(target, *arguments), stdout=out, stderr=out, cwd=ROOT, env=self.environment
            )
        try:
            yield process
        finally:
            process.terminate()
            process.wait(60)

    def containers(self, service: str = "") -> list[dict[str, Any]]:
        """What the engine knows of the stack's containers, or of one service's, in the order of their numbers."""
        labels = [f"com.docker.compose.project={self.project}"]
        labels += [f"com.docker.compose.service={service}"] if service else []
        filters = [part for label in labels for part in ("--filter", f"label={label}")]
        names = docker("ps", "--all", "--quiet", "--no-trunc", *filters).split()
        found: list[dict[str, Any]] = json.loads(docker("inspect", *names)) if names else []
        return sorted(found, key=lambda container: str(container["Name"]))

    def secret(self, name: str) -> str:
        """One of its secrets."""
        return (self.secrets / name).read_text()


def make_arguments() -> list[str]:
    """What this machine's make needs besides."""
    return shlex.split(os.environ.get("SPFT_TEST_MAKE", ""))


def docker_program() -> str:
    """The engine's client that make calls."""
    named = [argument.partition("=")[2] for argument in make_arguments() if argument.startswith("DOCKER=")]
    return named[0] if named else "docker"


def docker(*arguments: str, timeout: float = 120) -> str:
    """What the engine's client says, which has to succeed."""
    return done([docker_program(), *arguments], timeout=timeout)


def done(command: list[str], **options: Any) -> str:
    """Both streams of a command that has to succeed."""
    ran = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, **options
    )
    assert ran.returncode == 0, f"{shlex.join(command)}:\n{ran.stdout[-4000:]}"
    return ran.stdout


def missing_engine() -> str | None:
    """Why no containers can be run here; None if they can."""
    client = shutil.which(docker_program())
    if client is None or shutil.which("make") is None:
        return "needs docker and make"
    asked = subprocess.run([client, "info"], capture_output=True, text=True, check=False, timeout=30)
    if asked.returncode != 0:
        return f"no engine answers `docker info`: {(asked.stderr.strip() or 'no reason given').splitlines()[-1]}"
    plugin = subprocess.run([client, "compose", "version"], capture_output=True, check=False, timeout=30)
    if plugin.returncode != 0 and shutil.which("docker-compose") is None:
        return "neither `docker compose` nor docker-compose is here"
    for image in base_images():
        if not _has(client, image):
            return f"the image {image} is not here and cannot be pulled"
    return None


def base_images() -> list[str]:
    """Images that are not built here, as Makefile and compose.yaml name them."""
    [base] = re.findall(r"(?m)^BASE \?= (\S+)", (ROOT / "Makefile").read_text())
    [postgres] = re.findall(r"\$\{POSTGRES_IMAGE:-(.+?)\}", (ROOT / "docker" / "compose.yaml").read_text())
    return [base, postgres]


def _has(client: str, image: str) -> bool:
    for command in ("image", "inspect", image), ("pull", "--quiet", image):
        if subprocess.run([client, *command], capture_output=True, check=False, timeout=600).returncode == 0:
            return True
    return False


@contextmanager
def stack(folder: Path, nodes: int) -> Iterator[Stack]:
    """A cluster with so many workers, built and healthy; it ends with the body, volumes too."""
    there = Stack(f"spft-test-{secrets.token_hex(4)}", folder / "secrets", free_port(), free_port())
    try:
        there.run("up", f"NODES={nodes}", timeout=3600)  # the first build fetches gigabytes
        wait_until(lambda: not unready(there), READY_SECONDS, lambda: f"not ready: {unready(there)}")
        yield there
    finally:
        there.run("down", "ARGS=--volumes")


def unready(there: Stack) -> list[str]:
    """Services that are not healthy, or one-shot ones that have not ended well."""
    late = []
    for container in there.containers():
        state, name = container["State"], container["Name"]
        if "mlflow-users" in name:
            if (state["Status"], state["ExitCode"]) != ("exited", 0):
                late.append(f"{name} {state['Status']} {state['ExitCode']}")
        elif state["Status"] != "running" or state["Health"]["Status"] != "healthy":
            late.append(f"{name} {state['Status']}")
    return late


def wait_until(condition: Callable[[], object], seconds: float, said: Callable[[], str]) -> None:
    """Wait for something to hold."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, said()
        time.sleep(0.5)


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port: int = free.getsockname()[1]
    return port
