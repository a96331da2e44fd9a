"""The data sets that cells are tested on besides their own: drawn, decoded and checked before anything is trained."""

from __future__ import annotations

import os

from study.chains import digest
from study.documents import StudyError
from study.plan import Plan
from study.store import NO_ROOM, Store
from trainables.data.index import DataError
from trainables.data.opened import Folders, open_away, open_data, refuse_images_in_both
from trainables.settings import DatasetSettings


def prepare_away(plan: Plan, store: Store) -> None:
    """Open every other data set once beside the one that is trained on.

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
        try:
            _prepare(data, store)
        except (DataError, StudyError) as error:
            problems |= dict.fromkeys(str(error).split("\n"))
        except OSError as error:
            remedy = "make room and run the same command again" if error.errno in NO_ROOM else "check the folder"
            where = error.filename or store.root
            problems[f"preparing what {data.name} is tested on: {where}: {error.strerror}; {remedy}"] = None
    if problems:
        raise StudyError(problems)


def _prepare(data: DatasetSettings, store: Store) -> None:
    folders, workers = Folders(store.phantoms, store.images, store.splits), os.cpu_count() or 1
    away = open_away(data, folders, workers=workers)
    refuse_images_in_both(open_data(data, folders, workers=workers), away)
    identity = digest("away", away.index.digest(), data.image_size, data.fit)
    store.check_contents(identity, away.images.contents_digest)
