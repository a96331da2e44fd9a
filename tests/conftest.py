"""Fixtures that all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

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
    """`--cluster`: the tests that take minutes of whole clusters, networks and servers each."""
    parser.addoption("--cluster", action="store_true", help="run the tests marked cluster too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what was not asked for, saying so."""
    if config.getoption("--cluster"):
        return
    left_out = pytest.mark.skip(reason="minutes of clusters, networks and servers: make test SLOW=1 ARGS=--cluster")
    for item in items:
        if item.get_closest_marker("cluster") is not None:
            item.add_marker(left_out)
