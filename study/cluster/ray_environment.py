"""Environment that Ray reads when it is imported, and what can be told of an address without Ray. Imports no ray."""

from __future__ import annotations

import os
import re
import secrets
import socket
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from analysis.credentials import holds_credentials
from study.documents import StudyError

QUIET = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the ledger logs; Tune's own loggers would again
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TUNE_GLOBAL_CHECKPOINT_S": "100000",  # Tune's restore is not used
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is ours to answer
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
KNOCK_SECONDS = 3.0  # for a port to answer
TOKENS = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|(^|_)KEY(_|$)|(^|_)AUTH(_|$)")  # names of what is told nobody


def sent_along(variables: Mapping[str, str]) -> dict[str, str]:
    """Variables that trials need on other nodes: the hub's settings, but no token. Ray shows to all what it is sent."""
    hub = {name: value for name, value in variables.items() if name.startswith("HF_")}
    return {n: v for n, v in hub.items() if not SECRET.search(n) and not holds_credentials(v)}


def prepare_environment(folder: Path, *, local: bool) -> None:
    """Set what is not set already; call it before ray is imported.

    Token authentication is said explicitly: with RAY_AUTH_MODE unset, Ray writes a token of its own into the home
    folder, or takes one that is there, and clusters and drivers then disagree on whether one is needed. A cluster of
    this machine always asks for a token: one in the storage, unless the environment names another.

    Args:
        folder: where the token of a cluster on this machine is kept, readable by its owner alone.
        local: the cluster is started by us, on this machine; the token of one that was started by others is theirs to
            give.

    Raises:
        StudyError: RAY_AUTH_MODE is not set, nor any token, for a cluster of others.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    given = any(os.environ.get(name) for name in TOKENS)
    if local and not given:
        path = folder / "ray_auth_token"
        if not path.is_file():
            _make_token(path)
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(path)
    if local or (given and not os.environ.get("RAY_AUTH_MODE")):
        os.environ["RAY_AUTH_MODE"] = "token"
    if fault := mode_fault():
        raise StudyError([f"--address: {fault}"])


def mode_fault() -> str | None:
    """Why it is not known whether a cluster of others asks for a token; None where it is."""
    mode = os.environ.get("RAY_AUTH_MODE", "").lower()
    given = any(os.environ.get(name) for name in TOKENS)
    if mode == "disabled" or (given and mode in ("", "token")):
        return None
    if mode == "token":
        said = "RAY_AUTH_MODE is token, and no token is named"
    else:
        said = f"RAY_AUTH_MODE is {mode!r}" if mode else "RAY_AUTH_MODE is not set"
    return (
        f"{said}: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to the file with the token that the cluster was "
        "started with (RAY_AUTH_MODE=disabled where it has none: then whoever reaches it may run code on it)"
    )


def _make_token(path: Path) -> None:
    """A token that appears whole and never changes: Ray's processes read it one after another, other drivers too."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # readable by its owner alone
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))
    with suppress(FileExistsError):  # another driver was first
        path.hardlink_to(name)
    Path(name).unlink()


def address_fault(address: str) -> str | None:
    """What is wrong with the address of a cluster as far as a knock at its port tells; None if it may be right."""
    if address == "auto":
        return None
    if "://" in address:
        return "Ray Client addresses cannot drive a study: run the command on a node of the cluster, with HOST:PORT"
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        return "expected HOST:PORT of the cluster's head node, such as 10.0.0.1:6379, or auto"
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK_SECONDS).close()
    except OSError as error:
        return f"nothing answers there ({error.strerror or error}); is the head node up, and is this its GCS port?"
    return None


def token_fault() -> str | None:
    """What is wrong with the token that the environment names: Ray would end this process where it cannot read it."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token" or os.environ.get("RAY_AUTH_TOKEN"):
        return None
    path = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    try:
        if path.read_text().strip():
            return None
        reason = "it is empty"
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
    return f"RAY_AUTH_MODE is token, but {path} holds none ({reason}); set RAY_AUTH_TOKEN_PATH to the cluster's token"
