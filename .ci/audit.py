"""Ask for known vulnerabilities of every release in requirements.lock: `make audit`.

pip-audit asks an advisory database over the network. A release that it cannot tell anything of is no release without
vulnerabilities, so this says how many there are and fails, where pip-audit itself would pass.

Exit status: 0 nothing known of any release; 1 vulnerabilities, listed; 3 some or all releases could not be audited.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

LOCK = Path(__file__).resolve().parents[1] / "requirements.lock"
FOUND, UNKNOWN = 1, 3
SECONDS = 600


def main() -> int:
    """Audit a lock and say what was found."""
    parser = argparse.ArgumentParser(description="known vulnerabilities of the locked releases")
    parser.add_argument("--lock", type=Path, default=LOCK, help="file of name==version lines")
    parser.add_argument("--service", default="pypi", help="pip-audit's vulnerability service: pypi, osv or esms")
    parser.add_argument("--ignore", action="append", default=[], metavar="ID", help="an advisory that was looked into")
    given = parser.parse_args()
    answer, said = ask(given.lock, given.service, given.ignore)
    if answer is None:
        print(f"audit: the service {given.service!r} did not answer: {said}", file=sys.stderr)
        print("audit: NOTHING was audited; run it where the service can be reached, or --service osv", file=sys.stderr)
        return UNKNOWN
    return judge(answer)


def ask(lock: Path, service: str, ignored: list[str]) -> tuple[dict[str, Any] | None, str]:
    """What pip-audit found, as it writes it; None with the reason where it could not ask."""
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(lock), "--no-deps", "--disable-pip"]
    command += ["--vulnerability-service", service, "--format", "json", "--progress-spinner", "off"]
    command += [part for advisory in ignored for part in ("--ignore-vuln", advisory)]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return None, f"no answer within {SECONDS} s"
    try:
        answer = json.loads(run.stdout)
        return answer if isinstance(answer["dependencies"], list) else None, ""
    except (ValueError, KeyError, TypeError):
        return None, (run.stderr.strip().splitlines() or [f"exit status {run.returncode}"])[-1]


def judge(answer: dict[str, Any]) -> int:
    """Print vulnerabilities and gaps; the exit status."""
    releases = answer["dependencies"]
    gaps = [release for release in releases if "skip_reason" in release]
    vulnerable = [release for release in releases if release.get("vulns")]
    for release in vulnerable:
        for advisory in release["vulns"]:
            fixed = ", ".join(advisory.get("fix_versions", [])) or "no release yet"
            names = ", ".join(dict.fromkeys([advisory["id"], *advisory.get("aliases", [])]))
            print(f"{release['name']} {release['version']}: {names} (fixed in {fixed})")
    audited = len(releases) - len(gaps)
    print(f"audit: {audited} of {len(releases)} releases audited, {len(vulnerable)} with known vulnerabilities")
    if gaps or not releases:
        names = ", ".join(release["name"] for release in gaps[:5]) + (", …" if len(gaps) > 5 else "")
        print(
            f"audit: {len(gaps)} releases COULD NOT be audited ({names}): the index in use knows no advisories; "
            "run it where the service can be reached, or --service osv",
            file=sys.stderr,
        )
    if vulnerable:
        return FOUND
    return UNKNOWN if gaps or not releases else 0


if __name__ == "__main__":
    sys.exit(main())
