"""MLflow servers on loopback, started and stopped as an operator would."""

from __future__ import annotations

import base64
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import closing, suppress
from pathlib import Path

from tests.ledger_samples import new_database


class Server:
    """An MLflow server over an SQLite file or another database, on a free port of this machine."""

    def __init__(self, folder: Path, database: str | None = None) -> None:
        with closing(socket.create_server(("127.0.0.1", 0))) as free:
            self.port = free.getsockname()[1]
        self.folder, self.database = folder, database or new_database(folder)
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", self.database, "--workers", "1"]
        command += ["--artifacts-destination", str(self.folder / "served")]
        command += self.arguments()
        # Without processes for jobs of MLflow's own, which nothing here asks for.
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **self.environment()}
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=self.folder, env=environment, start_new_session=True
            )
        for _ in range(240):
            with suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=1):
                return
            assert self.process.poll() is None, (self.folder / "server.log").read_text()
            time.sleep(0.5)
        raise AssertionError("the server did not answer within two minutes")

    def arguments(self) -> list[str]:
        """Further ones."""
        return []

    def environment(self) -> dict[str, str]:
        """Further variables."""
        return {}

    def stop(self) -> None:
        """End the server and its worker, which share a process group of their own."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(20)


class ServerWithUsers(Server):
    """A server that asks for a user and password; its administrator's password is drawn, none is a default."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.admin_password = secrets.token_urlsafe(24)
        (folder / "users.ini").write_text(
            "[mlflow]\n"
            "default_permission = READ\n"
            f"database_uri = sqlite:///{folder / 'users.db'}\n"
            "admin_username = admin\n"
            "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
        )

    def arguments(self) -> list[str]:
        return ["--app-name", "basic-auth"]

    def environment(self) -> dict[str, str]:
        return {
            "MLFLOW_AUTH_CONFIG_PATH": str(self.folder / "users.ini"),
            "MLFLOW_AUTH_ADMIN_PASSWORD": self.admin_password,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_urlsafe(24),
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # a dozen processes for what studies do not use
        }

    def add_user(self, name: str) -> dict[str, str]:
        """Make a user; what a client of theirs has in its environment."""
        password = secrets.token_urlsafe(24)
        request = urllib.request.Request(
            f"{self.uri}/api/2.0/mlflow/users/create",
            data=json.dumps({"username": name, "password": password}).encode(),
            headers={"Content-Type": "application/json", "Authorization": basic("admin", self.admin_password)},
        )
        with urllib.request.urlopen(request, timeout=60):
            pass
        # The first request of each kind makes a server import and set up for seconds: more than clients wait.
        page = f"{self.uri}/api/2.0/mlflow/experiments/search?max_results=1"
        asking = urllib.request.Request(page, headers={"Authorization": basic(name, password)})
        with urllib.request.urlopen(asking, timeout=60):
            return {"MLFLOW_TRACKING_USERNAME": name, "MLFLOW_TRACKING_PASSWORD": password}


def basic(user: str, password: str) -> str:
    """The header by which a user signs in."""
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
