"""The commands of a search: `search` and `ablate-best`. Light at import, as every command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from study.documents import StudyError
from study.options import (
    Overrides,
    Together,
    check_cluster,
    check_new_ledger,
    check_timeout,
    read_data_roots,
    read_overrides,
    storage_address,
    tracking_address,
)
from study.running import Launch
from study.storage import places
from study.storage.sharing import reach

if TYPE_CHECKING:
    from study.searches.running import SearchLaunch
    from study.spec import Study

SEARCH = "search"

Name = Annotated[
    str, typer.Argument(metavar="[STUDY|FILE]", help="a study that declares a search; default: the task's")
]
Task = Annotated[str | None, typer.Option(metavar="TASK", help="classification, detection or segmentation")]
Trials = Annotated[int | None, typer.Option(metavar="N", help="configurations to evaluate; more than before goes on")]
Seconds = Annotated[
    float | None, typer.Option("--timeout", metavar="SECONDS", help="begin no further trial after that")
]
Hung = Annotated[
    float | None, typer.Option("--stage-timeout", metavar="SECONDS", help="a stage's epoch that takes longer has hung")
]
Sampler = Annotated[str | None, typer.Option(metavar="NAME", help="tpe, random, gp, cmaes, nsga2")]
Pruner = Annotated[str | None, typer.Option(metavar="NAME", help="asha, hyperband, median, none")]
OptunaStorage = Annotated[
    str | None, typer.Option(metavar="URL", help="database for Optuna; default: a journal file in the storage")
]
Override = Annotated[
    list[str] | None, typer.Option("-o", "--override", metavar="KEY=VALUE", help="override any key by dotted path")
]
Seeds = Annotated[str | None, typer.Option(metavar="0,1,2", help="training seeds of the confirmation")]
Smoke = Annotated[bool, typer.Option("--smoke", help="the smallest honest run")]
Dataset = Annotated[str | None, typer.Option(metavar="NAME", help="data set, see `list`")]
Roots = Annotated[list[str] | None, typer.Option("--data-root", metavar="[NAME=]DIR", help="folder of a data set")]
Backbone = Annotated[str | None, typer.Option(metavar="HUB_ID|DIR", help="encoder")]
Storage = Annotated[
    str | None,
    typer.Option(
        metavar="DIR|URI", help="folder of results, or s3://BUCKET/PREFIX; default: outputs, or outputs/smoke"
    ),
]
Tracking = Annotated[str | None, typer.Option(metavar="URI", help="MLflow; default: sqlite file in the storage")]
Address = Annotated[str | None, typer.Option(metavar="RAY", help="Ray cluster; default: this machine")]
Executor = Annotated[str, typer.Option(metavar="ray|local", help="local: one stage after another, here")]
NoSharing = Annotated[bool, typer.Option("--no-sharing", help="train every trial alone, without caches")]
Plan = Annotated[bool, typer.Option("--plan", help="estimate the cost; run nothing")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON for machines")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="tracebacks and the output of libraries")]


def search(
    study: Name = "",
    task: Task = None,
    trials: Trials = None,
    timeout: Seconds = None,
    sampler: Sampler = None,
    pruner: Pruner = None,
    optuna_storage: OptunaStorage = None,
    override: Override = None,
    seeds: Seeds = None,
    smoke: Smoke = False,
    dataset: Dataset = None,
    data_root: Roots = None,
    backbone: Backbone = None,
    storage: Storage = None,
    tracking_uri: Tracking = None,
    address: Address = None,
    executor: Executor = "ray",
    stage_timeout: Hung = None,
    no_sharing: NoSharing = False,
    plan: Plan = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Search the best configuration of a study with Optuna, and confirm it over several seeds."""
    given = [*(override or [])]
    for name, value in (("trials", trials), ("sampler", sampler), ("pruner", pruner)):
        if value is not None:
            given.append(f"search.{name}={value}")
    said = Together()
    place = said.value(places.Address(Path()), lambda: storage_address(storage, smoke))
    said.value(None, lambda: reach(place))
    launch = Launch(place, tracking_uri, address, executor, not no_sharing, stage_timeout, as_json, verbose)
    said.value(None, lambda: check_timeout(timeout))
    said.value(None, lambda: check_timeout(stage_timeout, "--stage-timeout"))
    declared = _declared(said, study, task, given, seeds, smoke, dataset, data_root, backbone, None if plan else launch)
    from study.searches.running import SearchLaunch, print_search_plan, run_search

    how = SearchLaunch(launch, timeout, optuna_storage)
    if plan:
        print_search_plan(declared, how)
        return
    raise typer.Exit(run_search(declared, how))


def ablate_best(
    study: Name = "",
    task: Task = None,
    optuna_storage: OptunaStorage = None,
    override: Override = None,
    seeds: Seeds = None,
    smoke: Smoke = False,
    dataset: Dataset = None,
    data_root: Roots = None,
    backbone: Backbone = None,
    storage: Storage = None,
    tracking_uri: Tracking = None,
    address: Address = None,
    executor: Executor = "ray",
    stage_timeout: Hung = None,
    no_sharing: NoSharing = False,
    plan: Plan = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Leave-one-out around the best trial of a finished search; the options are those the search was run with."""
    said = Together()
    place = said.value(places.Address(Path()), lambda: storage_address(storage, smoke))
    said.value(None, lambda: reach(place))
    launch = Launch(place, tracking_uri, address, executor, not no_sharing, stage_timeout, as_json, verbose)
    said.value(None, lambda: check_timeout(stage_timeout, "--stage-timeout"))
    declared = _declared(
        said, study, task, override, seeds, smoke, dataset, data_root, backbone, None if plan else launch
    )
    from study.running import print_plan
    from study.searches.running import SearchLaunch, ablation_around_best
    from study.searches.running import ablate_best as run_ablation

    how: SearchLaunch = SearchLaunch(launch, None, optuna_storage)
    if plan:
        print_plan(ablation_around_best(declared, how), launch)
        return
    raise typer.Exit(run_ablation(declared, how))


def _declared(
    said: Together,
    study: str,
    task: str | None,
    override: list[str] | None,
    seeds: str | None,
    smoke: bool,
    dataset: str | None,
    data_root: list[str] | None,
    backbone: str | None,
    launch: Launch | None,
) -> Study:
    """The study that the options mean, all that is wrong with them said together.

    Args:
        launch: that will run; None where nothing is run.
    """
    from study.spec import Choices, find_study, load_study

    overrides = said.value(Overrides({}, {}), lambda: read_overrides(override, seeds, backbone))
    no_roots: dict[str, str] = {}
    roots = said.value(no_roots, lambda: read_data_roots(data_root))
    name = said.value(SEARCH, lambda: _named(study, task))
    if launch is not None:
        said.value(None, lambda: check_cluster(launch.address, launch.executor))
        said.value(None, lambda: check_new_ledger(tracking_address(launch.tracking_uri, launch.folder)))
    said.raise_if_any()
    return load_study(find_study(name), Choices(overrides.values, dataset, roots, smoke, overrides.typed))


def _named(study: str, task: str | None) -> str:
    """The study that was named, or the shipped search of a task."""
    from typing import get_args

    from trainables.settings import Task as AnyTask

    tasks = get_args(AnyTask)
    if task is not None and task not in tasks:
        raise StudyError([f"--task {task}: expected one of {', '.join(tasks)}"])
    if study and task is not None:
        raise StudyError([f"{study} and --task {task}: a study has its task; give one of them"])
    if study:
        return study
    return SEARCH if task in (None, "classification") else f"{SEARCH}_{task}"
