"""Splits: a partition into disjoint groups, balanced by label, the same for the same seed."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainables.data.chestxray14 import read_table
from trainables.data.index import DataError
from trainables.data.registry import load_index
from trainables.data.splits import SHARES, Leak, find_leaks, refuse_leaks, sample_groups, split_groups
from trainables.settings import DatasetSettings

Data = tuple[np.ndarray, np.ndarray]


@st.composite
def grouped_labels(draw: st.DrawFn) -> Data:
    """Up to 60 groups of one to five images with up to four classes."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sizes = rng.integers(1, 6, draw(st.integers(1, 60)))
    groups = np.repeat([f"p{number}" for number in rng.permutation(len(sizes))], sizes)
    prevalence = rng.uniform(0, 0.6, draw(st.integers(1, 4)))
    labels = (rng.random((len(groups), len(prevalence))) < prevalence).astype(np.uint8)
    return groups, labels


@given(grouped_labels(), st.integers(0, 5))
def test_every_image_gets_one_split_and_no_group_two(data: Data, seed: int) -> None:
    groups, labels = data
    split = split_groups(groups, labels, seed)
    assert split.shape == groups.shape
    assert set(split.tolist()) <= {0, 1, 2}
    assert all(len(set(split[groups == group].tolist())) == 1 for group in set(groups.tolist()))
    assert find_leaks(groups, split) == []


@given(grouped_labels(), st.integers(0, 5), st.randoms(use_true_random=False))
def test_the_order_of_the_rows_does_not_matter(data: Data, seed: int, random: object) -> None:
    groups, labels = data
    order = np.random.default_rng(len(groups)).permutation(len(groups))
    split = split_groups(groups, labels, seed)
    assert np.array_equal(split[order], split_groups(groups[order], labels[order], seed))


@given(grouped_labels())
def test_the_same_seed_gives_the_same_split(data: Data) -> None:
    assert np.array_equal(split_groups(*data, 3), split_groups(*data, 3))


def test_another_seed_gives_another_split() -> None:
    groups = np.array([f"p{i}" for i in range(100)])
    labels = np.ones((100, 1), np.uint8)
    assert not np.array_equal(split_groups(groups, labels, 0), split_groups(groups, labels, 1))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=80), st.integers(0, 3))
@settings(max_examples=60)
def test_single_label_classes_of_three_groups_are_in_every_split(classes: list[int], seed: int) -> None:
    groups = np.array([f"g{i}" for i in range(len(classes))])
    labels = np.eye(6, dtype=np.uint8)[classes]
    split = split_groups(groups, labels, seed)
    for column in np.flatnonzero(labels.sum(0) >= 3):
        assert set(split[labels[:, column] == 1].tolist()) == {0, 1, 2}


@given(st.integers(0, 200))
@settings(max_examples=60)
def test_rare_classes_that_share_groups_with_common_ones_are_in_every_split(seed: int) -> None:
    rng = np.random.default_rng(seed)
    groups = np.array([f"g{i}" for i in range(60)])
    labels = (rng.random((60, 4)) < 0.3).astype(np.uint8)
    labels[:, 0] = 0
    labels[rng.choice(60, 3, replace=False), 0] = 1
    split = split_groups(groups, labels, seed)
    for column in range(4):
        assert set(split[labels[:, column] == 1].tolist()) == {0, 1, 2}


def test_ten_equal_groups_are_split_eight_one_one() -> None:
    groups = np.repeat([f"p{i}" for i in range(10)], 3)
    split = split_groups(groups, np.zeros((30, 2), np.uint8), 0)
    assert np.bincount(split).tolist() == [24, 3, 3]


def test_what_is_balanced_is_images_not_groups() -> None:
    """One patient of 80 images and twenty of one: by groups, train would hold 96 images; by images it holds 80."""
    groups = np.array(["big"] * 80 + [f"p{i}" for i in range(20)])
    split = split_groups(groups, np.ones((100, 1), np.uint8), 0)
    assert np.bincount(split).tolist() == [80, 10, 10]
    assert set(split[:80].tolist()) == {0}


