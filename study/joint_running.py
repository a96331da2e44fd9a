"""What `launch.py` does with a joint study: plan and check all its studies, run them, report them together."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from study.documents import StudyError
from study.joint import JointStudy, find_joint, load_joint
from study.options import require_ledger, storage_address
from study.running import (
    FAILED,
    Launch,
    planned_for,
    prepared,
    report_at,
    require_images,
    run_together,
    say_where,
)

if TYPE_CHECKING:
    from analysis.records import StudyRecords
    from study.driver import Launched
    from study.layers import Choices
    from study.plan import Plan


def run_or_plan(path: Path, choices: Choices, launch: Launch, *, plan_only: bool) -> None:
    """What `launch.py` does with a joint study's file; ends with the exit status of the run."""
    joint = load_joint(path, choices)
    if plan_only:
        print_joint_plan(joint, launch)
    else:
        raise SystemExit(run_joint(joint, launch))


def run_joint(joint: JointStudy, launch: Launch) -> int:
    """Run what is missing of all studies, and show their tables side by side.

    Trials of studies that have nothing in common run beside each other, so that no slot waits for a study's last
    trial; in this process, which has one slot, and where one study begins as another one does, studies run in turn.

    Returns:
        exit status: 0 every cell of every study has finished, 1 some have not.

    Raises:
        StudyError: with what is wrong with any of them; nothing was trained.
    """
    console = Console(stderr=launch.as_json)
    with prepared(launch, console):
        from study.joint_schedule import lots_of

        plans = _plans(joint, launch, download=True)
        _require_all_images(plans)
        plans = _prepare(plans, launch, console)
        ended: list[Launched] = []
        for lot in [[plan] for plan in plans] if launch.executor == "local" else lots_of(plans):
            for number, plan in enumerate(lot, len(ended) + 1):
                heading = f"{number}/{len(plans)} {plan.study.name}: {plan.study.title}"
                console.print(heading, style="bold", highlight=False, markup=False)
            ended += run_together(lot, replace(launch, as_json=False), console)
        complete = all(launched.complete for launched in ended)
        report = write_joint(joint, launch, console)
    if launch.as_json:
        print(json.dumps({"report": str(report), "complete": complete}))
    say_where(launch, ended[-1].ui_path, console)
    return 0 if complete else FAILED


def print_joint_plan(joint: JointStudy, launch: Launch) -> None:
    """Say what would run of every study and what it costs; nothing is written."""
    from study.plan_view import plan_table
    from study.schedule import pending_schedule

    plans = _plans(joint, launch, download=False)
    pending = [pending_schedule(plan, launch.storage).pending_units for plan in plans]
    if launch.as_json:
        studies = [plan.as_json() | {"pending_units": units} for plan, units in zip(plans, pending, strict=True)]
        print(json.dumps({"study": joint.name, "cells": joint.cells, "studies": studies}, indent=2))
        return
    console = Console()
    console.print(f"{joint.name}: {joint.title}; {joint.cells} cells in {len(plans)} studies", highlight=False)
    for plan, units in zip(plans, pending, strict=True):
        console.print(plan_table(plan, units))


# -- reading the ledger ----------------------------------------------------------------------------------------------


def place_of(
    study: str, storage: str | None, tracking_uri: str | None, smoke: bool
) -> tuple[JointStudy, Launch] | None:
    """A joint study by name or path, and where its studies' ledger and outputs lie; None where it is none.

    Raises:
        LedgerError: there is no ledger.
    """
    path = find_joint(study)
    if path is None:
        return None
    launch = Launch(storage_address(storage, smoke), tracking_uri)
    require_ledger(launch.ledger)
    return load_joint(path), launch


def joint_status(joint: JointStudy, launch: Launch) -> None:
    """How far each study has come; one that has not begun is not in the ledger yet."""
    from analysis.records import load, studies_of
    from study.status import status_table

    console = Console()
    begun = studies_of(launch.ledger)
    for study in joint.studies:
        if study.name in begun:
            console.print(status_table(load(launch.ledger, study.name)))
        else:
            console.print(f"{study.name}: {study.title}. Not begun.", highlight=False, markup=False)


