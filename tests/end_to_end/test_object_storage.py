"""The ablation with its storage in an object store: the bits of a folder, whatever store, driver or node go through."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest
from fault_checks import HASHES, every_run_once, same_results

from analysis.records import load
from study.interrupts import StudyHaltedError
from study.storage import object_store as module
from tests.launches import completed, launched
from tests.object_stores import SECRET, Store, address_of, object_store
from tests.ray_nodes import RayNodes, ray_nodes
from tests.studies_for_tests import ROOT, Ran, run_study

pytestmark = pytest.mark.slow


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Store]:
    with object_store(tmp_path / "own") as store:
        yield store


def ledger_of(server: Store) -> str:
    return f"sqlite:///{address_of(server).folder / 'mlflow.db'}"


def kept(server: Store, part: str) -> list[str]:
    """Names of the states or results that count."""
    names = [
        path.removeprefix(f"/{server.bucket}/spft/outputs/") for method, path in server.requests if method == "PUT"
    ]
    return [name for name in names if name.startswith(part) and name.endswith("manifest.json")]


def once(holds: Callable[[], object]) -> Callable[[], bool]:
    return lambda: bool(holds())


# -------------------------------------------------------------------------------------------------- the same bits


def test_the_ablation_through_ray_is_the_same_in_an_object_store_and_every_command_reads_it(
    undisturbed: Ran, server: Store, tmp_path: Path
) -> None:
    done = completed(server.uri, executor="ray")
    assert done.process.returncode == 0, done.output
    same_results(address_of(server).folder, undisturbed, ledger_of(server))
    (tmp_path / "cells.csv").write_bytes(server.objects("ablation/report")["ablation/report/cells.csv"])
    cells = pd.read_csv(tmp_path / "cells.csv").set_index(["row", "seed"]).sort_index()
    pd.testing.assert_frame_equal(cells[HASHES], undisturbed.cells()[HASHES], check_exact=True)
    kinds = {name.partition("/")[0] for name in server.objects()}
    assert not kinds & {"images", "activations", "phantoms", "partial", "mlflow.db", "mlartifacts"}, kinds
    assert "the ledger is on this machine" in done.output and SECRET not in done.output
    _commands_read_it(server)


def _commands_read_it(server: Store) -> None:
    storage = server.uri
    plan = completed(storage, "--plan", "--json")
    assert json.loads(plan.output)["pending_units"] == 0
    assert _launched("status", "ablation", "--storage", storage).returncode == 0
    name = "ablation/report/table.csv"
    server.write(name, server.objects(name)[name].replace(b"0.", b"1."))
    assert _launched("verify", "ablation", "--storage", storage).returncode == 1, "what the store holds is compared"
    assert _launched("report", "ablation", "--storage", storage).returncode == 0
    assert _launched("verify", "ablation", "--storage", storage).returncode == 0


def _launched(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "study/launch.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


# ------------------------------------------------------------------------------------------------------------ faults


def test_a_study_goes_on_through_refused_writes_a_stopped_store_a_killed_driver_and_a_damaged_state(
    undisturbed: Ran, server: Store
) -> None:
    with launched(server.uri) as launch:
        assert launch.until(once(lambda: kept(server, "states")), 600)
        server.refuses = 403
        assert launch.until(lambda: "the store refuses it (Access Denied); trying again for" in launch.output, 600)
        server.refuses = None
        assert launch.until(once(lambda: kept(server, "results")), 600)
        server.stop()
        assert launch.until(lambda: "cannot be reached" in launch.output, 600)
        server.start()
        results = len(kept(server, "results"))
        assert launch.until(lambda: len(kept(server, "results")) > results, 600)
        launch.process.kill()
        launch.wait()
    assert launch.output.count("answers again after") >= 2
    damaged = [name for name in server.objects("states") if name.endswith("tensors.safetensors")]
    for name in damaged:
        data = server.objects(name)[name]
        server.write(name, data[:-1] + bytes([data[-1] ^ 1]))
    again = completed(server.uri)
    assert again.process.returncode == 0, again.output
    assert (
        "is damaged (the digest of tensors.safetensors does not match); it is deleted and trained again" in again.output
    )
    assert SECRET not in launch.output + again.output
    same_results(address_of(server).folder, undisturbed, ledger_of(server))
    every_run_once(ledger_of(server), undisturbed.plan)


def test_a_store_that_stays_away_stops_the_study_with_one_message_and_it_goes_on_later(
    undisturbed: Ran, server: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PATIENCE_S", 2.0)
    server.writes_left = 60  # some states and results
    with pytest.raises(StudyHaltedError) as caught:
        run_study(address_of(server))
    said = str(caught.value)
    assert said.startswith(f"--storage {server.uri}: the store fails (Please reduce your request rate.)")
    assert "run the same command again: nothing is damaged" in said and "\n" not in said
    server.writes_left = None
    assert kept(server, "states"), "it had begun"
    assert run_study(address_of(server)).complete
    same_results(address_of(server).folder, undisturbed, ledger_of(server))
    every_run_once(ledger_of(server), undisturbed.plan)


def test_a_second_driver_of_the_study_on_this_machine_is_refused(server: Store) -> None:
    with launched(server.uri) as first:
        assert first.until(lambda: any("/claims/" in path for method, path in server.requests if method == "PUT"))
        second = completed(server.uri)
        assert second.process.returncode == 2
        assert f"ablation is being run in this storage already, by process {first.process.pid} on " in second.output


# ------------------------------------------------------------------------------------------- nodes that share nothing


@pytest.fixture
def apart(server: Store, tmp_path: Path) -> Iterator[RayNodes]:
    """Two nodes in mount name spaces of their own, that see neither the driver's folder nor each other's."""
    if subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("this user may not make mount name spaces")
    with ray_nodes(workers=0) as nodes:
        for name in ("one", "two"):
            hidden = f'mount -t tmpfs none {shlex.quote(str(tmp_path))} && exec "$@"'
            own = f"SPFT_LOCAL={tmp_path / name}"
            nodes.start_worker(["env", own, "unshare", "-m", "sh", "-c", hidden, "sh"])
        yield nodes


def test_nodes_without_a_shared_folder_train_to_the_bits_of_one_machine_and_one_without_the_store_is_named(
    undisturbed: Ran, server: Store, apart: RayNodes, tmp_path: Path
) -> None:
    node = apart.start_worker(["env", "AWS_ENDPOINT_URL=http://127.0.0.1:9"])
    options, own = ("--address", apart.address), str(tmp_path / "driver")
    environment = {**apart.environment, "SPFT_LOCAL": own}
    refused = completed(server.uri, *options, executor="ray", environment=environment)
    assert refused.process.returncode == 2, refused.output
    said = " ".join(refused.output.split())
    assert f"error node {node.address} (" in said and f"--storage {server.uri}: the store cannot be reached" in said
    assert said.count("error ") == 1 and not kept(server, "states")
    node.end()

    done = completed(server.uri, *options, executor="ray", environment=environment)
    assert done.process.returncode == 0, done.output
    folder = Path(own) / address_of(server).folder.relative_to(os.environ["SPFT_LOCAL"])
    ledger = f"sqlite:///{folder / 'mlflow.db'}"
    same_results(folder, undisturbed, ledger)
    units = load(ledger, "ablation").header.units
    assert units.executed >= units.shared, "caches that another node has built are counted"
    assert not (tmp_path / "one").exists() and not (tmp_path / "two").exists(), "they kept their own to themselves"
