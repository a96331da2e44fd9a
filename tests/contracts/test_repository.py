"""What the repository may hold: names that shadow nothing, packages that ship whole, no huge file, no machine's path.

As in test_architecture.py, a rule turns a tree into faults; the project has none, and offending trees show the bite.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

import pytest

Files = list[PurePosixPath]
Tree = Callable[[dict[str, str]], Files]

PACKAGES = ("study", "search_spaces", "trainables", "analysis")
NOT_SHIPPED = ("tests", "docker", "docs")
LARGEST_FILE = 3 * 2**20  # bytes
# Absolute paths in somebody's home or working folder. What precedes the slash tells them from a relative path, a
# variable's expansion, a glob or a closing tag.
MACHINE_PATH = re.compile(
    rb"(?:(?<=file://)|(?<![\w.~$)}<*/]))/(?:(?:home|Users)/\w|(?:root|work)(?![\w-]))|[A-Za-z]:\\+Users\\"
)
CONTAINER_PATH = re.compile(rb"/home/(?:ray)\b")  # the user of Ray's public images; allowed in docker/


def layout_faults(files: Sequence[PurePosixPath]) -> list[str]:
    """Names that would shadow a module somebody else imports."""
    faults = []
    for file in files:
        top, second = (*file.parts, "")[:2]
        if file == PurePosixPath("docker/__init__.py"):
            faults.append(f"{file}: shadows the docker SDK that MLflow imports; delete it")
        if top == "tests" and second in PACKAGES:
            faults.append(f"{file}: tests/{second} shadows {second}; use tests/{second}_tests")
        if top == "study" and PurePosixPath(second).stem in sys.stdlib_module_names:
            faults.append(f"{file}: named like a standard module, which a script in study/ would hide; rename it")
    return faults


def packaging_faults(root: Path, files: Sequence[PurePosixPath]) -> list[str]:
    """Differences between the packages and data files of the tree and those that pyproject.toml ships."""
    setuptools = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    listed = {PurePosixPath(name.replace(".", "/")) for name in setuptools["packages"]}
    inside = [file for file in files if file.parent.parts and not file.parts[0].startswith((".", *NOT_SHIPPED))]
    found = {file.parent for file in inside if file.name == "__init__.py"}
    faults = [f"{folder}: a package that pyproject.toml does not list" for folder in sorted(found - listed)]
    faults += [f"{folder}: listed in pyproject.toml, but has no __init__.py" for folder in sorted(listed - found)]
    for file in inside:
        if file.suffix == ".py":
            if file.parent not in found | listed:
                faults.append(f"{file}: its folder has no __init__.py, so it is not packaged")
        elif file.suffix != ".md" and not is_shipped(file, setuptools.get("package-data", {})):
            faults.append(f"{file}: matched by no package-data pattern, so it is not packaged")
    return faults


def is_shipped(file: PurePosixPath, package_data: dict[str, list[str]]) -> bool:
    """Whether a pattern of package-data matches a file (setuptools' `*` does not cross folders)."""
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
        searched = CONTAINER_PATH.sub(b"", content) if file.parts[0] == "docker" else content
        for match in MACHINE_PATH.finditer(searched):
            line = 1 + searched.count(b"\n", 0, match.start())
            path = searched[match.start() : match.start() + 60].split(b"\n")[0].decode(errors="replace")
            faults.append(f"{file}:{line}: path of a developer's machine: {path}")
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


# --- the project keeps the rules


def test_no_name_shadows_another_module(files: Files) -> None:
    assert layout_faults(files) == []


def test_everything_in_the_packages_is_shipped(root: Path, files: Files) -> None:
    assert packaging_faults(root, files) == []


def test_no_file_is_huge_or_names_a_machine(root: Path, files: Files) -> None:
    assert content_faults(root, files) == []


def test_decision_records_keep_their_form(root: Path, files: Files) -> None:
    assert decision_faults(root, files) == []


# --- the rules bite


@pytest.mark.parametrize(
    "name", ["docker/__init__.py", "tests/study/test_a.py", "tests/analysis/a.py", "study/queue.py", "study/types/a.py"]
)
def test_a_shadowing_name_is_found(name: str) -> None:
    faults = layout_faults([PurePosixPath(name)])
    assert len(faults) == 1
    assert faults[0].startswith(f"{name}: ")


def test_names_that_shadow_nothing_pass() -> None:
    names = ["tests/study_tests/test_queue.py", "study/studies/x.yaml", "docker/compose.yaml", "analysis/statistics.py"]
    assert layout_faults([PurePosixPath(name) for name in names]) == []


def test_what_packaging_would_lose_is_found(tmp_path: Path, tree: Tree) -> None:
    contents = {
        "pyproject.toml": """
            [tool.setuptools]
            packages = ["study", "gone"]
            package-data = {study = ["templates/*.html"]}
        """,
        "study/__init__.py": "",
        "study/templates/report.html": "",
        "study/templates/deep/report.html": "",
        "study/README.md": "",
        "study/loose/code.py": "",
        "extra/__init__.py": "",
        "tests/benchmarks/__init__.py": "",
    }
    assert packaging_faults(tmp_path, tree(contents)) == [
        "extra: a package that pyproject.toml does not list",
        "gone: listed in pyproject.toml, but has no __init__.py",
        "study/loose/code.py: its folder has no __init__.py, so it is not packaged",
        "study/templates/deep/report.html: matched by no package-data pattern, so it is not packaged",
    ]


# `{}` stands for the slash, so that these lines do not offend themselves.
@pytest.mark.parametrize(
    "line",
    [
        "root: {}home/ann/data",
        '"{}Users/ann"',
        "cd {}work",
        "file://{}root/x",
        "PATH=.:{}root/bin",
        "C:{0}Users{0}ann",
        ">{}work/a<",
        "rm -r {}root",
    ],
)
def test_a_machine_path_is_found(tmp_path: Path, line: str) -> None:
    slash = "\\" if line.startswith("C:") else "/"
    (tmp_path / "notes.bin").write_bytes(b"\x00\xff\nsecond " + line.format(slash).encode())
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
        "**{}work",
    ],
)
def test_other_paths_pass(tmp_path: Path, line: str) -> None:
    (tmp_path / "notes.md").write_text(line.format("/"))
    assert content_faults(tmp_path, [PurePosixPath("notes.md")]) == []


