"""Token authentication is said on every path, from a file of the storage; no secret is sent along."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from study.cluster.ray_environment import prepare_environment, sent_along, token_fault
from study.documents import StudyError

MODE, PATH, TOKEN = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_TOKEN"


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing set, a home folder with a token of Ray's own in it, and all as it was afterwards."""
    monkeypatch.setattr(os, "environ", {**os.environ})
    for name in (MODE, PATH, TOKEN):
        os.environ.pop(name, None)
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("of the home folder")
    os.environ["HOME"] = str(tmp_path)


def test_a_cluster_of_this_machine_has_a_token_that_its_owner_alone_can_read(tmp_path: Path) -> None:
    prepare_environment(tmp_path, local=True)
    path = Path(os.environ[PATH])
    assert (os.environ[MODE], path) == ("token", tmp_path / "ray_auth_token")
    assert path.stat().st_mode & 0o777 == 0o600
    assert len(path.read_text()) == 64
    assert token_fault() is None


def test_the_token_stays_what_it_was_and_no_two_storages_share_one(tmp_path: Path) -> None:
    tokens = []
    for name in ("a", "b", "a"):
        (tmp_path / name).mkdir(exist_ok=True)
        os.environ.pop(PATH, None)
        prepare_environment(tmp_path / name, local=True)
        tokens.append(Path(os.environ[PATH]).read_text())
    assert tokens[0] == tokens[2] != tokens[1]


@pytest.mark.parametrize("mode", ["", "disabled", "token"])
def test_a_cluster_of_this_machine_asks_for_a_token_whatever_the_mode_was(tmp_path: Path, mode: str) -> None:
    os.environ[MODE] = mode
    prepare_environment(tmp_path, local=True)
    assert (os.environ[MODE], os.environ[PATH]) == ("token", str(tmp_path / "ray_auth_token"))


def test_a_token_that_is_given_is_used(tmp_path: Path) -> None:
    os.environ[PATH] = "/srv/token"
    for local in (True, False):
        prepare_environment(tmp_path, local=local)
        assert (os.environ[MODE], os.environ[PATH]) == ("token", "/srv/token")
    assert not (tmp_path / "ray_auth_token").exists()


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        (None, "RAY_AUTH_MODE is not set"),
        ("tokens", "RAY_AUTH_MODE is 'tokens'"),
        ("token", "RAY_AUTH_MODE is token, and no token is named"),
    ],
)
def test_a_cluster_of_others_is_not_met_without_saying_how(tmp_path: Path, mode: str | None, said: str) -> None:
    if mode is not None:
        os.environ[MODE] = mode
    with pytest.raises(StudyError, match=f"{said}: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH"):
        prepare_environment(tmp_path, local=False)


def test_a_cluster_without_a_token_is_one_only_where_that_is_said(tmp_path: Path) -> None:
    os.environ[MODE] = "disabled"
    prepare_environment(tmp_path, local=False)
    assert os.environ[MODE] == "disabled"
    assert PATH not in os.environ


@pytest.mark.parametrize(("contents", "said"), [(None, r"holds none \(No such file"), ("\n", "it is empty")])
def test_a_file_without_a_token_is_named(tmp_path: Path, contents: str | None, said: str) -> None:
    path = tmp_path / "token"
    if contents is not None:
        path.write_text(contents)
    os.environ[MODE], os.environ[PATH] = "token", str(path)
    assert re.search(f"{re.escape(str(path))} .*{said}", token_fault() or "")


def test_the_hubs_settings_are_sent_along_and_its_token_is_not() -> None:
    here = {"HF_HOME": "/cache", "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "https://hub.example", "PATH": "/bin"}
    secret = {"HF_TOKEN": "hf_x", "HF_TOKEN_PATH": "/t", "HF_API_KEY": "k", "HF_HUB_PASSWORD": "p", "HF_AUTH": "a"}
    secret["HF_MIRROR"] = "https://ann:secret@hub.example"
    assert sent_along(here | secret | {"AWS_SECRET_ACCESS_KEY": "s"}) == {
        name: here[name] for name in ("HF_HOME", "HF_HUB_OFFLINE", "HF_ENDPOINT")
    }
