"""Before training: room on the disk, and every data set drawn, decoded and checked once."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from study.chains import digest
from study.documents import StudyError
from study.plan import Plan
from study.storage.places import LOCAL, NO_ROOM, AwayError
from study.store import Store
from trainables.data.images import Told
from trainables.data.index import DataError
from trainables.data.opened import Folders, open_away, open_data, refuse_images_in_both
from trainables.settings import DatasetSettings
from trainables.tasks import TASKS

PLAIN_SECONDS = 30.0  # without a terminal: between two lines on how far decoding has come


def require_disk(plans: Sequence[Plan], store: Store) -> None:
    """Refuse studies that their storage has no room for: a full disk must not be met after days.

    What lies in the storage already counts as this study's, so that no study is refused for what it has written.

    Raises:
        StudyError: with what is wanted and what is free.
    """
    free = shutil.disk_usage(store.root).free
    needed = sum(plan.disk_bytes if store.address.uri is None else plan.cache_bytes for plan in plans)
    if needed <= free:
        return
    wanted = needed - _written(store.root)
    if wanted > free:
        what, where, other = "images, caches, states and weights", f"--storage {store.root}", "choose another --storage"
        if store.address.uri is not None:
            what, where, other = "images and caches", str(store.root), f"name another folder by {LOCAL}"
        raise StudyError(
            [
                f"{where}: the study takes {wanted / 1e9:,.1f} GB for {what}, {free / 1e9:,.1f} GB are free; make "
                f"room, {other}, or choose a smaller dataset.image_size"
            ]
        )


def _written(root: Path) -> int:
    """Bytes of the files in a storage, as far as they stay where they are."""
    total = 0
    for folder, _, files in os.walk(root):
        for name in files:
            try:
                total += os.stat(os.path.join(folder, name)).st_blocks * 512  # noqa: PTH116, PTH118 (many files)
            except FileNotFoundError:  # dropped meanwhile
                continue
    return total


def prepare_data(plan: Plan, store: Store, console: Console) -> dict[str, str]:
    """Draw, decode and check every data set once; cache identity → digest of the contents of its images and masks.

    Raises:
        StudyError: with every problem of every data set; nothing was trained.
    """
    contents: dict[str, str] = {}
    opened: dict[str, str] = {}
    problems: list[str] = []
    folders = Folders(store.phantoms, store.images, store.splits)
    for chain in plan.chains:
        settings = chain.cell.settings
        at = settings.model_dump_json(include={"task", "dataset", "segmentation"}, exclude={"dataset": {"tested"}})
        if at not in opened:
            try:
                kind, workers = TASKS[settings.task], os.cpu_count() or 1
                with _told(settings.dataset.name, console, speak=bool(plan.images_to_decode)) as told:
                    data = open_data(
                        settings.dataset, folders, workers=workers, told=told, labels_learnt=kind.labels_learnt
                    )
                opened[at] = kind.contents(settings, data)
                store.check_contents(chain.cache_identity, opened[at])
            except (DataError, StudyError) as error:
                problems += str(error).split("\n")
                opened[at] = ""
            except OSError as error:
                problems.append(_unusable(settings.dataset.name, store, error))
                opened[at] = ""
        contents[chain.cache_identity] = opened[at]
    if problems:
        raise StudyError(problems)
    return contents


def prepare_away(plan: Plan, store: Store, console: Console) -> None:
    """Draw, decode and check every data set that is tested on besides, once, beside the one that is trained on.

    Raises:
        StudyError: with everything that keeps one from being used: images that are missing, damaged, changed, or that
            training looks at too.
    """
    settings = {
        chain.cell.settings.dataset.model_dump_json(): chain.cell.settings.dataset
        for chain in plan.chains
        if chain.material.away is not None
    }
    problems: dict[str, None] = {}
    for data in settings.values():
        name = data.test_on.name if data.test_on is not None else data.name
        try:
            _open_beside(data, store, name, console, speak=bool(plan.images_to_decode))
        except (DataError, StudyError) as error:
            problems |= dict.fromkeys(str(error).split("\n"))
        except OSError as error:
            problems[_unusable(name, store, error)] = None
    if problems:
        raise StudyError(problems)


def _open_beside(data: DatasetSettings, store: Store, name: str, console: Console, *, speak: bool) -> None:
    folders, workers = Folders(store.phantoms, store.images, store.splits), os.cpu_count() or 1
    with _told(name, console, speak=speak) as told:
        away = open_away(data, folders, workers=workers, told=told)
    refuse_images_in_both(open_data(data, folders, workers=workers), away)
    identity = digest("away", away.index.digest(), data.image_size, data.fit)
    store.check_contents(identity, away.images.contents_digest)


def _unusable(name: str, store: Store, error: OSError) -> str:
    if isinstance(error, AwayError):
        return str(error)
    remedy = "make room and run the same command again" if error.errno in NO_ROOM else "check the folder"
    return f"preparing {name}: {error.filename or store.root}: {error.strerror}; {remedy}"


@contextmanager
def _told(dataset: str, console: Console, *, speak: bool) -> Iterator[Told]:
    """Says how far decoding has come: a bar in a terminal, a line now and then in a log."""
    if not speak:
        yield lambda done, images: None
        return
    if not console.is_terminal:
        console.print(f"preparing {dataset} …", highlight=False)
        yield _Lines(dataset, console)
        return
    columns = (TextColumn("preparing {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(dataset, total=None)
        yield lambda done, images: bar.update(task, completed=done, total=images)


class _Lines:
    """One line each half minute."""

    def __init__(self, dataset: str, console: Console) -> None:
        self._dataset, self._console = dataset, console
        self._spoke = time.monotonic()

    def __call__(self, done: int, images: int) -> None:
        if time.monotonic() - self._spoke >= PLAIN_SECONDS:
            self._spoke = time.monotonic()
            self._console.print(f"  {self._dataset}: {done:,} of {images:,} images decoded", highlight=False)
