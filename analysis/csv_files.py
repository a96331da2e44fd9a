"""table.csv and cells.csv: the study for machines, and the check that they still say what the ledger says."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from analysis.records import StudyRecords
from analysis.tables import Comparison, StudyTable, TableLine, build_table, measured, metric_columns

TABLE_FILE = "table.csv"
CELLS_FILE = "cells.csv"
JOINT_FILE = "joint.csv"
_CELL_IDENTITY = ("study", "dataset", "row", "seed", "status")
_CELL_DIGESTS = ("best_epoch", "mlflow_run_id", "weights_sha256", "trajectory_sha256", "split_digest", "config_digest")
_KEYS = {
    TABLE_FILE: ("dataset", "row", "reference"),
    CELLS_FILE: ("dataset", "row", "seed"),
    JOINT_FILE: ("study", "dataset", "row", "reference"),
}


def table_csv(table: StudyTable) -> str:
    """The main table: a line a row, data set and comparison; figures to 10 significant digits, undefined ones empty."""
    return _records_csv(_table_records(table))


def joint_csv(tables: Sequence[StudyTable]) -> str:
    """The main tables of several studies under each other, with the task of each."""
    return _records_csv([{"task": table.header.task, **record} for table in tables for record in _table_records(table)])


def _table_records(table: StudyTable) -> list[dict[str, str]]:
    return [
        {**_of_line(table, line), **(_of_comparison(comparison) if comparison else {})}
        for line in table.lines
        for comparison in (line.comparisons or (None,))
    ]


def _records_csv(records: Sequence[dict[str, str]]) -> str:
    columns = list(dict.fromkeys(column for record in records for column in record))
    return _to_csv(columns, [[record.get(column, "") for column in columns] for record in records])


def cells_csv(records: StudyRecords) -> str:
    """Every declared cell: identity, status, all metrics at full precision, digests; undefined values empty."""
    cells, metrics = measured(records), metric_columns(records)
    columns = [*_CELL_IDENTITY, *metrics, *_CELL_DIGESTS]
    texts = [_texts(column, cells[column]) for column in columns]
    return _to_csv(columns, [list(line) for line in zip(*texts, strict=True)])


def verify(records: StudyRecords, folder: Path) -> list[str]:
    """Recompute table.csv and cells.csv from the ledger and name each drift: file, line, column, value then and now.

    Returns:
        One sentence a drift; empty when the files say what the ledger says.
    """
    now = {TABLE_FILE: table_csv(build_table(records)), CELLS_FILE: cells_csv(records)}
    return [drift for file, text in now.items() for drift in _drifts(folder / file, text)]


def verify_joint(studies: Sequence[StudyRecords], folder: Path) -> list[str]:
    """As `verify`, of the joint table of several studies."""
    return _drifts(folder / JOINT_FILE, joint_csv([build_table(records) for records in studies]))


# ---------------------------------------------------------------- lines


def _of_line(table: StudyTable, line: TableLine) -> dict[str, str]:
    header, summary = table.header, line.summary
    undefined = next(fact.undefined for fact in table.facts if fact.dataset == line.dataset)
    marks = {f"mark/{part}": str(int(line.marks.get(part, False))) for part in header.parts}
    return {
        "study": header.study,
        "dataset": line.dataset,
        "row": line.row,
        **marks,
        "metric": header.main_metric,
        "mean": _figure(summary.mean),
        "std": _figure(summary.std),
        "n": str(summary.n),
        "declared": str(len(header.seeds)),
        "seeds": _list(line.seeds),
        "best": _figure(summary.best),
        "best_seed": "" if line.best_seed is None else str(line.best_seed),
        "absent": _list(f"{cell.seed}: {cell.status}" for cell in line.absent),
        "noop_of": json.dumps({row: list(seeds) for row, seeds in line.noop_of.items()}) if line.noop_of else "",
        "undefined_classes": _list(undefined),
        "row_run_id": line.row_run_id,
        "cell_run_ids": _list(f"{seed}: {run}" for seed, run in line.run_ids.items()),
    }


def _of_comparison(comparison: Comparison) -> dict[str, str]:
    paired = comparison.paired
    return {
        "reference": comparison.reference,
        "pairs": str(paired.n),
        "delta": _figure(paired.delta),
        "low": _figure(paired.low),
        "high": _figure(paired.high),
        "std_of_differences": _figure(paired.std),
        "dz": _figure(paired.dz),
        "detectable_dz": "" if paired.detectable_dz is None else _figure(paired.detectable_dz),
        "detectable_delta": _figure(paired.detectable_delta),
        "p": _figure(paired.p),
        "p_holm": _figure(comparison.p_holm),
        "attainable_holm": _figure(comparison.attainable_holm),
        "marked": str(int(comparison.marked)),
        "removed_pairs": _list(f"{cell.row}, seed {cell.seed}: {cell.status}" for cell in comparison.absent),
    }


def _figure(value: float) -> str:
    """Ten digits: more than the ledger's figures carry, fewer than what the order of a sum can change."""
    return "" if math.isnan(value) else f"{value:.10g}"


