"""A plan and its results in the ledger's terms: headers of study, rows and cells, epochs and outcomes."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from typing import Any

from analysis.schema import StudyHeader, Units
from study.chains import Chain, Material, digest, library_versions, the_task
from study.documents import flatten
from study.ledger_entries import CellHeader, CellOutcome, Epoch, RowHeader
from study.plan import Plan
from study.spec import Row
from study.store import Store
from trainables.data.index import Index
from trainables.results import CellResult, EpochRecord
from trainables.settings import DatasetSettings

# Where files lie says nothing about a row: it is the same row on another machine.
PLACES: dict[str, Any] = {"dataset": {"root": True, "test_on": {"root"}}, "model": {"weights"}}
NEEDS_NO_RESULTS: dict[str, int | None] = {"executed": None, "stopped_early": 0, "recomputed": 0}


def study_header(plan: Plan, units: Units, provenance: dict[str, str]) -> StudyHeader:
    """What a table needs to know besides its rows and cells."""
    study = plan.study
    materials = {chain.cell.dataset: chain.material for chain in plan.chains}
    kind = the_task(study)
    return StudyHeader(
        study=study.name,
        title=study.title,
        description=study.description,
        task=study.rows[0].settings[study.datasets[0]].task,
        main_metric=kind.main_metric,
        metric_label=kind.metric_label,
        rows=tuple(row.name for row in study.rows),
        seeds=study.seeds,
        datasets=study.datasets,
        parts=study.parts,
        comparisons=study.comparisons(),
        per_class=study.report.per_class,
        classes={name: m.classes for name, m in materials.items()},
        dropped={name: m.index.dropped for name, m in materials.items()},
        synthetic=tuple(name for name, m in materials.items() if m.synthetic),
        published=study.report.published,
        notes=_notes(plan),
        units=units,
        provenance=provenance,
    )


def provenance(plan: Plan, command: str) -> dict[str, str]:
    """Command, versions and digests for the report."""
    facts = {"command": command, "device": plan.compute.device, "precision": plan.compute.precision}
    facts["threads a trial"] = str(plan.compute.threads)
    for chain in plan.chains:
        model, index = chain.material.model, chain.material.index
        facts[f"backbone {model.name}"] = f"sha256 {model.weights_digest[:16]}"
        facts[f"data set {index.dataset}"] = (
            f"{len(index)} images, {len(set(index.groups.tolist()))} {index.group_kind}s, "
            f"split {index.split_digest()[:16]}"
        )
        if (away := chain.material.away) is not None:
            facts[f"tested on {chain.cell.dataset.partition('→')[2]}"] = (
                f"{len(away)} images, {len(set(away.groups.tolist()))} {away.group_kind}s, "
                f"split {away.split_digest()[:16]}"
            )
    return facts | library_versions() | {name: version(name) for name in the_task(plan.study).libraries}


def row_headers(plan: Plan) -> dict[tuple[str, str], RowHeader]:
    """(data set, row) → the row's run."""
    headers = {}
    for dataset in plan.study.datasets:
        for row in plan.study.rows:
            params = _params(row, dataset)
            headers[dataset, row.name] = RowHeader(
                key=digest("row", plan.study.name, row.name, dataset, params),
                name=row.name,
                index=row.index,
                dataset=dataset,
                marks=row.marks,
                changes=row.changes,
                params=params,
            )
    return headers


def cell_headers(plan: Plan, rows: dict[tuple[str, str], RowHeader]) -> list[CellHeader]:
    """Every cell before it runs, in table order."""
    stages = {stage.key for stage in plan.stages}
    headers = []
    for chain in plan.chains:
        cell, material = chain.cell, chain.material
        row = rows[cell.dataset, cell.row.name]
        headers.append(
            CellHeader(
                key=chain.key,
                row=cell.row.name,
                row_index=cell.row.index,
                seed=cell.seed,
                dataset=cell.dataset,
                row_key=row.key,
                params=row.params | {"seed": str(cell.seed)},
                config_digest=digest("config", row.params),
                split_digest=_of_both(material, Index.split_digest),
                dataset_digest=_of_both(material, Index.digest),
                dataset_source=_source(cell.settings.dataset, material),
                stage_keys=tuple(key[:16] for key in chain.keys if key in stages),
            )
        )
    return headers


def _of_both(material: Material, digest_of: Callable[[Index], str]) -> str:
    """An index's digest; where cells are tested elsewhere one of both, for it takes both to make the result again."""
    home = digest_of(material.index)
    return home if material.away is None else digest("home and away", home, digest_of(material.away))


def _source(data: DatasetSettings, material: Material) -> str:
    home = data.root or f"drawn: {material.index.dataset}"
    if material.away is None or data.test_on is None:
        return home
    return f"{home}, tested on {data.test_on.root or f'drawn: {material.away.dataset}'}"


def epochs_of(chain: Chain, history: Iterable[EpochRecord]) -> list[Epoch]:
    """A trajectory's epochs as one cell sees them: validation metrics of its own copy alone, as 'val/<metric>'."""
    own = f"val/{chain.observer.copy}/"
    head_epochs = chain.cell.settings.strategy.head_epochs
    epochs = []
    for record in history:
        # In the head stage there are no averaged copies yet: every copy equals the raw weights.
        prefix = own if record.epoch > head_epochs else "val/raw/"
        metrics = {name: value for name, value in record.metrics.items() if not name.startswith("val/")}
        metrics |= {f"val/{k[len(prefix) :]}": v for k, v in record.metrics.items() if k.startswith(prefix)}
        metrics |= {"cost/units": float(record.units), "cost/seconds": record.seconds}
        epochs.append(Epoch(record.epoch, record.time_ms, metrics))
    return epochs


