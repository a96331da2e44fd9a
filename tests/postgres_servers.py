"""PostgreSQL servers on loopback, each in a folder of its own, started and ended as an operator would."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

USER, PASSWORD, DATABASE = "ann", "not-to-be-shown", "postgres"
ACCOUNT = "postgres"  # the server refuses to run as root; Debian's package makes this account
SECONDS = 120


def _binaries() -> Path | None:
    """Folder of initdb and pg_ctl: Debian keeps them off PATH, a folder a version."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda f: int(f.parent.name), reverse=True)
    if (found := shutil.which("initdb")) is not None:
        folders.insert(0, Path(found).resolve().parent)
    return next((folder for folder in folders if (folder / "initdb").is_file()), None)


def _account() -> str | None:
    """Whom the server runs as: root's is the one that is there for it."""
    if os.geteuid() != 0:
        return pwd.getpwuid(os.geteuid()).pw_name
    with suppress(KeyError):
        return pwd.getpwnam(ACCOUNT).pw_name
    return None


def why_not() -> str | None:
    """What keeps a server from running here; None if nothing does."""
    if _binaries() is None:
        return "no PostgreSQL server is installed (Debian: apt-get install postgresql)"
    if _account() is None:
        return f"PostgreSQL does not run as root, and there is no account {ACCOUNT}"
    if find_spec("psycopg") is None:
        return "needs the extra `search`: make setup EXTRAS=dev,search"
    return None


class PostgresServer:
    """A server with one user, who has a password, on a free port of this machine."""

    def __init__(self) -> None:
        binaries, account = _binaries(), _account()
        assert binaries is not None
        assert account is not None
        self._binaries, self._account = binaries, account
        with closing(socket.create_server(("127.0.0.1", 0))) as free:
            self.port = free.getsockname()[1]
        self.url = f"postgresql+psycopg://{USER}:{PASSWORD}@127.0.0.1:{self.port}/{DATABASE}"
        self.shown_url = self.url.replace(f":{PASSWORD}@", "@")  # for the command line, which takes no password
        # Short, for its socket, and not below a folder of root's, where the account may not go.
        self.folder = Path(tempfile.mkdtemp(prefix="pg-"))
        secret = self.folder / "secret"
        secret.write_text(PASSWORD)
        for path in (self.folder, secret):
            shutil.chown(path, account)
        # The data are gone with the test: nothing need survive a power cut.
        self._run("initdb", "--no-sync", "-U", USER, "--auth=scram-sha-256", f"--pwfile={secret}", "-E", "UTF8")

    def start(self) -> None:
        """Return when it takes connections."""
        options = f"-c listen_addresses=127.0.0.1 -p {self.port} -k {self.folder} -F"
        self._run("pg_ctl", "start", "-w", "-l", str(self.folder / "log"), "-o", options)

    def stop(self, *, at_once: bool = False) -> None:
        """End it; `at_once`: like a crash, connections are cut and nothing is written any more."""
        self._run("pg_ctl", "stop", "-w", "-m", "immediate" if at_once else "fast")

    def end(self) -> None:
        """Stop it, if it runs, and remove all that it wrote."""
        if (self.folder / "data" / "postmaster.pid").exists():
            self.stop(at_once=True)
        shutil.rmtree(self.folder)

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [self._binaries / program, "-D", self.folder / "data", *arguments],
            cwd=self.folder,
            env={"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # not a pipe: the server would inherit it, and nobody would see its end
            stderr=(self.folder / "errors").open("ab"),
            timeout=SECONDS,
            check=False,
            **({"user": self._account, "group": self._account, "extra_groups": []} if os.geteuid() == 0 else {}),
        )
        assert done.returncode == 0, (self.folder / "errors").read_text() + self._log()

    def _log(self) -> str:
        log = self.folder / "log"
        return log.read_text() if log.exists() else ""


@contextmanager
def postgres() -> Iterator[PostgresServer]:
    """A running server, of which nothing is left afterwards."""
    server = PostgresServer()
    try:
        server.start()
        yield server
    finally:
        server.end()
