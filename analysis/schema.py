"""What the ledger holds about a study, as the analysis reads it: the one schema between writer and reader.

`study/ledger.py` writes these facts to MLflow, `analysis/records.py` reads them back; both take the names of tags and
metrics from here, so that they cannot drift apart. Imports no mlflow and no pandas.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict

TAG = "spft."  # every tag of ours starts with this

# Tags of every run
TAG_KIND = TAG + "kind"  # 'row' or 'cell'
TAG_KEY = TAG + "key"  # deterministic: a run is found again by it, never duplicated
TAG_CURRENT = TAG + "current"  # 'true' for the runs of the study as last declared
TAG_STUDY = TAG + "study"
TAG_ROW = TAG + "row"
TAG_ROW_INDEX = TAG + "row_index"
TAG_DATASET = TAG + "dataset"
# Tags of row runs
TAG_MARKS = TAG + "marks"  # JSON: part → bool (Table 11's marks)
TAG_CHANGES = TAG + "changes"  # JSON: dotted key → value, against the study's baseline
# Tags of cell runs
TAG_SEED = TAG + "seed"
TAG_STATUS = TAG + "status"  # CellStatus; MLflow has no PRUNED, so the state of its own lives here
TAG_ERROR = TAG + "error"
TAG_BEST_EPOCH = TAG + "best_epoch"
TAG_WEIGHTS = TAG + "weights_sha256"
TAG_TRAJECTORY = TAG + "trajectory_sha256"
TAG_SPLIT = TAG + "split_digest"
TAG_CONFIG = TAG + "config_digest"
TAG_STAGES = TAG + "stage_keys"  # JSON list
TAG_NOOP_OF = TAG + "noop_of"  # name of the row with the same trajectory and observer at this seed
TAG_UNDEFINED = TAG + "undefined_classes"  # JSON list: classes with one value in the test split
TAG_PREDICTIONS = TAG + "predictions_sha256"  # of the artifact; a cell without the tag has none
TAG_OUTCOME = TAG + "outcome_digest"  # of all that a cell ended with: the same outcome is written once
# Tag of the experiment
TAG_HEADER = TAG + "header"  # StudyHeader as JSON, or where its pieces are: see `header_tags`

# Metrics. Per epoch (step = epochs completed, from 1): 'train/loss', 'val/<metric>', 'lr/…', 'unfrozen_blocks',
# 'class_weight/<class>'. Once a cell, at step 0: 'test/<metric>' and 'best/val/<metric>' for the chosen epoch (the
# prefix keeps the latter out of the curve of 'val/<metric>'). Row runs: 'test/<metric>/mean', '/std', '/n'.
# Names are escaped by `metric_key` in MLflow.
TEST = "test/"
VAL = "val/"
BEST = "best/"
# Artifact of a cell: names, groups, labels (N, C) int8 (−1 unlabelled), scores (N, C) float32, classes.
PREDICTIONS = "predictions.npz"

CellStatus = Literal["RUNNING", "FINISHED", "FAILED", "PRUNED"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Units(_Frozen):
    """Training cost in integer units, one an image's forward pass through one cost unit of the model.

    `alone`, `shared` and `floor` are planned; `executed` was counted in the loop, over all launches that built the
    study; `stopped_early` is what early stopping left out of the plan; `recomputed` what caches could not serve.
    """

    alone: int
    shared: int
    floor: int
    executed: int | None = None
    stopped_early: int = 0
    recomputed: int = 0


class StudyHeader(_Frozen):
    """What a table needs to know besides its rows and cells."""

    study: str
    title: str
    description: str = ""
    task: str
    main_metric: str  # e.g. 'macro_auc'
    metric_label: str  # e.g. 'macro AUC'
    rows: tuple[str, ...]  # order of the table
    seeds: tuple[int, ...]
    datasets: tuple[str, ...]
    parts: tuple[str, ...] = ()  # columns of marks
    comparisons: tuple[tuple[str, str], ...] = ()  # (row, reference row): paired by seed
    per_class: bool = False
    search: bool = False  # rows are trials of a search, which no table compares
    classes: dict[str, tuple[str, ...]]  # data set → classes
    dropped: dict[str, tuple[str, ...]]  # data set → dropped classes
    synthetic: tuple[str, ...] = ()  # data sets that are drawn, not taken
    published: str | tuple[str, ...] | None = None  # files of analysis/published/ to set beside
    notes: tuple[str, ...] = ()  # leakage, splits, tolerance modes: stated in every report
    units: Units
    provenance: dict[str, str]  # command, versions, machine, digests


_REFUSED = re.compile(r"^\.+|[^\w.\- ]")  # by MLflow, in a part of a metric's or parameter's name; ':' is ours
_ESCAPED = re.compile(r":([0-9A-F]*):")
_TAG_PIECE = 5_000  # characters an experiment tag may hold in every MLflow server since 1.0


def metric_key(name: str) -> str:
    """A name as MLflow accepts it as the key of a metric or parameter; `metric_name` turns it back.

    MLflow takes letters, digits, '_', '-', '.', ' ', ':' and '/', and only names that are normal paths. Any other
    character c becomes ':HEX:' (so '@' is ':40:' and ':' is ':3A:'), also dots that lead a part between slashes; an
    empty part is '::'.
    """
    return "/".join(_escape_part(part) for part in name.split("/"))


def _escape_part(part: str) -> str:
    return _REFUSED.sub(lambda found: "".join(f":{ord(character):X}:" for character in found[0]), part) or "::"


def metric_name(key: str) -> str:
    """The name that `metric_key` made a key of."""
    return _ESCAPED.sub(lambda found: chr(int(found[1], 16)) if found[1] else "", key)


def header_tags(header: StudyHeader) -> dict[str, str]:
    """Experiment tags that hold a header, in the order to write them.

    A header longer than one tag may be is cut into pieces whose names hold its digest, and `TAG_HEADER`, written
    last, points to them: a writer that dies half-way leaves the previous header in force.
    """
    text = header.model_dump_json()
    if len(text) <= _TAG_PIECE:
        return {TAG_HEADER: text}
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    pieces = [text[i : i + _TAG_PIECE] for i in range(0, len(text), _TAG_PIECE)]
    tags = {f"{TAG_HEADER}.{digest}.{i}": piece for i, piece in enumerate(pieces)}
    return tags | {TAG_HEADER: json.dumps({"digest": digest, "pieces": len(pieces)})}


def header_from_tags(tags: Mapping[str, str]) -> StudyHeader | None:
    """The header that an experiment's tags hold; None where the experiment is no study of ours.

    Raises:
        ValueError: the header was written by an incompatible version, or a piece of it was deleted.
    """
    text = tags.get(TAG_HEADER)
    if text is None:
        return None
    pointer = json.loads(text)
    if pointer.keys() == {"digest", "pieces"}:
        names = [f"{TAG_HEADER}.{pointer['digest']}.{i}" for i in range(pointer["pieces"])]
        if not tags.keys() >= set(names):
            raise ValueError(f"the tags {sorted(set(names) - tags.keys())} are missing")
        text = "".join(tags[name] for name in names)
    return StudyHeader.model_validate_json(text)
