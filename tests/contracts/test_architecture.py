"""Who may import whom: the direction between packages, libraries behind one file, a planner without heavy imports.

Each rule is a function from a tree (its root and the files in it) to faults, one line each that names the place. The
tests ask for none in the project, and show on small offending trees that each rule bites.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import pytest

Files = list[PurePosixPath]
Tree = Callable[[dict[str, str]], Files]

MAY_IMPORT = {  # package → what of this project it may import
    "study": ("study", "search_spaces", "trainables", "analysis"),
    "search_spaces": ("search_spaces", "trainables.settings"),
    "trainables": ("trainables",),
    "analysis": ("analysis",),
}
OURS = (*MAY_IMPORT, "tests")
ONLY_IN = {  # library → the files that may import it
    "ray": (
        "study/ray_executor.py",
        "study/cluster/ray_cluster.py",
        "study/cluster/ray_head.py",
        "study/cluster/ray_dashboard.py",
    ),
    # asking and telling; where it is kept; drawing, which takes matplotlib
    "optuna": ("study/search.py", "study/searches/trial_storage.py", "study/searches/figures.py"),
    "mlflow": ("study/ledger.py", "analysis/records.py"),
    "fsspec": ("study/storage/object_store.py",),
}
# `--plan`, `--help` and validation answer in about a second: importing the first must not import the second.
LIGHT = ("study.spec", "study.plan", "study.cli")
HEAVY = ("torch", "ray", "mlflow", "sklearn", "transformers", "optuna", "fsspec", "botocore")


class Import(NamedTuple):
    """One imported name: `from a import b` counts as `a.b`."""

    line: int
    module: str


def sources(files: Iterable[PurePosixPath]) -> Iterator[PurePosixPath]:
    """Python files outside tests/, which may import anything."""
    return (file for file in files if file.suffix == ".py" and file.parts[0] != "tests")


def imports(source: str, file: PurePosixPath) -> list[Import]:
    """Every import of a file, wherever it stands: at the top, in a function, under TYPE_CHECKING, by name."""
    found = []
    for node in ast.walk(ast.parse(source, filename=str(file))):
        if isinstance(node, ast.Import):
            found += [Import(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = file.parent.parts[: len(file.parent.parts) + 1 - node.level] if node.level else ()
            base = (*package, *([node.module] if node.module else []))
            found += [Import(node.lineno, ".".join((*base, alias.name))) for alias in node.names]
        elif isinstance(node, ast.Call) and called(node) in {"import_module", "__import__"} and node.args:
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                found.append(Import(node.lineno, name.value))
    return found


def called(node: ast.Call) -> str:
    """Last part of a called name: 'f' for `f()` and for `m.f()`."""
    if isinstance(node.func, ast.Attribute):
        return node.func.attr
    return node.func.id if isinstance(node.func, ast.Name) else ""


def within(module: str, prefix: str) -> bool:
    """Whether a dotted name is the prefix or lies below it."""
    return module == prefix or module.startswith(prefix + ".")


def direction_faults(root: Path, files: Sequence[PurePosixPath]) -> list[str]:
    """Imports of this project's packages against their direction."""
    faults = []
    for file in sources(files):
        allowed = MAY_IMPORT.get(file.parts[0], OURS)
        for line, module in imports((root / file).read_text(), file):
            ours = any(within(module, package) for package in OURS)
            if ours and not any(within(module, target) for target in allowed):
                faults.append(f"{file}:{line}: imports {module}; {file.parts[0]} may import {', '.join(allowed)}")
    return faults


def library_faults(root: Path, files: Sequence[PurePosixPath]) -> list[str]:
    """Imports of a library outside the files that stand between it and the project."""
    return [
        f"{file}:{line}: imports {module}; only {' and '.join(homes)} may import {library}"
        for file in sources(files)
        for line, module in imports((root / file).read_text(), file)
        for library, homes in ONLY_IN.items()
        if within(module, library) and str(file) not in homes
    ]


def heavy_imports(root: Path, module: str) -> list[str]:
    """Which heavy libraries a module pulls in when it is imported, in a fresh process.

    Raises:
        AssertionError: the module cannot be imported.
    """
    code = "import importlib, sys; importlib.import_module(sys.argv[1]); print(*{m.split('.')[0] for m in sys.modules})"
    command = [sys.executable, "-c", code, module]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, f"import {module} failed:\n{run.stderr}"
    return sorted(set(HEAVY) & set(run.stdout.split()))