def finished_outcome(chain: Chain, result: CellResult, store: Store | None, noop_of: str | None) -> CellOutcome:
    """The outcome of a cell that has a result; with its predictions where the store is given."""
    return CellOutcome(
        status="FINISHED",
        end_ms=result.history[-1].time_ms,
        best_epoch=result.best_epoch,
        metrics=result.metrics,
        weights_sha256=result.weights_sha256,
        trajectory_sha256=result.trajectory_sha256,
        noop_of=noop_of,
        undefined_classes=result.undefined,
        effective={"phases": _effective_phases(result.history), "provenance": result.provenance},
        predictions=None if store is None else store.predictions(chain.leaf, chain.observer.name),
    )


def no_ops(results: Sequence[tuple[Chain, CellResult]]) -> dict[str, str]:
    """Cell key → name of the earlier row whose trajectory and evaluated weights it equals at the same seed."""
    seen: dict[tuple[object, ...], str] = {}
    found: dict[str, str] = {}
    for chain, result in sorted(results, key=lambda pair: pair[0].cell.row.index):
        cell = chain.cell
        at = (cell.dataset, cell.seed, result.trajectory_sha256, result.weights_sha256, result.best_epoch)
        earlier = seen.setdefault(at, cell.row.name)
        if earlier != cell.row.name:
            found[chain.key] = earlier
    return found


def counted_units(plan: Plan, results: Sequence[tuple[Chain, CellResult]], cache_units: dict[str, int]) -> Units:
    """Planned units beside those counted in the loop.

    Args:
        cache_units: name of an activation cache → units spent on building it.

    An epoch that several cells share is counted once. What early stopping left out is counted as planned.
    """
    executed: dict[str, int] = {}
    caches: set[str] = set()
    for chain, result in results:
        for key, record in zip(chain.keys, result.history, strict=False):
            executed[key] = record.units
            if record.cache is not None:
                caches.add(record.cache)
    total = sum(executed.values()) + sum(cache_units.get(name, 0) for name in caches)
    finished = {chain.key for chain, _ in results}
    left_out = _left_out(plan, set(executed), finished)
    recomputed = max(0, total + left_out - plan.units.shared) if len(finished) == len(plan.chains) else 0
    planned = plan.units
    return Units(
        alone=planned.alone,
        shared=planned.shared,
        floor=planned.floor,
        executed=total,
        stopped_early=left_out,
        recomputed=recomputed,
    )


def _left_out(plan: Plan, executed: set[str], finished: set[str]) -> int:
    """Planned units of epochs that no finished cell came to, and of caches that nobody then needed."""
    keys: dict[str, int] = {}
    for chain in plan.chains:
        if chain.key in finished:
            planned = zip(chain.keys, plan.epoch_units(chain), strict=True)
            keys |= {key: units for key, units in planned if key not in executed}
    unused = [c.build_units for c in plan.caches if not executed.intersection(c.users)]
    return sum(keys.values()) + (sum(unused) if len(finished) == len(plan.chains) else 0)


def _effective_phases(history: Sequence[EpochRecord]) -> list[dict[str, Any]]:
    """The configuration read back from the trained objects, one entry a run of epochs in which it stayed the same."""
    phases: list[dict[str, Any]] = []
    for record in history:
        facts = {k: v for k, v in record.effective.items() if k != "learning_rates"}
        rates = record.effective["learning_rates"]
        if phases and phases[-1]["facts"] == json.loads(json.dumps(facts)):
            phases[-1]["last_epoch"] = record.epoch
            phases[-1]["learning_rates"]["last_step"] = rates["last_step"]
        else:
            entry = {"first_epoch": record.epoch, "last_epoch": record.epoch}
            phases.append({**entry, "facts": json.loads(json.dumps(facts)), "learning_rates": dict(rates)})
    return phases


def _params(row: Row, dataset: str) -> dict[str, str]:
    settings = row.settings[dataset].model_dump(mode="json", exclude=PLACES)
    return {key: json.dumps(value) if not isinstance(value, str) else value for key, value in flatten(settings).items()}


def _notes(plan: Plan) -> tuple[str, ...]:
    """What a reader of the table must know: how it was measured, leakage, tolerance modes, the data sets' own notes."""
    kind = the_task(plan.study)
    notes = {note: None for chain in plan.chains for note in kind.notes(chain.cell.settings)}
    by_dataset: dict[str, set[str]] = defaultdict(set)
    for chain in plan.chains:
        index = chain.material.index
        for looked_at in (index, *([chain.material.away] if chain.material.away is not None else [])):
            for note in looked_at.notes:
                notes[f"{looked_at.dataset}: {note}"] = None
            by_dataset[looked_at.dataset].add(chain.material.model.name)
    for dataset, backbones in by_dataset.items():
        if dataset in ("chestxray14", "chexpert") and any("rad-dino" in name.lower() for name in backbones):
            notes[
                f"{dataset}: RAD-DINO was pretrained, self-supervised, on images of ChestX-ray14 and CheXpert, so test "
                "images may have been seen unlabelled."
            ] = None
    if plan.study.execution.cache_dtype == "float16":
        notes[
            "Activations were cached in fp16: results are within a tolerance of, not equal to, uncached training."
        ] = None
    if plan.study.smoke:
        notes["A smoke run: far too short to mean anything but that everything works."] = None
    return (*notes, *plan.study.report.notes)
