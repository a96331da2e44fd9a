"""What the options of the command line mean, and whether the places that they name can be used.

Everything here answers in seconds and imports nothing heavy: what is wrong is said before torch, Ray or MLflow are
imported, before an image is read, and before anything is written.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from analysis.credentials import SIGN_IN, holds_credentials, without_credentials
from study.documents import StudyError, parse_override
from study.storage.places import LOCAL, Address

DEFAULT_STORAGE = Path("outputs")
LONGEST_TIMEOUT = 30 * 86_400.0  # seconds; what is longer waits for ever, which is the default
T = TypeVar("T")
KNOCK_SECONDS = 4.0  # how long a server may take to answer a connection


@dataclass(frozen=True)
class Overrides:
    """Keys that options set; `typed`: key → the option as it was typed."""

    values: Mapping[str, Any]
    typed: Mapping[str, str]


def read_overrides(given: Sequence[str] | None, seeds: str | None, backbone: str | None) -> Overrides:
    """The keys that -o, --seeds and --backbone set.

    Raises:
        StudyError: with every option that cannot be read, and every key that is given twice.
    """
    from study.spec import TEXT_KEYS

    problems: list[str] = []
    pairs: list[tuple[str, Any, str]] = []
    for text in given or []:
        try:
            pairs.append((*parse_override(text, TEXT_KEYS), f"-o {text}"))
        except StudyError as error:
            problems += error.problems
    if seeds is not None:
        if re.fullmatch(r"-?[0-9]{1,30}(,-?[0-9]{1,30})*", seeds):
            pairs.append(("seeds", [int(seed) for seed in seeds.split(",")], f"--seeds {seeds}"))
        else:
            problems.append(f"--seeds {seeds}: expected whole numbers with commas, such as 0,1,2")
    if backbone is not None:
        pairs.append(("model.backbone", backbone, f"--backbone {backbone}"))
    typed: dict[str, str] = {}
    for key, _, option in pairs:
        if key in typed:
            problems.append(f"{typed[key]} and {option}: {key} is given twice; leave one of them out")
        typed.setdefault(key, option)
    if problems:
        raise StudyError(problems)
    return Overrides({key: value for key, value, _ in pairs}, typed)


def read_data_roots(given: Sequence[str] | None) -> dict[str, str]:
    """Data set → absolute folder; the empty name stands for the study's only data set.

    Raises:
        StudyError: with every folder that is not there, and every data set that is given twice.
    """
    roots: dict[str, str] = {}
    problems = []
    for text in given or []:
        name, folder = _named_folder(text)
        path = Path(os.path.expanduser(folder))  # noqa: PTH111 (Path raises for a user that is none)
        if name in roots:
            problems.append(f"--data-root {text}: {name or 'a folder'} is given twice; leave one of them out")
        elif not os.path.isdir(path):  # noqa: PTH112 (and for a name too long to be one)
            found = "is no folder" if os.path.exists(path) else "no such folder"  # noqa: PTH110
            near = _nearest(path) if found == "no such folder" else ""
            problems.append(
                f"--data-root {text}: {found}; give the folder that holds the data set as distributed{near}"
            )
        roots.setdefault(name, str(path.absolute()))
    if problems:
        raise StudyError(problems)
    return roots


def _named_folder(text: str) -> tuple[str, str]:
    """`NAME=DIR` or `DIR`; a folder may have = in its name, a data set has no / in its own."""
    name, equals, folder = text.partition("=")
    if not equals or "/" in name or os.path.isdir(text):  # noqa: PTH112
        return "", text
    return name, folder


def _nearest(path: Path) -> str:
    """The entry beside a missing folder that is called nearly so."""
    if not os.path.isdir(path.parent):  # noqa: PTH112
        return f" ({path.parent} is not there either)"
    found = get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1)
    return f"; did you mean {path.parent / found[0]}?" if found else ""


# -- secrets ---------------------------------------------------------------------------------------------------------

ELSEWHERE = {
    "http": SIGN_IN,
    "https": SIGN_IN,
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or both in the file ~/.aws/credentials",
    "postgresql": "leave the password out, and set PGPASSWORD or give it in the file ~/.pgpass",
}


def refuse_credentials(arguments: Sequence[str]) -> None:
    """Refuse addresses that hold a password: what is typed stands in process lists, shell histories and records.

    Raises:
        StudyError: with every such argument, without its secret, and where it belongs.
    """
    problems = []
    for before, argument in zip(("", *arguments), arguments, strict=False):
        if not holds_credentials(argument):
            continue
        shown = without_credentials(argument)
        option = f"{before} {shown}" if before.startswith("-") and not argument.startswith("-") else shown
        scheme = re.search(r"([A-Za-z][A-Za-z0-9.-]*)(?:\+[A-Za-z0-9.-]+)?://", argument)
        remedy = ELSEWHERE.get(scheme[1].lower() if scheme else "", "give it where the server's client looks for it")
        problems.append(f"{option}: holds a user or password, which others can read in process lists; {remedy}")
    if problems:
        raise StudyError(problems)


# -- storage ---------------------------------------------------------------------------------------------------------


def storage_address(given: str | None, smoke: bool) -> Address:
    """Where results are.

    Raises:
        StudyError: it is no folder that can be written, and no URI of an object store; nothing is made yet.
    """
    if given is not None and re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", given):
        address = Address.at(given)
        if fault := _folder_fault(address.folder):
            raise StudyError([f"--storage {given}: its folder on this machine, {address.folder}, {fault} by {LOCAL}"])
        return address
    if given is None:
        folder = DEFAULT_STORAGE / "smoke" if smoke else DEFAULT_STORAGE
    else:
        folder = Path(os.path.expanduser(given))  # noqa: PTH111
    if fault := _folder_fault(folder):
        shown = str(folder) if len(str(folder)) < 200 else f"{str(folder)[:100]}…"
        raise StudyError([f"--storage {shown}: {fault}"])
    return Address(folder)


def _folder_fault(folder: Path) -> str | None:
    """What keeps a folder from being written, or from being made."""
    there = folder
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    if any(len(os.fsencode(part)) > 255 for part in folder.parts):
        return "a name in it is too long; give a writable folder"
    if not there.is_dir():
        return f"cannot be made: {there} is no folder; give a writable folder"
    if not os.access(there, os.W_OK | os.X_OK):
        reason = "is on a read-only file system" if os.statvfs(there).f_flag & os.ST_RDONLY else "may not be written to"
        return f"cannot be written: {there} {reason}; give a writable folder"
    return None


# -- ledger ----------------------------------------------------------------------------------------------------------


def tracking_address(given: str | None, folder: Path) -> str:
    """The ledger's address: the one given, or the file in the storage."""
    return given or f"sqlite:///{folder.resolve() / 'mlflow.db'}"


