"""Markdown, LaTeX and CSV: escaped, aligned, byte-identical, and verified against the ledger."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from simulated_study import CLASSES, HOSTILE, Simulated, simulate

from analysis.csv_files import cells_csv, no_formula, table_csv, verify
from analysis.layout import class_tables, main_table
from analysis.tables import build_table
from analysis.wording import table_notes
from analysis.writers import to_latex, to_markdown, write_atomically

HOSTILE_PLAN = Simulated(rows=HOSTILE, classes=(*HOSTILE, "Edema"), parts=HOSTILE[:3], datasets=("a|b", "c_d&%"))
GAPS = (("chestxray14", "+ EMA", 1, "FAILED"), ("chestxray14", "MLP head only", 2, "MISSING"))


def markdown(plan: Simulated) -> str:
    table = build_table(simulate(plan))
    return to_markdown(table.header.title, [main_table(table), *class_tables(table)], table_notes(table))


def latex(plan: Simulated) -> str:
    table = build_table(simulate(plan))
    return to_latex(table, table_notes(table))


def test_markdown_lines_have_as_many_cells_as_their_header_whatever_the_names() -> None:
    lines = [line for line in markdown(HOSTILE_PLAN).splitlines() if line.startswith("|")]
    unescaped = [len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in lines]
    main = unescaped[: 2 + len(HOSTILE)]
    assert len(set(main)) == 1
    assert set(unescaped[-3:]) == {len(HOSTILE) + 2}


def test_markdown_holds_no_live_markup_from_names() -> None:
    text = markdown(HOSTILE_PLAN)
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "[x](javascript" not in text.replace(r"\[x\]", "")


def test_markdown_says_mean_std_n_interval_and_gaps() -> None:
    text = markdown(Simulated(failed=GAPS, synthetic=("chestxray14",), undefined=("Hernia",)))
    assert re.search(r"\| 0\.\d{4} ± 0\.\d{4} \| 2 of 3 \| 0\.\d{4} \(seed \d\) \|", text)
    for fragment in ("SYNTHETIC", "seed 1: FAILED (CUDA out of memory", "seed 2: MISSING", "dropped", "Hernia"):
        assert fragment in text
    assert "With 3 pairs the 95 % interval is ±2.48 sd" in text
    assert "No comparison bears a mark" in text


def test_one_seed_prints_no_std_no_interval_and_no_mark() -> None:
    text = markdown(Simulated(seeds=(4,)))
    rows = [line for line in text.splitlines() if line.startswith(("| MLP", r"| \+"))]
    assert rows
    assert not any("±" in line or " to " in line or "*" in line for line in rows)
    assert "With 1 pair nothing can be said about the spread" in text


def tex_cells(line: str) -> int:
    return len(re.findall(r"(?<!\\)&", line)) + 1


def test_latex_tabulars_are_balanced_and_every_line_fits_its_columns() -> None:
    text = latex(replace(HOSTILE_PLAN, failed=(("a|b", HOSTILE[0], 1, "FAILED"),)))
    for environment in ("table", "tabular"):
        assert text.count(rf"\begin{{{environment}}}") == text.count(rf"\end{{{environment}}}") == 2
    for block in re.findall(r"\\begin\{tabular\}(.*?)\\end\{tabular\}", text, re.DOTALL):
        columns, body = block.split("\n", 1)
        lines = [line for line in body.splitlines() if line.startswith("{}")]
        assert {tex_cells(line) for line in lines} == {len(columns.strip("{}"))}
        assert body.index(r"\toprule") < body.index(r"\midrule") < body.index(r"\bottomrule")


def test_latex_escapes_every_special_character() -> None:
    text = latex(HOSTILE_PLAN)
    assert r"a\textbar{}b\_\&\%\$\textless{}script\textgreater{}" in text
    assert r"\textbackslash{}input\{x\} \textasciitilde{}\textasciicircum{}\#\{\}" in text
    # Once escapes and our own commands are taken away, nothing special is left, and braces balance.
    assert not re.search(r"(?<!\\)[#$_^~]", re.sub(r"\$(\\[a-zA-Z]+|-|\^\{\*\})\$", "", text))
    depth = 0
    for token in re.findall(r"\\.|[{}]", text):
        depth += {"{": 1, "}": -1}.get(token, 0)
        assert depth >= 0
    assert depth == 0


def test_latex_of_our_own_words_is_ascii() -> None:
    assert latex(Simulated(failed=GAPS, noop=(("+ EMA", "+ class weights"),))).isascii()


def test_cells_csv_has_the_declared_columns_and_reads_back_exactly() -> None:
    records = simulate(Simulated(failed=GAPS, extra_metrics=("micro_auc",)))
    lines = list(csv.DictReader(io.StringIO(cells_csv(records))))
    assert list(lines[0]) == [
        *("study", "dataset", "row", "seed", "status", "macro_auc", "micro_auc", *(f"auc/{c}" for c in CLASSES)),
        *("best_epoch", "mlflow_run_id", "weights_sha256", "trajectory_sha256", "split_digest", "config_digest"),
    ]
    assert len(lines) == len(records.cells)
    first = records.cells.iloc[0]
    assert float(lines[0]["macro_auc"]) == first["macro_auc"]
    assert lines[0]["best_epoch"] == str(int(first["best_epoch"]))
    missing = next(line for line in lines if line["status"] == "MISSING")
    assert missing["macro_auc"] == missing["best_epoch"] == missing["mlflow_run_id"] == ""


def test_table_csv_names_the_runs_of_every_line() -> None:
    records = simulate(Simulated(failed=GAPS))
    lines = list(csv.DictReader(io.StringIO(table_csv(build_table(records)))))
    named = " ".join(line["cell_run_ids"] for line in lines)
    assert all(run in named for run in records.cells["mlflow_run_id"].dropna())
    assert lines[-1]["absent"] == "1: FAILED"
    assert lines[-1]["removed_pairs"] == "+ EMA, seed 1: FAILED"


def test_a_row_with_two_references_has_a_line_for_each() -> None:
    pairs = (("+ EMA", "+ class weights"), ("+ EMA", "MLP head only"))
    table = build_table(simulate(Simulated(comparisons=pairs)))
    lines = [line for line in csv.DictReader(io.StringIO(table_csv(table))) if line["row"] == "+ EMA"]
    assert [line["reference"] for line in lines] == ["+ class weights", "MLP head only"]
    continued = main_table(table).lines[-1]
    assert continued[0] == ""
    assert "MLP head only" in continued


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ('=HYPERLINK("http://x")', '\'=HYPERLINK("http://x")'),
        ("@SUM(A1)", "'@SUM(A1)"),
        (" =1+1", "' =1+1"),
        ("\t=1+1", "'\t=1+1"),
        ('+ HYPERLINK("http://x")', '\'+ HYPERLINK("http://x")'),
        ("-2+cmd|' /C calc'!A0", "'-2+cmd|' /C calc'!A0"),
        ("+ EMA (full)", "+ EMA (full)"),
        ("+ progressive unfreezing", "+ progressive unfreezing"),
        ("-0.25", "-0.25"),
        ("-1.5e-07", "-1.5e-07"),
        ("depth = 3", "depth = 3"),
    ],
)
def test_a_spreadsheet_finds_no_formula_in_a_table(name: str, written: str, tmp_path: Path) -> None:
    assert no_formula(name) == written
    records = simulate(Simulated(rows=("MLP head only", name), classes=(name, "Edema")))
    for text, file in ((table_csv(build_table(records)), "table.csv"), (cells_csv(records), "cells.csv")):
        lines = list(csv.DictReader(io.StringIO(text)))
        assert {line["row"] for line in lines} == {"MLP head only", written}
        assert [field for line in csv.reader(io.StringIO(text)) for field in line if field != no_formula(field)] == []
        write_atomically(tmp_path / file, text)
    assert verify(records, tmp_path) == []


def test_the_same_records_in_another_order_give_the_same_bytes() -> None:
    records = simulate(replace(HOSTILE_PLAN, failed=(("a|b", HOSTILE[1], 0, "PRUNED"),)))
    columns = list(records.cells.columns)
    shuffled = replace(records, cells=records.cells.sample(frac=1, random_state=3)[columns[::-1]])
    assert cells_csv(shuffled) == cells_csv(records)
    assert table_csv(build_table(shuffled)) == table_csv(build_table(records))


def test_verify_is_silent_while_files_and_ledger_agree(tmp_path: Path) -> None:
    records = simulate(HOSTILE_PLAN)
    write_atomically(tmp_path / "table.csv", table_csv(build_table(records)))
    write_atomically(tmp_path / "cells.csv", cells_csv(records))
    assert verify(records, tmp_path) == []


def test_verify_names_file_line_column_and_both_values(tmp_path: Path) -> None:
    records = simulate()
    write_atomically(tmp_path / "table.csv", table_csv(build_table(records)))
    write_atomically(tmp_path / "cells.csv", cells_csv(records))
    cells = records.cells.copy()
    then = float(cells.loc[4, "macro_auc"])
    cells.loc[4, "macro_auc"] = then + 1e-7
    drifts = verify(replace(records, cells=cells), tmp_path)
    where = "chestxray14 · + progressive unfreezing"
    assert f"cells.csv, line 6: {where} · 1, macro_auc: '{then!r}' then, '{then + 1e-7!r}' now" in drifts
    assert any(drift.startswith(f"table.csv, line 3: {where} · MLP head only, mean: ") for drift in drifts)
    assert any(", delta: " in drift for drift in drifts)


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (
            lambda text: text.replace("FINISHED", "FAILED", 1),
            "line 2: chestxray14 · MLP head only · 0, status: 'FAILED'",
        ),
        (lambda text: "".join(text.splitlines(keepends=True)[:-1]), "chestxray14 · + EMA · 2 is in the ledger and not"),
        (
            lambda text: text + text.splitlines()[1].replace(",0,", ",9,", 1) + "\n",
            "line 14: chestxray14 · MLP head only",
        ),
        (lambda text: text.replace("best_epoch", "best"), "column 'best_epoch' is missing"),
        (lambda text: text.replace("\n", "\r\n"), "written differently"),
        (lambda text: text + text.splitlines()[-1] + "\n", "written differently"),
        (lambda _: "", "column 'study' is missing"),
    ],
)
def test_verify_sees_every_kind_of_tampering(tmp_path: Path, edit: Callable[[str], str], expected: str) -> None:
    records = simulate()
    write_atomically(tmp_path / "table.csv", table_csv(build_table(records)))
    write_atomically(tmp_path / "cells.csv", edit(cells_csv(records)))
    drifts = verify(records, tmp_path)
    assert any(drift.startswith("cells.csv") and expected in drift for drift in drifts), drifts


def test_verify_misses_no_absent_file(tmp_path: Path) -> None:
    assert [drift.split(":")[0] for drift in verify(simulate(), tmp_path)] == ["table.csv", "cells.csv"]


def test_a_write_that_fails_leaves_the_old_file_and_no_scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_atomically(tmp_path / "table.md", "old")

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("analysis.writers.os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
