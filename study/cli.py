"""The command line. Light at import: torch, ray, mlflow and sklearn are imported by the commands that need them."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from study.documents import StudyError, apply, parse_override

if TYPE_CHECKING:
    from study.plan import Plan
    from study.spec import Study

DEFAULT_STORAGE = Path("outputs")
FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130
UI_PORT = 5000


class StudyGroup(TyperGroup):
    """`launch.py STUDY …` runs a study: a first word that is no command is the name of one."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Insert the command `run` in front of a study's name."""
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=StudyGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Ablation and hyperparameter studies of fine-tuning: declared once, trained once, tables to defend.\n\n"
    "`launch.py STUDY [OPTIONS]` runs a study: a shipped one by name (see `list`) or a YAML file.",
)

StudyName = Annotated[str, typer.Argument(metavar="STUDY|FILE", help="shipped study or YAML file")]
Overrides = Annotated[
    list[str] | None, typer.Option("-o", "--override", metavar="KEY=VALUE", help="override any key by dotted path")
]
Storage = Annotated[Path | None, typer.Option(help="folder of results; default: outputs, or outputs/smoke")]
Tracking = Annotated[str | None, typer.Option(metavar="URI", help="MLflow; default: sqlite file in the storage")]
Smoke = Annotated[bool, typer.Option("--smoke", help="the smallest honest run of the study")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON for machines")]


@app.command(hidden=True)
def run(
    study: StudyName,
    override: Overrides = None,
    seeds: Annotated[str | None, typer.Option(metavar="0,1,2", help="training seeds")] = None,
    smoke: Smoke = False,
    dataset: Annotated[str | None, typer.Option(metavar="NAME", help="data set, see `list`")] = None,
    data_root: Annotated[
        list[str] | None, typer.Option(metavar="[NAME=]DIR", help="folder of a data set, as distributed")
    ] = None,
    backbone: Annotated[str | None, typer.Option(metavar="HUB_ID|DIR", help="encoder")] = None,
    storage: Storage = None,
    tracking_uri: Tracking = None,
    address: Annotated[str | None, typer.Option(metavar="RAY", help="Ray cluster; default: this machine")] = None,
    executor: Annotated[str, typer.Option(metavar="ray|local", help="local: one trial after another, here")] = "ray",
    no_sharing: Annotated[bool, typer.Option("--no-sharing", help="train every cell alone, without caches")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="say what would run and what it costs; run nothing")] = False,
    as_json: AsJson = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="tracebacks and the output of libraries")] = False,
) -> None:
    """Run a study, or with --plan say what would run."""
    from study.spec import Choices, find_study, load_study

    if executor not in ("ray", "local"):
        raise StudyError([f"--executor {executor}: expected ray or local"])
    overrides = _overrides(override, seeds, backbone)
    roots = _data_roots(data_root)
    declared = load_study(find_study(study), Choices(overrides, dataset, roots, smoke))
    folder = _storage(storage, smoke)
    if plan:
        _print_plan(_planned(declared, folder, not no_sharing, download=False), folder, as_json)
        return
    _run(declared, folder, tracking_uri, address, executor, not no_sharing, as_json, verbose)


@app.command("list")
def list_studies() -> None:
    """Shipped studies and known data sets."""
    from study.spec import load_study, shipped_studies
    from trainables.data.registry import DATASETS

    console = Console()
    console.print("Studies", style="bold")
    for name, path in shipped_studies().items():
        declared = load_study(path)
        console.print(f"  {name:14} {declared.title} ({len(declared.cells())} cells)", highlight=False)
    console.print("Data sets", style="bold")
    for name, info in DATASETS.items():
        console.print(f"  {name:14} {info.title}", highlight=False)


@app.command()
def schema() -> None:
    """JSON schema of study files, for editors."""
    from study.spec import study_schema

    print(json.dumps(study_schema(), indent=2))


