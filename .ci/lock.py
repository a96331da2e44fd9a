"""Write requirements.lock: every release that the project with all its extras resolves to.

Run by `make lock`, with any Python ≥ 3.11 that has pip ≥ 22.2. Nothing is installed: pip resolves and reports. Pins of
the present lock are kept where pyproject.toml allows them, so that adding one dependency moves no other;
`--upgrade` forgets them and takes the newest releases.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "requirements.lock"

HEADER = """\
# Releases that spft-studies and all its extras (and their build) resolve to: a pip *constraints* file.
# It installs nothing by itself: `pip install -c requirements.lock -e '.[dev]'` takes what is asked for, as pinned here.
# Written by `make lock` (newest releases: `make lock UPGRADE=1`); never edit it by hand. Why: docs/decisions/0001
# Resolved for CPython {python} on {system} {machine}.
"""


def main() -> None:
    """Resolve, then write the lock."""
    parser = argparse.ArgumentParser(description="write requirements.lock")
    parser.add_argument("--upgrade", action="store_true", help="take the newest releases instead of keeping pins")
    upgrade = parser.parse_args().upgrade
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    report = resolve(requirements(pyproject), None if upgrade or not LOCK.exists() else LOCK)
    lines = pins(report, own=pyproject["project"]["name"])
    header = HEADER.format(
        python=".".join(platform.python_version_tuple()[:2]), system=platform.system(), machine=platform.machine()
    )
    LOCK.write_text(header + "".join(f"{line}\n" for line in lines))
    print(f"{LOCK.name}: {len(lines)} releases")


def requirements(pyproject: dict[str, Any]) -> list[str]:
    """The project with every extra it declares, and what its build needs."""
    extras = ",".join(sorted(pyproject["project"].get("optional-dependencies", {})))
    return [f"{ROOT}[{extras}]" if extras else str(ROOT), *pyproject["build-system"]["requires"]]


def resolve(wanted: list[str], constraints: Path | None) -> dict[str, Any]:
    """The installation report of pip (version 1) for an empty environment.

    Raises:
        SystemExit: pip found no resolution; pip has printed why.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
        command += ["--report", str(path), *(["-c", str(constraints)] if constraints else []), *wanted]
        if subprocess.run(command, check=False).returncode:
            remedy = "try `make lock UPGRADE=1`, which keeps no pin" if constraints else "see pip's message above"
            sys.exit(f"lock: pip finds no resolution of pyproject.toml: {remedy}")
        report: dict[str, Any] = json.loads(path.read_text())
    return report


def pins(report: dict[str, Any], own: str) -> list[str]:
    """Sorted `name==version` lines of a report, without the project itself.

    Raises:
        SystemExit: a dependency comes from a URL, a folder or a repository: no index could serve its pin.
    """
    found = {}
    for item in report["install"]:
        name = re.sub(r"[-_.]+", "-", item["metadata"]["name"]).lower()  # PEP 503
        if name == own:
            continue
        if item["is_direct"]:
            sys.exit(f"lock: {name} is required by URL or path; require a release of it in pyproject.toml")
        # Builds of one release differ in the local label (`+cpu`); a pin without it accepts any of them (PEP 440).
        found[name] = item["metadata"]["version"].partition("+")[0]
    return [f"{name}=={version}" for name, version in sorted(found.items())]


if __name__ == "__main__":
    main()