def report_joint(joint: JointStudy, launch: Launch) -> None:
    """Write each study's report again, and that of all of them."""
    from analysis.report import write_report
    from study.pictures import kept_images
    from study.storage.sharing import bring, share_study

    for records in records_of(joint, launch.ledger):
        name = records.header.study
        again = f"python study/launch.py report {name} {launch.ledger_options}"
        bring(launch.storage, f"{name}/pictures", replace=True)
        with report_at(launch.folder / name / "report", again) as place:
            write_report(records, place, kept_images(launch.folder, name))
            share_study(launch.storage, name)
    write_joint(joint, launch, Console())


def verify_joint_study(joint: JointStudy, launch: Launch) -> int:
    """Compare every written table with the ledger, those of the studies and their joint one.

    Returns:
        exit status: 0 they are those of the ledger, 1 some differ.
    """
    from analysis.joint import verify_joint
    from analysis.report import verify
    from study.storage.sharing import written_report

    studies = records_of(joint, launch.ledger)
    drifts = []
    for records in studies:
        with written_report(launch.storage, records.header.study) as written:
            drifts += [f"{records.header.study}: {drift}" for drift in verify(records, written)]
    with written_report(launch.storage, joint.name) as written:
        drifts += [f"{joint.name}: {drift}" for drift in verify_joint(studies, written)]
    for drift in drifts:
        print(drift)
    if drifts:
        return FAILED
    print(f"{joint.name}: the tables are those of the ledger")
    return 0


def write_joint(joint: JointStudy, launch: Launch, console: Console) -> Path:
    """Write the report of all studies from the ledger, and show their table; its page."""
    from analysis.joint import JointHeader, joint_terminal_table, write_joint_report
    from study.pictures import kept_images
    from study.storage.sharing import share_study

    studies = records_of(joint, launch.ledger)
    header = JointHeader(joint.name, joint.title, joint.description, _command(studies))
    again = f"python study/launch.py report {joint.name} {launch.ledger_options}"
    with report_at(launch.folder / joint.name / "report", again) as place:
        sources = [kept_images(launch.folder, records.header.study) for records in studies]
        page = write_joint_report(header, studies, place, sources)
        share_study(launch.storage, joint.name)
    console.print(joint_terminal_table(header, studies))
    console.print(f"report: {page}", highlight=False, soft_wrap=True)
    return page


def _command(studies: Iterable[StudyRecords]) -> str:
    """The commands that the studies were last run by."""
    return "; ".join(dict.fromkeys(records.header.provenance.get("command", "") for records in studies))


def records_of(joint: JointStudy, ledger: str) -> list[StudyRecords]:
    """What the ledger holds of every study.

    Raises:
        LedgerError: the ledger does not hold one of them.
    """
    from analysis.records import load

    return [load(ledger, study.name) for study in joint.studies]


def _plans(joint: JointStudy, launch: Launch, *, download: bool) -> list[Plan]:
    """Plans of all studies.

    Raises:
        StudyError: with what keeps any of them from being planned.
    """
    plans: list[Plan] = []
    problems: list[str] = []
    for study in joint.studies:
        try:
            plans.append(planned_for(study, launch, download=download))
        except StudyError as error:
            problems += error.problems
    _raise(problems)
    return plans


def _require_all_images(plans: Iterable[Plan]) -> None:
    problems: list[str] = []
    for plan in plans:
        try:
            require_images(plan)
        except StudyError as error:
            problems += error.problems
    _raise(problems)


def _prepare(plans: list[Plan], launch: Launch, console: Console) -> list[Plan]:
    """Decode all images now: a file that cannot be read is told before the first study trains, not after."""
    from study.preparing import prepare_data
    from study.store import Store

    store = Store(launch.storage, caches=launch.sharing)
    problems: list[str] = []
    for plan in plans:
        try:
            prepare_data(plan, store, console)
        except StudyError as error:
            problems += error.problems
    _raise(problems)
    return [replace(plan, images_to_decode=0) for plan in plans]


def _raise(problems: list[str]) -> None:
    if problems:
        raise StudyError(dict.fromkeys(problems))
