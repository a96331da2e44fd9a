"""`make audit`: vulnerabilities fail it, and so does everything that could not be asked for."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SAFE = {"name": "numpy", "version": "2.4.6", "vulns": []}
WEAK = {
    "name": "jinja2",
    "version": "2.4.1",
    "vulns": [
        {
            "id": "PYSEC-2014-8",
            "fix_versions": ["2.7.2"],
            "aliases": ["CVE-2014-1402", "GHSA-8r7q-cvjq-x353"],
            "description": "Jinja2 before 2.7.2 does not properly create temporary files.",
        }
    ],
}
GAP = {"name": "typer", "skip_reason": "Dependency not found on PyPI and could not be audited: typer (0.29.2)"}


@pytest.fixture(scope="module")
def audit(root: Path) -> ModuleType:
    """The script behind `make audit`."""
    spec = importlib.util.spec_from_file_location("audit", root / ".ci" / "audit.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("releases", "status", "said"),
    [
        ([SAFE], 0, "audit: 1 of 1 releases audited, 0 with known vulnerabilities"),
        ([SAFE, WEAK], 1, "jinja2 2.4.1: PYSEC-2014-8, CVE-2014-1402, GHSA-8r7q-cvjq-x353 (fixed in 2.7.2)"),
        ([SAFE, GAP], 3, "audit: 1 releases COULD NOT be audited (typer)"),
        ([WEAK, GAP], 1, "COULD NOT be audited (typer)"),
        ([], 3, "audit: 0 of 0 releases audited"),
    ],
)
def test_what_is_vulnerable_or_unknown_does_not_pass(
    audit: ModuleType, capsys: pytest.CaptureFixture[str], releases: list[dict[str, Any]], status: int, said: str
) -> None:
    assert audit.judge({"dependencies": releases}) == status
    captured = capsys.readouterr()
    assert said in captured.out + captured.err


def test_a_service_that_does_not_answer_is_no_clean_bill(root: Path, tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("numpy==2.4.6\n")
    command = [sys.executable, str(root / ".ci" / "audit.py"), "--lock", str(tmp_path / "lock"), "--service", "osv"]
    nowhere = {"HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9", "NO_PROXY": ""}
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env={**os.environ, **nowhere}
    )
    assert run.returncode == 3, run.stdout + run.stderr
    assert "audit: the service 'osv' did not answer: " in run.stderr
    assert "audit: NOTHING was audited" in run.stderr
    assert "Traceback" not in run.stderr and run.stdout == ""
