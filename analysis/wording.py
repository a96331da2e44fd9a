"""What tables mean, in sentences: the notes under them and the reading of each comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence

from analysis.layout import interval, number, one_line, p_value, signed
from analysis.patients import PatientNoise
from analysis.schema import Units
from analysis.statistics import ALPHA, detectable_dz, half_width_in_std, smallest_attainable_p
from analysis.tables import AbsentCell, Comparison, StudyTable

_NAMED = 30  # absent cells spelled out under a table; the report and cells.csv hold them all
FEW_GROUPS = 10


def table_notes(table: StudyTable) -> list[str]:
    """The sentences under the main table where nothing else stands: figures, gaps, limits, data."""
    synthetic = [_synthetic(table)] if table.header.synthetic else []
    problems = [f"Attention: {problem}" for problem in table.problems]
    return [*synthetic, *problems, *figure_notes(table), *data_notes(table)]


def figure_notes(table: StudyTable) -> list[str]:
    """What the main table's figures are, and which cells are in none of them."""
    notes = [
        f"{table.header.metric_label}: mean ± sample standard deviation (n − 1) over n seeds, at the epoch chosen on "
        "validation. The best run stands apart and is compared with nothing."
    ]
    if table.comparisons:
        notes += comparison_notes(table)
    return notes + absent_notes(table.absent) + noop_notes(table)


def data_notes(table: StudyTable) -> list[str]:
    """Classes that are in no figure, then what the study itself states: leakage, splits, tolerance modes."""
    return class_notes(table) + list(table.header.notes)


def patient_notes(noise: Sequence[PatientNoise], metric: str) -> list[str]:
    """How the intervals over test patients were made, for a main metric by its key."""
    if not noise:
        return []
    of_class = (
        "DeLong's intervals by class take images as independent. Neither includes"
        if metric == "macro_auc"
        else "Intervals by class are of the same draws. None includes"
    )
    notes = [
        "Percentile bootstrap over whole groups (patients or lesions), the same draws for all rows; a difference is "
        f"the mean over the seeds of the pairs. {of_class} the noise of training."
    ]
    fewest = min(n.groups for n in noise)
    if fewest < FEW_GROUPS:
        notes.append(
            f"{fewest} groups are too few for such an interval to hold what it promises: it is likely to be too narrow."
        )
    incomplete = max(n.macro.incomplete for n in noise)
    if incomplete:
        notes.append(
            f"In up to {incomplete} of {max(n.draws for n in noise)} draws some class was undefined; the mean of such "
            "a draw is over the other classes."
        )
    return notes


def comparison_notes(table: StudyTable) -> list[str]:
    """How differences were made, and what the seeds can show."""
    notes = [
        "Δ is the mean difference from the reference row over pairs of the same seed, with its 95 % paired t interval; "
        "d_z = Δ / sd of the differences. Detectable Δ is the smallest difference that so many pairs of this spread "
        "would show at 80 % power. p: paired t test, Holm-corrected over this table's comparisons."
    ]
    notes += [what_pairs_show(n) for n in sorted({c.paired.n for c in table.comparisons})]
    bounds = [c.attainable_holm for c in table.comparisons if not math.isnan(c.attainable_holm)]
    if any(c.marked for c in table.comparisons):
        notes.append(
            f"* p ≤ {ALPHA} after correction, where a test without the assumption of normality could reach it too."
        )
    elif bounds and min(bounds) > ALPHA:
        notes.append(
            f"No comparison bears a mark: without assuming normal differences, these pairs cannot reach a corrected p "
            f"below {p_value(min(bounds))}."
        )
    return notes


def what_pairs_show(n: int) -> str:
    """What a comparison of n pairs can and cannot show."""
    dz, least = detectable_dz(n), smallest_attainable_p(n)
    if dz is None:
        return f"With {n} pair{'s' * (n != 1)} nothing can be said about the spread: no interval, no test."
    return (
        f"With {n} pairs the 95 % interval is ±{half_width_in_std(n):.2f} sd of the differences, effects of "
        f"d_z ≥ {dz:.2f} are detected at 80 % power, and a rank test cannot go below p = {least:.3g}."
    )


def class_notes(table: StudyTable) -> list[str]:
    """Dropped and undefined classes, by name."""
    notes = []
    for fact in table.facts:
        if fact.dropped:
            notes.append(f"{fact.dataset}: dropped from training and tables: {', '.join(fact.dropped)}.")
        if fact.undefined:
            notes.append(
                f"{fact.dataset}: undefined, one value only in the test split, left out of the macro: "
                f"{', '.join(fact.undefined)}."
            )
    return notes


