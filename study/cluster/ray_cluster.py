"""A Ray cluster to run trials on: reach it or start it, count its slots, and ask its nodes what they see.

With `ray_executor`, `ray_head` and `ray_dashboard` the only files that import ray.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import tempfile
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from fractions import Fraction
from pathlib import Path
from typing import Any

import ray
from ray import cloudpickle
from ray._private import ray_constants, services
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # it is there, its stub is not
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from study.cluster import node_survey
from study.cluster.ray_dashboard import job_of, names_of
from study.cluster.ray_environment import address_fault, sent_along, token_fault
from study.cluster.ray_head import leave, watched
from study.documents import StudyError
from study.executors import placed
from study.interrupts import ClusterLostError, kept_signals
from study.schedule import Schedule
from study.spec import Study
from study.store import Store

log = logging.getLogger(__name__)

PROJECT = Path(__file__).resolve().parents[2]
METRICS_TARGETS = "prom_metrics_service_discovery.json"  # Ray writes it into its temporary folder
ANSWER_SECONDS = 6.0  # for a head node to answer; Ray itself would ask for minutes
SURVEY_SECONDS = 120.0  # for all nodes together: they may have to start a worker and to fetch the encoder
NODES_SECONDS = 10.0  # between two looks at which nodes there are

Resources = Mapping[str, float]


@contextmanager
def cluster(address: str | None, studies: Sequence[Study], *, verbose: bool) -> Iterator[None]:
    """Be connected to a cluster that others started, or to one of this machine's own that lives as long as the body.

    The latter listens on loopback alone. What is sent along shows in Ray's dashboard, so it holds no secret.

    Args:
        studies: whose job it is.

    Raises:
        StudyError: it cannot be reached or started; says why within seconds.
        ClusterLostError: its head node went away meanwhile; this process must end.
    """
    environment = {"PYTHONPATH": str(PROJECT)} | sent_along(os.environ)
    options: dict[str, Any] = {"runtime_env": {"env_vars": environment}, "log_to_driver": verbose}
    options |= {"logging_level": logging.INFO if verbose else logging.ERROR, "job_config": job_of(studies)}
    if address is None:
        if fault := token_fault():
            raise StudyError([fault])
        folder = tempfile.mkdtemp(prefix="ray")  # socket paths are limited to 107 bytes, so not in the storage
        options |= {"address": "local", "num_cpus": os.cpu_count(), "include_dashboard": None, "_temp_dir": folder}
    else:
        options |= {"address": _answering(address)}
    where, lost = "this machine" if address is None else f"--address {address}", False
    try:
        with _quiet(verbose):
            with _on_loopback() if address is None else nullcontext():
                _connect(options, where)
            if address is None:
                log.info("metrics for Prometheus: targets in %s/%s", options["_temp_dir"], METRICS_TARGETS)
            with watched(where) if address is not None else nullcontext():
                yield
    except ClusterLostError:
        lost = True
        raise
    finally:
        leave() if lost else ray.shutdown()
        if address is None and not verbose:
            shutil.rmtree(options["_temp_dir"], ignore_errors=True)


class Room:
    """How many trials are given out at a time: as many as fit on the nodes, which come and go; or as many as declared.

    What is given out beyond the room that there is waits in Ray, where an autoscaler sees it.
    """

    def __init__(self, autoscale_to: int | None) -> None:
        """See `study.spec.Execution`."""
        self._declared = autoscale_to
        self._nodes: list[dict[str, Any]] = []
        self._looked = -math.inf

    def takes_another(self, given: Iterable[Resources]) -> bool:
        """Whether another trial may be given out beside those that are.

        Each takes the share of the cluster that leaves room for as many of its kind as there are slots for them.
        """
        if time.monotonic() - self._looked > NODES_SECONDS:
            self.look()
        return sum(Fraction(1, self.slots(asked)) for asked in given) < 1

    def overflows(self, given: Iterable[Resources]) -> bool:
        """Whether some of the trials that are given out wait for a node that is to come."""
        if self._declared is None:
            return False
        return sum(Fraction(1, max(1, self._fit(asked))) for asked in given) > 1

    def slots(self, asked: Resources) -> int:
        """How many trials that ask for so much are given out at a time; at least one, which then waits for a node."""
        if self._declared is None:
            return max(self._fit(asked), 1)
        part = min(asked.get("GPU", 1.0), 1.0)
        return max(self._fit(asked), int(self._declared / part + 1e-9))

    def _fit(self, asked: Resources) -> int:
        return sum(_room(node, asked) for node in self._nodes)

    def look(self) -> None:
        """See which nodes there are now."""
        self._nodes = ray.nodes()
        self._looked = time.monotonic()

    @property
    def has_several_nodes(self) -> bool:
        """Whether it matters to a trial where it runs."""
        return len([n for n in self._nodes if n["Alive"] and n["Resources"].get("CPU")]) > 1


def slots(resources: Resources) -> int:
    """How many trials fit on the cluster at once."""
    return sum(_room(node, resources) for node in ray.nodes())


def require_slots(resources: Resources) -> None:
    """Make sure that a trial fits on some node; what is missing is named instead of waited for.

    Raises:
        StudyError: none does.
    """
    if slots(resources):
        return
    have = ray.cluster_resources()
    asked = ", ".join(f"{amount:g} {name}" for name, amount in resources.items())
    total = ", ".join(f"{have.get(name, 0.0):g} {name}" for name in resources)
    raise StudyError(
        [
            f"execution: a trial asks for {asked}, no node of the cluster has that (in all: {total}); "
            "set execution.cpus or execution.gpus, or add nodes; if an autoscaler brings them, set "
            "execution.autoscale_to"
        ]
    )


def survey(schedule: Schedule, store: Store, resources: Resources) -> None:
    """Ask every node that could run a trial what it sees; all that differs from here is said at once.

    Raises:
        StudyError: a node lacks what trials need, or does not answer.
    """
    settings = [placed(node.request).settings for node in schedule.nodes]
    data = dict.fromkeys(s.dataset.root for s in settings if s.dataset.root is not None)
    away = [s.dataset.test_on for s in settings if s.dataset.test_on is not None]
    data |= dict.fromkeys(other.root for other in away if other.root is not None)
    encoders = dict.fromkeys(s.model.backbone for s in settings)
    cloudpickle.register_pickle_by_value(node_survey)  # the project may be missing there
    ask = ray.remote(num_cpus=0, max_retries=0)(node_survey.look)
    studies = names_of(schedule.studies)
    faults: dict[str, list[str]] = {}
    with node_survey.wanted(store.address, data, encoders) as wanted:
        asked = {}
        for node in ray.nodes():
            if _room(node, resources):
                there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                named = ask.options(scheduling_strategy=there, name=f"{studies}: survey of {_name(node)}")
                asked[named.remote(wanted)] = node
        if not asked:
            return  # none yet: an autoscaler is to bring them
        here = node_survey.look(wanted)
        answered, silent = ray.wait(list(asked), num_returns=len(asked), timeout=SURVEY_SECONDS)
        for answer in answered:
            name = _name(asked[answer])
            try:
                found = node_survey.differences(name, wanted, here, ray.get(answer))
            except ray.exceptions.RayError as error:
                found = [f"{name}: cannot run a task ({first_line(error)})"]
            faults[asked[answer]["NodeID"]] = found
    for answer in silent:
        said = f"{_name(asked[answer])}: no answer within {SURVEY_SECONDS:g} s; restart or remove it"
        faults[asked[answer]["NodeID"]] = [said]
    left = {node["NodeID"] for node in ray.nodes() if node["Alive"]}  # one that died meanwhile is nobody's fault
    problems = [fault for node, found in faults.items() if node in left for fault in found]
    if problems:
        raise StudyError(problems)


def first_line(error: BaseException) -> str:
    """The first line of what an error says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# -- small parts -----------------------------------------------------------------------------------------------------


