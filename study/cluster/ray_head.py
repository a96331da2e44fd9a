"""The head node of a cluster, watched while a study runs.

Left to itself, Ray ends a driver whose head does not answer for a minute: without a word of ours, wherever it stands,
and a driver whose head was started again waits for workers that the new head knows nothing of. Here the study is
stopped before, as by a signal, and says what to do.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ray
from ray._private import ray_constants

from study.cluster.watchdog import Silence
from study.interrupts import ClusterLostError, Halt

log = logging.getLogger(__name__)

RAYS_PATIENCE = "RAY_gcs_rpc_server_reconnect_timeout_s"  # environment: after so many seconds Ray ends this process
RAYS_PATIENCE_S = 60.0
ASK_S, ANSWER_S = 2.0, 5.0  # between two questions, and for an answer
AWAY_S = 5.0  # of silence, after which it is said
TURN_S = 0.5
WRONG_CLUSTER = "WrongClusterID"  # in what Ray raises when a head that was started again is asked
STUCK_S = 5.0  # for the study's thread to hear that it is stopped


class Head:
    """What is known of a head: when it answered last, and whether it is still the one that the study began with."""

    def __init__(
        self, ask: Callable[[], str], where: str, patience_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Nothing is asked yet.

        Args:
            ask: the name of the head's session, another one each time that a head is started; raises where there is
                no answer.
            where: the cluster, as its user knows it.
            patience_s: seconds of silence after which it counts as gone.
        """
        self._ask = ask
        self._where, self._patience_s = where, patience_s
        self._session: str | None = None
        self._replaced = False
        self._answers = threading.Event()
        self._silence, self._away = Silence(patience_s, clock), Silence(AWAY_S, clock)
        self._said = False

    def question(self) -> None:
        """Ask once."""
        try:
            session = self._ask()
        except Exception as error:
            log.info("the head node of %s: %s", self._where, error)
            self.hear(error)
            return
        if self._session is None:
            self._session = session
        self._replaced = self._replaced or session != self._session
        self._answers.set()

    def hear(self, error: BaseException) -> bool:
        """What a call of Ray's raised; whether it says that another head has answered."""
        self._replaced = self._replaced or WRONG_CLUSTER in str(error)
        return self._replaced

    def turn(self) -> ClusterLostError | None:
        """Why there is nothing to wait for any more; else None. Called often: what it took itself counts for little."""
        if self._replaced:
            return self._lost(
                "was started again, and knows nothing of what was running", "Start its worker nodes again"
            )
        late, away = self._silence.turn(["head"]), self._away.turn(["head"])
        if self._answers.is_set():
            self._answers.clear()
            self._silence.heard("head")
            self._away.heard("head")
            late, away = [], []
        if late:
            remedy = "Start it again (`ray start --head`), then its worker nodes"
            return self._lost(f"has not answered for {self._patience_s:g} s", remedy)
        if bool(away) != self._said:
            self._said = bool(away)
            still = f"does not answer; giving it {self._patience_s:g} s" if away else "answers again"
            log.warning("%s: the head node %s", self._where, still)
        return None

    def _lost(self, what: str, remedy: str) -> ClusterLostError:
        return ClusterLostError(f"{self._where}: the head node {what}; nothing that was finished is lost. {remedy}")


@contextmanager
def watched(where: str) -> Iterator[None]:
    """Stop the body when the head of the cluster that this process is connected to is gone, or another one.

    Not for a cluster that this process started: it ends with its driver.

    Raises:
        ClusterLostError: it is; Ray must not be asked for anything any more, see `leave`.
    """
    patience_s = float(os.environ.get(RAYS_PATIENCE) or RAYS_PATIENCE_S) / 2
    head, halt, ended = Head(_session, where, patience_s), Halt(), threading.Event()
    tasks = (lambda: _question(head, ended), lambda: _watch(head, halt, ended))
    threads = [threading.Thread(target=task, name="head watch", daemon=True) for task in tasks]
    for thread in threads:
        thread.start()
    try:
        yield
    except BaseException as error:
        lost = halt.reason or (head.turn() if head.hear(error) else None)
        if lost is None:
            raise
        raise lost from None
    finally:
        ended.set()
        if halt.reason is None:  # a question that outlived the head would end this process after Ray's own patience
            for thread in threads:
                thread.join(ANSWER_S + ASK_S)


def leave() -> None:
    """Let this process end without Ray's farewell, which would wait for the head that is gone."""
    atexit.register(_end)  # called first, as the last that was registered


def _end() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(1)


def _question(head: Head, ended: threading.Event) -> None:
    while not ended.wait(ASK_S):
        head.question()


def _watch(head: Head, halt: Halt, ended: threading.Event) -> None:
    while not ended.wait(TURN_S):
        if (lost := head.turn()) is not None:
            halt(lost)
            if not ended.wait(STUCK_S):
                _end_stuck(lost)
            return


def _end_stuck(lost: ClusterLostError) -> None:
    """End this process for the study's thread, which waits for the head in a call of Ray's that no signal reaches."""
    from study.running import go_on

    print(f"error {go_on(lost)}", file=sys.stderr)
    _end()


def _session() -> str:
    client = ray._private.worker.global_worker.gcs_client
    name = client.internal_kv_get(b"session_name", ray_constants.KV_NAMESPACE_SESSION, timeout=ANSWER_S)
    return (name or b"").decode()
