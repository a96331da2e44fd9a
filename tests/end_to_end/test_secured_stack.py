"""A study under way with a ledger that has users: who gets in, what listens, what shows, and that no secret leaks.

One run serves all tests: everything is looked at while it trains, then it is stopped, and its report is written.
"""

from __future__ import annotations

import base64
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.launches import Launch, completed, launched
from tests.mlflow_servers import ServerWithUsers, basic
from tests.studies_for_tests import ROOT, TINY

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

LONG = {**TINY, "strategy.tune_epochs": 4000, "stopping.patience": "null"}  # trains until it is stopped
LISTING = """
import json, sys
from ray.util.state import list_actors, list_jobs, list_tasks
asked = {"address": sys.argv[1], "detail": True, "limit": 1000}
actors = [vars(a) for a in list_actors(**asked)]
tasks = [vars(t) for t in list_tasks(**asked)]
jobs = [{"entrypoint": j.entrypoint, "metadata": j.metadata, "env": j.runtime_env} for j in list_jobs(**asked)]
print(json.dumps({"actors": actors, "tasks": tasks, "jobs": jobs}, default=str))
"""
KNOCKING = """
import sys
from ray._raylet import GcsClient
print(len(GcsClient(address=sys.argv[1]).get_all_node_info(timeout=10)))
"""


@dataclass
class Seen:
    """What was seen while the study trained, and where its traces lie."""

    server: ServerWithUsers
    secrets: dict[str, str]  # name → what nobody may find
    storage: Path
    folders: list[Path]  # of all traces
    listening: set[tuple[str, int, str]] = field(default_factory=set)
    commands: set[str] = field(default_factory=set)
    status: dict[str, subprocess.CompletedProcess[str]] = field(default_factory=dict)
    knocks: dict[str, subprocess.CompletedProcess[str]] = field(default_factory=dict)
    pages: dict[str, int] = field(default_factory=dict)
    listed: dict[str, Any] = field(default_factory=dict)
    metrics: str = ""
    output: str = ""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    folder = tmp_path_factory.mktemp("stack")
    scratch = Path(tempfile.mkdtemp(prefix="sec", dir="/tmp"))  # Ray's: its paths must be short
    (folder / "server").mkdir()
    server = ServerWithUsers(folder / "server")
    try:
        server.start()
        writer, reader = server.add_user("writer"), server.add_user("reader")
        hub = f"hf_{secrets.token_urlsafe(24)}"
        password = writer["MLFLOW_TRACKING_PASSWORD"]
        hidden = {"password": password, "sign-in": basic("writer", password), "hub token": hub}
        result = Seen(server, hidden, folder / "storage", [folder, scratch])
        environment = {**writer, "HF_TOKEN": hub, "TMPDIR": str(scratch)}
        options = ("--tracking-uri", server.uri, "-v")
        with launched(result.storage, *options, overrides=LONG, executor="ray", environment=environment) as launch:
            look(result, launch, scratch, reader, folder / "elsewhere")
            launch.send(signal.SIGINT)
            launch.wait()
            result.output = launch.output
        report = ["report", "ablation", "--storage", str(result.storage), "--tracking-uri", server.uri]
        written = command(*report, environment=writer)
        assert written.returncode == 0, written.stderr
        result.output += written.stdout + written.stderr
        yield result
    finally:
        server.stop()
        shutil.rmtree(scratch, ignore_errors=True)


