"""CheXpert: renamed folders, four values of a label, three policies, two views, and the official test split."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from layout_copies import LAYOUTS, copy_with, plain_rows

from trainables.data import chexpert
from trainables.data.adapter import Table
from trainables.data.index import DataError, Index
from trainables.data.registry import find, load_index, locate, read_table
from trainables.settings import DatasetSettings

FOLDER = "CheXpert-v1.0-small"
HEADER = f"Path,Sex,Age,Frontal/Lateral,AP/PA,{','.join(chexpert.CLASSES)}"


def read(root: Path, **changes: object) -> Table:
    return read_table(DatasetSettings(name="chexpert", root=str(root)).model_copy(update=changes))


def value(table: Table, row: int, name: str) -> int:
    return int(table.labels[row, chexpert.CLASSES.index(name)])


def write(root: Path, patients: int, seed: int = 0, *, valid: int = 40) -> Path:
    """A train.csv of two images a patient, a quarter of the labels uncertain, and a valid.csv without a fracture."""
    rng = np.random.default_rng(seed)
    root.mkdir(parents=True)
    for file, part, count in (("train.csv", "train", patients), ("valid.csv", "valid", valid)):
        lines = [HEADER]
        for number in range(count):
            for view in ("frontal", "lateral"):
                drawn = rng.choice(["1.0", "0.0", "-1.0", ""], 14, p=[0.3, 0.3, 0.25, 0.15])
                if part == "valid":
                    drawn = np.where(np.isin(drawn, ["-1.0", ""]), "0.0", drawn)
                    drawn[chexpert.CLASSES.index("Fracture")] = "0.0"
                path = f"CheXpert-v1.0/{part}/patient{number + (90000 if part == 'valid' else 0):05d}/study1/{view}.jpg"
                lines.append(f"{path},Male,50,{view.capitalize()},,{','.join(drawn)}")
        (root / file).write_text("\n".join(lines) + "\n")
    return root


@pytest.mark.parametrize("root", [LAYOUTS / "chexpert", LAYOUTS / "chexpert" / FOLDER])
def test_it_reads_from_the_folder_of_the_tables_and_from_the_one_around_it(root: Path) -> None:
    table = read(root)
    assert table.names.tolist() == [
        "train/patient90001/study1/view1_frontal.jpg",
        "train/patient90002/study2/view1_frontal.jpg",
        "train/patient90002/study1/view2_lateral.jpg",
        "train/patient90003/study1/view1_frontal.jpg",
    ]
    assert table.groups.tolist() == ["patient90001", "patient90002", "patient90002", "patient90003"]
    assert table.refused == ()
    assert table.warnings == ("valid.csv is left aside: it is the test split of dataset.split=official",)


def test_blank_is_absent_and_uncertain_is_what_the_policy_says() -> None:
    for policy, uncertain in (("ones", 1), ("zeros", 0), ("ignore", -1)):
        table = read(LAYOUTS / "chexpert", uncertain=policy)
        assert value(table, 1, "Cardiomegaly") == uncertain
        assert value(table, 1, "Lung Opacity") == 1
        assert value(table, 1, "No Finding") == 0  # blank
        assert value(table, 0, "Pneumothorax") == 0
        assert table.info is not None
        assert f"(U-{policy.capitalize()})" in table.info.notes[-1]


def test_frontal_images_alone_where_asked_for() -> None:
    table = read(LAYOUTS / "chexpert", views="frontal")
    assert len(table) == 3
    assert not any("lateral" in name for name in table.names.tolist())
    assert table.strata is not None
    assert len(table.strata) == 3


def test_the_official_split_tests_on_valid_with_laterals_that_have_no_ap_or_pa() -> None:
    table = read(LAYOUTS / "chexpert", split="official")
    assert table.official is not None
    assert table.official.tolist() == [0, 0, 0, 0, 2, 2]
    assert table.warnings == ()
    assert value(table, 5, "Consolidation") == 1


def test_a_renamed_folder_makes_no_difference(tmp_path: Path) -> None:
    renamed = copy_with(tmp_path, "chexpert", f"{FOLDER}/train.csv", "CheXpert-v1.0-small/train", "train")
    (renamed / FOLDER).rename(renamed / "my copy")
    assert read(renamed).names.tolist() == read(LAYOUTS / "chexpert").names.tolist()


def test_images_are_found_under_the_folder_of_the_tables(tmp_path: Path) -> None:
    root = write(tmp_path / "outer" / "renamed", 60)
    index = load_index(DatasetSettings(name="chexpert", root=str(root.parent)))
    for name in index.names.tolist()[1:]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    assert find(index, root.parent)[0] is None
    with pytest.raises(DataError, match=r"1 of 120 images .*looked in renamed/.* first missing is train/patient00000/"):
        locate(index, root.parent)
    assert find(index, root)[1:] == [root / name for name in index.names.tolist()[1:]]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("patient90001/", "person1/", "line 2: Path 'CheXpert-v1.0-small/train/person1/study1/view1_frontal.jpg'"),
        ("Frontal,AP", "Oblique,AP", "line 2: Frontal/Lateral 'Oblique'; expected Frontal or Lateral"),
        ("AP,1.0", "AP,2.0", "line 2: No Finding '2.0'; expected 1, 0, -1 or nothing"),
        ("patient90002/study1/view2_lateral", "patient90002/study2/view1_frontal", "line 4: .*already in line 3"),
        ("Lung Lesion", "Lung lesion", "no column 'Lung Lesion'; its header is Path, Sex"),
    ],
)
def test_what_is_broken_is_named_with_its_place(tmp_path: Path, old: str, new: str, expected: str) -> None:
    root = copy_with(tmp_path, "chexpert", f"{FOLDER}/train.csv", old, new)
    with pytest.raises(DataError, match=expected):
        read(root).usable()


def test_a_folder_without_tables_or_with_two_copies_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no train.csv in .*; give the folder that holds train.csv, train/ and valid/"):
        read(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.csv").touch()
    with pytest.raises(DataError, match=r"several train.csv, in a and b"):
        read(tmp_path)
    with pytest.raises(DataError, match=r"valid.csv does not exist: .*dataset.split=grouped"):
        (tmp_path / "a" / "train.csv").write_text((LAYOUTS / "chexpert" / FOLDER / "train.csv").read_text())
        read(tmp_path / "a", split="official")


def test_policies_are_compared_on_one_split(tmp_path: Path) -> None:
    root = write(tmp_path / "data", 120)

    def index(policy: str) -> Index:
        settings = DatasetSettings(name="chexpert", root=str(root), uncertain=policy)
        return load_index(settings, tmp_path / "splits")

    ones, zeros, ignore = index("ones"), index("zeros"), index("ignore")
    assert ones.split_digest() == zeros.split_digest() == ignore.split_digest()
    assert len({ones.digest(), zeros.digest(), ignore.digest()}) == 3
    assert len(list((tmp_path / "splits").iterdir())) == 1
    masked = (ignore.labels == -1).sum()
    assert masked == (ones.labels == 1).sum() - (zeros.labels == 1).sum() > 0
    positives, negatives = ignore.class_counts("train")
    assert (positives + negatives < len(ignore.rows("train"))).all()


def test_frontal_images_have_a_split_of_their_own_file(tmp_path: Path) -> None:
    root = write(tmp_path / "data", 120)
    for views in ("all", "frontal"):
        load_index(DatasetSettings(name="chexpert", root=str(root), views=views), tmp_path / "splits")
    assert len(list((tmp_path / "splits").iterdir())) == 2


def test_the_official_test_split_may_lack_a_class_which_is_then_named(tmp_path: Path) -> None:
    root = write(tmp_path / "data", 120)
    index = load_index(DatasetSettings(name="chexpert", root=str(root), split="official"))
    assert len(index.rows("test")) == 80
    assert all(name.startswith("valid/") for name in index.names[index.rows("test")].tolist())
    assert len(index.rows("val")) == pytest.approx(240 / 9, rel=0.25)
    assert index.notes[-1] == "Not measurable in the given test split, and left out of the macro: Fracture."


def test_settings_of_another_data_set_are_refused_by_name() -> None:
    settings = DatasetSettings(name="phantom", uncertain="ignore", table="t.csv")
    with pytest.raises(DataError) as refused:
        load_index(settings)
    assert str(refused.value).split("\n") == [
        "dataset.uncertain: phantom does not read it; it is a setting of chexpert",
        "dataset.table: phantom does not read it; it is a setting of csv and coco",
    ]


def test_the_true_first_rows_agree_with_a_plain_csv_reading(real_data: Path, tmp_path: Path) -> None:
    source = real_data / "tables" / "chexpert_train_first2000.csv"
    (tmp_path / "train.csv").write_bytes(source.read_bytes())
    rows = plain_rows(source)
    for policy, as_positive in (("ones", {"1.0", "-1.0"}), ("zeros", {"1.0"})):
        table = read(tmp_path, uncertain=policy).usable()
        assert len(table) == len(rows) == 2000
        for column, name in enumerate(chexpert.CLASSES):
            assert table.labels[:, column].tolist() == [int(row[name] in as_positive) for row in rows]
    ignored = read(tmp_path, uncertain="ignore")
    counted = Counter(row[name] for row in rows for name in chexpert.CLASSES)
    assert int((ignored.labels == -1).sum()) == counted["-1.0"] > 0
    assert int((ignored.labels == 1).sum()) == counted["1.0"]
    assert ignored.groups.tolist() == [row["Path"].split("/")[2] for row in rows]
    frontal = read(tmp_path, views="frontal")
    assert len(frontal) == sum(row["Frontal/Lateral"] == "Frontal" for row in rows)
