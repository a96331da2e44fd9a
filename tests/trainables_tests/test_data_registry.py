"""From settings to an index: classes, splits, samples, the kept split file, and images found on disk."""

from __future__ import annotations

import csv
import gzip
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from trainables.data import chestxray14, ham10000
from trainables.data.index import SPLITS, DataError, Index
from trainables.data.registry import DATASETS, load_index, locate, prepare
from trainables.settings import DatasetSettings

WriteTable = Callable[..., DatasetSettings]


@pytest.fixture
def ham(tmp_path: Path) -> WriteTable:
    """Write a HAM10000 table of one image a lesion, the classes in turn, and empty image files."""

    def write(images: int = 210, **changes: object) -> DatasetSettings:
        root = tmp_path / "ham"
        (root / "HAM10000_images_part_1").mkdir(parents=True, exist_ok=True)
        with (root / "HAM10000_metadata.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(ham10000.HEADER)
            for i in range(images):
                dx = ham10000.CLASSES[i % 7]
                writer.writerow([f"HAM_{i:07d}", f"ISIC_{i:07d}", dx, "histo", 50, "male", "back"])
                (root / "HAM10000_images_part_1" / f"ISIC_{i:07d}.jpg").touch()
        return DatasetSettings(name="ham10000", root=str(root)).model_copy(update=changes)

    return write


@pytest.mark.parametrize("name", ["phantom", "phantom-derm"])
def test_the_default_phantoms_can_be_learnt_and_measured_in_every_class(name: str) -> None:
    index = load_index(DatasetSettings(name=name))
    assert len(index) == DATASETS[name].default_images
    assert index.synthetic
    for split, share in zip(SPLITS, (0.8, 0.1, 0.1), strict=True):
        rows = index.rows(split)
        assert len(rows) == pytest.approx(share * len(index), abs=3)
        assert index.labels[rows].sum(0).min() >= 4
        assert (len(rows) - index.labels[rows].sum(0, dtype=int)).min() >= 4


def test_no_dataset_settings_but_those_of_the_table_and_split_change_the_index() -> None:
    default = load_index(DatasetSettings())
    assert load_index(DatasetSettings(image_size=64, fit="squash")).digest() == default.digest()
    for change in ({"hospital": 1}, {"split_seed": 1}, {"images": 800}):
        assert load_index(DatasetSettings(**change)).digest() != default.digest()


def test_reading_an_index_needs_none_of_the_heavy_libraries() -> None:
    code = (
        "import sys\n"
        "from trainables.data.registry import load_index\n"
        "from trainables.settings import DatasetSettings\n"
        "load_index(DatasetSettings())\n"
        "print(sorted({'torch', 'sklearn', 'ray', 'mlflow', 'pandas', 'PIL', 'scipy'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_an_unknown_data_set_is_refused_with_the_known_ones() -> None:
    with pytest.raises(DataError, match="unknown data set 'chestxray'; known are chestxray14, chexpert, ham10000"):
        load_index(DatasetSettings(name="chestxray"))


def test_an_unknown_class_to_drop_is_refused_with_the_known_ones() -> None:
    with pytest.raises(DataError, match="phantom has no class 'Edma'; its classes are Atelectasis, Cardiomegaly"):
        load_index(DatasetSettings(drop_classes=("Edma", "Mass")))


def test_not_all_classes_can_be_dropped() -> None:
    with pytest.raises(DataError, match="drops all 7 classes"):
        load_index(DatasetSettings(name="phantom-derm", drop_classes=ham10000.CLASSES))


def test_the_phantom_has_no_official_split() -> None:
    with pytest.raises(DataError, match="no official split"):
        load_index(DatasetSettings(split="official"))


def test_dropping_a_class_of_multi_label_data_keeps_its_images_and_every_split() -> None:
    whole, less = load_index(DatasetSettings()), load_index(DatasetSettings(drop_classes=("Hernia", "Mass")))
    assert less.classes == tuple(name for name in whole.classes if name not in ("Hernia", "Mass"))
    assert less.dropped == ("Mass", "Hernia")
    assert len(less) == len(whole)
    assert less.split_digest() == whole.split_digest()
    assert less.digest() != whole.digest()


def test_dropping_a_class_of_single_label_data_removes_its_images_and_moves_no_other(ham: WriteTable) -> None:
    whole, less = load_index(ham()), load_index(ham(drop_classes=("nv",)))
    stays = whole.labels[:, whole.classes.index("nv")] == 0
    assert less.names.tolist() == whole.names[stays].tolist()
    assert less.split.tolist() == whole.split[stays].tolist()
    assert less.labels.sum(1).tolist() == [1] * 180


def test_classes_that_cannot_be_measured_are_refused_together_with_counts_and_remedy(ham: WriteTable) -> None:
    settings = ham(images=70)
    table = Path(str(settings.root)) / "HAM10000_metadata.csv"
    # Two lesions each of df and vasc are left: one split of three goes without.
    lines = table.read_text().splitlines(keepends=True)
    surplus = [line for dx in ("df", "vasc") for line in [li for li in lines if f",{dx}," in li][2:]]
    table.write_text("".join(line for line in lines if line not in surplus))
    with pytest.raises(DataError, match=r"2 class\(es\) without a positive .*drop_classes=\[df,vasc\]") as refused:
        load_index(settings)
    assert re.search(r"Positives: df train \d, val \d, test \d; vasc train", str(refused.value))
    kept = load_index(settings.model_copy(update={"drop_classes": ("df", "vasc")}))
    assert kept.classes == ("akiec", "bcc", "bkl", "mel", "nv")


def test_a_class_that_every_image_has_is_refused_too(tmp_path: Path) -> None:
    rows = [f"{i:08d}_000.png,{'Mass|Edema' if i % 2 else 'Mass'},0,{i},50,M,PA,1,1,1,1" for i in range(100)]
    (tmp_path / "Data_Entry_2017_v2020.csv").write_text("\n".join([chestxray14.HEADER, *rows]))
    others = tuple(name for name in chestxray14.CLASSES if name not in ("Mass", "Edema"))
    settings = DatasetSettings(name="chestxray14", root=str(tmp_path), drop_classes=others)
    with pytest.raises(DataError, match=r"Positives: Mass train 80, val 10, test 10; .*drop_classes=\[Mass\]"):
        load_index(settings)


def test_a_smaller_number_of_real_images_is_a_sample_of_whole_groups(ham: WriteTable) -> None:
    whole, sample = load_index(ham(images=350)), load_index(ham(images=350).model_copy(update={"images": 140}))
    assert len(sample) == 140
    assert set(sample.names.tolist()) < set(whole.names.tolist())
    again = load_index(ham(images=350).model_copy(update={"images": 140}))
    assert again.digest() == sample.digest()


def test_val_is_carved_out_of_the_official_train_list_by_patient(tmp_path: Path) -> None:
    rows, lists = [], {"train": "", "test": ""}
    for patient in range(200):
        for follow_up in range(1 + patient % 3):
            name = f"{patient:08d}_{follow_up:03d}.png"
            finding = chestxray14.CLASSES[patient % 14]
            rows.append(f"{name},{finding},{follow_up},{patient},50,M,PA,1,1,1,1")
            lists["test" if patient >= 140 else "train"] += name + "\n"
    (tmp_path / "Data_Entry_2017.csv").write_text("\n".join([chestxray14.HEADER, *rows]))
    for split, file in chestxray14.OFFICIAL_LISTS.items():
        (tmp_path / file).write_text(lists[split])
    index = load_index(DatasetSettings(name="chestxray14", root=str(tmp_path), split="official"))
    assert set(index.names[index.rows("test")].tolist()) == set(lists["test"].split())
    rest = len(index.rows("train")) + len(index.rows("val"))
    assert len(index.rows("val")) == pytest.approx(rest / 9, rel=0.15)


def test_official_lists_that_tear_a_patient_apart_are_refused(tmp_path: Path) -> None:
    rows = [f"{p:08d}_{f:03d}.png,Mass,{f},{p},50,M,PA,1,1,1,1" for p in range(30) for f in range(2)]
    (tmp_path / "Data_Entry_2017.csv").write_text("\n".join([chestxray14.HEADER, *rows]))
    names = [row.split(",")[0] for row in rows]
    (tmp_path / "train_val_list.txt").write_text("\n".join(names[:41]))
    (tmp_path / "test_list.txt").write_text("\n".join(names[41:]))
    with pytest.raises(DataError, match=r"1 patient\(s\) have images in two splits \(patient 20 in train and test\)"):
        load_index(DatasetSettings(name="chestxray14", root=str(tmp_path), split="official"))


class TestKeptSplit:
    def test_it_is_written_once_and_read_from_then_on(self, tmp_path: Path) -> None:
        first = load_index(DatasetSettings(), tmp_path / "splits")
        (file,) = (tmp_path / "splits").iterdir()
        written = file.stat().st_mtime_ns
        head, header, *rows = file.read_text().splitlines()
        assert re.fullmatch(r"# digest=[0-9a-f]{64} seed=2026 dataset=phantom split=grouped", head)
        assert header == "image,group,split"
        assert len(rows) == len(first)
        assert load_index(DatasetSettings(), tmp_path / "splits").split_digest() == first.split_digest()
        assert file.stat().st_mtime_ns == written
        assert first.split_digest() == load_index(DatasetSettings()).split_digest()

    def test_it_is_what_counts_not_the_algorithm(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        first = load_index(DatasetSettings(), tmp_path)

        def other(*_arguments: object) -> None:
            raise AssertionError("split anew")

        monkeypatch.setattr("trainables.data.registry.split_groups", other)
        assert load_index(DatasetSettings(), tmp_path).split_digest() == first.split_digest()

    def test_settings_with_other_rows_or_splits_have_files_of_their_own(self, tmp_path: Path) -> None:
        for changes in ({}, {"split_seed": 1}, {"images": 800}, {"hospital": 2}):
            load_index(DatasetSettings(**changes), tmp_path)
        load_index(DatasetSettings(drop_classes=("Mass",), image_size=64, fit="squash"), tmp_path)
        assert len(list(tmp_path.iterdir())) == 4

    def test_an_edited_file_is_refused(self, tmp_path: Path) -> None:
        load_index(DatasetSettings(), tmp_path)
        (file,) = tmp_path.iterdir()
        file.write_text(file.read_text().replace(",test\n", ",train\n", 1))
        with pytest.raises(DataError, match=r"damaged or was edited .*; restore it, or delete it"):
            load_index(DatasetSettings(), tmp_path)

    def test_a_truncated_file_is_refused(self, tmp_path: Path) -> None:
        load_index(DatasetSettings(), tmp_path)
        (file,) = tmp_path.iterdir()
        file.write_bytes(file.read_bytes()[:5000])
        with pytest.raises(DataError, match="damaged or was edited"):
            load_index(DatasetSettings(), tmp_path)

    def test_another_table_is_refused(self, tmp_path: Path, ham: WriteTable) -> None:
        load_index(ham(images=210), tmp_path / "splits")
        with pytest.raises(DataError, match=r"0 of its images are gone .* 70 are new \(image ISIC_0000210 is not in"):
            load_index(ham(images=280), tmp_path / "splits")
        with pytest.raises(DataError, match="140 of its images are gone"):
            load_index(ham(images=70), tmp_path / "splits")

    def test_the_order_of_the_table_may_change(self, tmp_path: Path, ham: WriteTable) -> None:
        first = load_index(ham(), tmp_path / "splits")
        table = Path(str(ham().root)) / "HAM10000_metadata.csv"
        header, *rows = table.read_text().splitlines()
        table.write_text("\n".join([header, *reversed(rows)]))
        settings = DatasetSettings(name="ham10000", root=str(table.parent))
        again = load_index(settings, tmp_path / "splits")
        assert again.names.tolist() == first.names.tolist()[::-1]
        assert again.split.tolist() == first.split.tolist()[::-1]


class TestLocate:
    def test_names_without_extension_are_found_in_both_parts(self, tmp_path: Path, ham: WriteTable) -> None:
        index = load_index(ham())
        root = tmp_path / "ham"
        (root / "HAM10000_images_part_2").mkdir()
        moved = root / "HAM10000_images_part_1" / "ISIC_0000003.jpg"
        moved.rename(root / "HAM10000_images_part_2" / "ISIC_0000003.JPG")
        paths = locate(index, root)
        assert paths[2] == root / "HAM10000_images_part_1" / "ISIC_0000002.jpg"
        assert paths[3] == root / "HAM10000_images_part_2" / "ISIC_0000003.JPG"

    def test_missing_images_are_counted_and_the_first_is_named(self, tmp_path: Path, ham: WriteTable) -> None:
        settings = ham()
        index = load_index(settings)
        for number in (5, 9):
            (tmp_path / "ham" / "HAM10000_images_part_1" / f"ISIC_{number:07d}.jpg").unlink()
        with pytest.raises(DataError, match=r"2 of 210 images are not under .* the first missing is ISIC_0000005"):
            prepare(settings, index, tmp_path)

    def test_without_any_image_folder_that_is_said(self, tmp_path: Path) -> None:
        index = replace(load_index(DatasetSettings()), dataset="chestxray14")
        with pytest.raises(DataError, match=r"1200 of 1200 images are not under .*looked in no image folder"):
            locate(index, tmp_path)

    @pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "images/../../secret.png"])
    def test_names_that_leave_the_root_are_refused(self, tmp_path: Path, name: str) -> None:
        (tmp_path / "secret.png").touch()
        with pytest.raises(DataError, match="leaves the data set's folder"):
            locate(_renamed(load_index(DatasetSettings()), name), tmp_path / "root")

    def test_nested_names_are_paths_under_the_root(self, tmp_path: Path) -> None:
        index = load_index(DatasetSettings())
        first = replace(index, **{f: getattr(index, f)[:1] for f in ("groups", "labels", "split")})
        (tmp_path / "a" / "b").mkdir(parents=True)
        (tmp_path / "a" / "b" / "c.png").touch()
        assert locate(replace(first, names=np.array(["a/b/c.png"])), tmp_path) == [tmp_path / "a" / "b" / "c.png"]
        with pytest.raises(DataError, match=r"the first missing is a/b/d\.png"):
            locate(replace(first, names=np.array(["a/b/d.png"])), tmp_path)

    def test_the_twelve_folders_of_chestxray14_are_searched(self, tmp_path: Path) -> None:
        index = load_index(DatasetSettings())
        for position, name in enumerate(index.names.tolist()):
            folder = tmp_path / f"images_{position % 12 + 1:03d}" / "images"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
        paths = locate(index, tmp_path)
        assert [path.name for path in paths] == index.names.tolist()
        assert len({path.parent for path in paths}) == 12


def _renamed(index: Index, name: str) -> Index:
    return replace(index, names=np.array([name, *index.names.tolist()[1:]]))


def test_the_real_subsets_load_with_the_classes_they_can_measure(real_data: Path, tmp_path: Path) -> None:
    ham = DatasetSettings(name="ham10000", root=str(real_data / "ham10000"))
    index = load_index(ham, tmp_path / "splits")
    assert len(index) == 2087
    assert prepare(ham, index, tmp_path) == real_data / "ham10000"
    chest = DatasetSettings(name="chestxray14", root=str(real_data / "chestxray14"))
    try:
        index = load_index(chest)
    except DataError as refused:
        named = re.search(r"drop_classes=\[(.*?)\]", str(refused))
        assert named is not None
        index = load_index(chest.model_copy(update={"drop_classes": tuple(named[1].split(","))}))
    assert len(index) == 1000
    assert len(locate(index, real_data / "chestxray14")) == 1000


def test_a_sample_of_the_true_nih_table_can_be_measured(real_data: Path, tmp_path: Path) -> None:
    with gzip.open(real_data / "tables" / "Data_Entry_2017_v2020.csv.gz") as packed:
        (tmp_path / "Data_Entry_2017_v2020.csv").write_bytes(packed.read())
    index = load_index(DatasetSettings(name="chestxray14", root=str(tmp_path), images=12_000))
    assert len(index) == pytest.approx(12_000, abs=100)