# --- the project keeps the rules


def test_packages_import_in_one_direction(root: Path, files: Files) -> None:
    assert {file.parts[0] for file in sources(files)} >= set(MAY_IMPORT), "a package without sources"
    assert direction_faults(root, files) == []


def test_ray_optuna_and_mlflow_stay_behind_their_files(root: Path, files: Files) -> None:
    assert library_faults(root, files) == []


@pytest.mark.parametrize("module", LIGHT)
def test_planning_imports_nothing_heavy(root: Path, module: str) -> None:
    assert heavy_imports(root, module) == []


# --- the rules bite


@pytest.mark.parametrize(
    ("file", "source", "fault"),
    [
        ("trainables/loop.py", "import study.store", "1: imports study.store"),
        ("trainables/loop.py", "def f():\n    from analysis import tables", "2: imports analysis.tables"),
        ("trainables/data/csv.py", "from ... import study", "1: imports study"),
        ("trainables/data/csv.py", "from ...study.store import put", "1: imports study.store.put"),
        ("analysis/tables.py", "if TYPE_CHECKING:\n    import trainables.loop", "2: imports trainables.loop"),
        ("analysis/tables.py", "import importlib as i\ni.import_module('search_spaces')", "2: imports search_spaces"),
        ("search_spaces/spaces.py", "from trainables import strategy", "1: imports trainables.strategy"),
        ("search_spaces/spaces.py", "import trainables", "1: imports trainables"),
        ("search_spaces/spaces.py", "import trainables.settings_v2", "1: imports trainables.settings_v2"),
        ("study/cli.py", "from tests.conftest import ROOT", "1: imports tests.conftest.ROOT"),
    ],
)
def test_an_import_against_the_direction_is_found(
    tmp_path: Path, tree: Tree, file: str, source: str, fault: str
) -> None:
    faults = direction_faults(tmp_path, tree({file: source}))
    assert [fault.partition(";")[0] for fault in faults] == [f"{file}:{fault}"]


def test_imports_along_the_direction_pass(tmp_path: Path, tree: Tree) -> None:
    contents = {
        "study/cli.py": "import analysis.tables, search_spaces, studyology\nfrom trainables.loop import run\n",
        "search_spaces/spaces.py": "from trainables.settings import Settings\nfrom trainables import settings\n",
        "trainables/data/csv.py": "from ..settings import Settings\nfrom . import index\nimport csv\n",
        "tests/study_tests/test_cli.py": "import study.cli, ray\n",
    }
    assert direction_faults(tmp_path, tree(contents)) == []


def test_a_library_outside_its_files_is_found(tmp_path: Path, tree: Tree) -> None:
    contents = {
        "study/ray_executor.py": "import ray\nfrom ray import tune\n",
        "study/executors.py": "def f():\n    from ray.tune import Tuner\n    import mlflow.tracking\n",
        "search_spaces/spaces.py": "import optuna\nimport raylib\n",
        "docker/probe.py": "__import__('ray')\n",
    }
    assert [fault.partition(";")[0] for fault in library_faults(tmp_path, tree(contents))] == [
        "docker/probe.py:1: imports ray",
        "search_spaces/spaces.py:1: imports optuna",
        "study/executors.py:2: imports ray.tune.Tuner",
        "study/executors.py:3: imports mlflow.tracking",
    ]


def test_a_heavy_import_is_found_however_indirect(tmp_path: Path, tree: Tree) -> None:
    contents = {
        "study/__init__.py": "",
        "study/spec.py": "import study.helper\n",
        "study/helper.py": "import mlflow\n",
        "study/plan.py": "def later():\n    import mlflow\n",
        "study/cli.py": "import missing_module\n",
        "mlflow.py": "",
    }
    tree(contents)
    assert heavy_imports(tmp_path, "study.spec") == ["mlflow"]
    assert heavy_imports(tmp_path, "study.plan") == []
    with pytest.raises(AssertionError, match="missing_module"):
        heavy_imports(tmp_path, "study.cli")
