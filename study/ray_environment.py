"""Environment that Ray reads when it is imported: authentication, telemetry and Tune's side effects. Imports no ray."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

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


def prepare_environment(folder: Path, *, local: bool) -> None:
    """Set what is not set already; call it before ray is imported.

    Token authentication is said explicitly: with RAY_AUTH_MODE unset, Ray writes a token of its own into the home
    folder, and clusters and drivers then disagree on whether one is needed. On a cluster that was started by others,
    RAY_AUTH_MODE and RAY_AUTH_TOKEN_PATH are theirs to give.

    Args:
        folder: where the token of a cluster on this machine is kept, readable by its owner alone.
        local: the cluster is started by us, on this machine.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if not local or "RAY_AUTH_MODE" in os.environ:
        return
    path = folder / "ray_auth_token"
    if not path.is_file():
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(path)