def require_ledger(address: str) -> None:
    """Refuse a ledger that is not there, before MLflow would make an empty one.

    Raises:
        LedgerError: no such file, not one of MLflow's, or a server that does not answer.
    """
    from analysis.tracking import SQLITE, check_database, sqlite_path

    _check_scheme(address)
    if address.startswith(SQLITE):
        check_database(sqlite_path(address))
    else:
        _knock(address)


def check_new_ledger(address: str) -> None:
    """Refuse an address at which a study's ledger can neither be nor be made.

    Raises:
        LedgerError: an unknown scheme, a file that is not MLflow's, or a server that does not answer.
    """
    from analysis.tracking import SQLITE, LedgerError, check_database, sqlite_path

    _check_scheme(address)
    if not address.startswith(SQLITE):
        _knock(address)
        return
    path = sqlite_path(address)
    if path.is_dir():
        raise LedgerError(
            f"--tracking-uri {address}: {path} is a folder; name a file in it: {SQLITE}{path / 'mlflow.db'}"
        )
    if path.exists() and path.stat().st_size:
        check_database(path)


def _check_scheme(address: str) -> None:
    from analysis.tracking import SQLITE, LedgerError

    parts = urlsplit(address)
    if not address.startswith(SQLITE) and (parts.scheme not in ("http", "https") or not parts.hostname):
        raise LedgerError(f"--tracking-uri {address}: expected sqlite:///FILE or http(s)://SERVER[:PORT]")


def _knock(address: str) -> None:
    """Whether anything listens there; whether it is an MLflow server is asked by its client."""
    from urllib.request import getproxies, proxy_bypass

    from analysis.tracking import LedgerError

    parts = urlsplit(address)
    if parts.scheme in getproxies() and not proxy_bypass(parts.hostname or ""):
        return  # only the client knows the way through the proxy
    try:
        at = (parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))
        socket.create_connection(at, timeout=KNOCK_SECONDS).close()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise LedgerError(
            f"--tracking-uri {address}: nothing answers there ({reason}); start the server or mend the address"
        ) from error


def ledger_study(study: str) -> str:
    """The study's name in the ledger: of a file, what it says; a bare name is taken as it is."""
    from study.spec import find_study, load_study

    looks_like_file = Path(study).suffix in (".yaml", ".yml") or "/" in study
    return load_study(find_study(study)).name if looks_like_file else study


def require_free_port(port: int) -> None:
    """Refuse a port that the UI cannot listen on.

    Raises:
        StudyError: naming the option.
    """
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StudyError(
            [f"--port {port}: cannot be used ({reason}); give another one, such as --port {port + 1}"]
        ) from error


# -- cluster ---------------------------------------------------------------------------------------------------------


def check_timeout(timeout: float | None, option: str = "--timeout") -> None:
    """Refuse seconds that are none.

    Raises:
        StudyError: naming the option.
    """
    if timeout is not None and not 0 < timeout <= LONGEST_TIMEOUT:
        raise StudyError([f"{option} {timeout:g}: expected seconds above 0, at most {LONGEST_TIMEOUT:g}"])


def check_cluster(address: str | None, executor: str) -> None:
    """Refuse an executor that is none, and a cluster that does not answer.

    Raises:
        StudyError: naming the option.
    """
    if executor not in ("ray", "local"):
        raise StudyError([f"--executor {executor}: expected ray or local"])
    if address is None:
        return
    if executor == "local":
        raise StudyError(
            [f"--address {address} and --executor local: trials run either there or here; give one of them"]
        )
    from study.cluster.ray_environment import address_fault, mode_fault

    if fault := address_fault(address) or mode_fault():
        raise StudyError([f"--address {address}: {fault}"])


class Together:
    """Runs checks that do not depend on each other, and raises everything that they refuse at once."""

    def __init__(self) -> None:
        self._problems: list[str] = []

    def value(self, default: T, check: Callable[[], T]) -> T:
        """What a check gives, or the default where it refuses."""
        from analysis.tracking import LedgerError

        try:
            return check()
        except (StudyError, LedgerError) as error:
            self._problems += str(error).split("\n")
            return default

    def raise_if_any(self) -> None:
        """Raise StudyError with all problems."""
        if self._problems:
            raise StudyError(self._problems)