def look(seen: Seen, launch: Launch, scratch: Path, reader: Mapping[str, str], elsewhere: Path) -> None:
    """Look at all that a study under way shows."""
    trained = seen.storage / "states"
    assert launch.until(lambda: any(trained.glob("*"))), launch.output
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(seen.storage / "ray_auth_token")}
    [head] = [p for p in launch.processes() if p.name() == "gcs_server"]
    gcs = next(f"127.0.0.1:{c.laddr.port}" for c in listeners(head))
    elsewhere.mkdir()
    asked = ("status", "ablation", "--tracking-uri", seen.server.uri)
    for user, environment in {"nobody": {}, "wrong": reader | WRONG}.items():
        seen.status[user] = command(*asked, environment=environment, folder=elsewhere)
    (elsewhere / "other").write_text(secrets.token_hex(32))
    given = {
        "right": token,
        "wrong": {**token, "RAY_AUTH_TOKEN_PATH": str(elsewhere / "other")},
        "none": {"RAY_AUTH_MODE": "disabled"},
    }
    for name, environment in given.items():
        seen.knocks[name] = python(KNOCKING, gcs, environment=environment)
    [targets] = scratch.glob("ray*/prom_metrics_service_discovery.json")
    [dashboard] = [p for p in launch.processes() if "dashboard/dashboard.py" in " ".join(p.cmdline())]
    first = int(*re.findall(r"--port=(\d+)", " ".join(dashboard.cmdline())))  # where it is taken, the next ones
    [port] = [
        c.laddr.port for c in listeners(dashboard) if c.status == psutil.CONN_LISTEN and 0 <= c.laddr.port - first < 50
    ]
    listing = python(LISTING, f"http://127.0.0.1:{port}", environment=token)
    assert listing.returncode == 0, listing.stderr
    seen.listed = json.loads(listing.stdout)
    for path in ("/api/v0/actors", "/api/jobs/", "/logs/"):
        seen.pages[path] = http_status(f"http://127.0.0.1:{port}{path}")
    signed_in = {"Authorization": f"Bearer {(seen.storage / 'ray_auth_token').read_text()}"}
    seen.pages["signed in"] = http_status(f"http://127.0.0.1:{port}/api/jobs/", **signed_in)
    assert launch.until(lambda: scraped(seen, targets), pause=1), launch.output

    def epochs_are_told() -> bool:  # the ledger is written behind the training
        seen.status["reader"] = command(*asked, environment=reader, folder=elsewhere)
        return re.search(r"seed \d: \d", seen.status["reader"].stdout) is not None

    assert launch.until(epochs_are_told), seen.status["reader"].stdout + seen.status["reader"].stderr
    for process in [*family(launch), *server_processes(seen.server)]:
        with suppress(psutil.NoSuchProcess):
            line = " ".join(process.cmdline())
            seen.commands.add(line)
            seen.listening |= {(c.laddr.ip, c.laddr.port, line) for c in listeners(process)}
    assert launch.running, launch.output


def family(launch: Launch) -> set[psutil.Process]:
    """All that a launch has started: by what it inherited, and by descent, since Ray's titles may overwrite that."""
    return {*launch.processes(), *psutil.Process(launch.process.pid).children(recursive=True)}


WRONG = {"MLFLOW_TRACKING_PASSWORD": "wrong-" + secrets.token_hex(8)}


def command(*arguments: str, environment: Mapping[str, str], folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """`launch.py …` as somebody else runs it."""
    line = [sys.executable, str(ROOT / "study" / "launch.py"), *arguments]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "RAY_"))}
    env = {**clean, "COLUMNS": "200", **environment}
    return subprocess.run(line, cwd=folder, env=env, capture_output=True, text=True, timeout=120, check=False)


def python(code: str, *arguments: str, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Code in a process that has Ray's variables from here alone."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    line = [sys.executable, "-c", code, *arguments]
    return subprocess.run(line, env={**clean, **environment}, capture_output=True, text=True, timeout=120, check=False)


def listeners(process: psutil.Process) -> list[Any]:
    """Sockets that a process listens at; of UDP all that are bound."""
    found = process.net_connections("inet")
    return [c for c in found if c.status == psutil.CONN_LISTEN or (c.type == 2 and not c.raddr)]


def server_processes(server: ServerWithUsers) -> list[psutil.Process]:
    assert server.process is not None
    first = psutil.Process(server.process.pid)
    return [first, *first.children(recursive=True)]


def http_status(page: str, **headers: str) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(page, headers=headers), timeout=20) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as refused:
        return refused.code


def scraped(seen: Seen, targets: Path) -> bool:
    """Read metrics as Prometheus does, from where Ray tells it that they are."""
    for group in json.loads(targets.read_text()):
        for target in group["targets"]:
            with suppress(OSError), urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as answer:
                text = answer.read().decode()
                if re.search(r"^ray_spft_epochs_total\{.*\} [1-9]", text, re.M):
                    seen.metrics = text
    return bool(seen.metrics)


# ------------------------------------------------------------------------------------------------ who gets in


def test_an_mlflow_call_without_a_user_or_with_a_wrong_password_is_refused(seen: Seen) -> None:
    page = f"{seen.server.uri}/api/2.0/mlflow/experiments/search?max_results=1"
    assert http_status(page) == 401
    assert http_status(page, Authorization=basic("admin", "password1234")) == 401, "the default of older releases"
    assert http_status(page, Authorization=basic("admin", seen.server.admin_password)) == 200
    for user, said in {"nobody": "asks for a user, and MLFLOW_TRACKING_USERNAME is", "wrong": "refuses user"}.items():
        told = seen.status[user]
        assert told.returncode == 2, told.stdout
        assert said in told.stderr and "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" in told.stderr
        assert WRONG["MLFLOW_TRACKING_PASSWORD"] not in told.stderr + told.stdout


def test_a_study_is_refused_by_a_server_that_does_not_know_its_user(seen: Seen, tmp_path: Path) -> None:
    launch = completed(tmp_path / "storage", "--tracking-uri", seen.server.uri)
    assert launch.process.returncode == 2
    assert "asks for a user" in launch.output and "Traceback" not in launch.output
    assert not (tmp_path / "storage" / "images").exists(), "refused before anything was made"


