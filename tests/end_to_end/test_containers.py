"""The ablation over containers that are built from docker/: closed to strangers, and whole when a worker is killed."""

from __future__ import annotations

import base64
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

from tests.containers import IMAGE, Stack, docker, missing_engine, stack, wait_until

HASHES = ["weights_sha256", "trajectory_sha256", "best_epoch", "status"]
NOBODYS_TOKEN = "0" * 64

pytestmark = [pytest.mark.slow, pytest.mark.timeout(5400)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    reason = missing_engine()
    if reason is not None:
        pytest.skip(reason)
    with stack(tmp_path_factory.mktemp("stack"), nodes=2) as running:
        yield running


# ------------------------------------------------------------------------------------------------------ closed doors


def test_nothing_is_published_beyond_loopback(cluster: Stack) -> None:
    published = {
        (container["Config"]["Labels"]["com.docker.compose.service"], binding["HostIp"], binding["HostPort"])
        for container in cluster.containers()
        for bindings in container["NetworkSettings"]["Ports"].values()
        for binding in bindings or []
    }
    assert published == {
        ("mlflow", "127.0.0.1", str(cluster.mlflow_port)),
        ("head", "127.0.0.1", str(cluster.dashboard_port)),
    }


def test_no_process_is_root_and_none_has_a_secret_in_its_arguments(cluster: Stack) -> None:
    listed = [docker("top", c["Id"], "-eo", "pid,uid,args") for c in cluster.containers() if c["State"]["Running"]]
    lines = [line.split(maxsplit=2)[1:] for text in listed for line in text.splitlines()[1:]]
    assert len(lines) > 10
    assert "0" not in {uid for uid, _ in lines}
    secrets = [file.read_text() for file in cluster.secrets.iterdir()]
    assert not [arguments for _, arguments in lines if any(secret in arguments for secret in secrets)]


def test_neither_image_nor_containers_nor_their_logs_tell_a_secret(cluster: Stack) -> None:
    told = [docker("history", "--no-trunc", IMAGE), docker("inspect", IMAGE)]
    for container in cluster.containers():
        told += [docker("inspect", container["Id"]), docker("logs", container["Id"])]
    assert not [secret.name for secret in cluster.secrets.iterdir() if any(secret.read_text() in text for text in told)]


@pytest.mark.parametrize(
    ("user", "password", "status"),
    [(None, "", 401), ("admin", "password1234", 401), ("study", NOBODYS_TOKEN, 401), ("study", None, 200)],
)
def test_mlflow_knows_its_users(cluster: Stack, user: str | None, password: str | None, status: int) -> None:
    request = urllib.request.Request(
        f"http://127.0.0.1:{cluster.mlflow_port}/api/2.0/mlflow/experiments/search?max_results=1"
    )
    if user is not None:
        login = f"{user}:{cluster.secret('mlflow_study_password') if password is None else password}"
        request.add_header("Authorization", f"Basic {base64.b64encode(login.encode()).decode()}")
    assert answer(request) == status


@pytest.mark.parametrize("token", [None, NOBODYS_TOKEN])
def test_the_dashboard_shows_a_stranger_nothing(cluster: Stack, token: str | None) -> None:
    request = urllib.request.Request(f"http://127.0.0.1:{cluster.dashboard_port}/api/jobs/")
    if token is not None:
        request.add_header("Authorization", f"Bearer {token}")
    assert answer(request) in {401, 403}
    request.add_header("Authorization", f"Bearer {cluster.secret('ray_token')}")
    assert answer(request) == 200


@pytest.mark.parametrize("environment", ["RAY_AUTH_MODE=disabled", f"RAY_AUTH_TOKEN={NOBODYS_TOKEN}"])
def test_ray_refuses_who_has_no_token_or_another_one(cluster: Stack, environment: str) -> None:
    """From inside the network, where every port is open."""
    [head] = cluster.containers("head")
    ask = 'env -u RAY_AUTH_TOKEN_PATH "$0" ray status --address=head:6379 2>&1 || true'
    said = docker("exec", "--env", "RAY_AUTH_MODE=token", head["Id"], "bash", "-c", ask, environment)
    assert "node_" not in said
    assert re.search("(?i)unauthenticated|authentication|token", said), said


@pytest.mark.parametrize(("role", "database"), [("mlflow", "optuna"), ("optuna", "mlflow"), ("optuna", "mlflow_auth")])
def test_a_role_of_postgres_opens_its_own_databases_alone(cluster: Stack, role: str, database: str) -> None:
    [postgres] = cluster.containers("postgres")
    ask = f'PGPASSWORD=$(cat /run/secrets/{role}_db_password) psql -h postgres -U {role} -tAc "select 1" -d'
    assert docker("exec", postgres["Id"], "bash", "-c", f"{ask} {role}").strip() == "1"
    said = docker("exec", postgres["Id"], "bash", "-c", f"{ask} {database} 2>&1 || true")
    assert "permission denied for database" in said
    said = docker(
        "exec", postgres["Id"], "bash", "-c", f"PGPASSWORD=no psql -h 127.0.0.1 -U {role} {role} 2>&1 || true"
    )
    assert "password authentication failed" in said


def answer(request: urllib.request.Request) -> int:
    """Status of an answer."""
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            status: int = response.status
            return status
    except urllib.error.HTTPError as error:
        return error.code


# --------------------------------------------------------------------------------------------------------- the study


@pytest.fixture(scope="module")
def alone(cluster: Stack, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of the same study in one container without a network: no cluster, no servers."""
    name = f"{cluster.project}-alone"
    command = ["python3", "/app/study/launch.py", "ablation", "--smoke", "--storage", "/storage", "--executor", "local"]
    folder = tmp_path_factory.mktemp("alone")
    docker("create", "--name", name, "--network=none", "--entrypoint=env", IMAGE, *command)
    try:
        docker("start", "--attach", name, timeout=900)
        docker("cp", f"{name}:/storage/ablation/report", str(folder))
    finally:
        docker("rm", "--force", "--volumes", name)
    return folder / "report"


def test_a_killed_worker_costs_no_bit_of_the_table(
    cluster: Stack, alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workers = cluster.containers("worker")
    assert len(workers) == 2
    log, started = tmp_path / "log.txt", time.monotonic()
    with cluster.running(log, "cluster-ablation", "ARGS=--smoke") as study:

        def still() -> bool:
            assert study.poll() is None, log.read_text()
            return True

        wait_until(lambda: still() and all(map(trains, workers)), 400, log.read_text)
        killed = time.monotonic()
        docker("kill", workers[1]["Id"])
        study.wait(1200)
    took = time.monotonic() - started
    assert study.returncode == 0, log.read_text()
    words = " ".join(log.read_text().split())
    assert re.search(r"again ablation: .*? its (node died|worker cannot be reached any more)", words), words
    assert not cluster.containers("worker")[1]["State"]["Running"]

    [head] = cluster.containers("head")
    docker("cp", f"{head['Id']}:/storage/smoke/ablation/report", str(tmp_path))
    report = tmp_path / "report"
    for name in ("table.csv", "table.md", "table.tex"):
        assert without_runs(report / name) == without_runs(alone / name), name
    pd.testing.assert_frame_equal(cells(report), cells(alone))
    with capsys.disabled():
        print(f"\n{log.read_text()}")
        print(f"{len(cells(report))} cells as alone; {took:.0f} s, a worker killed after {killed - started:.0f} s")


def test_what_was_trained_is_in_mlflow_on_postgres(cluster: Stack) -> None:
    [postgres] = cluster.containers("postgres")
    ask = ["psql", "-d", "mlflow", "-tAc", "select count(*) from tags where key = 'mlflow.runName'"]
    assert int(docker("exec", postgres["Id"], *ask)) >= 8  # cells, and their rows


def without_runs(table: Path) -> str:
    """A table's text; a run of MLflow has another name in each ledger."""
    return re.sub(r"\b[0-9a-f]{32}\b", "RUN", table.read_text())


def cells(report: Path) -> pd.DataFrame:
    """Hashes by row and seed."""
    return pd.read_csv(report / "cells.csv").set_index(["row", "seed"]).sort_index()[HASHES]


def trains(worker: dict[str, str]) -> bool:
    """Whether a trial runs on a node."""
    return "ray::TrialActor.train" in docker("top", worker["Id"], "-eo", "pid,args")
