"""Optuna's figures of a search: which there are, of which trials, and that they are the same every time."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image
from test_search import opened, told

from study.searches.figures import LEAST_FOR_IMPORTANCE, draw_search

LABEL = "validation Macro AUC"


def test_a_search_without_a_finished_trial_has_no_figure(tmp_path: Path) -> None:
    trials = opened(tmp_path)
    trials.propose()
    assert draw_search(trials.study, (LABEL,)) == []


@pytest.mark.parametrize("labels", [(LABEL,), pytest.param((LABEL, "training units"), marks=pytest.mark.slow)])
def test_history_importances_and_slices_of_each_objective_and_the_front_of_two(
    tmp_path: Path, labels: tuple[str, ...]
) -> None:
    """Also where parameters act in some of the trials alone."""
    trials = opened(tmp_path, trials=12, objectives=("metric", "units")[: len(labels)])
    while trials.count < 12:
        told(trials, trials.propose(), len(labels))
    study = trials.study
    drawings = draw_search(study, labels)
    several = [f"search-{what}-{i}" for i in (0, 1) for what in ("history", "importances", "slices")]
    expected = [*several, "search-pareto"] if len(labels) > 1 else [name[:-2] for name in several[:3]]
    assert [drawing.name for drawing in drawings] == expected
    for drawing in drawings:
        pixels = Image.open(io.BytesIO(drawing.png)).convert("L")
        assert pixels.getextrema()[0] < 128 < pixels.getextrema()[1], "something is drawn"
        assert min(pixels.size) > 250
        assert any(label in drawing.title for label in labels)
    again = draw_search(study, labels)
    assert [one.svg for one in again] == [one.svg for one in drawings]


def test_no_importance_is_drawn_from_a_handful_of_trials(tmp_path: Path) -> None:
    trials = opened(tmp_path)
    while trials.count < LEAST_FOR_IMPORTANCE - 2:
        told(trials, trials.propose())
    names = [drawing.name for drawing in draw_search(trials.study, (LABEL,))]
    assert names == ["search-history", "search-slices"]
