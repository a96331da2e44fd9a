"""No file that is read can run code: weights, arrays, tables and YAML are read by what makes values and nothing else.

As in test_architecture.py, a rule turns a tree into faults; the project has none, and offending trees show the bite.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath

import pytest

Files = list[PurePosixPath]
Tree = Callable[[dict[str, str]], Files]

# Files that unpickle what Ray carried from the driver to its workers and back, and nothing from anywhere else.
CARRIED_BY_RAY = ("study/ray_executor.py",)
# A reader that makes empty parts in place of every object (trainables/weight_shapes.py): no class is ever found.
FINDS_NO_CLASS = ("trainables/weight_shapes.py",)
NEVER = {
    "eval": "runs text as code",
    "exec": "runs text as code",
    "os.system": "runs text in a shell",
    "os.popen": "runs text in a shell",
    "marshal.loads": "reads code",
    "torch.hub.load": "downloads code and runs it",
    "shelve.open": "unpickles",
    "pandas.read_pickle": "unpickles",
    "pd.read_pickle": "unpickles",
    "joblib.load": "unpickles",
    "yaml.load": "makes objects; use safe_load",
    "yaml.unsafe_load": "makes objects; use safe_load",
    "yaml.full_load": "makes objects; use safe_load",
}
UNPICKLES = ("pickle.load", "pickle.loads", "pickle.Unpickler", "cloudpickle.load", "cloudpickle.loads", "dill.load")
UNPACKS = ("extractall", "unpack_archive")  # archives hold paths and links


def sources(files: Sequence[PurePosixPath]) -> Iterator[PurePosixPath]:
    """Python files that ship, and the tools."""
    return (file for file in files if file.suffix == ".py" and file.parts[0] != "tests")


def code_faults(root: Path, files: Sequence[PurePosixPath]) -> list[str]:
    """Calls and classes by which a file that is read could run code."""
    faults = []
    for file in sources(files):
        for node in ast.walk(ast.parse((root / file).read_text(), filename=str(file))):
            fault = None
            if isinstance(node, ast.Call):
                fault = called_fault(file, node)
            elif isinstance(node, ast.ClassDef):
                bases = {ast.unparse(base) for base in node.bases}
                if bases & set(UNPICKLES) and str(file) not in FINDS_NO_CLASS:
                    fault = "an unpickler"
            if fault is not None:
                faults.append(f"{file}:{node.lineno}: {fault}")  # type: ignore[attr-defined]
    return faults


def called_fault(file: PurePosixPath, call: ast.Call) -> str | None:
    """What is wrong with a call; None if nothing is."""
    name = ast.unparse(call.func)
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    loads_model = name.endswith(".from_pretrained") and "pretrain" not in file.stem  # which made the folder itself
    rules = {
        f"{name} {NEVER.get(name)}": name in NEVER,
        f"{name} unpickles what it reads": name in UNPICKLES and str(file) not in CARRIED_BY_RAY,
        f"{name} unpacks what an archive says, wherever it says": name.rpartition(".")[2] in UNPACKS,
        "torch.load without weights_only=True unpickles": name == "torch.load" and given.get("weights_only") != "True",
        "torch_safe_load without safe_only=True unpickles": name == "torch_safe_load"
        and given.get("safe_only") != "True",
        f"{name} with allow_pickle unpickles": given.get("allow_pickle", "False") != "False",
        f"{name} runs text in a shell": given.get("shell", "False") != "False",
        f"{name} downloads code and runs it": given.get("trust_remote_code", "False") != "False",
        f"{name} without local_files_only=True may download": loads_model and given.get("local_files_only") != "True",
    }
    return next((fault for fault, holds in rules.items() if holds), None)


def test_no_file_that_is_read_can_run_code(root: Path, files: Files) -> None:
    assert code_faults(root, files) == []


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("torch.load(path)", "torch.load without weights_only=True unpickles"),
        ("torch.load(path, weights_only=False)", "torch.load without weights_only=True unpickles"),
        ("torch_safe_load(path)", "torch_safe_load without safe_only=True unpickles"),
        ("np.load(path, allow_pickle=True)", "np.load with allow_pickle unpickles"),
        ("pickle.load(file)", "pickle.load unpickles what it reads"),
        ("cloudpickle.loads(data)", "cloudpickle.loads unpickles what it reads"),
        ("class Reader(pickle.Unpickler): pass", "an unpickler"),
        ("yaml.load(text, Loader)", "yaml.load makes objects; use safe_load"),
        ("pd.read_pickle(path)", "pd.read_pickle unpickles"),
        ("subprocess.run(text, shell=True)", "subprocess.run runs text in a shell"),
        ("def f():\n    eval(text)", "eval runs text as code"),
        ("AutoModel.from_pretrained(name)", "AutoModel.from_pretrained without local_files_only=True may download"),
        (
            "AutoModel.from_pretrained(folder, local_files_only=True, trust_remote_code=True)",
            "AutoModel.from_pretrained downloads code and runs it",
        ),
        ("tarfile.open(path).extractall(folder)", "tarfile.open(path).extractall unpacks what an archive says"),
    ],
)
def test_what_would_run_code_is_found(tmp_path: Path, tree: Tree, source: str, fault: str) -> None:
    [found] = code_faults(tmp_path, tree({"trainables/loop.py": source}))
    assert found.partition(": ")[2].startswith(fault)


def test_what_reads_values_passes(tmp_path: Path, tree: Tree) -> None:
    contents = {
        "trainables/loop.py": "torch.load(p, weights_only=True)\nnp.load(p)\nnp.load(p, allow_pickle=False)\n"
        "yaml.safe_load(t)\nsubprocess.run(['x'])\nmodel.eval()\nfile.load(x)\n",
        "study/ray_executor.py": "cloudpickle.loads(data)",
        "trainables/weight_shapes.py": "class Reader(pickle.Unpickler): pass",
        "tests/test_x.py": "torch.load(p, weights_only=False)",
    }
    assert code_faults(tmp_path, tree(contents)) == []
