"""`make setup` on machines that lack something, and `.ci/run`'s promises. Interpreters and apt are stand-ins here: the
real ones would install gigabytes; CI itself runs them."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

CLOSING = "=========== 3 passed, 1 skipped in 61.20s (0:01:01) ==========="
# Answers like an interpreter: creates an environment with a copy of itself, and notes every call and its constraints.
PYTHON = """#!/bin/sh
echo "$* ${PIP_CONSTRAINT:+[$PIP_CONSTRAINT $PIP_BUILD_CONSTRAINT]}" >> calls.log
case "$*" in "-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python;; esac
"""


def executable(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def checkout(root: Path, tmp_path: Path) -> Path:
    """A folder with the Makefile, the lock and a pyproject.toml."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(root / name, tmp_path / name)
    return tmp_path


def make(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # No other variable: a `make check SLOW=1` that runs these tests hands its own down.
    env = {"PATH": os.environ["PATH"]}
    return subprocess.run(
        ["make", *arguments], cwd=checkout, env=env, capture_output=True, text=True, timeout=60, check=False
    )


def calls(checkout: Path) -> list[str]:
    return [line.rstrip() for line in (checkout / "calls.log").read_text().splitlines()]


def test_setup_installs_once_under_the_lock_and_again_when_it_changes(checkout: Path) -> None:
    python = executable(checkout / "python", PYTHON)
    first = make(checkout, "setup", f"PYTHON={python}")
    assert first.returncode == 0, first.stderr
    assert calls(checkout)[2:] == [
        "-m venv --clear .venv",
        "-m pip install -e .[dev] [requirements.lock requirements.lock]",
    ]

    assert "Nothing to be done" in make(checkout, "setup", f"PYTHON={python}").stdout
    assert len(calls(checkout)) == 4

    stamp = checkout / ".venv" / ".installed-dev"
    os.utime(stamp, (0, 0))  # as if the lock had changed since
    make(checkout, "setup", f"PYTHON={python}")
    assert calls(checkout)[4:] == ["-m pip install -e .[dev] [requirements.lock requirements.lock]"]


def test_another_choice_of_extras_is_installed_too(checkout: Path) -> None:
    python = executable(checkout / "python", PYTHON)
    make(checkout, "setup", f"PYTHON={python}")
    make(checkout, "setup", f"PYTHON={python}", "EXTRAS=dev,detection")
    assert [call for call in calls(checkout) if "pip install" in call][1].startswith(
        "-m pip install -e .[dev,detection]"
    )


def test_an_install_that_fails_is_not_taken_for_done(checkout: Path) -> None:
    failing = PYTHON + 'case "$*" in "-m pip"*) exit 1;; esac\n'
    python = executable(checkout / "python", failing)
    assert make(checkout, "setup", f"PYTHON={python}").returncode != 0
    assert not list((checkout / ".venv").glob(".installed*"))


def test_an_old_python_is_refused_with_the_remedy(checkout: Path) -> None:
    old = executable(checkout / "python3.9", "#!/bin/sh\nexit 1\n")  # its version check says no
    run = make(checkout, "setup", f"PYTHON={old}")
    assert run.returncode != 0
    assert f"setup: needs Python 3.11 or newer; tried: {old}. Install it, or name it: make setup PYTHON=" in run.stderr
    assert not (checkout / ".venv").exists()


def test_the_first_python_that_is_new_enough_is_taken(checkout: Path) -> None:
    old = executable(checkout / "python3.9", "#!/bin/sh\nexit 1\n")
    new = executable(checkout / "python3.11", PYTHON)
    assert make(checkout, "setup", f"PYTHON={checkout}/missing {old} {new}").returncode == 0
    assert f"{new} -m venv" in make(checkout, "--always-make", "setup", f"PYTHON={old} {new}").stdout


def test_a_python_without_ensurepip_is_refused_with_the_remedy(checkout: Path) -> None:
    bare = executable(checkout / "python", '#!/bin/sh\ncase "$*" in *ensurepip*) exit 1;; esac\n')
    run = make(checkout, "setup", f"PYTHON={bare}")
    assert run.returncode != 0
    assert "On Debian and Ubuntu: apt-get install python3-venv" in run.stderr
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize(
    ("arguments", "marks"), [((), "-m 'not slow'"), (("SLOW=0",), "-m 'not slow'"), (("SLOW=1",), "")]
)
def test_check_runs_lint_types_and_tests_in_this_order(checkout: Path, arguments: tuple[str, ...], marks: str) -> None:
    printed = make(checkout, "--dry-run", "check", "LIMIT=timeout 9", *arguments).stdout.splitlines()
    assert [" ".join(line.split()) for line in printed[-4:]] == [
        ".venv/bin/python -m ruff check .",
        ".venv/bin/python -m ruff format --check .",
        ".venv/bin/python -m mypy",
        f"timeout 9 .venv/bin/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder {marks}".strip(),
    ]


def test_help_names_every_target_of_the_surface(checkout: Path) -> None:
    listed = {line.split()[1] for line in make(checkout).stdout.splitlines()}
    assert listed >= {"setup", "ablation", "test", "check", "check-all", "bench", "lock", "clean", "help"}


# --- .ci/run


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A PATH of its own: what .ci/run uses, git, a capable python3, ip, PostgreSQL; no make yet."""
    path = tmp_path / "bin"
    path.mkdir()
    for tool in ("bash", "dirname", "grep", "mktemp", "rm", "tail", "tee", "timeout"):
        found = shutil.which(tool)
        assert found is not None, f"{tool} is not installed"
        (path / tool).symlink_to(found)
    for stand_in in ("git", "python3", "ip", "pg_createcluster"):
        executable(path / stand_in, "#!/bin/sh\n")
    executable(path / "apt-get", f'#!/bin/sh\necho "$*" >> {tmp_path}/apt.log\n')
    return path


def ci(root: Path, path: Path, make_does: str) -> subprocess.CompletedProcess[str]:
    """Runs .ci/run where `make` does as told."""
    executable(path / "make", f"#!/bin/sh\n{make_does}\n")
    return subprocess.run(
        [path / "bash", root / ".ci" / "run"],
        env={"PATH": str(path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_ci_passes_on_what_make_says(root: Path, machine: Path, tmp_path: Path) -> None:
    run = ci(root, machine, f'echo "$CI $*"\necho "{CLOSING}"')
    assert run.returncode == 0, run.stderr
    first, last = run.stdout.splitlines()
    assert first.startswith("true --keep-going check SLOW=1 LIMIT=timeout --signal=INT")
    assert last == CLOSING
    assert not (tmp_path / "apt.log").exists(), "nothing was missing"


def test_ci_ends_with_the_closing_line_when_make_fails(root: Path, machine: Path) -> None:
    run = ci(root, machine, f'echo "{CLOSING}"; echo "make: *** [test] Error 1" >&2; exit 2')
    assert run.returncode == 2
    assert run.stdout.splitlines()[-1] == CLOSING


@pytest.mark.parametrize(("status", "expected"), [(2, 2), (0, 1)])
def test_ci_fails_when_the_tests_never_ran(root: Path, machine: Path, status: int, expected: int) -> None:
    run = ci(root, machine, f"echo no tests; exit {status}")
    assert run.returncode == expected
    assert f"ci: pytest did not finish (exit status {status})" in run.stderr


def test_ci_installs_what_is_missing_and_nothing_else(root: Path, machine: Path, tmp_path: Path) -> None:
    for tool in ("ip", "pg_createcluster"):
        (machine / tool).unlink()
    executable(machine / "python3", "#!/bin/sh\nexit 1\n")  # too old, or without ensurepip
    run = ci(root, machine, f'echo "{CLOSING}"')
    if os.geteuid() != 0:
        assert run.returncode == 1
        assert "ci: needs python3 python3-venv iproute2 postgresql; install them, or run as root" in run.stderr
        return
    assert run.returncode == 0, run.stderr
    update, install = (tmp_path / "apt.log").read_text().splitlines()
    assert update.endswith("update")
    assert install.endswith("install --yes --no-install-recommends python3 python3-venv iproute2 postgresql")
    assert "DPkg::Lock::Timeout=300" in install
