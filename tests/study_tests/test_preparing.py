"""Before training: a storage without room is refused, and decoding says how far it has come."""

from __future__ import annotations

import dataclasses
import io
import shutil
from pathlib import Path

import pytest
from rich.console import Console
from small_studies import document, planned

from study import preparing
from study.documents import StudyError
from study.driver import RunOptions, run_plan
from study.preparing import prepare_data, require_disk
from study.store import Store


def test_a_study_that_the_disk_has_no_room_for_is_refused_before_anything_is_drawn(tmp_path: Path) -> None:
    plan = dataclasses.replace(planned(tmp_path, document()), disk_bytes=shutil.disk_usage(tmp_path).free + 10**12)
    with pytest.raises(StudyError, match=r"--storage .*: the study takes [\d,.]+ GB .* are free; make room, choose"):
        run_plan(plan, RunOptions(tmp_path, "command", executor="local"), Console(quiet=True))
    assert not list(tmp_path.glob("phantoms/*")) and not list(tmp_path.glob("images/*"))


def test_what_a_study_has_written_already_is_not_asked_for_again(tmp_path: Path) -> None:
    store, empty = Store(tmp_path / "storage"), Store(tmp_path / "empty")
    with (store.root / "written").open("wb") as file:
        for _ in range(300):
            file.write(b"x" * 10**6)
    plan = dataclasses.replace(planned(tmp_path, document()), disk_bytes=shutil.disk_usage(tmp_path).free + 15 * 10**7)
    require_disk([plan], store)
    with pytest.raises(StudyError):
        require_disk([plan], empty)


def test_decoding_is_told_in_a_terminal_as_a_bar_and_in_a_log_by_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(tmp_path, document())
    monkeypatch.setattr(preparing, "PLAIN_SECONDS", 0.0)
    log = io.StringIO()
    prepare_data(plan, Store(tmp_path / "one"), Console(file=log, width=80))
    lines = log.getvalue().splitlines()
    images = plan.images_to_decode
    assert lines[0] == "preparing phantom …"
    assert lines[-1] == f"  phantom: {images} of {images} images decoded"
    screen = io.StringIO()
    prepare_data(plan, Store(tmp_path / "two"), Console(file=screen, width=80, force_terminal=True))
    assert f"{images}/{images}" in screen.getvalue()


def test_nothing_is_said_where_nothing_is_decoded(tmp_path: Path) -> None:
    plan = planned(tmp_path, document())
    store = Store(tmp_path / "storage")
    prepare_data(plan, store, Console(quiet=True))
    log = io.StringIO()
    prepare_data(dataclasses.replace(plan, images_to_decode=0), store, Console(file=log))
    assert log.getvalue() == ""
