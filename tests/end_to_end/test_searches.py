"""Searches run for real: the same bits as training each trial alone, kills that lose nothing, winners confirmed."""

from __future__ import annotations

import itertools
import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import pandas as pd
import pytest
from rich.console import Console

from analysis import schema
from study.chains import Chain
from study.documents import StudyError
from study.driver import RunOptions, run_plan
from study.plan import make_plan
from study.running import Launch as Options
from study.search import TrialFacts, Trials
from study.searches import session as search_session
from study.searches.rows import Search, chains_of
from study.searches.running import SearchLaunch, ablate_best, run_search
from study.searches.trial_storage import default_place
from study.spec import Choices, Study, find_study, load_study
from study.storage.places import Address
from study.store import Store
from tests.launches import launched
from tests.postgres_servers import PASSWORD, postgres, why_not
from tests.studies_for_tests import ROOT, TINY

pytestmark = pytest.mark.slow

LOOKS = 3
SMALL: Mapping[str, Any] = {
    **TINY,
    "search.parameters": {
        "ema.decay": {"choices": [0.9, 0.98], "when": {"ema.enabled": True}},
        "strategy.tune_epochs": None,  # two epochs: a rung after the first
    },
    "search.trials": 3 * LOOKS,
    "search.startup": 1,
    "search.confirm": 0,
}
TYPED = {key: json.dumps(value) for key, value in SMALL.items()}  # as on a command line
LEFT_OUT = ("unfreezing", "depth", "step", "head_epochs", "tune_epochs")
# The default, then rates of stage 2 that wreck the encoder; one of four looks at a rung goes on.
WRECKING = TYPED | {
    "search.parameters": json.dumps(
        {
            **{f"strategy.{name}": None for name in LEFT_OUT},
            **{f"weighting.{name}": None for name in ("enabled", "eta", "normalise", "clip")},
            **{f"optimiser.{name}": None for name in ("head_lr", "weight_decay", "tune_head_lr")},
            "optimiser.encoder_lr": {"choices": [1, 400, 800, 1600], "times": "optimiser.encoder_lr"},
            "ema.decay": SMALL["search.parameters"]["ema.decay"],
        }
    ),
    "search.trials": json.dumps(4 * LOOKS),
    "search.sampler": json.dumps("random"),
    "search.reduction": json.dumps(4),
}


@dataclass(frozen=True)
class Searched:
    """A search that was run."""

    storage: Path
    search: Search
    status: int

    @property
    def trials(self) -> list[TrialFacts]:
        return self.kept().all()

    def kept(self) -> Trials:
        place, name = default_place(self.storage, "search"), self.search.study.name
        declaration = self.search.declaration(self.storage)
        return Trials.found(place, name, self.search.settings, self.search.space, declaration)

    def chains(self) -> dict[int, Chain]:
        """Number of a trial → its chain."""
        made = chains_of(self.search.trials_study(self.search.trial_rows(self.trials)), self.storage)
        return dict(zip((t.number for t in self.trials), made, strict=True))

    def csv(self) -> str:
        return (self.storage / "search" / "report" / "trials.csv").read_text()


def declared(overrides: Mapping[str, Any]) -> Study:
    return load_study(find_study("search"), Choices(dict(overrides)))


def searched(storage: Path, **more: Any) -> Searched:
    study = declared({**SMALL, **{f"search.{name}": value for name, value in more.items()}})
    status = run_search(study, SearchLaunch(Options(Address(storage), executor="local")))
    return Searched(storage, Search.of(study), status)


def runs_of(storage: Path, study: str = "search") -> list[Any]:
    client = mlflow.MlflowClient(f"sqlite:///{storage.resolve() / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(study)
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id], max_results=1000))


def artifacts_of(storage: Path, run_id: str) -> set[str]:
    """Names of the files of the search's report that a run holds."""
    client = mlflow.MlflowClient(f"sqlite:///{storage.resolve() / 'mlflow.db'}")
    return {Path(file.path).name for file in client.list_artifacts(run_id, "search")}