def _list(items: Iterable[object]) -> str:
    return "; ".join(map(str, items))


def _texts(name: str, column: pd.Series) -> list[str]:
    """A column's values as text: whole numbers without a point, floats shortest that read back equal, gaps empty."""
    whole = name in ("seed", "best_epoch")  # a gap makes pandas hold them as floats
    filled = pd.to_numeric(column).astype("Int64") if whole else column
    gaps = filled.isna().tolist()
    return ["" if gap else str(value) for value, gap in zip(filled.tolist(), gaps, strict=True)]


def _to_csv(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(map(no_formula, columns))
    writer.writerows(map(no_formula, line) for line in lines)
    return stream.getvalue()


# What a spreadsheet would compute: `=…`, `@…`, and behind a sign a call of a function or of a program. Numbers and
# names such as '+ EMA (full)' are left as they are.
_FORMULA = re.compile(r"[\s]*(?:[=@]|[+\-].*(?:[\w.]\(|[|!]))", re.DOTALL)


def no_formula(text: str) -> str:
    """A field that a spreadsheet shows as text, whatever a study or a table of labels calls things."""
    return f"'{text}" if _FORMULA.match(text) else text


# ---------------------------------------------------------------- drift


def _drifts(path: Path, now: str) -> list[str]:
    if not path.is_file():
        return [f"{path.name}: the file is not there; write the report again"]
    with path.open(encoding="utf-8", newline="") as stream:
        then = stream.read()
    if then == now:
        return []
    (old_columns, old), (new_columns, new) = _parse(path, then), _parse(path, now)
    drifts = [f"{path.name}, line 1: column {c!r} is not in the ledger" for c in old_columns if c not in new_columns]
    drifts += [f"{path.name}, line 1: column {c!r} is missing" for c in new_columns if c not in old_columns]
    shared = [column for column in old_columns if column in new_columns]
    for key, (line, record) in old.items():
        place = f"{path.name}, line {line}: {' · '.join(key)}"
        if key not in new:
            drifts.append(f"{place} is not in the ledger")
            continue
        current = new[key][1]
        drifts += [f"{place}, {c}: {record[c]!r} then, {current[c]!r} now" for c in shared if record[c] != current[c]]
    drifts += [f"{path.name}: {' · '.join(key)} is in the ledger and not in the file" for key in new if key not in old]
    return drifts or [f"{path.name}: equal values, written differently (order, quoting, line ends or doubled lines)"]


_Lines = dict[tuple[str, ...], tuple[int, dict[str, str]]]


def _parse(path: Path, text: str) -> tuple[list[str], _Lines]:
    reader = csv.reader(io.StringIO(text))
    columns = next(reader, [])
    lines: _Lines = {}
    for fields in reader:
        record = dict.fromkeys(columns, "") | dict(zip(columns, fields, strict=False))
        lines[tuple(record.get(column, "") for column in _KEYS[path.name])] = (reader.line_num, record)
    return columns, lines
