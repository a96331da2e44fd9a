"""Run a study: data, executor and ledger meet here, in the driver's process, and nowhere else."""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from analysis.schema import StudyHeader, Units
from analysis.tracking import LedgerError
from study import garbage
from study.chains import Chain
from study.declare import (
    cell_headers,
    counted_units,
    epochs_of,
    finished_outcome,
    no_ops,
    provenance,
    row_headers,
    study_header,
)
from study.documents import StudyError
from study.executors import Executor, LocalExecutor
from study.interrupts import Halt, StudyHaltedError, answered_signals
from study.joint_schedule import JointListener, JointSchedule
from study.ledger import Ledger
from study.ledger_entries import CellHeader, CellOutcome, Epoch, RowHeader
from study.ledger_writer import LedgerWriter
from study.plan import Cache, Plan
from study.preparing import prepare_away, prepare_data, require_disk
from study.progress import Progress
from study.schedule import Node, Schedule, pending_schedule
from study.storage.claim import claimed, lock_file
from study.storage.places import Address, AwayError
from study.store import GO_ON, Store
from trainables.cache_files import cache_name, release
from trainables.results import CellResult, EpochRecord

log = logging.getLogger(__name__)

SCRATCH_BYTES = 200_000_000  # what Ray's logs and sockets need at the least


@dataclass(frozen=True)
class RunOptions:
    """How to run a plan: where results, ledger and workers are."""

    storage: Address | Path
    command: str
    tracking_uri: str | None = None
    address: str | None = None
    executor: str = "ray"
    timeout: float | None = None
    verbose: bool = False


class Launched(NamedTuple):
    """How a launch ended: the header, whether every cell has finished, and where the MLflow UI shows the study."""

    header: StudyHeader
    complete: bool
    ui_path: str


def run_plan(
    plan: Plan, options: RunOptions, console: Console, begin: Callable[..., Session] | None = None
) -> Launched:
    """Run what is missing of a study, see `run_plans`.

    Args:
        begin: makes the session, with the arguments of `Session`; for studies that grow.
    """
    (launched,) = run_plans([plan], options, console, begin)
    return launched


def run_plans(
    plans: Sequence[Plan], options: RunOptions, console: Console, begin: Callable[..., Session] | None = None
) -> list[Launched]:
    """Run what is missing of studies, their trials beside each other, and bring the ledger up to date.

    Args:
        plans: alike in what they give a trial, and in whether they share (see `study.joint_schedule.lots_of`).
        begin: makes a session, with the arguments of `Session`.

    Raises:
        StudyError: the data, storage or cluster cannot be used, or another driver runs a study; nothing was trained.
        LedgerError: the ledger cannot be used; nothing was trained.
        StudyHaltedError: storage or ledger failed on the way; nothing that was finished is lost.
        Interrupted: SIGINT or SIGTERM; nothing that was finished is lost.
    """
    store = Store(options.storage, caches=plans[0].sharing)
    halt = Halt()
    with ExitStack() as claims:
        for plan in plans:
            claims.enter_context(_claimed_everywhere(store, plan.study.name, options.command, halt))
        claims.enter_context(answered_signals())
        try:
            return _run(plans, options, store, console, halt, begin or Session)
        except KeyboardInterrupt:
            if halt.reason is None:
                raise
            raise _halted(halt.reason, store) or StudyHaltedError(str(halt.reason)) from halt.reason


@contextmanager
def _claimed_everywhere(store: Store, study: str, command: str, halt: Halt) -> Iterator[None]:
    """Hold a study on this machine, and in an object store against all machines."""
    with claimed(store.locks, study, command), ExitStack() as everywhere:
        if store.address.uri is not None:
            from study.storage.lease import leased
            from study.storage.object_store import ObjectStore

            assert isinstance(store.place, ObjectStore)
            everywhere.enter_context(leased(store.place, lock_file(store.locks, study), study, command, halt))
        yield


