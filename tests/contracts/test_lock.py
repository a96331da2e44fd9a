"""The lock pins what pyproject.toml names and all that it pulls in, and the tests run on exactly that."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

Pins = dict[str, Version]


def read_lock(text: str) -> Pins:
    """Name → version.

    Raises:
        ValueError: a line is no plain pin, names no public release, stands twice or out of order.
    """
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    for line in lines:
        if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*==[0-9][0-9a-z.]*", line):
            raise ValueError(f"not of the form name==version: {line}")
    names = [line.partition("==")[0] for line in lines]
    if names != sorted(set(names)):
        raise ValueError("names are not sorted, or stand twice")
    return {name: Version(line.partition("==")[2]) for name, line in zip(names, lines, strict=True)}


def requirements(pyproject: dict[str, Any], *extras: str) -> list[Requirement]:
    """What the build, the project and some of its extras name."""
    project = pyproject["project"]
    groups = [pyproject["build-system"]["requires"], project["dependencies"]]
    groups += [project["optional-dependencies"][extra] for extra in extras]
    return [Requirement(text) for group in groups for text in group]


def unpinned(wanted: list[Requirement], pins: Pins) -> list[str]:
    """Requirements that apply here and that the lock does not pin, or pins to a release they refuse."""
    applying = [requirement for requirement in wanted if requirement.marker is None or requirement.marker.evaluate()]
    faults = []
    for requirement in applying:
        version = pins.get(canonicalize_name(requirement.name))
        if version is None:
            faults.append(f"{requirement}: not in requirements.lock; run `make lock`")
        elif not requirement.specifier.contains(version, prereleases=True):
            faults.append(f"{requirement}: requirements.lock pins {version}; run `make lock UPGRADE=1`")
    return faults


def installed_closure(wanted: list[Requirement]) -> Pins:
    """Everything that requirements pull in, as installed here.

    Raises:
        PackageNotFoundError: one of them is not installed.
    """
    found: Pins = {}
    seen: set[tuple[str, str]] = set()
    queue = [(requirement, "") for requirement in wanted]
    while queue:
        requirement, extra = queue.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        package = distribution(name)
        found[name] = Version(Version(package.version).public)
        for asked in {"", *requirement.extras} - {extra for seen_name, extra in seen if seen_name == name}:
            seen.add((name, asked))
            queue += [(Requirement(text), asked) for text in package.requires or []]
    return found


@pytest.fixture(scope="module")
def pyproject(root: Path) -> dict[str, Any]:
    return tomllib.loads((root / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def pins(root: Path) -> Pins:
    return read_lock((root / "requirements.lock").read_text())


@pytest.fixture(scope="module")
def lock_script(root: Path) -> ModuleType:
    """The script behind `make lock`."""
    spec = importlib.util.spec_from_file_location("lock", root / ".ci" / "lock.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_lock_pins_all_that_pyproject_names(pyproject: dict[str, Any], pins: Pins) -> None:
    extras = pyproject["project"]["optional-dependencies"]
    assert {"detection", "dev"} <= set(extras)
    assert unpinned(requirements(pyproject, *extras), pins) == []


def test_the_tests_run_on_the_pinned_releases(pyproject: dict[str, Any], pins: Pins) -> None:
    # Build requirements come and go with pip's isolated build; an installed one is compared too.
    wanted = [r for r in requirements(pyproject, "dev") if r.name not in {"setuptools", "wheel"}]
    installed = installed_closure(wanted)
    assert len(installed) > 2 * len(wanted), "the closure stops early"
    different = {name: (str(version), str(pins.get(name))) for name, version in installed.items()
                 if pins.get(name) != version}  # fmt: skip
    assert different == {}, "installed, pinned: run `make setup` (or `make lock`, if nothing is pinned)"


def test_a_requirement_outside_the_lock_is_found() -> None:
    pins = read_lock("# comment\nnumpy==2.4.6\ntypes-pyyaml==6.0.12.20261113\n")
    wanted = ["numpy>=2", "Types_PyYAML", "numpy<2", "scipy", 'pywin32; sys_platform == "win32"']
    assert [fault.partition(":")[0] for fault in unpinned([Requirement(text) for text in wanted], pins)] == [
        "numpy<2",
        "scipy",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "numpy>=2.0",
        "torch==2.14.1+cpu",
        "numpy @ https://files.example/numpy.whl",
        "-e .",
        "--index-url https://pypi.example/simple",
        "Flask==3.1.3",
        "numpy==2.4.6 --hash=sha256:00",
        "scipy==1.17.1\nnumpy==2.4.6",
        "numpy==2.4.6\nnumpy==2.4.6",
    ],
)
def test_a_lock_that_is_no_plain_list_of_pins_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"not of the form|not sorted"):
        read_lock(text)


def test_the_closure_follows_extras_and_markers() -> None:
    """hypothesis needs sortedcontainers; its extra `numpy` needs numpy."""
    assert "numpy" not in installed_closure([Requirement("hypothesis")])
    assert {"numpy", "sortedcontainers"} <= set(installed_closure([Requirement("hypothesis[numpy]")]))
    with pytest.raises(PackageNotFoundError):
        installed_closure([Requirement("no-such-distribution")])


def report(name: str, version: str, *, direct: bool = False) -> dict[str, Any]:
    """One entry of pip's installation report."""
    return {"metadata": {"name": name, "version": version}, "is_direct": direct}


def test_the_lock_is_written_sorted_and_without_local_labels(lock_script: ModuleType) -> None:
    entries = [
        report("torch", "2.14.1+cpu"),
        report("PyYAML", "6.0.3"),
        report("spft-studies", "0.1.0", direct=True),
        report("jaraco.text", "4.0"),
    ]
    lines = lock_script.pins({"install": entries}, own="spft-studies")
    assert lines == ["jaraco-text==4.0", "pyyaml==6.0.3", "torch==2.14.1"]


def test_a_dependency_without_a_release_cannot_be_locked(lock_script: ModuleType) -> None:
    with pytest.raises(SystemExit, match="sam2 is required by URL or path"):
        lock_script.pins({"install": [report("sam2", "1.0", direct=True)]}, own="spft-studies")


def test_the_lock_resolves_every_extra(lock_script: ModuleType, pyproject: dict[str, Any]) -> None:
    project, *build = lock_script.requirements(pyproject)
    assert set(pyproject["project"]["optional-dependencies"]) == set(project.rpartition("[")[2].rstrip("]").split(","))
    assert build == pyproject["build-system"]["requires"]


def test_the_header_says_how_the_lock_is_made(root: Path, lock_script: ModuleType) -> None:
    written = (root / "requirements.lock").read_text()
    fixed = lock_script.HEADER.partition("# Resolved for")[0]
    assert written.startswith(fixed)
    assert "make lock" in fixed
