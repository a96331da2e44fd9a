"""Facts as JSON that carries its own digest: what was cut short or changed is not taken for whole."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def sealed(facts: dict[str, Any]) -> bytes:
    """Facts as JSON, with their own digest."""
    plain = json.loads(json.dumps(facts))
    return json.dumps(plain | {"seal": _seal(plain)}).encode()


def unsealed(data: bytes, name: str) -> dict[str, Any]:
    """Facts as they were sealed; `name` is of the file, for the error.

    Raises:
        ValueError: not JSON, or not what was written.
    """
    facts = json.loads(data.decode("utf-8"))
    if not isinstance(facts, dict) or facts.pop("seal", None) != _seal(facts):
        raise ValueError(f"the digest of {name} does not match")
    return facts


def _seal(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