def _run(
    plans: Sequence[Plan],
    options: RunOptions,
    store: Store,
    console: Console,
    halt: Halt,
    begin: Callable[..., Session],
) -> list[Launched]:
    store.sweep()
    # A ledger that was named is tried first: a wrong address must not be told after hours of decoding images.
    uri, artifacts = options.tracking_uri, _artifacts(options, store)
    ledgers = [] if uri is None else [Ledger(uri, artifacts) for _ in plans]
    if (pending := _together([pending_schedule(plan, store.address) for plan in plans])).nodes:
        require_disk(plans, store)
        _executor(plans[0], options, store).check(pending, store)  # also before hours of decoding
    store.bring_splits()
    contents: dict[str, str] = {}
    for plan in plans:
        contents |= prepare_data(plan, store, console)
        prepare_away(plan, store, console)
    store.share_splits()
    if uri is None:
        if store.address.uri is not None:
            console.print(_own_ledger(store), highlight=False, markup=False, soft_wrap=True)
        ledgers = [Ledger(store.default_tracking_uri(), artifacts) for _ in plans]
    say = partial(console.print, style="yellow", highlight=False, markup=False, soft_wrap=True)
    sessions = [
        begin(plan, store, ledger, contents, options.command, say=say, halt=halt)
        for plan, ledger in zip(plans, ledgers, strict=True)
    ]
    with ExitStack() as farewell:
        for session in sessions:
            session.open()
            farewell.callback(session.abandon)
        try:
            _train(plans, sessions, options, store, console)
            # What a session sets in the environment is taken back in the opposite order.
            ended = [session.close() for session in reversed(sessions)][::-1]
        except Exception as error:
            if (halted := _halted(error, store)) is None:
                raise
            raise halted from error
    return [Launched(*end, session.ui_path()) for end, session in zip(ended, sessions, strict=True)]


def _train(
    plans: Sequence[Plan], sessions: Sequence[Session], options: RunOptions, store: Store, console: Console
) -> None:
    """Run the trials that are left."""
    schedule = _together([session.schedule() for session in sessions])
    if not schedule.nodes:
        return
    known = [result for session in sessions for result in session.known]
    by_study = {plan.study.name: session for plan, session in zip(plans, sessions, strict=True)}
    with Progress(console, schedule) as progress:
        for session in sessions:
            session.watch(progress)
        _executor(plans[0], options, store, known).run(schedule, store, JointListener(by_study))


def _together(schedules: Sequence[Schedule]) -> Schedule:
    return schedules[0] if len(schedules) == 1 else JointSchedule(schedules)


def _halted(reason: Exception, store: Store) -> StudyHaltedError | None:
    """What to say of a study that storage or ledger stopped: a full storage explains whatever else failed with it."""
    try:
        store.require_room()
    except StudyError as full:
        return StudyHaltedError(str(full))
    if isinstance(reason, AwayError):  # and back by now
        return StudyHaltedError(f"{reason}, and {GO_ON}")
    return StudyHaltedError(str(reason)) if isinstance(reason, LedgerError) else None


def _own_ledger(store: Store) -> str:
    """Where the ledger of a storage on a URI is, as long as nobody names one: no database lies in an object store."""
    return (
        f"the ledger is on this machine, {store.root / 'mlflow.db'}: name a server by --tracking-uri for one that "
        f"others see; anywhere else the same command makes it anew from the results in {store.address.shown}"
    )


