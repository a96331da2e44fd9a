"""optuna-dashboard looks at a search: from the journal file and from a database, while it runs."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from test_search import DECLARED, SPACE, settings, told

from study.search import Trials
from study.searches.trial_storage import Place, default_place
from tests.postgres_servers import postgres, why_not

DASHBOARD = shutil.which("optuna-dashboard", path=str(Path(sys.executable).parent))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(DASHBOARD is None, reason="needs the extra `search`: make setup EXTRAS=dev,search"),
]


@contextmanager
def dashboard(storage: str, folder: Path) -> Iterator[str]:
    """The address of a dashboard over a journal file or database, as `docs/search.md` starts it."""
    assert DASHBOARD is not None
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    command = [DASHBOARD, storage, "--host", "127.0.0.1", "--port", str(port)]
    log = folder / "dashboard.log"
    with log.open("wb") as printed:
        process = subprocess.Popen(command, stdout=printed, stderr=printed, cwd=folder)
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(240):
            with suppress(OSError), urllib.request.urlopen(f"{address}/dashboard/", timeout=1):
                break
            assert process.poll() is None, log.read_text()
            time.sleep(0.25)
        else:
            raise AssertionError("the dashboard did not answer within a minute")
        yield address
    finally:
        process.terminate()
        process.wait(20)


def asked(address: str, path: str) -> Any:
    with urllib.request.urlopen(f"{address}/api/{path}", timeout=10) as answer:
        return json.load(answer)


def states(address: str, study: int) -> Counter[str]:
    return Counter(trial["state"] for trial in asked(address, f"studies/{study}?after=0")["trials"])


def looked_at(place: Place, folder: Path) -> None:
    """A running search with trials in every state; the dashboard sees what comes, and changes nothing."""
    given = settings(pruner="asha", trials=12)
    trials = Trials.open(place, "mine", given, SPACE, DECLARED)
    told(trials, trials.propose())
    for trial in trials.propose():
        trials.prunes(trial.number, 1, 0.2)
        trials.prune(trial.number, [3])
    trials.propose()
    with dashboard(place.address, folder) as address:
        (summary,) = asked(address, "studies")["study_summaries"]
        assert summary["study_name"] == "mine"
        assert summary["directions"] == ["maximize"]
        study = int(summary["study_id"])
        assert states(address, study) == {"Complete": 3, "Pruned": 3, "Running": 3}
        told(trials, trials.propose())
        deadline = time.monotonic() + 30  # it looks again every few seconds
        while states(address, study)["Complete"] < 6 and time.monotonic() < deadline:
            time.sleep(0.5)
        assert states(address, study) == {"Complete": 6, "Pruned": 3, "Running": 3}
        shown = asked(address, f"studies/{study}?after=0")["trials"][0]["params"]
        assert {p["name"] for p in shown} == set(trials.all()[0].chosen)
    before = trials.all()
    assert Trials.open(place, "mine", given, SPACE, DECLARED).all() == before


def test_a_journal_is_opened_while_the_search_runs(tmp_path: Path) -> None:
    looked_at(default_place(tmp_path, "mine"), tmp_path)


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_a_postgres_database_is_opened_while_the_search_runs(tmp_path: Path) -> None:
    with postgres() as server:
        looked_at(Place(server.url), tmp_path)
