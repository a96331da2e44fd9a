"""The report of a search: every trial, what it cost, and Optuna's figures, as files in its report folder."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from analysis.csv_files import no_formula
from analysis.layout import TextTable
from analysis.schema import StudyHeader
from analysis.search_page import SearchPage, render
from analysis.writers import write_atomically
from study.search import TrialFacts, Trials
from study.searches.rows import Search

MOST_SHOWN = 200  # trials in the page; all of them are in trials.csv


class Spent(NamedTuple):
    """Training units: `executed` as they were spent, `alone` had every trial been trained by itself as far."""

    executed: int
    alone: int


def write_search_report(search: Search, trials: Trials, header: StudyHeader, spent: Spent, folder: Path) -> list[Path]:
    """Write trials.csv, figures/search-*.png and .svg, and report.html; all are replaced as a whole."""
    from study.searches.figures import draw_search

    facts = trials.all()
    drawings = draw_search(trials.study, objective_labels(search, header.metric_label))
    files = [write_atomically(folder / "trials.csv", trials_csv(search, facts))]
    for drawing in drawings:
        files.append(write_atomically(folder / "figures" / f"{drawing.name}.png", drawing.png))
        files.append(write_atomically(folder / "figures" / f"{drawing.name}.svg", drawing.svg))
    for stale in set((folder / "figures").glob("search-*")) - set(files):
        stale.unlink()
    page = SearchPage(
        header=header,
        facts=_facts(search, facts, spent),
        best=_table(search, trials.best(), header.metric_label, _best_caption(search)),
        trials=_table(search, facts[:MOST_SHOWN], header.metric_label, _all_caption(len(facts))),
        drawings=tuple(drawings),
        notes=_notes(search),
    )
    files.append(write_atomically(folder / "report.html", render(page)))
    return files


def objective_labels(search: Search, metric_label: str) -> tuple[str, ...]:
    """Names of the objectives for people."""
    names = {"metric": f"validation {metric_label}", "units": "training units"}
    return tuple(names[objective] for objective in search.settings.objectives)


def trials_csv(search: Search, trials: Sequence[TrialFacts]) -> str:
    """One line a trial: number, trajectory, status, objectives, parameters (empty where one does not act), error."""
    keys = [dimension.key for dimension in search.space.dimensions]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["trial", "trajectory", "status", *search.settings.objectives, *map(no_formula, keys), "error"])
    for trial in trials:
        values = [repr(value) for value in trial.values] or [""] * len(search.settings.objectives)
        chosen = [no_formula(str(trial.chosen[key])) if key in trial.chosen else "" for key in keys]
        writer.writerow([trial.number, trial.trajectory, trial.status, *values, *chosen, no_formula(trial.error)])
    return out.getvalue()


def _facts(search: Search, trials: Sequence[TrialFacts], spent: Spent) -> tuple[tuple[str, str], ...]:
    counts = Counter(trial.status for trial in trials)
    settings = search.settings
    gain = f" ({spent.alone / spent.executed:.2f}×)" if spent.executed else ""
    return (
        ("trials", ", ".join(f"{n} {status.lower()}" for status, n in sorted(counts.items())) or "none yet"),
        ("trajectories", f"{len({trial.trajectory for trial in trials})} proposed"),
        ("sampler", f"{settings.sampler}, seed {settings.seed}, {settings.startup} trajectories at random first"),
        ("pruner", _pruner(search)),
        ("training seed", str(settings.trial_seed)),
        ("training units", f"{spent.executed:,} spent; {spent.alone:,} had every trial trained alone as far{gain}"),
    )


def _pruner(search: Search) -> str:
    settings = search.settings
    if settings.pruner == "none":
        return "none"
    shares = [f"{settings.reduction ** (i - settings.rungs):.3g}" for i in range(settings.rungs)]
    return f"{settings.pruner}, at {', '.join(shares)} of each trajectory's own stage 2"


def _best_caption(search: Search) -> str:
    if len(search.settings.objectives) > 1:
        return "Pareto front: no other trial is better in one objective and as good in the others"
    return "Best trials, on validation"


def _all_caption(count: int) -> str:
    return "All trials" if count <= MOST_SHOWN else f"The first {MOST_SHOWN} of {count} trials; all are in trials.csv"


def _table(search: Search, trials: Sequence[TrialFacts], metric_label: str, caption: str) -> TextTable:
    labels = objective_labels(search, metric_label)
    keys = [dimension.key for dimension in search.space.dimensions]
    lines = []
    for trial in trials[:MOST_SHOWN]:
        values = [_shown(value) for value in trial.values] or ["–"] * len(labels)
        chosen = [_shown(trial.chosen[key]) if key in trial.chosen else "" for key in keys]
        lines.append((str(trial.number), str(trial.trajectory), trial.status.lower(), *values, *chosen))
    columns = ("trial", "trajectory", "status", *labels, *keys)
    return TextTable(caption, columns, (("", tuple(lines)),), (False, False, True, *[False] * (len(columns) - 3)))


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 10_000 else f"{value:.4g}"
    return str(value)


def _notes(search: Search) -> tuple[str, ...]:
    return (
        "Values are of the validation split at the trial's best epoch, with one training seed. The best of many such "
        "values is too high for having been chosen: see the confirmation, which trains the best trials again in full "
        "over other seeds. The test split is not looked at here.",
        "Trials of one trajectory are ways to look at one training run (raw weights, averaged copies); they cost "
        "evaluations only. A pruned trajectory was ended because the pruner would have ended every one of its trials.",
        f"Seeds of the confirmation: {', '.join(map(str, search.study.seeds))}.",
    )
