"""The command line. Light at import: torch, ray, mlflow and sklearn are imported by the commands that need them."""

from __future__ import annotations

import atexit
import gc
import json
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.console import Console
from typer.core import TyperCommand, TyperGroup
from typer.exceptions import TyperException

from study.documents import StudyError, apply
from study.interrupts import StudyHaltedError
from study.options import (
    Overrides,
    Together,
    check_cluster,
    check_new_ledger,
    check_timeout,
    ledger_study,
    read_data_roots,
    read_overrides,
    refuse_credentials,
    require_free_port,
    require_ledger,
    storage_address,
    tracking_address,
)
from study.running import FAILED, UI_PORT, Launch, print_plan, report_at, run_study
from study.searches import commands as search_cli
from study.storage.places import Address, AwayError
from study.storage.sharing import reach

if TYPE_CHECKING:
    from analysis.schema import StudyHeader

BAD_INPUT, INTERRUPTED = 2, 130


class StudyGroup(TyperGroup):
    """`launch.py STUDY …` runs a study: a first word that is no command is the name of one."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Insert the command `run` in front of a study's name."""
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            args = ["run", *args]
        return super().parse_args(ctx, args)


class RunCommand(TyperCommand):
    """The command `run`, which users call by a study's name."""

    def format_usage(self, ctx: Any, formatter: Any) -> None:
        """Show the command as it is typed."""
        formatter.write_usage("launch.py", "STUDY|FILE [OPTIONS]")


app = typer.Typer(
    cls=StudyGroup,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Ablation and hyperparameter studies of fine-tuning: declared once, trained once, tables to defend.\n\n"
    "`launch.py STUDY [OPTIONS]` runs a study: a shipped one by name (see `list`) or a YAML file. "
    "`launch.py STUDY --help` names its options.",
)

