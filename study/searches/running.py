"""What `launch.py search` and `launch.py ablate-best` do and say. Imports what is heavy when it comes to it."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from study.documents import StudyError
from study.plan import make_plan
from study.running import (
    FAILED,
    Launch,
    planned_for,
    prepared,
    require_images,
    run_options,
    run_to_table,
    say_where,
)
from study.searches.rows import Search, ablation_of, confirmation
from study.spec import Study

if TYPE_CHECKING:
    from study.driver import Launched
    from study.plan import Plan
    from study.search import TrialFacts, Trials
    from study.searches.trial_storage import Place


@dataclass(frozen=True)
class SearchLaunch:
    """What the options of a search say besides those of every launch.

    Attributes:
        seconds: after which no further trajectory is begun; None: no limit.
        optuna_storage: URL of a database; None: a journal file in the storage.
    """

    launch: Launch
    seconds: float | None = None
    optuna_storage: str | None = None

    def place(self, name: str) -> Place:
        """Where Optuna keeps the search."""
        from study.searches.trial_storage import Place, default_place

        return default_place(self.launch.folder, name) if self.optuna_storage is None else Place(self.optuna_storage)


def run_search(declared: Study, how: SearchLaunch) -> int:
    """Run what is missing of a search, then of the confirmation of its best trials.

    Returns:
        exit status: 0 a trial has finished and every confirmed cell, 1 not.
    """
    launch = how.launch
    console = Console(stderr=launch.as_json)
    search = Search.of(declared)
    with prepared(launch, console):
        _say_own_journal(search, how, console)
        found, launched = _searched(search, how, console)
        trials, best = found.all(), found.best()
        _say_found(search, trials, best, launch, console)
        confirmed = confirmation(search, best, trials, launch.folder) if best else None
        if confirmed is not None:
            launched = run_to_table(confirmed, launch, console)
        elif best and search.settings.confirm:
            console.print("no trial differs from the rows of the study: there is nothing to confirm")
    say_where(launch, launched.ui_path, console)
    return 0 if best and launched.complete else FAILED


def ablate_best(declared: Study, how: SearchLaunch) -> int:
    """Run leave-one-out around the best trial of a search.

    Returns:
        exit status: 0 every cell has finished, 1 some have not.
    """
    launch = how.launch
    console = Console(stderr=launch.as_json)
    with prepared(launch, console):
        launched = run_to_table(ablation_around_best(declared, how), launch, console)
    say_where(launch, launched.ui_path, console)
    return 0 if launched.complete else FAILED


def ablation_around_best(declared: Study, how: SearchLaunch) -> Study:
    """The ablation around the best trial of a search that has one.

    Raises:
        StudyError: there is no such search, it has no finished trial, or it was begun under another declaration.
    """
    from study.search import Trials

    search = Search.of(declared)
    place = how.place(declared.name)
    found = Trials.found(place, declared.name, search.settings, search.space, search.declaration(how.launch.folder))
    best = found.best()
    if not best:
        raise StudyError([f"search {declared.name!r} has no finished trial yet; run `launch.py search` first"])
    running = sum(trial.status == "RUNNING" for trial in found.all())
    if running:
        raise StudyError([f"search {declared.name!r} has {running} trials that are not finished; let it end first"])
    return ablation_of(search, best[0], found.count, how.launch.folder)


def _searched(search: Search, how: SearchLaunch, console: Console) -> tuple[Trials, Launched]:
    """Run the trials."""
    launch = how.launch
    plan = planned_for(search.trials_study(search.study.rows[:1]), launch, download=True)
    require_images(plan)
    search.check_values(launch.folder, download=True)
    from study.driver import run_plan
    from study.search import Trials, check_sampler
    from study.searches.trial_storage import check_place, storage_watched

    place = how.place(search.study.name)
    declaration = search.declaration(launch.folder)
    check_sampler(search.settings)
    check_place(place, search.study.name, declaration)
    from study.searches.session import Budget, SearchSession

    begin = partial(SearchSession, search=search, place=place, budget=Budget(how.seconds))
    with storage_watched(place):
        launched = run_plan(plan, run_options(launch), console, begin)
    return Trials.found(place, search.study.name, search.settings, search.space, declaration), launched


# -- what is said ----------------------------------------------------------------------------------------------------


def _say_own_journal(search: Search, how: SearchLaunch, console: Console) -> None:
    """No journal lies in an object store: where it is, as long as nobody names a database."""
    if how.launch.storage.uri is not None and how.optuna_storage is None:
        kept = f"the search's trials are kept on this machine, {how.place(search.study.name).address}"
        told = f"{kept}: name a database by --optuna-storage to go on elsewhere"
        console.print(told, highlight=False, markup=False, soft_wrap=True)


def _say_found(
    search: Search, trials: list[TrialFacts], best: list[TrialFacts], launch: Launch, console: Console
) -> None:
    name = search.study.name
    counts = {s: sum(t.status == s for t in trials) for s in ("FINISHED", "PRUNED", "FAILED", "RUNNING")}
    said = ", ".join(f"{n} {status.lower()}" for status, n in counts.items() if n)
    console.print(f"search {name}: {len(trials)} trials ({said or 'none'})", highlight=False)
    for trial in best[:3]:
        values = ", ".join(f"{value:.4g}" for value in trial.values)
        chosen = ", ".join(f"{key}={_shown(value)}" for key, value in trial.chosen.items())
        console.print(f"  trial {trial.number}: {values}   {chosen}", highlight=False, markup=False, soft_wrap=True)
    failed = [trial for trial in trials if trial.status == "FAILED"]
    for trial in failed[:3]:
        console.print(f"  trial {trial.number} failed: {trial.error}", style="yellow", markup=False, soft_wrap=True)
    report = launch.folder / name / "report" / "report.html"
    console.print(f"report of the search: {report}", highlight=False, soft_wrap=True)
    if launch.as_json:
        told = {"trials": counts, "best": None if not best else {"trial": best[0].number, **_plain(best[0])}}
        print(json.dumps({"search": name, "report": str(report), **told}))


def _plain(trial: TrialFacts) -> dict[str, Any]:
    return {"values": list(trial.values), "chosen": trial.chosen}


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


# -- --plan ----------------------------------------------------------------------------------------------------------


def print_search_plan(declared: Study, how: SearchLaunch) -> None:
    """Say what a search would cost; nothing is written.

    An estimate: a search of the same size with trials drawn at random, none of them pruned or stopped early.
    """
    launch, search = how.launch, Search.of(declared)
    search.check_values(launch.folder, download=False)
    drawn = search.drawn(launch.folder)
    trials = make_plan(drawn, storage=launch.folder, sharing=launch.sharing, repeats=True)
    confirmed = _confirmation_estimate(search, drawn, launch)
    if launch.as_json:
        told = {"trials": search.settings.trials, "observers": search.space.observers(), "search": trials.as_json()}
        print(json.dumps({"study": declared.name, **told, "confirmation": confirmed.as_json()}, indent=2))
        return
    Console().print(_plan_table(search, trials, confirmed))


def _confirmation_estimate(search: Search, drawn: Study, launch: Launch) -> Plan:
    """As many drawn rows beside the study's own as there would be winners."""
    looks = search.space.observers()
    winners = drawn.rows[looks::looks][: search.settings.confirm]
    study = search.trials_study([*search.study.rows, *winners])
    rows = tuple(replace(row, index=i) for i, row in enumerate(study.rows))
    study = replace(study, name=f"{search.study.name}-confirm", rows=rows, seeds=search.study.seeds)
    return make_plan(study, storage=launch.folder, sharing=launch.sharing, repeats=True)


