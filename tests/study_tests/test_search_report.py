"""The table of a search's trials: a spreadsheet reads its numbers as numbers and runs nothing that it says."""

from __future__ import annotations

import csv
import io

from study.search import TrialFacts
from study.searches.report import trials_csv
from study.searches.rows import Search
from study.spec import find_study, load_study


def test_a_line_a_trial_with_exact_values_and_no_formula() -> None:
    search = Search.of(load_study(find_study("search")))
    keys = [dimension.key for dimension in search.space.dimensions]
    acts, idle = keys[0], keys[1]
    text = trials_csv(
        search,
        [
            TrialFacts(0, {acts: 0.1 + 0.2}, "FINISHED", 0, (0.7000000000000001,)),
            TrialFacts(1, {acts: -1e-3}, "FAILED", 0, error='=HYPERLINK("http://x", "diverged")'),
        ],
    )
    finished, failed = csv.DictReader(io.StringIO(text))
    assert list(finished) == ["trial", "trajectory", "status", "metric", *keys, "error"]
    assert float(finished["metric"]) == 0.7000000000000001 and float(finished[acts]) == 0.1 + 0.2
    assert finished[idle] == "", "it does not act"
    assert failed["metric"] == ""
    assert float(failed[acts]) == -1e-3, "a number below zero is no formula"
    assert failed["error"] == '\'=HYPERLINK("http://x", "diverged")'
