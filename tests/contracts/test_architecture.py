"""The house rules that no type checker sees: who imports whom, what is packaged, what must never be committed.

Each rule is a function from a tree (its root and the files in it) to faults, one line each that names the place. The
tests ask for none in the project, and show on small offending trees that each rule bites.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]

MAY_IMPORT = {  # package → what of this project it may import
    "study": ("study", "search_spaces", "trainables", "analysis"),
    "search_spaces": ("search_spaces", "trainables.settings"),
    "trainables": ("trainables",),
    "analysis": ("analysis",),
}
OURS = (*MAY_IMPORT, "tests")
ONLY_IN = {  # library → the files that may import it
    "ray": ("study/ray_executor.py",),
    "optuna": ("study/search.py",),
    "mlflow": ("study/ledger.py", "analysis/records.py"),
}
LIGHT = (
    "study.spec",
    "study.plan",
    "study.cli",
)  # answer in about a second, so they import none of these at import time:
HEAVY = ("torch", "ray", "mlflow", "sklearn", "transformers", "optuna")
LARGEST_FILE = 3 * 2**20  # bytes
# Absolute paths in somebody's home or working folder. What precedes the slash tells them from a relative path, a
# variable's expansion, a glob or a closing tag.
MACHINE_PATH = re.compile(
    rb"(?:(?<=file://)|(?<![\w.~$)}<*/]))/(?:(?:home|Users)/\w|(?:root|work)(?![\w-]))|[A-Za-z]:\\+Users\\"
)
CONTAINER_PATH = re.compile(rb"/home/ray\b")  # the user of Ray's public images; allowed in docker/


class Import(NamedTuple):
    """One imported name: `from a import b` counts as `a.b`."""

    line: int
    module: str


# --- reading a tree


def project_files(root: Path) -> list[PurePosixPath]:
    """Files that are tracked, or would be by `git add`, relative to the root."""
    # The clone may belong to another user than the one who runs the tests (containers).
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    return sorted({PurePosixPath(name) for name in listed.split("\0") if name and (root / name).is_file()})


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
        elif isinstance(node, ast.Call) and _called(node) in {"import_module", "__import__"} and node.args:
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                found.append(Import(node.lineno, name.value))
    return found


def _called(node: ast.Call) -> str:
    if isinstance(node.func, ast.Attribute):
        return node.func.attr
    return node.func.id if isinstance(node.func, ast.Name) else ""


def within(module: str, prefix: str) -> bool:
    """Whether a dotted name is the prefix or lies below it."""
    return module == prefix or module.startswith(prefix + ".")


# --- the rules


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


def layout_faults(files: Sequence[PurePosixPath]) -> list[str]:
    """Names that would shadow a module somebody else imports."""
    faults = []
    for file in files:
        if file == PurePosixPath("docker/__init__.py"):
            faults.append(f"{file}: shadows the docker SDK that MLflow imports; delete it")
        if len(file.parts) > 2 and file.parts[0] == "tests" and file.parts[1] in MAY_IMPORT:
            faults.append(f"{file}: tests/{file.parts[1]} shadows {file.parts[1]}; use tests/{file.parts[1]}_tests")
        if len(file.parts) > 1 and file.parts[0] == "study" and PurePosixPath(file.parts[1]).stem in _STANDARD:
            faults.append(f"{file}: named like a standard module, which `python study/launch.py` would hide; rename it")
    return faults


_STANDARD = sys.stdlib_module_names - {"__future__"}


def packaging_faults(root: Path, files: Sequence[PurePosixPath]) -> list[str]:
    """Differences between the packages and data files of the tree and those that pyproject.toml ships."""
    setuptools = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    listed = {PurePosixPath(name.replace(".", "/")) for name in setuptools["packages"]}
    inside = [file for file in files if len(file.parts) > 1 and file.parts[0] not in {"tests", "docker", "docs", ".ci"}]
    found = {file.parent for file in inside if file.name == "__init__.py"}
    faults = [f"{folder}: a package that pyproject.toml does not list" for folder in sorted(found - listed)]
    faults += [f"{folder}: listed in pyproject.toml, but has no __init__.py" for folder in sorted(listed - found)]
    for file in inside:
        if file.suffix == ".py":
            if file.parent not in found:
                faults.append(f"{file}: its folder has no __init__.py, so it is not packaged")
        elif file.suffix != ".md" and not _shipped(file, setuptools.get("package-data", {})):
            faults.append(f"{file}: matched by no package-data pattern, so it is not packaged")
    return faults


def _shipped(file: PurePosixPath, package_data: dict[str, list[str]]) -> bool:
    for package, patterns in package_data.items():
        folder = PurePosixPath(package.replace(".", "/"))
        if file.is_relative_to(folder):
            path = file.relative_to(folder)
            if any(path.match(p) and len(path.parts) == len(PurePosixPath(p).parts) for p in patterns):
                return True
    return False


def content_faults(root: Path, files: Sequence[PurePosixPath]) -> list[str]:
    """Files too large for a repository, and paths of somebody's machine in them (binary files too)."""
    faults = []
    for file in files:
        content = (root / file).read_bytes()
        if len(content) > LARGEST_FILE:
            faults.append(f"{file}: {len(content) / 2**20:.1f} MB; at most {LARGEST_FILE / 2**20:.0f} MB are committed")
        for number, line in enumerate(content.split(b"\n"), start=1):
            if file.parts[0] == "docker":
                line = CONTAINER_PATH.sub(b"", line)
            if match := MACHINE_PATH.search(line):
                place = line[match.start() : match.start() + 60].decode(errors="replace")
                faults.append(f"{file}:{number}: path of a developer's machine: {place}")
    return faults