def _room(node: Mapping[str, Any], resources: Resources) -> int:
    """How many trials fit on a node. A part of a GPU is a part of one of them: two thirds fit once on each."""
    if not node["Alive"]:
        return 0
    fit = []
    for name, amount in resources.items():
        has = node["Resources"].get(name, 0.0)
        whole, part = (int(has), 1.0) if name == "GPU" and amount < 1 else (1, has)
        fit.append(whole * int(part / amount + 1e-9))
    return min(fit)


def _name(node: Mapping[str, Any]) -> str:
    return f"node {node['NodeManagerAddress']} ({node['NodeID'][:8]})"


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Have a cluster that starts meanwhile listen on 127.0.0.1 alone, every process and port of it.

    Ray takes the machine's outward address for its own unless clusters are said not to span machines: a switch that
    it has for the firewalls of macOS and Windows, read from the environment when it was imported.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _connect(options: Mapping[str, Any], where: str) -> None:
    try:
        with kept_signals():
            ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
        raise StudyError([f"{where}: Ray cannot be used ({first_line(error)})"]) from error


def _answering(address: str) -> str:
    """The address as HOST:PORT of a head node that answers, knows our token and this machine.

    Raises:
        StudyError: it is none.
    """
    fault = token_fault() or address_fault(address)
    if fault is None:
        found = services.canonicalize_bootstrap_address(address)
        if found is None:
            fault = "no cluster is known on this machine; start one or give HOST:PORT of its head node"
        else:
            fault = _asked(found)
    if fault is not None:
        raise StudyError([f"--address {address}: {fault}"])
    return str(found)


def _asked(address: str) -> str | None:
    """What keeps this machine from using the cluster; asked in a thread, since Ray's own patience is far too long."""
    faults: list[str | None] = []
    thread = threading.Thread(target=lambda: faults.append(_fault_of(address)), daemon=True)
    thread.start()
    thread.join(timeout=ANSWER_SECONDS)
    return faults[0] if faults else f"what listens there does not answer as Ray does within {ANSWER_SECONDS:g} s"


def _fault_of(address: str) -> str | None:
    try:
        known = {node.hex() for node in GcsClient(address=address).get_all_node_info(timeout=ANSWER_SECONDS)}
    except ray.exceptions.AuthenticationError:
        return (
            "the cluster refuses our token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to the file with the token "
            "that the cluster was started with"
        )
    except ray.exceptions.RayError as error:
        return f"this is no port of a Ray head node ({first_line(error)})"
    if known.isdisjoint(services.find_node_ids()):
        return f"this machine is no node of that cluster: run the command on one, or `ray start --address={address}`"
    return None


@contextmanager
def _quiet(verbose: bool) -> Iterator[None]:
    """Ray's and Tune's own output only with -v."""
    if verbose:
        yield
        return
    for name in ("ray", "ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # a dead worker is said by the searcher, once
    told, ray._private.worker.print_to_stdstream = ray._private.worker.print_to_stdstream, _untold
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        ray._private.worker.print_to_stdstream = told


def _untold(*arguments: Any, **options: Any) -> None:
    """Ray writes what raylets say of dead workers to standard output, whatever `log_to_driver` says."""
