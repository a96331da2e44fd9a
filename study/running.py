"""What `launch.py STUDY` does and says: plan, run, conclude. Imports what is heavy when it comes to it."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from analysis.credentials import without_credentials
from study.documents import StudyError
from study.interrupts import ClusterLostError, Interrupted, StudyHaltedError, answered_signals
from study.options import tracking_address
from study.storage.places import Address, AwayError

if TYPE_CHECKING:
    from study.chains import Chain
    from study.driver import Launched, RunOptions
    from study.plan import Plan
    from study.spec import Study
    from trainables.data.index import Index

FAILED = 1
UI_PORT = 5000


@dataclass(frozen=True)
class Launch:
    """What the options of a run say.

    Attributes:
        storage: of results.
        tracking_uri: of the ledger; None: the file in the storage's folder on this machine.
        address: of a Ray cluster; None: this machine.
        timeout: seconds after which a stage counts as hung.
    """

    storage: Address
    tracking_uri: str | None = None
    address: str | None = None
    executor: str = "ray"
    sharing: bool = True
    timeout: float | None = None
    as_json: bool = False
    verbose: bool = False

    @property
    def folder(self) -> Path:
        """On this machine: of results, or of what is not shared where they are on a URI."""
        return self.storage.folder

    @property
    def ledger(self) -> str:
        """Its address."""
        return tracking_address(self.tracking_uri, self.folder)

    @property
    def ledger_options(self) -> str:
        """The options with which other commands find the ledger and the report."""
        tracking = f" --tracking-uri {shlex.quote(self.tracking_uri)}" if self.tracking_uri else ""
        return f"--storage {shlex.quote(self.storage.shown)}{tracking}"


def run_study(declared: Study, launch: Launch) -> int:
    """Run what is missing of a study and show its table.

    Returns:
        exit status: 0 every cell has finished, 1 some have not.
    """
    console = Console(stderr=launch.as_json)
    with prepared(launch, console):
        launched = run_to_table(declared, launch, console)
    say_where(launch, launched.ui_path, console)
    return 0 if launched.complete else FAILED


def run_to_table(declared: Study, launch: Launch, console: Console) -> Launched:
    """Run a study within `prepared`, and show its table."""
    planned = planned_for(declared, launch, download=True)
    require_images(planned)
    return run_planned(planned, launch, console)


def run_planned(planned: Plan, launch: Launch, console: Console) -> Launched:
    """Run a plan whose images are there, within `prepared`, and show its table."""
    (launched,) = run_together([planned], launch, console)
    return launched


def run_together(plans: Sequence[Plan], launch: Launch, console: Console) -> list[Launched]:
    """Run plans beside each other, see `study.driver.run_plans`, and show their tables."""
    from study.driver import run_plans

    launched = run_plans(plans, run_options(launch), console)
    for plan in plans:
        _conclude(plan, launch, console)
    return launched


def this_command() -> str:
    """What was typed, to be typed again; it is shown and recorded, so it never holds a password."""
    return without_credentials("python study/launch.py " + shlex.join(sys.argv[1:]))


def go_on(lost: ClusterLostError) -> str:
    """What to say of a cluster that is gone, with the command for when it is back."""
    return f"{lost}. To go on:\n  {this_command()}"


def run_options(launch: Launch) -> RunOptions:
    """A launch in the driver's terms."""
    from study.driver import RunOptions

    return RunOptions(
        launch.storage,
        this_command(),
        tracking_uri=launch.tracking_uri,
        address=launch.address,
        executor=launch.executor,
        timeout=launch.timeout,
        verbose=launch.verbose,
    )


def print_plan(declared: Study, launch: Launch) -> None:
    """Say what would run and what it costs; nothing is written."""
    from study.schedule import pending_schedule

    planned = planned_for(declared, launch, download=False)
    pending = pending_schedule(planned, launch.storage).pending_units
    if launch.as_json:
        print(json.dumps(planned.as_json() | {"pending_units": pending}, indent=2))
        return
    from study.plan_view import plan_table

    Console().print(plan_table(planned, pending))


def planned_for(declared: Study, launch: Launch, *, download: bool) -> Plan:
    """The plan of a study in a launch's storage."""
    from study.plan import make_plan

    return make_plan(declared, storage=launch.folder, sharing=launch.sharing, download=download)


