"""The tree that the contract tests judge, and small trees to show that they bite."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[2]
Files = list[PurePosixPath]


def list_project_files(root: Path) -> Files:
    """Files that are tracked, or would be by `git add`, relative to the root."""
    # The clone may belong to another user than the one who runs the tests (containers).
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    return sorted({PurePosixPath(name) for name in listed.split("\0") if name and (root / name).is_file()})


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the project."""
    return ROOT


@pytest.fixture(scope="session")
def project_files() -> Callable[[Path], Files]:
    """`list_project_files`, for its own test."""
    return list_project_files


@pytest.fixture(scope="session")
def files() -> Files:
    """Every file of the project."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: which files belong to the project is not known")
    return list_project_files(ROOT)


@pytest.fixture
def tree(tmp_path: Path) -> Callable[[dict[str, str]], Files]:
    """Writes a small tree under tmp_path from {relative path: text} and returns its files."""

    def write(contents: dict[str, str]) -> Files:
        for name, text in contents.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return sorted(PurePosixPath(name) for name in contents)

    return write
