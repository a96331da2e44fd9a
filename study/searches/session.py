"""One launch of a search: a session whose study grows by the trajectories that Optuna proposes.

What the store holds decides what is trained, as for every study; what Optuna holds decides which trials there are.
A trial is told to Optuna after its result, its pruning or its failure is certain, and everything is told again when a
launch begins, so that a driver that was killed in between leaves no trial behind.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from analysis.schema import StudyHeader, Units
from study.chains import Chain, digest, the_task
from study.declare import cell_headers, counted_units, epochs_of, finished_outcome, row_headers
from study.driver import Session
from study.growing import GrowingSchedule
from study.ledger_entries import CellHeader, CellOutcome, RowHeader
from study.plan import Plan, make_plan
from study.schedule import Node, Schedule
from study.search import TrialFacts, Trials
from study.searches.report import Spent, write_search_report
from study.searches.rows import Search
from study.searches.trial_storage import Place
from study.storage.sharing import share_study
from trainables.cache_files import release
from trainables.results import CellResult, EpochRecord
from trainables.stopping import follow

VAL, TEST = "val/", "test/"


@dataclass(frozen=True)
class Budget:
    """How long a launch asks for more: `seconds` from its start, None without an end."""

    seconds: float | None = None


class SearchSession(Session):
    """Hears what trials do, and keeps Optuna, ledger and store in step."""

    def __init__(self, plan: Plan, *session: Any, search: Search, place: Place, budget: Budget, **more: Any) -> None:
        """See `Session`.

        Args:
            plan: of the search's baseline, by which data and cluster were checked.
            place: where Optuna keeps its study.
        """
        super().__init__(plan, *session, **more)
        self._search = search
        self._budget = budget
        self._began = time.monotonic()
        declaration = search.declaration(self._store.root)
        self._trials = Trials.open(place, search.study.name, search.settings, search.space, declaration)
        self._chains: dict[str, Chain] = {}  # by key
        self._numbers: dict[str, int] = {}  # key of a chain → number of its trial
        self._ended: dict[str, TrialFacts] = {}  # pruned and failed trials by the key of their chain
        self._firsts: dict[tuple[str, str], Chain] = {}  # leaf and observer → the first trial that trains it
        self._echoes: dict[str, list[Chain]] = defaultdict(list)  # key of such a first → trials that equal it
        self._parent = self._parent_row()

    # -- the study ----------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Take over the trials that are there, declare them, and write what earlier launches finished."""
        known = self._trials.completed()
        if known:
            self._plan = self._planned(known)
            for chain, trial in zip(self._plan.chains, known, strict=True):
                self._register(chain, trial)
        super().open()
        for key, trial in self._ended.items():
            self._ledger.finish(key, _outcome_of(trial))

    def schedule(self) -> Schedule:
        """Trials that were running when the last launch ended, and all that will be asked for."""
        before, most = self._trials.count, self._search.settings.trials
        self._growing = GrowingSchedule(
            self._plan,
            has_result=self._has_result,
            has_state=self._store.has_state,
            rungs=lambda chain: sorted(self._search.rung_epochs(chain)),
            grow=self._grow,
            goes_on=self._goes_on,
            left=lambda: max(0, most - self._trials.count) / max(1, most - before),
        )
        self._schedule = self._growing
        pending = [c for c in self._chains.values() if self._is_open(c) and not self._is_echo(c)]
        for chains in _by_trajectory(pending, self._trials.all(), self._numbers).values():
            self._growing.add(self._plan, chains)
        if not pending:
            self._grow()
        return self._growing

    def _planned(self, trials: Sequence[TrialFacts]) -> Plan:
        study = self._search.trials_study(self._search.trial_rows(trials))
        return make_plan(study, storage=self._store.root, sharing=self._plan.sharing, repeats=True)

    def _register(self, chain: Chain, trial: TrialFacts) -> None:
        self._chains[chain.key], self._numbers[chain.key] = chain, trial.number
        if trial.status in ("PRUNED", "FAILED"):
            self._ended[chain.key] = trial
        first = self._firsts.setdefault((chain.leaf, chain.observer.name), chain)
        if first is not chain:
            self._echoes[first.key].append(chain)

    def _is_open(self, chain: Chain) -> bool:
        return chain.key not in self._results and chain.key not in self._ended

    def _is_echo(self, chain: Chain) -> bool:
        return self._firsts[chain.leaf, chain.observer.name] is not chain

    # -- growing ------------------------------------------------------------------------------------------------------

    def _grow(self) -> bool:
        """Add the next trajectory that has something to train; False at the end of the budget."""
        while self._trials.count < self._search.settings.trials and not self._out_of_time():
            trials = self._trials.propose()
            plan = self._planned(trials)
            for chain, trial in zip(plan.chains, trials, strict=True):
                self._register(chain, trial)
            self._declare_more(plan)
            fresh = [chain for chain in plan.chains if not self._is_known(chain)]
            if fresh:
                self._growing.add(plan, fresh)
                return True
        return False

    def _is_known(self, chain: Chain) -> bool:
        """Whether a new trial has its result already, or will have that of an equal one."""
        first = self._firsts[chain.leaf, chain.observer.name]
        if first is chain or self._is_ended_with(first, chain):
            return self._take_result(chain) or chain.key in self._ended
        return True

    def _is_ended_with(self, first: Chain, chain: Chain) -> bool:
        """An equal trial that was pruned or failed is judged once for all."""
        if first.key in self._ended:
            self._end_like(self._ended[first.key], chain)
        return not self._is_open(first)

    def _out_of_time(self) -> bool:
        seconds = self._budget.seconds
        return seconds is not None and time.monotonic() - self._began >= seconds

    def _declare_more(self, plan: Plan) -> None:
        chains = tuple(self._chains.values())
        rows = tuple(chain.cell.row for chain in chains)
        study = replace(self._plan.study, rows=rows)
        self._plan = replace(self._plan, study=study, chains=chains)
        self._ledger.extend(self._header(self._planned_units()), self._cells(plan))

    # -- the ledger's terms -------------------------------------------------------------------------------------------

    def _parent_row(self) -> RowHeader:
        """The one run that all trials are children of."""
        (header,) = row_headers(self._plan).values()
        name = self._search.study.name
        return replace(header, key=digest("search", name, header.params), name=name, changes={}, of_trials=True)

    def _declared(self) -> tuple[list[RowHeader], list[CellHeader]]:
        return [self._parent], self._cells(self._plan) if self._chains else []

    def _cells(self, plan: Plan) -> list[CellHeader]:
        return [replace(cell, row_key=self._parent.key) for cell in cell_headers(plan, row_headers(plan))]

    def _header(self, units: Units) -> StudyHeader:
        return super()._header(units).model_copy(update={"search": True})

    def _outcome(self, chain: Chain, result: CellResult) -> CellOutcome:
        """A trial is judged on validation; what it does on the test split is not looked at before it is confirmed."""
        outcome = finished_outcome(chain, result, None, None)
        metrics = {name: value for name, value in outcome.metrics.items() if not name.startswith(TEST)}
        return replace(outcome, metrics=metrics)

    # -- what came out ------------------------------------------------------------------------------------------------

    def _take_result(self, chain: Chain) -> bool:
        if chain.key not in self._numbers or chain.key in self._ended:
            return False
        if not super()._take_result(chain):
            return False
        self._trials.finish(self._numbers[chain.key], self._values(chain, self.results[chain.key]))
        for echo in self._echoes.get(chain.key, ()):
            if self._is_open(echo):
                self._take_result(echo)
        return True

    def _values(self, chain: Chain, result: CellResult) -> list[float]:
        """The objectives of a finished trial: validation metric at its best epoch, units up to its last one."""
        metric = the_task(self._search.study).main_metric
        values = {
            "metric": result.metrics[VAL + metric],
            "units": float(sum(chain.course.units()[: result.last_epoch])),
        }
        return [values[objective] for objective in self._search.settings.objectives]

    def failed(self, node: Node, error: str) -> None:
        """A trial cannot be finished: it and its equals fail in Optuna too."""
        super().failed(node, error)
        for chain in node.chains:
            if chain.key in self._failed:
                self._end(chain, replace(self._fact(chain), status="FAILED", error=error, ended_ms=_now_ms()))

    def _goes_on(self, node: Node) -> bool:
        """Ask the pruner of every trial that still trains here: it ends only if none of them would go on."""
        watching = [chain for chain in node.chains if self._is_open(chain) and not self._has_result(chain)]
        step = self._search.rung_epochs(node.chains[0]).get(node.request.last)
        history = None if step is None else self._store.history(node.request.keys[-1])
        if step is None or history is None or not watching:
            return True
        metric = the_task(self._search.study).main_metric
        prunes = [self._trials.prunes(self._numbers[c.key], step, _best_so_far(c, history, metric)) for c in watching]
        if not all(prunes):
            return True
        for chain in watching:
            self._ledger.log_epochs(chain.key, epochs_of(chain, history))
            units = tuple(record.units for record in history)
            self._end(chain, replace(self._fact(chain), status="PRUNED", units=units, ended_ms=_now_ms()))
        self._store.drop(node.request.keys[-1])
        return False

    def _fact(self, chain: Chain) -> TrialFacts:
        number = self._numbers[chain.key]
        return TrialFacts(number, chain.cell.row.changes, "RUNNING", number)

    def _end(self, chain: Chain, trial: TrialFacts) -> None:
        """A trial and its equals were pruned or failed."""
        self._end_like(trial, chain)
        for echo in self._echoes.get(chain.key, ()):
            if self._is_open(echo):
                self._end_like(trial, echo)

    def _end_like(self, ended: TrialFacts, chain: Chain) -> None:
        trial = replace(ended, number=self._numbers[chain.key], chosen=chain.cell.row.changes)
        if trial.status == "PRUNED":
            self._trials.prune(trial.number, trial.units)
        else:
            self._trials.fail(trial.number, trial.error)
        self._ended[chain.key] = trial
        self._ledger.finish(chain.key, _outcome_of(trial))

    # -- the end ------------------------------------------------------------------------------------------------------

    def close(self) -> tuple[StudyHeader, bool]:
        """Count units, write the search's report, and end its run."""
        trials = self._trials.all()
        if trials:
            self._plan = self._planned(trials)
        results = list(self._results.values())
        caches = self._cache_units(results)
        units = counted_units(self._plan, results, caches).model_copy(update={"executed": self._spent(caches).executed})
        header = self._header(units)
        folder = self._store.report(self._search.study.name)
        for file in write_search_report(self._search, self._trials, header, self._spent(caches), folder):
            self._ledger.attach(self._parent.key, file, "search")
        share_study(self._store.address, self._search.study.name)
        self._ledger.close(header)
        for cache in self._plan.caches:
            if not cache.pooled and cache.identity in self._contents:
                release(self._cache_folder(cache))
        return header, not any(trial.status == "RUNNING" for trial in trials)

    def _spent(self, cache_units: dict[str, int]) -> Spent:
        """Training units of everything that was evaluated: once, as it was done, and each trial by itself."""
        once: dict[str, int] = {}
        alone = 0
        for chain, result in self._results.values():
            once |= {key: record.units for key, record in zip(chain.keys, result.history, strict=False)}
            alone += sum(chain.course.units()[: result.last_epoch])
        for key, trial in self._ended.items():
            chain = self._chains[key]
            once |= dict(zip(chain.keys, trial.units, strict=False))
            alone += sum(chain.course.units()[: len(trial.units)])
        return Spent(sum(once.values()) + sum(cache_units.values()), alone)


def _by_trajectory(
    chains: Sequence[Chain], trials: Sequence[TrialFacts], numbers: dict[str, int]
) -> dict[int, list[Chain]]:
    grouped: dict[int, list[Chain]] = defaultdict(list)
    for chain in chains:
        grouped[trials[numbers[chain.key]].trajectory].append(chain)
    return grouped


def _best_so_far(chain: Chain, history: Sequence[EpochRecord], metric: str) -> float:
    """A trial's best validation metric in stage 2; NaN where it was never defined."""
    name = f"{VAL}{chain.observer.copy}/{metric}"
    tuned = history[chain.cell.settings.strategy.head_epochs :]
    values = [record.metrics.get(name, float("nan")) for record in tuned]
    best = follow(values, None).best
    return float("nan") if best is None else values[best]


def _outcome_of(trial: TrialFacts) -> CellOutcome:
    if trial.status == "PRUNED":
        return CellOutcome("PRUNED", trial.ended_ms)
    return CellOutcome("FAILED", trial.ended_ms, error=trial.error)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
