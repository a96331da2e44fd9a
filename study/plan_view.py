"""A plan as a person reads it in a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from analysis.statistics import detectable_dz
from study.plan import Plan


def plan_table(plan: Plan, pending: int) -> Table:
    """Cells, stages, costs, disk, and what the seeds can show."""
    table = Table(title=f"plan of {plan.study.name}: {plan.study.title}", show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    study, units = plan.study, plan.units
    synthetic = {c.cell.dataset for c in plan.chains if c.material.synthetic}
    names = ", ".join(f"{d} (synthetic)" if d in synthetic else d for d in study.datasets)
    table.add_row("data sets", names)
    parts = (_counted(study.rows, "row"), _counted(study.seeds, "seed"), _counted(study.datasets, "data set"))
    table.add_row("cells", f"{len(plan.chains)} = {' × '.join(parts)}")
    table.add_row("stages", f"{len(plan.stages)}, of which {plan.shared_stages} serve several cells")
    table.add_row("units alone", f"{units.alone:>16,}   each cell by itself")
    gain = f"{units.alone / units.shared:.2f}× less" if plan.sharing else "nothing is shared"
    table.add_row("units shared", f"{units.shared:>16,}   this plan: {gain}")
    table.add_row("units floor", f"{units.floor:>16,}   least for the same bits: {units.alone / units.floor:.2f}×")
    table.add_row("still to train", f"{pending:>16,}   not in the storage yet")
    table.add_row("images to decode", f"{plan.images_to_decode:,}")
    table.add_row("disk", f"{plan.disk_bytes / 1e6:,.0f} MB for images, caches, states and weights")
    dz = detectable_dz(len(study.seeds))
    shown = "one seed shows no differences" if dz is None else f"smallest detectable d_z {dz:.2f} (80 % power, α 0.05)"
    table.add_row("seeds", f"{_listed(study.seeds)}: {shown}")
    compute = plan.compute
    threads = f"{compute.threads} thread{'s' * (compute.threads != 1)} a trial"
    table.add_row("computes with", f"{compute.device}, {threads}, {compute.precision}")
    dropped = {n: c.material.index.dropped for c in plan.chains for n in [c.cell.dataset] if c.material.index.dropped}
    for name, classes in dropped.items():
        table.add_row("dropped classes", f"{name}: {', '.join(classes)}")
    return table


def _counted(things: Sequence[object], name: str) -> str:
    return f"{len(things)} {name}{'s' * (len(things) != 1)}"


def _listed(seeds: Sequence[int]) -> str:
    shown = ", ".join(map(str, seeds[:10]))
    return shown if len(seeds) <= 10 else f"{shown}, … ({len(seeds)} in all)"