def decision_faults(root: Path, files: Sequence[PurePosixPath]) -> list[str]:
    """Decision records that break their form (docs/decisions/README.md)."""
    folder = PurePosixPath("docs/decisions")
    records = [file for file in files if file.parent == folder and file.name != "README.md"]
    contents = (root / folder / "README.md").read_text()
    faults = []
    for number, record in enumerate(records, start=1):
        text = (root / record).read_text()
        if not re.fullmatch(rf"{number:04d}-[a-z0-9-]+\.md", record.name):
            faults.append(f"{record}: expected a name of the form {number:04d}-words-in-lower-case.md")
        if re.findall(r"^## (.+)$", text, re.M) != ["Context", "Decision", "Consequences"]:
            faults.append(f"{record}: expected the sections Context, Decision, Consequences")
        if f"({record.name})" not in contents:
            faults.append(f"{record}: not listed in {folder}/README.md")
    return faults


def heavy_imports(root: Path, module: str) -> list[str]:
    """Which heavy libraries a module pulls in when it is imported, in a fresh process."""
    code = "import importlib, sys; importlib.import_module(sys.argv[1]); print(*{m.split('.')[0] for m in sys.modules})"
    run = subprocess.run(
        [sys.executable, "-c", code, module], cwd=root, capture_output=True, text=True, timeout=60, check=False
    )
    assert run.returncode == 0, f"import {module} failed:\n{run.stderr}"
    return sorted(set(HEAVY) & set(run.stdout.split()))


# --- the project keeps them


@pytest.fixture(scope="module")
def files() -> list[PurePosixPath]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: which files belong to the project is not known")
    return project_files(ROOT)


def test_packages_import_in_one_direction(files: list[PurePosixPath]) -> None:
    assert {file.parts[0] for file in sources(files)} >= set(MAY_IMPORT), "a package without sources: wrong root?"
    assert direction_faults(ROOT, files) == []


def test_ray_optuna_and_mlflow_stay_behind_their_files(files: list[PurePosixPath]) -> None:
    assert library_faults(ROOT, files) == []


@pytest.mark.parametrize("module", LIGHT)
def test_planning_imports_nothing_heavy(module: str) -> None:
    assert heavy_imports(ROOT, module) == []


def test_no_name_shadows_another_module(files: list[PurePosixPath]) -> None:
    assert layout_faults(files) == []


def test_everything_in_the_packages_is_shipped(files: list[PurePosixPath]) -> None:
    assert packaging_faults(ROOT, files) == []


