"""Fixtures that all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

# Ray reads its mode once, when it is imported, and tests of one process come in any order: those that run trials
# through Ray in this process need the mode that a cluster of this machine has.
_mode = os.environ.get("RAY_AUTH_MODE")
os.environ["RAY_AUTH_MODE"] = "token"
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


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--extended`: the tests that take minutes each: clusters, networks, servers, whole studies."""
    parser.addoption("--extended", action="store_true", help="run the tests marked extended too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what was not asked for, saying so."""
    if config.getoption("--extended"):
        return
    left_out = pytest.mark.skip(reason="takes minutes: make test SLOW=1 ARGS=--extended")
    for item in items:
        if item.get_closest_marker("extended") is not None:
            item.add_marker(left_out)