def require_images(plan: Plan) -> None:
    """Refuse images that are missing, or named outside of their folder, before anything is written.

    Raises:
        StudyError: with every data set that has such.
    """
    from trainables.data.index import DataError
    from trainables.data.registry import locate
    from trainables.data.tables import root_of

    problems: dict[str, None] = {}
    located = {(root, index.digest()): index for c in plan.chains for root, index in _places(c)}
    for (root, _), index in located.items():
        if not index.synthetic:
            try:
                locate(index, root_of(index.dataset, root))
            except DataError as error:
                problems[str(error)] = None
    if problems:
        raise StudyError(problems)


def _places(chain: Chain) -> list[tuple[str | None, Index]]:
    """Folder and index of each data set that a cell looks at."""
    data, material = chain.cell.settings.dataset, chain.material
    home = (data.root, material.index)
    if material.away is None or data.test_on is None:
        return [home]
    return [home, (data.test_on.root, material.away)]


@contextmanager
def prepared(launch: Launch, console: Console) -> Iterator[None]:
    """Quiet the libraries; answer Ctrl-C and SIGTERM with the command that goes on, and the signal's exit status.

    Raises:
        StudyHaltedError: the cluster is gone; with the command that goes on.
    """
    _silence(launch.verbose)
    try:
        with answered_signals():
            yield
    except Interrupted as stopped:
        console.print(f"\nstopped by {stopped}; nothing that was finished is lost. To go on:")
        console.print(f"  {this_command()}", highlight=False, markup=False, soft_wrap=True)
        raise SystemExit(stopped.status) from None
    except ClusterLostError as lost:
        raise StudyHaltedError(go_on(lost)) from lost


def _conclude(plan: Plan, launch: Launch, console: Console) -> None:
    from analysis.records import load
    from analysis.report import terminal_table, write_report
    from study.pictures import images_of
    from study.storage.sharing import share_study

    name = plan.study.name
    records = load(launch.ledger, name)
    with report_at(
        launch.folder / name / "report", f"python study/launch.py report {name} {launch.ledger_options}"
    ) as at:
        paths = write_report(records, at, images_of(plan, launch.folder))
        share_study(launch.storage, name)
    console.print(terminal_table(records))
    units = records.header.units
    saved = units.alone / units.shared if units.shared else 1.0
    console.print(
        f"training units: {units.executed:,} executed, {units.shared:,} planned, {units.alone:,} alone ({saved:.2f}×)",
        highlight=False,
    )
    console.print(f"report: {paths.html}", highlight=False, soft_wrap=True)
    if launch.as_json:
        print(json.dumps({"report": str(paths.html), "units": units.model_dump()}))


def say_where(launch: Launch, ui_path: str, console: Console) -> None:
    """How to open the MLflow UI."""
    uri = launch.tracking_uri
    if uri is not None and uri.startswith("http"):
        console.print(f"MLflow: {uri.rstrip('/')}{ui_path}", highlight=False, soft_wrap=True)
        return
    command = f"python study/launch.py ui {launch.ledger_options}"
    console.print(
        f"MLflow: {command}\n        then http://127.0.0.1:{UI_PORT}{ui_path}", highlight=False, soft_wrap=True
    )


@contextmanager
def report_at(place: Path, command: str) -> Iterator[Path]:
    """A report that cannot be written is one clear message: the results that it shows are safe."""
    try:
        yield place
    except AwayError as error:
        raise StudyHaltedError(
            f"the report is in {place}, and cannot be copied to the storage: {error}; then `{command}`"
        ) from error
    except OSError as error:
        raise StudyHaltedError(
            f"the report cannot be written: {error.filename or place}: {error.strerror}; every result is in the "
            f"ledger: make room or the folder writable, then `{command}`"
        ) from error


def _silence(verbose: bool) -> None:
    """Libraries speak only with -v; our own warnings always."""
    import logging

    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(message)s")
    for name in ("mlflow", "alembic", "ray", "transformers", "urllib3", "git", "botocore", "aiobotocore"):
        logging.getLogger(name).setLevel(logging.INFO if verbose else logging.ERROR)