def test_no_file_is_huge_or_names_a_machine(files: list[PurePosixPath]) -> None:
    assert content_faults(ROOT, files) == []


def test_decision_records_keep_their_form(files: list[PurePosixPath]) -> None:
    assert decision_faults(ROOT, files) == []


# --- the rules bite


def tree(root: Path, contents: dict[str, str]) -> list[PurePosixPath]:
    """Write files under a folder; returns their relative paths."""
    for name, text in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return sorted(PurePosixPath(name) for name in contents)


@pytest.mark.parametrize(
    ("file", "source", "module"),
    [
        ("trainables/loop.py", "import study.store", "study.store"),
        ("trainables/loop.py", "def f():\n    from analysis import tables\n", "analysis.tables"),
        ("trainables/data/csv.py", "from ... import study", "study"),
        (
            "analysis/tables.py",
            "if TYPE_CHECKING:\n    from trainables.settings import Task\n",
            "trainables.settings.Task",
        ),
        ("analysis/tables.py", "import importlib\nimportlib.import_module('search_spaces')\n", "search_spaces"),
        ("search_spaces/spaces.py", "from trainables import strategy", "trainables.strategy"),
        ("search_spaces/spaces.py", "import trainables", "trainables"),
        ("search_spaces/spaces.py", "from trainables.settings_extra import x", "trainables.settings_extra.x"),
        ("study/cli.py", "from tests.conftest import ROOT", "tests.conftest.ROOT"),
    ],
)
def test_an_import_against_the_direction_is_found(tmp_path: Path, file: str, source: str, module: str) -> None:
    faults = direction_faults(tmp_path, tree(tmp_path, {file: source}))
    assert [fault.partition(";")[0] for fault in faults] == [
        f"{file}:{1 + source[:-1].count(chr(10))}: imports {module}"
    ]


def test_imports_along_the_direction_pass(tmp_path: Path) -> None:
    files = tree(
        tmp_path,
        {
            "study/cli.py": "import analysis.tables, search_spaces, studyology\nfrom trainables.loop import run\n",
            "search_spaces/spaces.py": "from trainables.settings import Settings\nfrom trainables import settings\n",
            "trainables/data/csv.py": "from ..settings import Settings\nfrom . import index\nimport csv\n",
            "tests/study_tests/test_cli.py": "import study.cli, ray\n",
        },
    )
    assert direction_faults(tmp_path, files) == []


def test_a_library_outside_its_files_is_found(tmp_path: Path) -> None:
    files = tree(
        tmp_path,
        {
            "study/ray_executor.py": "import ray\nfrom ray import tune\n",
            "study/executors.py": "def f():\n    from ray.tune import Tuner\n    import mlflow.tracking\n",
            "search_spaces/spaces.py": "import optuna\nimport raylib\n",
            "docker/probe.py": "__import__('ray')\n",
        },
    )
    assert [fault.partition(";")[0] for fault in library_faults(tmp_path, files)] == [
        "docker/probe.py:1: imports ray",
        "search_spaces/spaces.py:1: imports optuna",
        "study/executors.py:2: imports ray.tune.Tuner",
        "study/executors.py:3: imports mlflow.tracking",
    ]


def test_a_heavy_import_is_found_however_indirect(tmp_path: Path) -> None:
    tree(
        tmp_path,
        {
            "study/__init__.py": "",
            "study/spec.py": "import study.helper\n",
            "study/helper.py": "import mlflow\n",
            "study/plan.py": "def later():\n    import mlflow\n",
            "study/cli.py": "import missing_module\n",
            "mlflow.py": "",
        },
    )
    assert heavy_imports(tmp_path, "study.spec") == ["mlflow"]
    assert heavy_imports(tmp_path, "study.plan") == []
    with pytest.raises(AssertionError, match="missing_module"):
        heavy_imports(tmp_path, "study.cli")


@pytest.mark.parametrize(
    "name",
    ["docker/__init__.py", "tests/study/test_plan.py", "tests/analysis/x.py", "study/queue.py", "study/types/a.py"],
)
def test_a_shadowing_name_is_found(name: str) -> None:
    assert len(layout_faults([PurePosixPath(name)])) == 1
    assert (
        layout_faults([PurePosixPath("tests/study_tests/test_queue.py"), PurePosixPath("study/studies/x.yaml")]) == []
    )