StudyName = Annotated[str, typer.Argument(metavar="STUDY|FILE", help="shipped study or YAML file")]
Overriding = Annotated[
    list[str] | None, typer.Option("-o", "--override", metavar="KEY=VALUE", help="override any key by dotted path")
]
Storage = Annotated[
    str | None,
    typer.Option(metavar="DIR|URI", help="folder, or s3://BUCKET/PREFIX; default: outputs, or outputs/smoke"),
]
Tracking = Annotated[str | None, typer.Option(metavar="URI", help="MLflow; default: sqlite file in the storage")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="tracebacks and the output of libraries")]
Smoke = Annotated[bool, typer.Option("--smoke", help="the smallest honest run of the study")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON for machines")]


@app.command(hidden=True, cls=RunCommand)
def run(
    study: StudyName,
    override: Overriding = None,
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
    timeout: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="a stage whose set-up or next epoch takes longer has hung: another worker goes on from its last "
            "epoch, execution.max_failures times; waiting for a slot does not count; default: no limit",
        ),
    ] = None,
    no_sharing: Annotated[bool, typer.Option("--no-sharing", help="train every cell alone, without caches")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="say what would run and what it costs; run nothing")] = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Run a study, or with --plan say what would run."""
    from study.joint import find_joint
    from study.joint_running import run_or_plan
    from study.spec import Choices, find_study, load_study

    said = Together()
    overrides = said.value(Overrides({}, {}), lambda: read_overrides(override, seeds, backbone))
    no_roots: dict[str, str] = {}
    roots = said.value(no_roots, lambda: read_data_roots(data_root))
    place = said.value(Address(Path()), lambda: storage_address(storage, smoke))
    said.value(None, lambda: reach(place))
    said.value(None, lambda: check_timeout(timeout))
    if not plan:
        said.value(None, lambda: check_cluster(address, executor))
        said.value(None, lambda: check_new_ledger(tracking_address(tracking_uri, place.folder)))
    said.raise_if_any()
    choices = Choices(overrides.values, dataset, roots, smoke, overrides.typed)
    if (joint := find_joint(study)) is not None:
        launch = Launch(place, tracking_uri, address, executor, not no_sharing, timeout, as_json, verbose)
        run_or_plan(joint, choices, launch, plan_only=plan)
        return
    declared = load_study(find_study(study), choices)
    launch = Launch(place, tracking_uri, address, executor, not no_sharing, timeout, as_json, verbose)
    if declared.search is not None:
        from study.searches.running import SearchLaunch, print_search_plan, run_search

        if plan:
            print_search_plan(declared, SearchLaunch(launch))
            return
        raise typer.Exit(run_search(declared, SearchLaunch(launch)))
    if plan:
        print_plan(declared, launch)
        return
    raise typer.Exit(run_study(declared, launch))


app.command(short_help="Search with Optuna, then confirm the best over several seeds.")(search_cli.search)
app.command("ablate-best", short_help="Leave-one-out around the best trial of a search.")(search_cli.ablate_best)


@app.command("list")
def list_studies() -> None:
    """Shipped studies and known data sets."""
    from study.joint import load_joint
    from study.spec import load_study, shipped_joint_studies, shipped_studies
    from trainables.data.registry import DATASETS

    console = Console()
    console.print("Studies", style="bold")
    for name, path in shipped_studies().items():
        declared = load_study(path)
        console.print(f"  {name:14} {declared.title} ({len(declared.cells())} cells)", highlight=False)
    for name, path in shipped_joint_studies().items():
        joint = load_joint(path)
        console.print(f"  {name:14} {joint.title} ({joint.cells} cells)", highlight=False)
    console.print("Data sets", style="bold")
    for name, info in DATASETS.items():
        console.print(f"  {name:14} {info.title}", highlight=False)


@app.command()
def schema() -> None:
    """JSON schema of study files, for editors."""
    from study.spec import study_schema

    print(json.dumps(study_schema(), indent=2))


@app.command(short_help="Read a data set as a study would, and count.")
def check(
    dataset: Annotated[str, typer.Argument(help="data set, see `list`")],
    data_root: Annotated[Path | None, typer.Option(metavar="DIR", help="its folder, as distributed")] = None,
    override: Overriding = None,
    tables_only: Annotated[bool, typer.Option("--tables-only", help="read the tables, open no image")] = False,
    findings: Annotated[
        Path | None, typer.Option(metavar="FILE", help="list of faults; default: findings-DATASET.csv, here")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Read a data set as a study would, and list what would falsify a result (then exit status 1)."""
    from rich.progress import Progress

    from study.dataset_check import FINDINGS, check_dataset, text_of, write_findings

    named: dict[str, Any] = {"name": dataset} | ({"root": str(data_root)} if data_root else {})
    given = apply({"dataset": named}, read_overrides(override, None, None).values)
    errors = Console(stderr=True)
    with Progress(console=errors, transient=True, disable=tables_only or not errors.is_terminal) as bar:
        task = bar.add_task("images", total=None)
        found = check_dataset(
            given["dataset"], tables_only=tables_only, seen=lambda total: bar.update(task, total=total, advance=1)
        )
    if as_json:
        print(json.dumps(found.facts(), indent=2))
    else:
        Console().print(text_of(found), highlight=False, markup=False, soft_wrap=True)
    faults = found.faults()
    if faults:
        path = findings or Path(FINDINGS.format(dataset=found.dataset))
        write_findings(faults, path)
        errors.print(f"{len(faults):,} faults, listed in {path}", highlight=False, soft_wrap=True)
        raise typer.Exit(FAILED)


@app.command()
def status(
    study: StudyName,
    storage: Storage = None,
    tracking_uri: Tracking = None,
    smoke: Smoke = False,
    verbose: Verbose = False,
) -> None:
    """How far a study has come, from its ledger; works while it runs."""
    from study.joint_running import joint_status, place_of

    if (joint := place_of(study, storage, tracking_uri, smoke)) is not None:
        joint_status(*joint)
        return
    at = _ledger_of(study, storage, tracking_uri, smoke)
    from analysis.records import load
    from study.status import status_table

    Console().print(status_table(load(at.address, at.study)))


@app.command(short_help="Tables, figures and report again, from the ledger.")
def report(
    study: StudyName,
    storage: Storage = None,
    tracking_uri: Tracking = None,
    smoke: Smoke = False,
    verbose: Verbose = False,
) -> None:
    """Build tables, figures and report.html again, from the ledger alone."""
    from study.joint_running import place_of, report_joint

    if (joint := place_of(study, storage, tracking_uri, smoke)) is not None:
        report_joint(*joint)
        return
    at = _ledger_of(study, storage, tracking_uri, smoke)
    from analysis.records import load
    from analysis.report import terminal_table, write_report
    from study.pictures import kept_images
    from study.storage.sharing import bring, share_study

    records = load(at.address, at.study)
    _refuse_search(records.header)
    again = f"python study/launch.py report {at.study} {Launch(at.storage, tracking_uri).ledger_options}"
    bring(at.storage, f"{at.study}/pictures", replace=True)
    with report_at(at.report, again) as place:
        paths = write_report(records, place, kept_images(at.storage.folder, at.study))
        share_study(at.storage, at.study)
    console = Console()
    console.print(terminal_table(records))
    console.print(f"report: {paths.html}", highlight=False, soft_wrap=True)


