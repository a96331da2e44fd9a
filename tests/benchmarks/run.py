"""Measure what the design promises: `python -m tests.benchmarks.run [NAME …] [--repeats N] [--json FILE]`.

Where a whole command is meant, it is a process of its own on fresh storage; what is compared runs in turn (A B A B …),
so that a drift of the machine's speed meets both; medians are reported. Figures are worth something on an idle machine
only: what else ran is watched before and after each measurement, recorded, and said.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from tests.benchmarks.measuring import Effort, Load, Measured, Measurement, load_now, machine
from tests.benchmarks.registry import MEASUREMENTS


def main(arguments: list[str] | None = None) -> None:
    """Run the named measurements, all by default, and print their figures."""
    options = _options(arguments)
    told: dict[str, Any] = {"machine": machine()}
    for name in options.names or MEASUREMENTS:
        told[name] = measure(name, MEASUREMENTS[name], options.repeats, smallest=options.smallest)
        if options.json is not None:  # after each, so that an hour of figures outlives what fails next
            options.json.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def measure(name: str, measurement: Measurement, repeats: int | None, *, smallest: bool = False) -> dict[str, Any]:
    """Run one measurement, print it as text, and return it as JSON."""
    effort = Effort(repeats or measurement.repeats, smallest)
    before, started = load_now(), time.perf_counter()
    measured = measurement.run(effort)
    seconds, after = time.perf_counter() - started, load_now()
    print(as_text(f"{name}: {measurement.title}", measured, effort, seconds, (before, after)), flush=True)
    return {
        "title": measurement.title,
        "repeats": effort.repeats,
        "smallest": smallest,
        "seconds": round(seconds, 1),
        "load": {"before": before._asdict(), "after": after._asdict(), "idle": before.idle and after.idle},
        "figures": {figure: value.as_json() for figure, value in measured.figures.items()},
        "facts": measured.facts,
    }


def as_text(title: str, measured: Measured, effort: Effort, seconds: float, loads: tuple[Load, Load]) -> str:
    """The figures as lines of text, each with its bound and whether it is met."""
    before, after = loads
    lines = [f"\n{title} ({effort.repeats} repeats, {seconds:.0f} s)"]
    if not (before.idle and after.idle):
        lines.append(
            f"  warning: the machine was not idle ({before.busy:.0%} busy before, {after.busy:.0%} after): "
            "these figures are no measurement"
        )
    if effort.smallest:
        lines.append("  warning: the smallest size, for tests of the benchmarks: these figures mean nothing")
    for name, figure in measured.figures.items():
        bound = ""
        if figure.met is not None:
            limit = f"at most {figure.at_most:g}" if figure.at_most is not None else f"at least {figure.at_least:g}"
            bound = f"{limit:16} {'met' if figure.met else 'MISSED'}"
        lines.append(f"  {name:46} {figure.value:12.4g} {figure.unit:6} {bound}".rstrip())
    return "\n".join(lines)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    listed = "\n".join(f"  {name:14} {m.minutes:>4g} min  {m.title}" for name, m in MEASUREMENTS.items())
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.run",
        description=f"{__doc__}\nMeasurements, with what they take on two idle cores:\n\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="measurements to run; default: all")
    parser.add_argument("--repeats", type=int, metavar="N", help="runs, or pairs of runs, instead of the default")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write figures, samples and loads there")
    parser.add_argument("--smallest", action="store_true", help="smallest sizes: to see that all works")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in MEASUREMENTS]
    if unknown:
        parser.error(f"unknown measurement {', '.join(unknown)}; expected some of {', '.join(MEASUREMENTS)}")
    if options.repeats is not None and options.repeats < 1:
        parser.error(f"--repeats {options.repeats}: expected 1 or more")
    return options


if __name__ == "__main__":
    main()
