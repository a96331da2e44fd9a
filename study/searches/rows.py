"""A search in a study's terms: trials as rows, and the studies that follow from what it found.

Imports no optuna: trials come as facts, so that `--plan` stays light.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from search_spaces.space import Assignment, Space, changed
from study.chains import Chain, chain_of, course_of, materials_of, resolve_compute
from study.documents import StudyError
from study.searches.settings import SearchSettings, space_of
from study.spec import Row, Study
from trainables.settings import Settings

if TYPE_CHECKING:
    from pathlib import Path

    from study.search import TrialFacts


@dataclass(frozen=True)
class Search:
    """A declared search.

    Attributes:
        study: as its file declares it; its first row is the baseline, its rows are what winners are compared with.
    """

    study: Study
    settings: SearchSettings
    space: Space

    @classmethod
    def of(cls, study: Study) -> Search:
        """The search that a validated study declares.

        Raises:
            StudyError: it declares none.
        """
        if study.search is None:
            raise StudyError(
                [f"{study.name}: declares no search; add a group `search`, which may be empty: search: {{}}"]
            )
        (dataset,) = study.datasets
        return cls(study, study.search, space_of(study.search, study.rows[0].settings[dataset]))

    @property
    def dataset(self) -> str:
        """Its data set."""
        return self.study.datasets[0]

    @property
    def baseline(self) -> Settings:
        """What every trial starts from."""
        return self.study.rows[0].settings[self.dataset]

    def row(self, name: str, index: int, chosen: Mapping[str, Any], marks: Mapping[str, bool] | None = None) -> Row:
        """The baseline with what was chosen."""
        settings = Settings.model_validate(changed(self.baseline.model_dump(), chosen))
        return Row(name, index, dict(chosen), dict(marks or {}), {self.dataset: settings})

    def trials_study(self, rows: Sequence[Row]) -> Study:
        """The search as a study: a row a trial, one seed, nothing compared."""
        report = self.study.report.model_copy(update={"compare": "none", "published": None})
        return replace(self.study, rows=tuple(rows), seeds=(self.settings.trial_seed,), report=report)

    def trial_rows(self, trials: Iterable[TrialFacts]) -> list[Row]:
        """Rows of trials."""
        return [self.row(trial_name(t.number), t.number, t.chosen) for t in trials]

    def drawn(self, storage: Path) -> Study:
        """A search of the same size with trials drawn at random and none pruned: for an estimate of its cost."""
        rng = random.Random(self.settings.seed)
        looks: list[Assignment] = self.space.observed(self.space.of_baseline() or self.space.drawn(rng))
        while len(looks) < self.settings.trials:
            looks += self.space.observed(self.space.drawn(rng))
        rows = [self.row(trial_name(i), i, look) for i, look in enumerate(looks[: self.settings.trials])]
        return self.trials_study(_acting(self, rows, storage)[0])

    def declaration(self, storage: Path) -> dict[str, Any]:
        """What the value of a trial depends on; a search goes on only where it is the same."""
        (chain,) = chains_of(self.trials_study([self.row("baseline", 0, {})]), storage)
        search = self.settings
        return {
            "baseline": self.baseline.model_dump(mode="json", exclude={"dataset": {"root"}}),
            "parameters": [repr(dimension) for dimension in self.space.dimensions],
            "search.trial_seed": search.trial_seed,
            "search.objectives": list(search.objectives),
            "search.pruner, rungs or reduction": [search.pruner, search.rungs, search.reduction],
            "data, encoder, device or code": chain.course.ground,
        }

    def check_values(self, storage: Path, *, download: bool) -> None:
        """Find out before anything starts whether every value that may be chosen is possible on the data and encoder.

        Raises:
            StudyError: with all that are not.
        """
        rows = [self.row("baseline", 0, {})]
        for dimension in self.space.dimensions:
            for value in dimension.extremes():
                rows.append(self.row(f"{dimension.key} = {value}", len(rows), {dimension.key: value}))
        materials_of(self.trials_study(rows), storage, download)

    def rung_epochs(self, chain: Chain) -> dict[int, int]:
        """Epochs completed at a chain's rungs → Optuna's step."""
        strategy = chain.cell.settings.strategy
        rungs = self.settings.rung_epochs(strategy.tune_epochs)
        return {strategy.head_epochs + epochs: step for epochs, step in rungs.items()}


def trial_name(number: int) -> str:
    """Name of a trial's row."""
    return f"trial {number}"


def chains_of(study: Study, storage: Path) -> list[Chain]:
    """Chains of all cells, as a plan with sharing has them."""
    materials = materials_of(study, storage, download=False)
    compute = resolve_compute(study.execution, [row.settings[d] for row in study.rows for d in study.datasets])
    courses = {
        (cell.dataset, cell.row.index): course_of(cell.settings, materials[cell.dataset, cell.row.index], compute)
        for cell in study.cells()
    }
    return [chain_of(c, courses[c.dataset, c.row.index], study.execution, sharing=True) for c in study.cells()]


def _looks_of(chain: Chain) -> tuple[str, str]:
    return chain.leaf, chain.observer.name


# -- the studies that follow -----------------------------------------------------------------------------------------