@app.command(short_help="Fail where tables differ from the ledger.")
def verify(
    study: StudyName,
    storage: Storage = None,
    tracking_uri: Tracking = None,
    smoke: Smoke = False,
    verbose: Verbose = False,
) -> None:
    """Compute the tables again from the ledger and fail where the written ones differ."""
    from study.joint_running import place_of, verify_joint_study

    if (joint := place_of(study, storage, tracking_uri, smoke)) is not None:
        raise typer.Exit(verify_joint_study(*joint))
    at = _ledger_of(study, storage, tracking_uri, smoke)
    from analysis.records import load
    from analysis.report import verify as drifts_of
    from study.storage.sharing import written_report

    records = load(at.address, at.study)
    _refuse_search(records.header)
    with written_report(at.storage, at.study) as written:
        drifts = drifts_of(records, written)
    for drift in drifts:
        print(drift)
    if drifts:
        raise typer.Exit(FAILED)
    print(f"{at.study}: the tables are those of the ledger")


@app.command()
def ui(
    storage: Storage = None,
    tracking_uri: Tracking = None,
    smoke: Smoke = False,
    port: Annotated[int, typer.Option(help="port on loopback")] = UI_PORT,
) -> None:
    """Open the MLflow UI over the ledger, on loopback."""
    uri = tracking_address(tracking_uri, storage_address(storage, smoke).folder)
    require_ledger(uri)
    if uri.startswith("http"):
        print(f"the ledger is served at {uri}")
        return
    require_free_port(port)
    print(f"MLflow UI at http://127.0.0.1:{port} (Ctrl-C ends it)", flush=True)
    arguments = ["-m", "mlflow", "ui", "--backend-store-uri", uri, "--host", "127.0.0.1", "--port", str(port)]
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")  # seven processes for what a study has not
    os.execv(sys.executable, [sys.executable, *arguments])


def main() -> None:
    """Run the command line; bad input is one clear message and exit status 2."""
    atexit.register(gc.freeze)  # or Python looks through all objects of torch and MLflow for cycles: seconds
    try:
        refuse_credentials(sys.argv[1:])
        status = app(args=sys.argv[1:] or ["--help"], standalone_mode=False)
    except TyperException as error:
        _refuse([f"{error.format_message()} See `launch.py {_helped(sys.argv[1:])}--help`."])
    except typer.Abort:
        raise SystemExit(INTERRUPTED) from None
    except StudyError as error:
        _refuse(error.problems)
    except (StudyHaltedError, AwayError) as error:
        _refuse([str(error)], FAILED)
    except (ValueError, RuntimeError) as error:
        if type(error).__name__ not in ("DataError", "BackboneError", "LedgerError"):
            raise  # a fault of ours: its place must not be lost
        _refuse(str(error).split("\n"))
    raise SystemExit(status or 0)


def _helped(arguments: list[str]) -> str:
    """The command whose options were meant."""
    first = arguments[0] if arguments else "-"
    return "" if first.startswith("-") else f"{shlex.quote(first)} "


def _refuse(problems: Any, status: int = BAD_INPUT) -> None:
    if {"-v", "--verbose"} & set(sys.argv):
        import traceback

        traceback.print_exc()
    console = Console(stderr=True)
    for problem in problems:
        console.print("[red]error[/]", end=" ")
        console.print(problem, highlight=False, markup=False, soft_wrap=True)
    raise SystemExit(status)


# -- reading the ledger ----------------------------------------------------------------------------------------------


class LedgerPlace(NamedTuple):
    """A study in a ledger, and where its outputs lie."""

    study: str
    storage: Address
    address: str

    @property
    def report(self) -> Path:
        """Folder of tables and report."""
        return self.storage.folder / self.study / "report"


def _refuse_search(header: StudyHeader) -> None:
    """Trials are compared by no table; what confirms them is a study of its own."""
    if header.search:
        raise StudyError(
            [
                f"{header.study}: a search; its report is written by `launch.py search`, and its winners' tables are "
                f"those of {header.study}-confirm"
            ]
        )


def _ledger_of(study: str, storage: str | None, tracking_uri: str | None, smoke: bool) -> LedgerPlace:
    """Where a study's ledger is; refused before anything heavy is imported if it is not there."""
    place = storage_address(storage, smoke)
    address = tracking_address(tracking_uri, place.folder)
    require_ledger(address)
    return LedgerPlace(ledger_study(study), place, address)
