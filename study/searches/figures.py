"""Figures of a search, by Optuna's own plotting: history, importances, slices, Pareto front.

Imports optuna, beside `search` and `search_storage`: drawing takes matplotlib, which asking and telling do without.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")

import matplotlib.pyplot as plt
import optuna
from optuna.trial import TrialState
from optuna.visualization import matplotlib as drawn

from analysis.figures import Drawing

DPI = 110
LEAST_FOR_IMPORTANCE = 8  # finished trials below which a forest has nothing to learn from


def draw_search(study: optuna.Study, labels: tuple[str, ...]) -> list[Drawing]:
    """Every figure that the trials have numbers for.

    Args:
        study: with at least one finished trial, or no figure is drawn.
        labels: of the objectives, in their order.
    """
    finished = [t for t in study.get_trials(deepcopy=False) if t.state == TrialState.COMPLETE]
    if not finished:
        return []
    with warnings.catch_warnings(), mpl.rc_context({"svg.hashsalt": "spft-studies", "font.size": 9}):
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        warnings.simplefilter("ignore", UserWarning)  # of axes that Optuna lays out itself
        return list(_drawings(study, labels, len(finished)))


def _drawings(study: optuna.Study, labels: tuple[str, ...], finished: int) -> Iterator[Drawing]:
    several, searched = len(labels) > 1, _varied(study)
    for i, label in enumerate(labels):
        of = {"target": _objective(i), "target_name": label} if several else {"target_name": label}
        suffix = f"-{i}" if several else ""
        yield _drawing(
            f"history{suffix}",
            f"{label}, trial by trial",
            f"{finished} finished trials by number, with the best value so far",
            lambda of=of: drawn.plot_optimization_history(study, **of),  # type: ignore[misc]
        )
        if finished >= LEAST_FOR_IMPORTANCE and searched:
            yield _drawing(
                f"importances{suffix}",
                f"What {label} depends on",
                "importance of each parameter that all finished trials have, by a forest over them (fANOVA)",
                lambda of=of: drawn.plot_param_importances(study, **of),  # type: ignore[misc]
            )
        if searched:
            yield _drawing(
                f"slices{suffix}",
                f"{label} along each parameter",
                "one panel a parameter, one point a finished trial, darker the later",
                lambda of=of: drawn.plot_slice(study, params=searched, **of),  # type: ignore[misc]
            )
    if len(labels) == 2:
        yield _drawing(
            "pareto",
            f"{labels[0]} against {labels[1]}",
            "finished trials; those that no other trial betters in both are marked",
            lambda: drawn.plot_pareto_front(study, target_names=list(labels)),
        )


def _objective(index: int) -> Callable[[optuna.trial.FrozenTrial], float]:
    return lambda trial: trial.values[index]


def _varied(study: optuna.Study) -> list[str]:
    """Parameters of which finished trials have more than one value."""
    values: dict[str, set[Any]] = {}
    for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        for name, value in trial.params.items():
            values.setdefault(name, set()).add(value)
    return sorted(name for name, found in values.items() if len(found) > 1)


def _drawing(name: str, title: str, alt: str, draw: Callable[[], Any]) -> Drawing:
    np.random.seed(0)
    axes = np.atleast_1d(np.asarray(draw(), dtype=object)).ravel()
    figure = axes[0].figure
    if name.startswith("slices"):
        figure.set_size_inches(max(4.0, 2.4 * len(axes)), 3.4)
    else:
        figure.set_size_inches(8.5, 4.2)
    png, svg = io.BytesIO(), io.BytesIO()
    figure.savefig(png, format="png", dpi=DPI, bbox_inches="tight", metadata={"Software": None})
    figure.savefig(svg, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    return Drawing(name.partition("-")[0], f"search-{name}", title, alt, png.getvalue(), svg.getvalue())
