"""What `check` says of a data set: it is read exactly as a study would read it."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pydantic import ValidationError

from study.documents import StudyError
from trainables.data.index import SPLITS, Index
from trainables.data.registry import load_index, prepare
from trainables.settings import DatasetSettings


def check_dataset(given: dict[str, Any]) -> dict[str, Any]:
    """Load the index, find every image, and count.

    Raises:
        StudyError: settings that do not exist or fit.
        DataError: whatever would keep a study from using the data set.
    """
    try:
        settings = DatasetSettings.model_validate(given)
    except ValidationError as error:
        raise StudyError(
            f"dataset.{'.'.join(map(str, p['loc']))}: {p['msg']}" for p in error.errors(include_url=False)
        ) from error
    index = load_index(settings)
    with TemporaryDirectory() as folder:
        prepare(settings, index, Path(folder))
    facts = _facts(index)
    return facts | {"text": _text(facts, index)}


def _facts(index: Index) -> dict[str, Any]:
    splits = {}
    for name in SPLITS:
        rows = index.rows(name)
        counts = index.labels[rows].sum(axis=0, dtype=int)
        splits[name] = {
            "images": len(rows),
            "groups": len(set(index.groups[rows].tolist())),
            "positives": dict(zip(index.classes, counts.tolist(), strict=True)),
        }
    return {
        "dataset": index.dataset,
        "images": len(index),
        "groups": len(set(index.groups.tolist())),
        "splits": splits,
        "dropped": list(index.dropped),
        "split_digest": index.split_digest(),
    }


def _text(facts: dict[str, Any], index: Index) -> str:
    lines = [f"{facts['dataset']}: {facts['images']:,} images of {facts['groups']:,} {index.group_kind}s"]
    lines.append(f"{'positives':28}" + "".join(f"{name:>9}" for name in SPLITS))
    lines += [
        f"{name:28}" + "".join(f"{facts['splits'][s]['positives'][name]:>9,}" for s in SPLITS) for name in index.classes
    ]
    lines.append(f"{'images':28}" + "".join(f"{facts['splits'][s]['images']:>9,}" for s in SPLITS))
    lines.append(f"{index.group_kind + 's':28}" + "".join(f"{facts['splits'][s]['groups']:>9,}" for s in SPLITS))
    if index.dropped:
        lines.append(f"dropped: {', '.join(index.dropped)}")
    return "\n".join(lines)
