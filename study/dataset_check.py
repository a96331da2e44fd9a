"""What `check` says of a data set: it is read as a study would read it, and every fault is listed, not the first."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from pydantic import ValidationError

from study.documents import StudyError
from trainables.data.boxes import Boxes
from trainables.data.index import SPLITS, Index, Refused
from trainables.data.masks import Masks
from trainables.data.registry import (
    DATASETS,
    find,
    leaks_of,
    place,
    read_boxes,
    read_masks,
    read_table,
    split_table,
    unmeasurable,
)
from trainables.data.shared_labels import is_finding, means_no_finding
from trainables.data.splits import Leak
from trainables.settings import DatasetSettings

FINDINGS = "findings-{dataset}.csv"  # where the faults are listed, in the folder of the command
_SHOWN = 5  # faults of a kind that the text shows


@dataclass(frozen=True)
class Duplicates:
    """Images with the same pixels.

    Attributes:
        why: what they falsify: 'in two splits', 'of two patients', 'with different labels'; empty where nothing.
    """

    images: tuple[str, ...]
    splits: tuple[str, ...]
    groups: tuple[str, ...]
    why: str


@dataclass(frozen=True)
class Check:
    """A data set's facts and faults.

    Attributes:
        splits: name → images, groups, positives a class.
        leaks: groups in two splits.
        missing: images without a file.
        unreadable: images that cannot be decoded.
        refused: rows, boxes and images that cannot be used.
        duplicates: sets of images with the same pixels.
        warnings: what falsifies nothing, one sentence each.
    """

    dataset: str
    group_kind: str
    images: int
    groups: int
    splits: dict[str, dict[str, Any]]
    leaks: tuple[Leak, ...]
    missing: tuple[str, ...]
    unreadable: tuple[Refused, ...]
    refused: tuple[Refused, ...]
    duplicates: tuple[Duplicates, ...]
    warnings: tuple[str, ...]

    def facts(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {
            "images": self.images,
            "groups": self.groups,
            "splits": self.splits,
            "leaks": [{"group": x.group, "splits": list(x.splits), "images": x.images} for x in self.leaks],
            "missing": list(self.missing),
            "unreadable": [{"image": x.place, "reason": x.reason} for x in self.unreadable],
            "refused": [{"place": x.place, "reason": x.reason} for x in self.refused],
            "duplicates": [
                {"images": list(x.images), "splits": list(x.splits), "groups": list(x.groups), "falsifies": x.why}
                for x in self.duplicates
            ],
            "warnings": list(self.warnings),
        }

    def faults(self) -> list[tuple[str, str, str]]:
        """(kind, place, detail) of everything that would falsify a result."""
        kind = self.group_kind
        return [
            *(("leak", f"{kind} {x.group}", f"{x.images} images in {' and '.join(x.splits)}") for x in self.leaks),
            *(("missing", name, "no file") for name in self.missing),
            *(("unreadable", x.place, x.reason) for x in self.unreadable),
            *(("refused", x.place, x.reason) for x in self.refused),
            *(("duplicate", ", ".join(x.images), f"the same pixels {x.why}") for x in self.duplicates if x.why),
        ]


def check_dataset(
    given: dict[str, Any], *, tables_only: bool = False, seen: Callable[[int], None] = lambda _images: None
) -> Check:
    """Read the tables, split, and unless `tables_only` open every image.

    Args:
        given: settings of the group `dataset`.
        tables_only: look for no image.
        seen: called with the number of all images after each image that was opened.

    Raises:
        StudyError: settings that do not exist or fit.
        DataError: what keeps the tables from being read at all.
    """
    settings = _settings(given)
    table = read_table(settings)
    index = split_table(table, settings)
    boxes = read_boxes(settings)
    refused = dict.fromkeys((*table.refused, *(() if boxes is None else boxes.refused)))
    problem = unmeasurable(index, given_test=table.official is not None)
    warnings = [*table.warnings, *_conflicts(index), *([problem] if problem is not None else [])]
    looked = _NOT_LOOKED if tables_only else _look(settings, index, boxes, seen)
    return Check(
        dataset=index.dataset,
        group_kind=index.group_kind,
        images=len(index),
        groups=len(np.unique(index.groups)),
        splits={name: _facts_of_split(index, name) for name in SPLITS},
        leaks=tuple(leaks_of(table, index)),
        missing=looked.missing,
        unreadable=looked.unreadable,
        refused=(*refused, *looked.wrong),
        duplicates=looked.duplicates,
        warnings=(*warnings, *_harmless(looked.duplicates), *looked.oddities),
    )


def _settings(given: dict[str, Any]) -> DatasetSettings:
    try:
        return DatasetSettings.model_validate(given)
    except ValidationError as error:
        raise StudyError(
            f"dataset.{'.'.join(map(str, p['loc']))}: {p['msg']}" for p in error.errors(include_url=False)
        ) from error


@dataclass(frozen=True)
class _Looked:
    """What the files of images and masks say."""

    missing: tuple[str, ...] = ()
    unreadable: tuple[Refused, ...] = ()
    wrong: tuple[Refused, ...] = ()
    duplicates: tuple[Duplicates, ...] = ()
    oddities: tuple[str, ...] = ()


_NOT_LOOKED = _Looked()


def _look(settings: DatasetSettings, index: Index, boxes: Boxes | None, seen: Callable[[int], None]) -> _Looked:
    from trainables.data.survey import survey_boxes, survey_images, survey_masks

    workers = os.cpu_count() or 1
    with TemporaryDirectory() as folder:
        paths = find(index, place(settings, Path(folder)))
        survey = survey_images(index, paths, workers, lambda: seen(len(index)))
        masks = read_masks(settings)
        of_masks = [] if masks is None else survey_masks(index, masks, survey.sizes, workers)
    of_boxes = [] if boxes is None else survey_boxes(index, boxes, survey.sizes)
    return _Looked(
        missing=tuple(name for name, path in zip(index.names.tolist(), paths, strict=True) if path is None),
        unreadable=survey.unreadable,
        wrong=(*survey.wrong, *of_boxes, *of_masks),
        duplicates=tuple(_duplicates(index, rows) for rows in survey.duplicates),
        oddities=(*_kinds_of_dicom(survey.claimed), *_left_out(masks)),
    )


def _left_out(masks: Masks | None) -> tuple[str, ...]:
    """Masks that a study would leave out."""
    if masks is None or not masks.left_out:
        return ()
    image, why = next(iter(masks.left_out.items()))
    return (f"the masks of {len(masks.left_out)} images are left out, the first are those of {image}: {why}",)


def _kinds_of_dicom(claimed: Mapping[tuple[str, str], int]) -> tuple[str, ...]:
    """Where nothing is known of what the images should be, DICOM files that say they are of several kinds."""
    if len(claimed) < 2:
        return ()
    kinds = sorted(claimed.items(), key=lambda kind: (-kind[1], kind[0]))
    told = ", ".join(f"{count} {modality or 'untold'} of {part or 'untold'}" for (modality, part), count in kinds)
    return (f"DICOM files of several modalities or body parts: {told}",)


def _conflicts(index: Index) -> list[str]:
    """Images that have no finding and one."""
    none = [column for column, name in enumerate(index.classes) if means_no_finding(name)]
    found = [column for column, name in enumerate(index.classes) if is_finding(name)]
    warnings = []
    for column in none:
        rows = np.flatnonzero((index.labels[:, column] == 1) & (index.labels[:, found] == 1).any(1))
        if len(rows):
            warnings.append(
                f"{len(rows)} images are labelled {index.classes[column]!r} beside a finding, the first is "
                f"{index.names[rows[0]]}"
            )
    return warnings


def _duplicates(index: Index, rows: tuple[int, ...]) -> Duplicates:
    at = np.array(rows)
    splits = tuple(SPLITS[s] for s in np.unique(index.split[at]).tolist())
    groups = tuple(np.unique(index.groups[at]).tolist())
    why = ""
    if len(splits) > 1:
        why = f"in {' and '.join(splits)}"
    elif len(np.unique(index.labels[at], axis=0)) > 1:
        why = "with different labels"
    elif len(groups) > 1 and index.group_kind != "image":
        why = f"of {len(groups)} {index.group_kind}s"
    return Duplicates(tuple(index.names[at].tolist()), splits, groups, why)


def _harmless(duplicates: tuple[Duplicates, ...]) -> list[str]:
    harmless = [found for found in duplicates if not found.why]
    if not harmless:
        return []
    first = " and ".join(harmless[0].images[:2])
    return [f"{len(harmless)} images are there more than once, in one split and alike, the first is {first}"]


def _facts_of_split(index: Index, name: str) -> dict[str, Any]:
    positives, _ = index.class_counts(name)
    return {
        "images": len(index.rows(name)),
        "groups": len(np.unique(index.groups[index.rows(name)])),
        "positives": dict(zip(index.classes, positives.tolist(), strict=True)),
    }


def write_findings(faults: list[tuple[str, str, str]], path: Path) -> None:
    """All faults as CSV: kind, place, detail.

    Raises:
        StudyError: the file cannot be written.
    """
    from analysis.csv_files import no_formula

    try:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["kind", "place", "detail"])
            writer.writerows([no_formula(text) for text in fault] for fault in faults)
    except OSError as error:
        raise StudyError([f"--findings {path}: cannot be written ({error.strerror}); name another file"]) from error


def text_of(check: Check) -> str:
    """What a person reads: counts, warnings, and the first faults of each kind."""
    kinds = f"{check.group_kind}s"
    own_groups = check.group_kind != "image"
    of = f" of {check.groups:,} {kinds}" if own_groups else ""
    lines = [f"{DATASETS[check.dataset].title}: {check.images:,} images{of}"]
    classes = list(check.splits["train"]["positives"])
    width = max(28, *(len(name) + 1 for name in (*classes, kinds)))
    table = [
        ("positives", SPLITS),
        *((name, [f"{check.splits[s]['positives'][name]:,}" for s in SPLITS]) for name in classes),
        ("images", [f"{check.splits[s]['images']:,}" for s in SPLITS]),
        *([(kinds, [f"{check.splits[s]['groups']:,}" for s in SPLITS])] if own_groups else []),
    ]
    lines += [f"{name:{width}}" + "".join(f"{value:>9}" for value in values) for name, values in table]
    lines += [f"warning: {warning}" for warning in check.warnings]
    faults = check.faults()
    for kind in dict.fromkeys(kind for kind, _, _ in faults):
        own = [(where, detail) for of, where, detail in faults if of == kind]
        lines += [f"{kind}: {where}: {detail}" for where, detail in own[:_SHOWN]]
        lines += [f"{kind}: … {len(own) - _SHOWN:,} more"] if len(own) > _SHOWN else []
    return "\n".join(lines)