def reading(comparison: Comparison, metric: str, noise: PatientNoise | None = None) -> str:
    """A comparison in plain language, claiming no more than its pairs can show."""
    paired, who = comparison.paired, f"{comparison.row} against {comparison.reference}"
    if paired.n == 0:
        return f"{who}: no pair of finished cells; nothing can be compared."
    start = f"{who}: {signed(paired.delta)} {metric} on average over {paired.n} pair{'s' * (paired.n != 1)}"
    if paired.n == 1:
        return f"{start}. One pair has no spread: it may be luck of the seed, and no interval can be given."
    sentences = [f"{start} (95 % interval {interval(paired.low, paired.high)}).", _verdict(comparison)]
    sentences.append(_detectable(comparison))
    if noise is not None and not math.isnan(noise.macro.low):
        sentences.append(_over_patients(noise))
    return " ".join(sentence for sentence in sentences if sentence)


def _verdict(comparison: Comparison) -> str:
    paired = comparison.paired
    if paired.std == 0:
        return "The differences are equal at every seed: look whether the rows differ as intended."
    if paired.low <= 0 <= paired.high:
        return "The interval contains 0: these seeds do not settle the direction."
    if comparison.marked:
        return f"The rows differ (Holm-corrected p = {p_value(comparison.p_holm)})."
    if comparison.attainable_holm > ALPHA:
        return (
            "The interval excludes 0 if the differences are normal, which so few pairs cannot show: a lead, not a "
            "finding; add seeds."
        )
    return f"The interval excludes 0, but not after correction (p = {p_value(comparison.p_holm)})."


def _detectable(comparison: Comparison) -> str:
    paired = comparison.paired
    if not paired.std > 0:
        return ""
    return (
        f"A true difference below {number(paired.detectable_delta)} would be seen in fewer than 80 % of such studies."
    )


def _over_patients(noise: PatientNoise) -> str:
    side = "contains 0" if noise.macro.low <= 0 <= noise.macro.high else "excludes 0"
    bounds = interval(noise.macro.low, noise.macro.high)
    few = f" (of {noise.groups} groups: too few to rely on)" if noise.groups < FEW_GROUPS else ""
    return f"Over test patients, at these very seeds, the interval is {bounds} and {side}{few}."


def cost_notes(units: Units) -> list[str]:
    """What was executed against what was planned."""
    saved = (
        f"Sharing leaves {units.shared / units.alone:.0%} of the work of separate cells" if units.alone else "No work"
    )
    notes = [f"{saved}; a unit is one image's forward pass through one cost unit of the model, backward counts twice."]
    if units.executed is None:
        return [*notes, "Nothing has been executed yet."]
    expected = units.shared - units.stopped_early + units.recomputed
    notes.append(
        f"Planned {units.shared:,}, less {units.stopped_early:,} by early stopping, plus {units.recomputed:,} that "
        f"caches could not serve: {expected:,} expected, {units.executed:,} executed."
    )
    if units.executed < expected:
        notes.append(
            f"Attention: {expected - units.executed:,} units fewer than expected; work was skipped or is not done."
        )
    elif units.executed > expected:
        notes.append(f"Attention: {units.executed - expected:,} units more than expected; work was repeated.")
    return notes


def _synthetic(table: StudyTable) -> str:
    drawn = ", ".join(table.header.synthetic)
    return f"SYNTHETIC: the images of {drawn} are drawn, not taken; no figure on them says anything about patients."


def absent_notes(absent: Sequence[AbsentCell]) -> list[str]:
    """Cells without a result, by name."""
    if not absent:
        return []
    named = [
        f"{c.dataset} · {c.row} · seed {c.seed}: {c.status}" + (f" ({one_line(c.error, 80)})" if c.error else "")
        for c in absent[:_NAMED]
    ]
    more = f"; and {len(absent) - _NAMED} more, see cells.csv" if len(absent) > _NAMED else ""
    return [f"Without a result, in no mean and in no pair: {'; '.join(named)}{more}."]


def noop_notes(table: StudyTable) -> list[str]:
    """Rows that equal another row."""
    return [
        f"{line.dataset} · {line.row} is a no-op: same trajectory and observer as {other} at seed "
        f"{', '.join(map(str, seeds))}; its change has no effect there."
        for line in table.lines
        for other, seeds in line.noop_of.items()
    ]