def _plan_table(search: Search, trials: Plan, confirmed: Plan) -> Table:
    table = Table(title=f"plan of {search.study.name}: {search.study.title}", show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    settings, looks = search.settings, search.space.observers()
    trajectories = len({chain.leaf for chain in trials.chains})
    drawn = "drawn at random for this estimate; nothing pruned, nothing stopped early"
    table.add_row("data set", search.dataset)
    table.add_row("trials", f"{settings.trials}, {looks} on each trajectory: {trajectories} trajectories, {drawn}")
    table.add_row("sampler", f"{settings.sampler}, seed {settings.seed}; pruner {settings.pruner}")
    table.add_row("stages", f"{len(trials.stages)}, of which {trials.shared_stages} serve several trials")
    for name, plan in (("search", trials), ("confirmation", confirmed)):
        units = plan.units
        table.add_row(f"{name}: units alone", f"{units.alone:>16,}   each trial or cell by itself")
        gain = f"{units.alone / units.shared:.2f}× less" if plan.sharing else "nothing is shared"
        table.add_row(f"{name}: units shared", f"{units.shared:>16,}   {gain}")
    cells = f"{len(confirmed.study.rows)} rows × {len(confirmed.study.seeds)} seeds"
    table.add_row("confirmation", f"{len(confirmed.chains)} cells at most: {cells}")
    table.add_row("images to decode", f"{trials.images_to_decode:,}")
    table.add_row("disk", f"{(trials.disk_bytes) / 1e6:,.0f} MB for images, caches, states and weights")
    for dimension in search.space.dimensions:
        choices = dimension.choices
        ends = f"{dimension.low:g} … {dimension.high:g}{', log' if dimension.log else ''}"
        table.add_row(dimension.key, ends if choices is None else ", ".join(map(_shown, choices)))
    return table
