"""Addresses that hold a password: refused, and never shown. Imports nothing heavy."""

from __future__ import annotations

import re

# Before the host; or with a slash in the password, where what precedes it would be a port that is no number.
_BEFORE_HOST = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)(?:[^/?#\s]*|[^/?#\s:@]*:(?!\d+(?:[/?#]|$))\S*)@")
_AS_A_PARAMETER = re.compile(
    r"([?&;](?:[a-z_]*(?:passw(?:or)?d|pwd|secret|token|credential)[a-z_]*|(?:api_?|access_|account_)?key)=)[^&;\s]+",
    re.IGNORECASE,
)

SIGN_IN = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or both in the file ~/.mlflow/credentials"


def without_credentials(text: str) -> str:
    """Text as a message, a log or a record may show it: of each address, user and password are '…'."""
    return _AS_A_PARAMETER.sub(r"\1…", _BEFORE_HOST.sub(r"\1…@", text))


def holds_credentials(text: str) -> bool:
    """Whether an address holds a password, or over HTTP a user, which may be a token; a database's user is none."""
    if _AS_A_PARAMETER.search(text):
        return True
    found = _BEFORE_HOST.search(text)
    if found is None:
        return False
    user = found[0].removeprefix(found[1])
    return ":" in user or found[1].lower() in ("http://", "https://")