def test_the_user_of_ray_images_is_named_in_docker_only(tmp_path: Path, tree: Tree) -> None:
    line = "COPY . {}home/ray/app".format("/")
    faults = content_faults(tmp_path, tree({"docker/Dockerfile": line, "study/a.yaml": line}))
    assert [fault.partition(":")[0] for fault in faults] == ["study/a.yaml"]


def test_a_file_over_the_limit_is_found(tmp_path: Path) -> None:
    (tmp_path / "fits").write_bytes(bytes(LARGEST_FILE))
    (tmp_path / "over").write_bytes(bytes(LARGEST_FILE + 1))
    faults = content_faults(tmp_path, [PurePosixPath("fits"), PurePosixPath("over")])
    assert [fault.partition(":")[0] for fault in faults] == ["over"]


def test_a_malformed_decision_record_is_found(tmp_path: Path, tree: Tree) -> None:
    contents = {
        "docs/decisions/README.md": "[one](0001-one.md) [three](0003-three.md)",
        "docs/decisions/0001-one.md": "# One\n## Context\n## Decision\n## Consequences\n",
        "docs/decisions/0003-three.md": "# Three\n## Decision\n",
        "docs/decisions/0004-four.md": "# Four\n## Context\n## Decision\n## Consequences\n",
    }
    assert decision_faults(tmp_path, tree(contents)) == [
        "docs/decisions/0003-three.md: expected a name of the form 0002-words-in-lower-case.md",
        "docs/decisions/0003-three.md: expected the sections Context, Decision, Consequences",
        "docs/decisions/0004-four.md: expected a name of the form 0003-words-in-lower-case.md",
        "docs/decisions/0004-four.md: not listed in docs/decisions/README.md",
    ]


def test_untracked_files_count_and_ignored_ones_do_not(
    tmp_path: Path, tree: Tree, project_files: Callable[[Path], Files]
) -> None:
    tree({".gitignore": "cache/\n", "cache/a.py": "", "kept.py": "", "gone.py": ""})
    for command in (["init", "--quiet"], ["add", "gone.py"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    (tmp_path / "gone.py").unlink()
    assert [str(file) for file in project_files(tmp_path)] == [".gitignore", "kept.py"]