def test_the_true_nih_table_is_split_evenly_and_quickly(real_data: Path, tmp_path: Path) -> None:
    with gzip.open(real_data / "tables" / "Data_Entry_2017_v2020.csv.gz") as packed:
        (tmp_path / "Data_Entry_2017_v2020.csv").write_bytes(packed.read())
    begin = time.process_time()
    table = read_table(DatasetSettings(name="chestxray14", root=str(tmp_path)))
    split = split_groups(table.groups, table.labels, 2026)
    assert time.process_time() - begin < 6
    whole = table.labels.mean(0)
    common = table.labels.sum(0) >= 500
    for part, share in enumerate(SHARES):
        rows = split == part
        assert rows.mean() == pytest.approx(share, abs=0.001)
        np.testing.assert_allclose(table.labels[rows].mean(0)[common], whole[common], rtol=0.1)


FULL_SCALE = r"""
import json, re, sys, time
begin = time.process_time()
from pathlib import Path
from trainables.data.registry import load_index
from trainables.settings import DatasetSettings
index = load_index(DatasetSettings(name="chestxray14", root=sys.argv[1]), Path(sys.argv[1]) / "splits")
seconds = time.process_time() - begin
# Not getrusage: its maximum holds what the parent had before this program began.
megabytes = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
print(json.dumps({"images": len(index), "seconds": seconds, "megabytes": megabytes}))
"""


def test_index_and_split_of_the_true_nih_table_take_6_seconds_and_600_mb_at_most(
    real_data: Path, tmp_path: Path
) -> None:
    """A process of its own, from its imports to the split that is written and read back; seconds of its processor."""
    with gzip.open(real_data / "tables" / "Data_Entry_2017_v2020.csv.gz") as packed:
        (tmp_path / "Data_Entry_2017_v2020.csv").write_bytes(packed.read())
    command = [sys.executable, "-c", FULL_SCALE, str(tmp_path)]
    told = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout)
    assert told["images"] == 112_120
    assert told["seconds"] <= 6, told
    assert told["megabytes"] <= 600, told


TABLES = {
    "chestxray14": ("Data_Entry_2017_v2020.csv.gz", "Data_Entry_2017_v2020.csv", 112_120),
    "ham10000": ("HAM10000_metadata.csv", "HAM10000_metadata.csv", 10_015),
    "vindr_cxr": ("vinbigdata-train.csv.gz", "train.csv", 15_000),
    "chexpert": ("chexpert_train_first2000.csv", "train.csv", 2_000),
}


@pytest.mark.parametrize("name", TABLES)
def test_no_group_of_a_true_table_is_in_two_splits(name: str, real_data: Path, tmp_path: Path) -> None:
    packed, file, images = TABLES[name]
    raw = (real_data / "tables" / packed).read_bytes()
    (tmp_path / file).write_bytes(gzip.decompress(raw) if packed.endswith(".gz") else raw)
    dropped = ("Pleural Other", "Fracture") if name == "chexpert" else ()
    index = load_index(DatasetSettings(name=name, root=str(tmp_path), drop_classes=dropped))
    assert len(index) == images
    splits_of: dict[str, set[int]] = {}
    for group, split in zip(index.groups.tolist(), index.split.tolist(), strict=True):
        splits_of.setdefault(group, set()).add(split)
    assert {len(splits) for splits in splits_of.values()} == {1}


def test_groups_in_two_splits_are_found_and_named() -> None:
    groups = np.array(["7", "8", "7", "9", "10", "10", "7"])
    leaks = find_leaks(groups, np.array([0, 0, 2, 1, 0, 1, 0], np.uint8))
    assert leaks == [Leak("10", ("train", "val"), 2), Leak("7", ("train", "test"), 3)]
    with pytest.raises(
        DataError, match=r"2 patient\(s\) .* \(patient 10 in train and val, patient 7 in train and test\)"
    ):
        refuse_leaks(leaks, "patient")


@given(grouped_labels(), st.integers(1, 200))
def test_a_sample_holds_whole_groups_and_is_about_as_large_as_asked(data: Data, images: int) -> None:
    groups, _ = data
    rows = sample_groups(groups, images, 0)
    assert np.array_equal(rows, np.sort(rows))
    assert not set(groups[rows].tolist()) & set(np.delete(groups, rows).tolist())
    assert abs(len(rows) - min(images, len(groups))) <= 5  # the largest group


def test_a_sample_depends_on_the_seed_alone() -> None:
    groups = np.array([f"p{i}" for i in range(50)])
    assert np.array_equal(sample_groups(groups, 20, 1), sample_groups(groups, 20, 1))
    assert not np.array_equal(sample_groups(groups, 20, 1), sample_groups(groups, 20, 2))