def confirmation(
    search: Search, best: Sequence[TrialFacts], trials: Sequence[TrialFacts], storage: Path
) -> Study | None:
    """The best trials run again in full over the study's seeds, beside its own rows; None where none is left to run.

    One trial a trajectory: the averages of one trajectory are no neighbours that could disagree. A trial that trains
    exactly as one of the study's rows does is that row.
    """
    own = search.trials_study(search.study.rows)
    known = {_looks_of(chain) for chain in chains_of(own, storage)}
    chosen: dict[int, TrialFacts] = {}
    leaves: set[str] = set()
    for trial in best:
        (chain,) = chains_of(search.trials_study(search.trial_rows([trial])), storage)
        if _looks_of(chain) not in known and chain.leaf not in leaves and len(chosen) < search.settings.confirm:
            leaves.add(chain.leaf)
            chosen[trial.number] = trial
    if not chosen:
        return None
    first = len(search.study.rows)
    rows = [
        search.row(_rank(trial, best, len(trials)), first + i, trial.chosen) for i, trial in enumerate(chosen.values())
    ]
    untried = [replace(row, name=f"{row.name} (0 trials)") for row in search.study.rows]
    return replace(
        search.study,
        name=f"{search.study.name}-confirm",
        title=f"Confirmation of: {search.study.title}",
        rows=(*untried, *rows),
        report=search.study.report.model_copy(
            update={"compare": "first", "notes": (*search.study.report.notes, _budget(search, trials))}
        ),
        search=None,
    )


def _rank(trial: TrialFacts, best: Sequence[TrialFacts], trials: int) -> str:
    rank = [t.number for t in best].index(trial.number) + 1
    return f"No. {rank} of {trials} trials (trial {trial.number})"


def _budget(search: Search, trials: Sequence[TrialFacts]) -> str:
    counts = {s: sum(t.status == s for t in trials) for s in ("FINISHED", "PRUNED", "FAILED")}
    trajectories = len({t.trajectory for t in trials})
    return (
        f"Rows named No. k of n trials were chosen on validation with seed {search.settings.trial_seed} among "
        f"{len(trials)} trials on {trajectories} trajectories ({counts['FINISHED']} finished, {counts['PRUNED']} "
        f"pruned, {counts['FAILED']} failed); the other rows were given no trial. None of the seeds of this table took "
        "part in the choice: a winner's validation value in the search is too high for having been chosen, the figures "
        "here are not."
    )


def ablation_of(search: Search, best: TrialFacts, trials: int, storage: Path) -> Study:
    """Leave-one-out around a configuration: without each declared part, and with each tuned setting as the baseline's.

    A row that would train and be evaluated exactly as another one is left out, and the report says so.

    Raises:
        StudyError: a part names a setting or value that is none.
    """
    full = f"No. 1 of {trials} trials (trial {best.number})"
    changes = _without(search, best)
    drafts = [search.row(full, 0, best.chosen)]
    for i, (name, change) in enumerate(changes.items(), start=1):
        drafts.append(_part_row(search, name, i, {**best.chosen, **change}))
    kept, idle = _acting(search, drafts, storage)
    parts = [row.name.removeprefix("− ") for row in kept[1:]]
    rows = [replace(row, index=i, marks={p: row.name != f"− {p}" for p in parts}) for i, row in enumerate(kept)]
    notes = [*search.study.report.notes]
    if idle:
        notes.append(f"Left out, because nothing changes without them: {', '.join(idle)}.")
    return replace(
        search.study,
        name=f"{search.study.name}-ablation",
        title=f"Ablation of the winner of: {search.study.title}",
        description="Leave-one-out around the best trial: each row lacks a part, or has one setting as it was before.",
        rows=tuple(rows),
        report=search.study.report.model_copy(update={"compare": "first", "published": None, "notes": tuple(notes)}),
        search=None,
    )


def _without(search: Search, best: TrialFacts) -> dict[str, Assignment]:
    """Name of a part or tuned setting → what takes it away."""
    baseline = search.baseline.model_dump()
    tuned: dict[str, Assignment] = {}
    for key, value in best.chosen.items():
        group, _, name = key.partition(".")
        before = baseline[group][name]
        if before != value:
            tuned[f"{key} = {_shown(value)}"] = {key: before}
    return {**search.settings.parts, **tuned}


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _part_row(search: Search, name: str, index: int, chosen: Mapping[str, Any]) -> Row:
    try:
        return search.row(f"− {name}", index, chosen)
    except (KeyError, TypeError, ValueError) as error:
        said = str(error).splitlines()[0]
        raise StudyError([f"search.parts.{name}: cannot be switched off so: {said}"]) from error


def _acting(search: Search, rows: Sequence[Row], storage: Path) -> tuple[list[Row], list[str]]:
    """Rows that differ in effect from all before them, and the names of the others."""
    kept: dict[tuple[str, str], Row] = {}
    for chain in chains_of(search.trials_study(rows), storage):
        kept.setdefault(_looks_of(chain), chain.cell.row)
    acting = {row.name for row in kept.values()}
    return list(kept.values()), [row.name.removeprefix("− ") for row in rows if row.name not in acting]