def test_what_packaging_would_lose_is_found(tmp_path: Path) -> None:
    pyproject = '[tool.setuptools]\npackages = ["study", "gone"]\npackage-data = {study = ["templates/*.html"]}\n'
    files = tree(
        tmp_path,
        {
            "pyproject.toml": pyproject,
            "study/__init__.py": "",
            "study/templates/report.html": "",
            "study/templates/deep/report.html": "",
            "study/README.md": "",
            "study/loose/code.py": "",
            "extra/__init__.py": "",
            "tests/benchmarks/__init__.py": "",
        },
    )
    assert packaging_faults(tmp_path, files) == [
        "extra: a package that pyproject.toml does not list",
        "gone: listed in pyproject.toml, but has no __init__.py",
        "study/loose/code.py: its folder has no __init__.py, so it is not packaged",
        "study/templates/deep/report.html: matched by no package-data pattern, so it is not packaged",
    ]


# `{}` keeps the offending paths from standing in this file.
@pytest.mark.parametrize(
    "line",
    [
        "root: {}home/ann/data",
        '"{}Users/ann"',
        "cd {}work",
        "file://{}root/x",
        "PATH=.:{}root/bin",
        r"C:\Users\ann",
        ">{}work/a<",
    ],
)
def test_a_machine_path_is_found(tmp_path: Path, line: str) -> None:
    (tmp_path / "notes.bin").write_bytes(b"\x00\xff\nsecond " + line.format("/").encode())
    faults = content_faults(tmp_path, [PurePosixPath("notes.bin")])
    assert len(faults) == 1
    assert faults[0].startswith("notes.bin:2: path of a developer's machine: ")


@pytest.mark.parametrize(
    "line",
    [
        "the root/work of it",
        "~{}work",
        "$HOME{}work/x",
        "${{X}}{}work",
        "https://x.org{}home/a",
        "<{}root>",
        "{}workers",
        "{}work-dir",
    ],
)
def test_other_paths_pass(tmp_path: Path, line: str) -> None:
    (tmp_path / "notes.md").write_text(line.format("/"))
    assert content_faults(tmp_path, [PurePosixPath("notes.md")]) == []


def test_the_user_of_ray_images_is_named_in_docker_only(tmp_path: Path) -> None:
    line = "COPY . {}home/ray/app".format("/")
    files = tree(tmp_path, {"docker/Dockerfile": line, "study/a.yaml": line})
    assert [fault.partition(":")[0] for fault in content_faults(tmp_path, files)] == ["study/a.yaml"]


def test_a_file_over_the_limit_is_found(tmp_path: Path) -> None:
    (tmp_path / "fits").write_bytes(bytes(LARGEST_FILE))
    (tmp_path / "over").write_bytes(bytes(LARGEST_FILE + 1))
    faults = content_faults(tmp_path, [PurePosixPath("fits"), PurePosixPath("over")])
    assert [fault.partition(":")[0] for fault in faults] == ["over"]


def test_a_malformed_decision_record_is_found(tmp_path: Path) -> None:
    files = tree(
        tmp_path,
        {
            "docs/decisions/README.md": "[one](0001-one.md) [three](0003-three.md)",
            "docs/decisions/0001-one.md": "# One\n## Context\n## Decision\n## Consequences\n",
            "docs/decisions/0003-three.md": "# Three\n## Decision\n",
        },
    )
    faults = decision_faults(tmp_path, files)
    assert len(faults) == 2
    assert all(fault.startswith("docs/decisions/0003-three.md: expected") for fault in faults)


def test_untracked_files_count_and_ignored_ones_do_not(tmp_path: Path) -> None:
    tree(tmp_path, {".gitignore": "cache/\n", "cache/a.py": "", "kept.py": "", "gone.py": ""})
    for command in (["init", "--quiet"], ["add", "gone.py"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    (tmp_path / "gone.py").unlink()
    assert [str(file) for file in project_files(tmp_path)] == [".gitignore", "kept.py"]