@app.command()
def check(
    dataset: Annotated[str, typer.Argument(help="data set, see `list`")],
    data_root: Annotated[Path | None, typer.Option(metavar="DIR", help="its folder, as distributed")] = None,
    override: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Read a data set as a study would: images, groups and positives a class in each split."""
    from study.dataset_check import check_dataset

    named: dict[str, Any] = {"name": dataset} | ({"root": str(data_root)} if data_root else {})
    given = apply({"dataset": named}, _overrides(override, None, None))
    facts = check_dataset(given["dataset"])
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    Console().print(facts["text"], highlight=False, markup=False)


@app.command()
def status(study: StudyName, storage: Storage = None, tracking_uri: Tracking = None, smoke: Smoke = False) -> None:
    """How far a study has come, from its ledger; works while it runs."""
    from analysis.records import load
    from study.status import status_table

    name, folder = _ledger_name(study), _storage(storage, smoke)
    Console().print(status_table(load(_tracking(tracking_uri, folder), name)))


@app.command()
def report(study: StudyName, storage: Storage = None, tracking_uri: Tracking = None, smoke: Smoke = False) -> None:
    """Build tables, figures and report.html again, from the ledger alone."""
    from analysis.records import load
    from analysis.report import terminal_table, write_report

    name, folder = _ledger_name(study), _storage(storage, smoke)
    records = load(_tracking(tracking_uri, folder), name)
    paths = write_report(records, folder / name / "report")
    console = Console()
    console.print(terminal_table(records))
    console.print(f"report: {paths.html}", highlight=False, soft_wrap=True)


@app.command()
def verify(study: StudyName, storage: Storage = None, tracking_uri: Tracking = None, smoke: Smoke = False) -> None:
    """Compute the tables again from the ledger and fail where the written ones differ."""
    from analysis.records import load
    from analysis.report import verify as drifts_of

    name, folder = _ledger_name(study), _storage(storage, smoke)
    drifts = drifts_of(load(_tracking(tracking_uri, folder), name), folder / name / "report")
    for drift in drifts:
        print(drift)
    if drifts:
        raise typer.Exit(FAILED)
    print(f"{name}: the tables are those of the ledger")


@app.command()
def ui(
    storage: Storage = None,
    tracking_uri: Tracking = None,
    smoke: Smoke = False,
    port: Annotated[int, typer.Option(help="port on loopback")] = UI_PORT,
) -> None:
    """Open the MLflow UI over the ledger, on loopback."""
    uri = _tracking(tracking_uri, _storage(storage, smoke))
    if uri.startswith("http"):
        print(f"the ledger is served at {uri}")
        return
    print(f"MLflow UI at http://127.0.0.1:{port} (Ctrl-C ends it)", flush=True)
    arguments = ["-m", "mlflow", "ui", "--backend-store-uri", uri, "--host", "127.0.0.1", "--port", str(port)]
    os.execv(sys.executable, [sys.executable, *arguments])


def main() -> None:
    """Run the command line; bad input is one clear message and exit status 2."""
    try:
        app(standalone_mode=True)
    except StudyError as error:
        _refuse(error.problems)
    except ValueError as error:
        if type(error).__name__ not in ("DataError", "BackboneError"):
            raise
        _refuse(str(error).split("\n"))
    except RuntimeError as error:
        if type(error).__name__ != "LedgerError":
            raise
        _refuse(str(error).split("\n"))


def _refuse(problems: Any) -> None:
    if {"-v", "--verbose"} & set(sys.argv):
        import traceback

        traceback.print_exc()
    console = Console(stderr=True)
    for problem in problems:
        console.print("[red]error[/]", end=" ")
        console.print(problem, highlight=False, markup=False, soft_wrap=True)
    raise SystemExit(BAD_INPUT)


# -- what the options mean -------------------------------------------------------------------------------------------


def _overrides(given: list[str] | None, seeds: str | None, backbone: str | None) -> dict[str, Any]:
    overrides: dict[str, Any] = {}
    problems: list[str] = []
    for text in given or []:
        try:
            key, value = parse_override(text)
            overrides[key] = value
        except StudyError as error:
            problems += error.problems
    if seeds is not None:
        try:
            overrides["seeds"] = [int(seed) for seed in seeds.split(",")]
        except ValueError:
            problems.append(f"--seeds {seeds}: expected whole numbers with commas, such as 0,1,2")
    if backbone is not None:
        overrides["model.backbone"] = backbone
    if problems:
        raise StudyError(problems)
    return overrides


def _data_roots(given: list[str] | None) -> dict[str, str]:
    roots = {}
    for text in given or []:
        name, equals, folder = text.partition("=")
        roots[name if equals else ""] = folder if equals else text
    return roots


def _storage(given: Path | None, smoke: bool) -> Path:
    return given if given is not None else (DEFAULT_STORAGE / "smoke" if smoke else DEFAULT_STORAGE)


def _tracking(given: str | None, folder: Path) -> str:
    return given or f"sqlite:///{folder.resolve() / 'mlflow.db'}"


def _ledger_name(study: str) -> str:
    """The study's name in the ledger: of a file, what it says; a bare name is taken as it is."""
    if not Path(study).is_file():
        return study
    from study.spec import load_study

    return load_study(Path(study)).name


# -- running ---------------------------------------------------------------------------------------------------------


def _planned(declared: Study, folder: Path, sharing: bool, *, download: bool) -> Plan:
    from study.plan import make_plan

    return make_plan(declared, storage=folder, sharing=sharing, download=download)


def _run(
    declared: Study,
    folder: Path,
    tracking_uri: str | None,
    address: str | None,
    executor: str,
    sharing: bool,
    as_json: bool,
    verbose: bool,
) -> None:
    planned = _planned(declared, folder, sharing, download=True)
    console = Console(stderr=as_json)
    _silence(verbose)
    from study.driver import RunOptions, run_plan

    command = "python study/launch.py " + shlex.join(sys.argv[1:])
    options = RunOptions(
        folder, command, tracking_uri=tracking_uri, address=address, executor=executor, verbose=verbose
    )
    try:
        launched = run_plan(planned, options, console)
    except KeyboardInterrupt:
        console.print("\nstopped; nothing that was finished is lost. Run the same command again to go on.")
        raise SystemExit(INTERRUPTED) from None
    address = tracking_uri if tracking_uri is not None and tracking_uri.startswith("http") else None
    _conclude(declared.name, folder, tracking_uri, console, as_json)
    _say_where(folder, address, launched.ui_path, console)
    raise SystemExit(0 if launched.complete else FAILED)


def _say_where(folder: Path, server: str | None, ui_path: str, console: Console) -> None:
    if server is not None:
        console.print(f"MLflow: {server.rstrip('/')}{ui_path}", highlight=False, soft_wrap=True)
        return
    command = f"python study/launch.py ui --storage {shlex.quote(str(folder))}"
    console.print(
        f"MLflow: {command}\n        then http://127.0.0.1:{UI_PORT}{ui_path}", highlight=False, soft_wrap=True
    )


def _conclude(name: str, folder: Path, tracking_uri: str | None, console: Console, as_json: bool) -> None:
    from analysis.records import load
    from analysis.report import terminal_table, write_report

    records = load(_tracking(tracking_uri, folder), name)
    paths = write_report(records, folder / name / "report")
    console.print(terminal_table(records))
    units = records.header.units
    saved = units.alone / units.shared if units.shared else 1.0
    console.print(
        f"training units: {units.executed:,} executed, {units.shared:,} planned, {units.alone:,} alone ({saved:.2f}×)",
        highlight=False,
    )
    console.print(f"report: {paths.html}", highlight=False, soft_wrap=True)
    if as_json:
        print(json.dumps({"report": str(paths.html), "units": units.model_dump()}))


def _silence(verbose: bool) -> None:
    """Libraries speak only with -v; our own warnings always."""
    import logging

    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(message)s")
    for name in ("mlflow", "alembic", "ray", "transformers", "urllib3", "git"):
        logging.getLogger(name).setLevel(logging.INFO if verbose else logging.ERROR)


def _print_plan(planned: Plan, folder: Path, as_json: bool) -> None:
    from study.schedule import pending_schedule

    pending = pending_schedule(planned, folder).pending_units
    facts = planned.as_json() | {"pending_units": pending}
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    from study.plan_view import plan_table

    Console().print(plan_table(planned, pending))
