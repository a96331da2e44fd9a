"""The test images that a report draws predictions on: taken from the decoded images, and kept beside the study.

No ledger holds images, and what is decoded can be thrown away: the few that a report shows are kept in the storage when
a study ends, so that `report` can draw them again later.
"""

from __future__ import annotations

import io
import json
import logging
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from analysis.picture_choice import Choice
from analysis.pictures import Pixels, PixelSource
from analysis.writers import write_atomically
from study.plan import Plan
from study.store import pictures_file
from trainables.data.images import decoded_pixels

log = logging.getLogger(__name__)

Images = dict[tuple[str, str], Pixels]  # (row of the study, image name) → (S, S, C)


def images_of(plan: Plan, root: Path) -> PixelSource:
    """Images from what this plan's data sets were decoded to, under the storage `root`; each is kept there."""

    def taken(choice: Choice) -> Images:
        images = _decoded(plan, root, choice)
        if images:
            write_atomically(pictures_file(root, plan.study.name, choice.dataset), _packed(images))
        return images

    return taken


def kept_images(root: Path, study: str) -> PixelSource:
    """Images that were kept under the storage `root` when the study was last run."""

    def taken(choice: Choice) -> Images:
        path = pictures_file(root, study, choice.dataset)
        return _unpacked(path) if path.is_file() else {}

    return taken


def _decoded(plan: Plan, root: Path, choice: Choice) -> Images:
    """Rows may differ in how large they take the images: each has its own."""
    chains = {c.cell.row.name: c for c in plan.chains if c.cell.dataset == choice.dataset}
    found: Images = {}
    for row in choice.runs:
        settings, index = chains[row].cell.settings.dataset, chains[row].material.index
        position = {name: i for i, name in enumerate(index.names.tolist())}
        at = [position[image.name] for image in choice.images if image.name in position]
        pixels = decoded_pixels(index, at, settings.image_size, settings.fit, root / "images")
        if pixels is not None:
            found |= {(row, str(index.names[i])): image for i, image in zip(at, pixels, strict=True)}
    return found


def _packed(images: Mapping[tuple[str, str], Pixels]) -> bytes:
    """Each different image once."""
    different: dict[bytes, Pixels] = {}
    places = []
    for (row, name), pixels in images.items():
        data = pixels.tobytes() + str(pixels.shape).encode()
        different.setdefault(data, pixels)
        places.append([row, name, list(different).index(data)])
    arrays = {f"pixels_{i}": pixels for i, pixels in enumerate(different.values())}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, places=np.array(json.dumps(places)), **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def _unpacked(path: Path) -> Images:
    """What `_packed` packed; a damaged file counts as none, and is said."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            places = json.loads(str(stored["places"]))
            return {(row, name): stored[f"pixels_{i}"] for row, name, i in places}
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        log.warning("%s: damaged (%s); run the study's command again to have its images kept anew", path, error)
        return {}
