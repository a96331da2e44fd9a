"""Fixtures that all tests share."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import settings

# Ray reads its mode once, when it is imported, and tests of one process come in any order: those that run trials
# through Ray in this process need the mode that a cluster of this machine has.
_mode = os.environ.get("RAY_AUTH_MODE")
os.environ["RAY_AUTH_MODE"] = "token"
# Ray's workers yield to every other process, and so to tests that run beside theirs: for minutes, on a busy machine.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 (so does Ray spell it)
import ray  # noqa: E402, F401

os.environ.pop("RAY_AUTH_MODE")
if _mode is not None:
    os.environ["RAY_AUTH_MODE"] = _mode

# How long an example takes says something about the machine, and nothing about the code.
settings.register_profile("project", deadline=None)
settings.load_profile("project")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real images, tables and weights; tests that need it skip where it is not."""
    folder = Path(os.environ.get("SPFT_REAL_DATA", ROOT.parent / "shared" / "real"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder.name!r}: set SPFT_REAL_DATA to the folder that holds them")
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with the most slow tests first: with two workers, none is left alone with a long file at the end."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow") is not None)
    items.sort(key=lambda item: -slow[item.path])