def test_a_call_to_the_embedded_cluster_without_its_token_is_refused(seen: Seen) -> None:
    assert seen.knocks["right"].stdout.strip() == "1", seen.knocks["right"].stderr
    for name in ("wrong", "none"):
        assert seen.knocks[name].returncode != 0
        assert re.search("[Aa]uthentication|[Uu]nauthenticated|token", seen.knocks[name].stderr), name
    assert seen.pages.pop("signed in") == 200
    assert set(seen.pages.values()) == {401}, seen.pages
    assert (seen.storage / "ray_auth_token").stat().st_mode & 0o777 == 0o600


# ------------------------------------------------------------------------------------------------ what listens


def test_nothing_listens_beyond_loopback(seen: Seen) -> None:
    kinds = " ".join(line for _, _, line in seen.listening)
    agent = r"DashboardAgent|dashboard/agent\.py"  # before and after it has its title
    for process in ("gcs_server", "raylet", "dashboard.py", agent, "TrialActor", "mlflow"):
        assert re.search(process, kinds), f"{process} was not looked at"
    beyond = [at for at in seen.listening if not re.match(r"(::ffff:)?127\.|::1$", at[0])]
    assert beyond == []


def test_the_ui_listens_on_loopback(seen: Seen, tmp_path: Path) -> None:
    port = seen.server.port + 1 if seen.server.port < 65_000 else seen.server.port - 1
    shutil.copy(seen.server.folder / Path(seen.server.database).name, tmp_path / "mlflow.db")
    line = [sys.executable, str(ROOT / "study" / "launch.py"), "ui", "--storage", str(tmp_path), "--port", str(port)]
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        found: list[Any] = []
        deadline = time.monotonic() + 120
        while not found and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.5)
            with suppress(psutil.NoSuchProcess):
                first = psutil.Process(process.pid)
                found = [c for p in (first, *first.children(recursive=True)) for c in listeners(p)]
        assert {(c.laddr.ip, c.laddr.port) for c in found} == {("127.0.0.1", port)}
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


# ------------------------------------------------------------------------------------------------ what shows


def test_no_secret_is_in_a_file_a_process_list_or_what_was_said(seen: Seen) -> None:
    files = [path for folder in seen.folders for path in folder.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"report.html", "cells.csv", "server.log", "gcs_server.out", "users.db"} <= names
    listed = json.dumps(seen.listed)
    for name, secret in seen.secrets.items():
        forms = {secret, base64.b64encode(secret.encode()).decode(), secret.removeprefix("Basic ")}
        for form in forms:
            assert form not in seen.output, name
            assert form not in listed, f"{name} in Ray's state"
            assert form not in seen.metrics, name
            assert not [line for line in seen.commands if form in line], f"{name} in a process list"
            assert not [path for path in files if form.encode() in path.read_bytes()], f"{name} in a file"


def test_status_is_told_while_it_runs_from_a_folder_without_a_storage(seen: Seen) -> None:
    told = seen.status["reader"]
    assert told.returncode == 0, told.stderr
    assert "1 running" in told.stdout or "2 running" in told.stdout
    assert re.search(r"seed \d: \d", told.stdout)
    assert "Ablation" in told.stdout


def test_rays_dashboard_names_study_row_and_seed(seen: Seen) -> None:
    [job] = seen.listed["jobs"]
    assert job["metadata"]["study"] == "ablation" and "0" in job["metadata"]["seeds"].split(", ")
    assert "MLP head only" in job["metadata"]["rows"]
    assert "study/launch.py ablation" in job["entrypoint"]
    trial = r"ablation: .+ · phantom · seed \d+ · epochs \d+–\d+"
    actors = [actor for actor in seen.listed["actors"] if actor["class_name"] == "TrialActor"]
    assert actors and all(re.fullmatch(rf"{trial} \(and what follows\)", actor["repr_name"]) for actor in actors)
    assert all(actor["ray_namespace"] == "ablation" for actor in actors)
    names = {task["name"] for task in seen.listed["tasks"]}
    trains = [name for name in names if name.startswith("TrialActor.train")]
    assert trains and all(re.fullmatch(rf"TrialActor\.train · {trial}", name) for name in trains), names


def test_prometheus_is_told_how_far_the_study_is(seen: Seen) -> None:
    def value(name: str, **tags: str) -> float:
        lines = [line for line in seen.metrics.splitlines() if line.startswith(f"ray_spft_{name}{{")]
        told = [line for line in lines if all(f'{k}="{v}"' in line for k, v in {"study": "ablation", **tags}.items())]
        assert len(told) == 1, lines
        return float(told[0].rpartition(" ")[2])

    assert value("trials", status="running") >= 1
    assert value("trials", status="failed") == 0
    assert value("epochs_total") >= 1
    assert 0 < value("units", kind="done") < value("units", kind="planned")