def statuses(storage: Path) -> Counter[str]:
    """Of the trials, as the ledger has them."""
    return Counter(r.data.tags[schema.TAG_STATUS] for r in runs_of(storage) if schema.TAG_STATUS in r.data.tags)


def tune_results(storage: Path) -> list[dict[str, Any]]:
    """The last result of every trial of Ray Tune, from its own record of the experiment."""
    (record,) = (storage / "tune" / "trials").glob("experiment_state-*.json")
    trials = json.loads(record.read_text())["trial_data"]
    return [json.loads(metadata)["last_result"] for _, metadata in trials]


def number_of(row: str) -> int:
    """Number of the trial that a row of the confirmation trains again."""
    return int(row.rpartition("(trial ")[2].rstrip(")"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Searched:
    return searched(tmp_path_factory.mktemp("undisturbed"))


def test_every_trial_has_the_bits_of_its_own_training_alone(undisturbed: Searched, tmp_path: Path) -> None:
    """Cut at rungs, on a shared head stage, looked at in three ways: against cells that share nothing."""
    finished = [t for t in undisturbed.trials if t.status == "FINISHED"][: 2 * LOOKS : 2]
    alone = undisturbed.search.trials_study(undisturbed.search.trial_rows(finished))
    plan = make_plan(alone, storage=tmp_path, sharing=False)
    run_plan(plan, RunOptions(tmp_path, command="a test", executor="local"), Console(quiet=True))
    ours, theirs = Store(undisturbed.storage), Store(tmp_path)
    for trial, chain in zip(finished, plan.chains, strict=True):
        own = undisturbed.chains()[trial.number]
        shared = ours.load_result(own.leaf, own.observer.name)
        by_itself = theirs.load_result(chain.leaf, chain.observer.name)
        assert shared is not None
        assert by_itself is not None
        assert shared.weights_sha256 == by_itself.weights_sha256
        assert shared.trajectory_sha256 == by_itself.trajectory_sha256
        assert trial.values == (by_itself.metrics["val/macro_auc"],)


def test_a_trial_that_is_pruned_is_pruned_everywhere_and_with_all_looks_at_its_trajectory(
    undisturbed: Searched,
) -> None:
    trials = undisturbed.trials
    counted = Counter(t.status for t in trials)
    assert counted["PRUNED"] >= LOOKS, "the case must arise"
    assert statuses(undisturbed.storage) == counted
    by_trajectory: dict[int, set[str]] = {}
    for trial in trials:
        by_trajectory.setdefault(trial.trajectory, set()).add(trial.status)
    assert all(len(found) == 1 for found in by_trajectory.values())
    store, chains = Store(undisturbed.storage), undisturbed.chains()
    for trial in trials:
        has_result = store.has_result(chains[trial.number].leaf, chains[trial.number].observer.name)
        assert has_result == (trial.status == "FINISHED")
        assert (len(trial.units) > 0) == (trial.status == "PRUNED")


def test_the_ledger_has_one_run_a_trial_below_one_parent_and_no_test_figure(undisturbed: Searched) -> None:
    runs = runs_of(undisturbed.storage)
    (parent,) = [run for run in runs if run.data.tags[schema.TAG_KIND] == "row"]
    trials = [run for run in runs if run is not parent]
    assert len(trials) == undisturbed.search.settings.trials
    assert {run.data.tags["mlflow.parentRunId"] for run in trials} == {parent.info.run_id}
    assert not [name for run in runs for name in run.data.metrics if name.startswith(schema.TEST)]
    best = undisturbed.kept().best()[0]
    (run,) = [run for run in trials if run.data.tags[schema.TAG_ROW] == f"trial {best.number}"]
    assert run.data.metrics["best/val/macro_auc"] == best.values[0]
    files = artifacts_of(undisturbed.storage, parent.info.run_id)
    assert files >= {"report.html", "trials.csv", "search-history.png", "search-slices.svg"}


def test_a_finished_search_that_is_run_again_trains_and_changes_nothing(undisturbed: Searched) -> None:
    before, runs = undisturbed.csv(), len(runs_of(undisturbed.storage))
    again = searched(undisturbed.storage)
    assert again.status == 0
    assert again.csv() == before
    assert len(runs_of(undisturbed.storage)) == runs


def test_a_search_that_is_killed_again_and_again_gives_the_trials_of_one_that_is_not(
    undisturbed: Searched, tmp_path: Path
) -> None:
    rng, storage, kills = random.Random(11), tmp_path / "killed", 0
    journal = storage / "search" / "optuna.log"
    for _ in range(3):
        with launched(storage, study="search", overrides=TYPED) as launch:
            size = journal.stat().st_size if journal.exists() else 0
            launch.until(lambda size=size: journal.exists() and journal.stat().st_size > size)  # type: ignore[misc]
            end = time.monotonic() + rng.uniform(0.0, 3.0)
            if launch.until(lambda end=end: time.monotonic() >= end):  # type: ignore[misc]
                launch.send(signal.SIGKILL)
                kills += launch.wait() == -signal.SIGKILL
    assert kills >= 2, launch.output
    with launched(storage, study="search", overrides=TYPED) as launch:
        assert launch.wait() == 0, launch.output
    after = Searched(storage, undisturbed.search, 0)
    assert after.csv() == undisturbed.csv()
    assert statuses(storage) == Counter(t.status for t in undisturbed.trials)
    keys = [run.data.tags[schema.TAG_KEY] for run in runs_of(storage)]
    assert len(keys) == len(set(keys)) == 1 + len(undisturbed.trials)


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_a_search_that_postgres_keeps_is_killed_goes_on_and_is_that_of_the_journal(
    undisturbed: Searched, tmp_path: Path
) -> None:
    with postgres() as server:
        kept, known = ("--optuna-storage", server.shown_url), {"PGPASSWORD": PASSWORD}
        with launched(tmp_path, *kept, study="search", overrides=TYPED, environment=known) as launch:
            launch.until(lambda: any(tmp_path.glob("results/*/*/result.json")))
            launch.send(signal.SIGKILL)
            assert launch.wait() == -signal.SIGKILL, "it was to be killed on the way"
        with launched(tmp_path, *kept, study="search", overrides=TYPED, environment=known) as launch:
            assert launch.wait() == 0, launch.output
        assert (tmp_path / "search" / "report" / "trials.csv").read_text() == undisturbed.csv()
        assert statuses(tmp_path) == Counter(t.status for t in undisturbed.trials)
        with launched(
            tmp_path, *kept, "--plan", "--json", study="ablate-best", overrides=TYPED, environment=known
        ) as launch:
            assert launch.wait() == 0, launch.output
            assert json.loads(launch.output)["study"] == "search-ablation"
    assert not (tmp_path / "search" / "optuna.log").exists(), "no journal beside it"
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path for path in written if PASSWORD.encode() in path.read_bytes()] == []


def test_pruned_is_pruned_in_ray_in_optuna_and_in_the_ledger(undisturbed: Searched, tmp_path: Path) -> None:
    """After the default come rates that wreck the encoder: all that is tried of them, but one at most, ends early."""
    with launched(tmp_path, study="search", overrides=WRECKING, executor="ray") as launch:
        assert launch.wait() == 0, launch.output
    after = Searched(tmp_path, Search.of(declared({key: json.loads(value) for key, value in WRECKING.items()})), 0)
    trials = after.trials
    assert len(trials) == after.search.settings.trials
    assert {t.status for t in trials} == {"FINISHED", "PRUNED"}
    assert [t.values for t in trials[:LOOKS]] == [t.values for t in undisturbed.trials[:LOOKS]], "the default's bits"
    leaves = {number: chain.leaf for number, chain in after.chains().items()}  # equal trials have one
    pruned = {leaves[t.number] for t in trials if t.status == "PRUNED"}
    assert len(pruned) >= 2
    assert not {leaves[t.number] for t in trials if t.status == "FINISHED"} & pruned
    assert {t.state.name for t in after.kept().study.trials} == {"COMPLETE", "PRUNED"}
    ends = Counter(one["outcome"] for one in tune_results(tmp_path))
    assert ends["PRUNED"] == len(pruned), "a trajectory's last trial in Ray"
    assert set(ends) == {"FINISHED", "PRUNED"}
    assert statuses(tmp_path) == Counter(t.status for t in trials)
    ledger = Counter(r.info.status for r in runs_of(tmp_path) if r.data.tags.get(schema.TAG_STATUS) == "PRUNED")
    assert ledger == {"KILLED": len([t for t in trials if t.status == "PRUNED"])}, "what MLflow has for it"
    assert not (tmp_path / "search-confirm").exists()


def test_a_search_through_ray_whose_driver_is_killed_goes_on_and_has_each_trial_once(tmp_path: Path) -> None:
    with launched(tmp_path, study="search", overrides=TYPED, executor="ray") as launch:
        launch.until(lambda: any(tmp_path.glob("results/*/*/result.json")))
        end = time.monotonic() + random.Random(3).uniform(0.0, 1.0)
        launch.until(lambda: time.monotonic() >= end)
        launch.send(signal.SIGKILL)
        assert launch.wait() == -signal.SIGKILL, "it was to be killed on the way"
        assert launch.leaves_nothing_behind(within=30)
    search = Search.of(declared(SMALL))
    before = Searched(tmp_path, search, 0).trials
    with launched(tmp_path, study="search", overrides=TYPED, executor="ray") as launch:
        assert launch.wait() == 0, launch.output
    trials = Searched(tmp_path, search, 0).trials
    assert [t.number for t in trials] == list(range(search.settings.trials))
    assert [(t.number, t.chosen, t.trajectory) for t in trials[: len(before)]] == [
        (t.number, t.chosen, t.trajectory) for t in before
    ]
    assert [t for t in trials[: len(before)] if before[t.number].status != "RUNNING"] == [
        t for t in before if t.status != "RUNNING"
    ]
    assert {t.status for t in trials} <= {"FINISHED", "PRUNED"}
    assert statuses(tmp_path) == Counter(t.status for t in trials)
    keys = [run.data.tags[schema.TAG_KEY] for run in runs_of(tmp_path)]
    assert len(keys) == len(set(keys)) == 1 + len(trials)


def test_a_search_whose_time_is_up_begins_nothing_more_and_goes_on_when_asked_again(
    undisturbed: Searched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = declared(SMALL)
    clock = itertools.count()  # a second passes between two looks at it
    stopped_clock = SimpleNamespace(monotonic=lambda: next(clock), time_ns=time.time_ns)
    monkeypatch.setattr(search_session, "time", stopped_clock)
    assert run_search(study, SearchLaunch(Options(Address(tmp_path), executor="local"), seconds=1.5)) == 0
    first = Searched(tmp_path, Search.of(study), 0)
    assert [t.trajectory for t in first.trials] == [0] * LOOKS, "the second trajectory would have begun too late"
    assert {t.status for t in first.trials} == {"FINISHED"}
    assert searched(tmp_path).csv() == undisturbed.csv()


def test_winners_are_confirmed_over_seeds_that_did_not_choose_them(
    undisturbed: Searched, capsys: pytest.CaptureFixture[str]
) -> None:
    """Further stages of the finished search; its trials take no part in the tables."""
    confirmed = searched(undisturbed.storage, confirm=1)
    assert confirmed.status == 0
    cells = pd.read_csv(undisturbed.storage / "search-confirm" / "report" / "cells.csv")
    assert set(cells["seed"]) == set(confirmed.search.study.seeds)
    assert confirmed.search.settings.trial_seed not in set(cells["seed"])
    assert cells["status"].eq("FINISHED").all()
    default, winner = dict.fromkeys(cells["row"])
    assert default == "Default (0 trials)"
    assert f"of {len(undisturbed.trials)} trials (trial " in winner
    assert undisturbed.trials[number_of(winner)].status == "FINISHED", "no pruned trial comes into a table"
    said = capsys.readouterr().out
    assert "Δ ± 95 %" in said
    assert f"of {len(undisturbed.trials)} trials" in said

    with launched(undisturbed.storage, study="ablate-best", overrides={**TYPED, "seeds": "[0]"}) as launch:
        assert launch.wait() == 0, launch.output
    ablation = pd.read_csv(undisturbed.storage / "search-ablation" / "report" / "cells.csv")
    rows = list(dict.fromkeys(ablation["row"]))
    assert rows[0].startswith("No. 1 of")
    assert "− Unfreezing" in rows
    assert ablation["status"].eq("FINISHED").all()


def test_several_objectives_are_told_nothing_is_pruned_and_the_front_is_drawn_and_confirmed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = searched(tmp_path, pruner="none", objectives=["metric", "units"], confirm=2)
    assert ran.status == 0
    chains = ran.chains()
    for trial in ran.trials:
        assert trial.status == "FINISHED"
        assert trial.values[1] == sum(chains[trial.number].course.units())
    front = [t for t in ran.trials if not any(_dominates(other, t) for other in ran.trials)]
    assert {t.number for t in ran.kept().best()} == {t.number for t in front}
    names = [f"{what}-{i}" for what in ("history", "importances", "slices") for i in (0, 1)] + ["pareto"]
    for file in (tmp_path / "search" / "report" / "figures" / f"search-{name}.png" for name in names):
        assert file.stat().st_size > 5_000
    page = (tmp_path / "search" / "report" / "report.html").read_text()
    for title in ("validation macro AUC against training units", "What training units depends on", "Pareto front"):
        assert title in page
    (parent,) = [run for run in runs_of(tmp_path) if run.data.tags[schema.TAG_KIND] == "row"]
    assert artifacts_of(tmp_path, parent.info.run_id) >= {f"search-{name}.png" for name in names}
    winners = set(pd.read_csv(tmp_path / "search-confirm" / "report" / "cells.csv")["row"]) - {"Default (0 trials)"}
    assert {number_of(row) for row in winners} <= {t.number for t in front}


def _dominates(one: TrialFacts, other: TrialFacts) -> bool:
    """As good in both objectives (metric: larger, units: smaller) and better in one of them."""
    return one.values[0] >= other.values[0] and one.values[1] <= other.values[1] and one.values != other.values


def test_a_trial_that_diverges_fails_and_the_search_goes_on(tmp_path: Path) -> None:
    huge = {"optimiser.encoder_lr": {"choices": [1e30, 2e30]}, **SMALL["search.parameters"]}
    ran = searched(tmp_path, trials=2 * LOOKS, parameters=huge)
    assert ran.status == 1, "no trial has finished"
    assert {t.status for t in ran.trials} == {"FAILED"}
    assert all("lower optimiser.encoder_lr" in t.error for t in ran.trials)
    assert statuses(tmp_path) == {"FAILED": len(ran.trials)}
    with pytest.raises(StudyError, match="no finished trial yet"):
        ablate_best(ran.search.study, SearchLaunch(Options(Address(tmp_path), executor="local")))


@pytest.mark.parametrize("command", ["report", "verify"])
def test_trials_are_compared_by_no_table(undisturbed: Searched, command: str) -> None:
    arguments = [sys.executable, "study/launch.py", command, "search", "--storage", str(undisturbed.storage)]
    told = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert told.returncode == 2
    assert "its winners' tables are those of search-confirm" in " ".join(told.stderr.split())


def test_the_report_holds_every_trial_and_loads_nothing(undisturbed: Searched) -> None:
    page = (undisturbed.storage / "search" / "report" / "report.html").read_text()
    assert "SYNTHETIC DATA" in page
    assert 'src="data:image/svg+xml;base64,' in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    table = pd.read_csv(undisturbed.storage / "search" / "report" / "trials.csv")
    assert list(table["trial"]) == list(range(len(undisturbed.trials)))
    assert list(table["status"]) == [t.status for t in undisturbed.trials]
