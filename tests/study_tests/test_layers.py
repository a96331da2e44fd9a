"""A problem names the place that has to be mended: the file's line, the profile's, or the option as it was typed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_studies import document, loaded

from study.documents import StudyError
from study.options import read_data_roots, read_overrides
from study.spec import Choices

FILE = """\
study: small
title: A small study
seeds: [0]
optimiser: {batch_size: 8}
rows:
  cumulative:
    - name: 1e-4
    - name: on
      set: {ema.enabled: true, ema.decay: 9e-1}
profiles:
  phantom: {optimiser: {head_lr: 1e-2}}
  ham10000: {strategy.depth: 4}
smoke: {strategy.depth: 2}
"""


def refusals(folder: Path, text: str | dict[str, Any], choices: Choices | None = None) -> list[str]:
    with pytest.raises(StudyError) as caught:
        loaded(folder, text, choices)
    return list(caught.value.problems)


def test_names_are_what_was_typed_and_rates_without_a_dot_are_numbers(tmp_path: Path) -> None:
    study = loaded(tmp_path, FILE)
    assert [row.name for row in study.rows] == ["1e-4", "on"]
    assert study.rows[1].changes == {"ema.enabled": True, "ema.decay": 0.9}
    assert study.rows[0].settings["phantom"].optimiser.head_lr == 0.01


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("batch_size: 8", "batch_size: 0", "study.yaml:4: optimiser.batch_size: expected at least 1; found 0"),
        (
            "head_lr: 1e-2",
            "head_lr: 0",
            "study.yaml:11: profiles.phantom.optimiser.head_lr: expected more than 0; found 0",
        ),
        (
            "strategy.depth: 4",
            "strategy.depht: 4",
            "study.yaml:12: profiles.ham10000.strategy.depht: unknown key; did you",
        ),
        (
            "depth: 2}",
            "depth: none}",
            "study.yaml:13: smoke.strategy.depth: expected a whole number or 'all'; found 'none'",
        ),
        (
            "decay: 9e-1",
            "decay: 9e1",
            "study.yaml:9: rows.cumulative.1.set.ema.decay: expected less than 1; found '9e1'",
        ),
        (
            "head_lr: 1e-2",
            "decay: 1",
            "study.yaml:11: profiles.phantom.optimiser.decay: unknown key; did you mean ema.decay?",
        ),
    ],
)
def test_a_layer_of_the_file_is_named_by_its_own_line(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert old in FILE
    (found,) = refusals(tmp_path, FILE.replace(old, new))
    assert found.startswith(said)


def test_what_later_rows_inherit_is_said_of_the_row_that_declares_it(tmp_path: Path) -> None:
    rows = [
        {"name": "a", "set": {"strategy.depth": 0}},
        {"name": "b", "set": {"ema.enabled": True}},
        {"name": "c", "set": {"ema.decay": 2}},
    ]
    found = refusals(tmp_path, document({"cumulative": rows}))
    assert [line.split(": ")[1] for line in found] == [
        "rows.cumulative.0.set.strategy.depth",
        "rows.cumulative.2.set.ema.decay",
    ]


def test_a_value_of_the_file_that_an_option_replaces_is_no_problem(tmp_path: Path) -> None:
    wrong = FILE.replace("batch_size: 8", "batch_size: 0")
    study = loaded(
        tmp_path,
        wrong.replace("smoke: {", "smoke: {optimiser.batch_size: 4, "),
        Choices({"optimiser": {"batch_size": 4}}),
    )
    assert study.rows[0].settings["phantom"].optimiser.batch_size == 4


def test_options_are_named_as_they_were_typed() -> None:
    read = read_overrides(["strategy.depth=all", "title=1e-4", "ema={decay: 0.5}"], "3,4", "./encoder")
    assert read.values == {
        "strategy.depth": "all",
        "title": "1e-4",
        "ema": {"decay": 0.5},
        "seeds": [3, 4],
        "model.backbone": "./encoder",
    }
    assert read.typed["seeds"] == "--seeds 3,4"
    assert read.typed["ema"] == "-o ema={decay: 0.5}"


@pytest.mark.parametrize(
    "seeds", ["", "0,", ",0", "0 1", "0,,1", "0;1", "1e3", "0-2", "all", "0x1", "9" * 40, "\u0663"]
)
def test_seeds_that_are_no_whole_numbers_are_refused(seeds: str) -> None:
    with pytest.raises(StudyError, match="expected whole numbers with commas, such as 0,1,2"):
        read_overrides(None, seeds, None)


def test_a_folder_may_have_an_equals_sign_and_a_data_set_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("plain", "a=b", "c=d"):
        Path(name).mkdir()
    assert read_data_roots(["a=b"]) == {"": str(tmp_path / "a=b")}
    assert read_data_roots(["ham10000=c=d", f"csv={tmp_path}"]) == {
        "ham10000": str(tmp_path / "c=d"),
        "csv": str(tmp_path),
    }
    assert read_data_roots([f"{tmp_path}/c=d"]) == {"": str(tmp_path / "c=d")}
    with pytest.raises(StudyError, match="ham10000 is given twice"):
        read_data_roots(["ham10000=plain", "ham10000=a=b"])
