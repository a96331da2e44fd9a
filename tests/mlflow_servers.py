"""MLflow servers on loopback, started and stopped as an operator would."""

from __future__ import annotations

import os
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
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder, start_new_session=True)
        for _ in range(240):
            with suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=1):
                return
            assert self.process.poll() is None, (self.folder / "server.log").read_text()
            time.sleep(0.5)
        raise AssertionError("the server did not answer within two minutes")

    def stop(self) -> None:
        """End the server and its worker, which share a process group of their own."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(20)
