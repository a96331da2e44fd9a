"""What a node must see, looked for with real folders and files, and how what differs is said."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from study.chains import sources_digest
from study.cluster.node_survey import Wanted, differences, look, wanted
from study.cluster.ray_environment import address_fault
from tests.object_stores import address_of, object_store
from trainables.backbone_files import SHIPPED


@pytest.fixture
def asked(tmp_path: Path) -> Iterator[Wanted]:
    storage, data, encoder = (tmp_path / name for name in ("storage", "data", "encoder"))
    for folder in (storage, data):
        folder.mkdir()
    (data / "table.csv").write_text("a\n")
    shutil.copytree(SHIPPED["tiny-phantom"], encoder)
    with wanted(storage, [str(data)], [str(encoder)]) as note:
        yield note


def test_where_all_is_in_place_nothing_differs_and_the_note_is_taken_away_again(tmp_path: Path) -> None:
    with wanted(tmp_path, [], ["tiny-phantom"]) as asked:
        assert (tmp_path / asked.note).is_file()
        seen = look(asked)
        assert differences("node 1", asked, seen, seen) == []
        assert seen.sources == sources_digest()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_everything_that_differs_is_said_at_once_with_node_place_and_remedy(asked: Wanted) -> None:
    here = look(asked)
    elsewhere = dataclasses.replace(
        asked,
        storage=f"{asked.storage}/none",
        data=tuple(f"{folder}/none" for folder in asked.data),
        encoders=tuple(f"{folder}/none" for folder in asked.encoders),
    )
    seen = look(elsewhere)
    there = dataclasses.replace(
        seen,
        data=dict.fromkeys(asked.data, seen.data[elsewhere.data[0]]),
        encoders=dict.fromkeys(asked.encoders, seen.encoders[elsewhere.encoders[0]]),
        sources="0" * 64,
        versions=seen.versions | {"torch": "1.0"},
    )
    problems = differences("node 7", asked, here, there)
    assert len(problems) == 5
    assert all(problem.startswith("node 7: ") and "; " in problem for problem in problems)
    assert f"--storage {asked.storage} is not there" in problems[0]
    assert f"data root {asked.data[0]} is not there" in problems[1]
    assert "no such folder" in problems[2]
    assert "the code of this project differs there" in problems[3]
    assert "torch is 1.0 there, here " in problems[4]


def test_a_folder_of_the_same_name_with_other_files_is_another_one(asked: Wanted) -> None:
    here = look(asked)
    (Path(asked.storage) / asked.note).write_text("of another cluster")
    (Path(asked.data[0]) / "more.csv").write_text("b\n")
    weights = Path(asked.encoders[0]) / "model.safetensors"
    weights.write_bytes(weights.read_bytes() + b"\0")
    problems = differences("node 7", asked, here, look(asked))
    assert [p.split(" ", 2)[2].split("(")[0].strip() for p in problems] == [
        f"--storage {asked.storage} is another folder there; give a folder of a file system that all nodes share",
        f"data root {asked.data[0]} has 2 entries there, here 1; mount or copy it to the same place on all nodes",
        f"encoder {asked.encoders[0]} is another one there",
    ]


def test_a_node_that_uses_another_object_store_or_may_not_use_it_is_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with object_store(tmp_path / "own") as server, wanted(address_of(server), [], []) as asked:
        here = look(asked)
        assert differences("node 1", asked, here, here) == []
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        (problem,) = differences("node 7", asked, here, look(asked))
        assert problem.startswith(f"node 7: --storage {server.uri}: the store cannot be reached (")
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
        server.delete(asked.note)
        (problem,) = differences("node 7", asked, here, look(asked))
        assert problem.startswith(f"node 7: --storage {server.uri}: is another store there; give all nodes")
        assert not [name for name in server.objects() if name.startswith("partial")]


def test_a_storage_without_the_note_is_another_one(asked: Wanted) -> None:
    (Path(asked.storage) / asked.note).unlink()
    assert look(asked).storage == "is another folder there"
    (Path(asked.storage) / asked.note).touch()  # so that it can be taken away


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("ray://127.0.0.1:10001", "Ray Client"),
        ("127.0.0.1", "expected HOST:PORT"),
        (":6379", "expected HOST:PORT"),
        ("127.0.0.1:port", "expected HOST:PORT"),
        ("127.0.0.1:70000", "expected HOST:PORT"),
        ("127.0.0.1:1", "nothing answers there (Connection refused)"),
        ("no-such-host.invalid:6379", "nothing answers there"),
    ],
)
def test_an_address_that_cannot_be_right_is_told_without_ray(address: str, said: str) -> None:
    fault = address_fault(address)
    assert fault is not None and said in fault