class Session:
    """One launch of a study: hears what trials do and keeps the ledger in step with the store."""

    def __init__(
        self,
        plan: Plan,
        store: Store,
        ledger: Ledger,
        contents: dict[str, str],
        command: str,
        *,
        say: Callable[[str], None] = log.warning,
        halt: Halt | None = None,
    ) -> None:
        """Keep what a launch needs.

        Args:
            contents: cache identity → digest of the images' contents.
            command: what starts this launch again.
            say: takes a line about the ledger.
            halt: how the launch is stopped when it cannot go on.
        """
        self._plan = plan
        self._store = store
        self._halt = halt or Halt()
        self._ledger = LedgerWriter(ledger, say, self._halt)
        self._contents = contents
        self._provenance = provenance(plan, command)
        self._results: dict[str, tuple[Chain, CellResult]] = {}
        self._failed: dict[str, tuple[Chain, str]] = {}
        self._cache_readers: dict[tuple[str, int], set[Node]] = {}  # identity and position → trials that will read it
        self._progress: Progress | None = None

    @property
    def results(self) -> dict[str, CellResult]:
        """Cell key → result, of the cells that have one."""
        return {key: result for key, (_, result) in self._results.items()}

    @property
    def known(self) -> Sequence[tuple[Chain, CellResult]]:
        """Cells that have a result, with it."""
        return list(self._results.values())

    def open(self) -> None:
        """Declare rows and cells, and write what earlier launches finished."""
        rows, cells = self._declared()
        self._ledger.open(self._header(self._planned_units()), rows, cells)
        for chain in self._plan.chains:
            self._take_result(chain)

    def schedule(self) -> Schedule:
        """Trials of the cells that have no result yet."""
        pending = [chain for chain in self._plan.chains if chain.key not in self._results]
        schedule = Schedule(self._plan, pending, self._has_result, self._store.has_state)
        for cache in self._plan.caches:
            if not cache.pooled:
                users = set(cache.users)
                readers = {n for n in schedule.nodes if not users.isdisjoint(n.keys[n.first :])}
                self._cache_readers[cache.identity, cache.position] = readers
        return schedule

    def watch(self, progress: Progress) -> None:
        """Show what happens from now on."""
        self._progress = progress

    # -- Listener -----------------------------------------------------------------------------------------------------

    def started(self, node: Node) -> None:
        """A trial was given to a worker."""
        self._halt.check()
        if self._progress is not None:
            self._progress.started(node)

    def epoch(self, node: Node, record: EpochRecord) -> None:
        """An epoch goes into every cell that contains it; a cell whose result is there is finished."""
        self._halt.check()
        for chain in node.chains:
            if chain.key not in self._results and not self._take_result(chain):
                self._ledger.log_epochs(chain.key, epochs_of(chain, [record]))
        if self._progress is not None:
            self._progress.epoch(node, record)

    def finished(self, node: Node) -> None:
        """A trial has ended well: its cells may have ended too, and caches may have seen their last use."""
        for chain in node.chains:
            if chain.key not in self._results:
                self._take_result(chain)
        self._release_caches()
        if self._progress is not None:
            self._progress.finished(node)

    def retried(self, node: Node, reason: str) -> None:
        """A trial's worker died; it is started again from its last saved epoch."""
        self._require_room()
        if self._progress is not None:
            self._progress.retried(node, reason)

    def failed(self, node: Node, error: str) -> None:
        """A trial cannot be finished: its cells fail with it, unless it is the storage that fails all of them."""
        self._require_room()
        for chain in node.chains:
            if chain.key not in self._results and not self._take_result(chain):
                self._failed[chain.key] = (chain, error)
                self._ledger.finish(chain.key, CellOutcome("FAILED", time.time_ns() // 1_000_000, error=error))
        self._release_caches()
        if self._progress is not None:
            self._progress.failed(node, error)

    # -- the end ------------------------------------------------------------------------------------------------------

    def close(self) -> tuple[StudyHeader, bool]:
        """Flag rows without effect, count units, aggregate rows."""
        results = list(self._results.values())
        for key, earlier in no_ops(results).items():
            chain, _ = self._results[key]
            result = self._store.load_result(chain.leaf, chain.observer.name)
            if result is not None:  # else it has been damaged since, which is said, and the next launch makes it again
                self._ledger.finish(key, finished_outcome(chain, result, self._store, earlier))
        units = counted_units(self._plan, results, self._cache_units(results))
        header = self._header(units)
        self._ledger.close(header)
        return header, len(results) == len(self._plan.chains)

    def ui_path(self) -> str:
        """Where the MLflow UI shows the study, below its server's address."""
        return self._ledger.ui_path()

    def abandon(self) -> None:
        """Let go of the ledger within seconds; after `close` there is nothing left to do."""
        self._ledger.abandon()

    # -- small parts --------------------------------------------------------------------------------------------------

    def _declared(self) -> tuple[list[RowHeader], list[CellHeader]]:
        """The rows and cells of the plan as the ledger shall have them."""
        rows = row_headers(self._plan)
        return list(rows.values()), cell_headers(self._plan, rows)

    def _header(self, units: Units) -> StudyHeader:
        return study_header(self._plan, units, self._provenance)

    def _planned_units(self) -> Units:
        """Before anything is counted."""
        return counted_units(self._plan, [], {}).model_copy(update={"executed": None})

    def _outcome(self, chain: Chain, result: CellResult) -> CellOutcome:
        """What the ledger is told of a cell that has a result."""
        return finished_outcome(chain, result, self._store, None)

    def _has_result(self, chain: Chain) -> bool:
        return chain.key in self._results or self._store.has_result(chain.leaf, chain.observer.name)

    def _take_result(self, chain: Chain) -> bool:
        """Bring a cell's result, if the store has one, into the ledger."""
        result = self._store.load_result(chain.leaf, chain.observer.name)
        if result is None:
            return False
        self._results[chain.key] = (chain, _kept(result))

        def told() -> tuple[Sequence[Epoch], CellOutcome]:
            return epochs_of(chain, result.history), self._outcome(chain, result)

        self._ledger.record(chain.key, told)
        return True

    def _require_room(self) -> None:
        """Stop the study where the storage can take no state: every further trial would fail for the same reason."""
        try:
            self._store.require_room()
        except StudyError as full:
            self._halt(full)

    def _release_caches(self) -> None:
        """Delete token caches that no waiting or running trial reads any more."""
        for cache in self._plan.caches:
            at = cache.identity, cache.position
            if (readers := self._cache_readers.get(at)) is None:
                continue
            readers -= {node for node in readers if node.status not in ("waiting", "running")}
            if not readers:
                release(self._cache_folder(cache))
                del self._cache_readers[at]

    def _cache_folder(self, cache: Cache) -> Path:
        dtype = self._plan.study.execution.cache_dtype
        name = cache_name(cache.identity, self._contents[cache.identity], cache.position, dtype)
        return self._store.activations() / name

    def _cache_units(self, results: Sequence[tuple[Chain, CellResult]]) -> dict[str, int]:
        names = {record.cache for _, result in results for record in result.history if record.cache is not None}
        return self._store.cache_units(names)


def _kept(result: CellResult) -> CellResult:
    """What is needed of a result to the study's end: not what its epochs measured, which is in store and ledger."""
    return replace(result, history=[replace(r, metrics={}, effective={}, events=[]) for r in result.history])


def _executor(
    plan: Plan, options: RunOptions, store: Store, known: Sequence[tuple[Chain, CellResult]] = ()
) -> Executor:
    if options.executor == "local":
        return LocalExecutor(plan.study.execution.max_failures, options.timeout)
    if options.address is None:
        _check_scratch()
    from study.cluster.ray_environment import prepare_environment

    prepare_environment(store.root, local=options.address is None)
    garbage.keep_one_heap()
    from study.ray_executor import RayExecutor

    return RayExecutor(
        plan.study.execution,
        plan.compute,
        address=options.address,
        verbose=options.verbose,
        timeout=options.timeout,
        known=known,
    )


def _check_scratch() -> None:
    """Ray's processes end without a word where they cannot write their logs and sockets."""
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if free < SCRATCH_BYTES:
        raise StudyError(
            [
                f"{folder}: {free / 1e6:.0f} MB are free, and Ray's logs and sockets on this machine need "
                f"{SCRATCH_BYTES / 1e6:.0f} MB; make room, or name another folder with a short path by TMPDIR"
            ]
        )


def _artifacts(options: RunOptions, store: Store) -> Path | None:
    local = options.tracking_uri is None or options.tracking_uri.startswith("sqlite:")
    return store.artifacts() if local else None
