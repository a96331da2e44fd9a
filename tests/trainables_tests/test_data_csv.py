"""Any table: three ways to write labels, columns by name, given splits, and one error for each thing that is wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layout_copies import LAYOUTS, plain_rows

from trainables.data import chestxray14, ham10000
from trainables.data.adapter import Table
from trainables.data.index import DataError
from trainables.data.registry import find, load_index, locate, read_table
from trainables.settings import DatasetSettings

BINARY = {"label_columns": ("Mass", "Nodule")}
SEPARATED = {"label_column": "findings", "label_separator": "|"}
SINGLE = {"label_column": "diagnosis"}


def described(root: Path = LAYOUTS / "csv", **changes: object) -> DatasetSettings:
    columns = {"table": "labels.csv", "image_column": "file", "group_column": "patient", **changes}
    return DatasetSettings(name="csv", root=str(root), **columns)


def read(root: Path = LAYOUTS / "csv", **changes: object) -> Table:
    return read_table(described(root, **changes))


def write(root: Path, *lines: str, encoding: str = "utf-8") -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / "labels.csv").write_bytes(
        "\n".join(["file,patient,part,findings,diagnosis,Mass,Nodule", *lines]).encode(encoding)
    )
    return root


def test_a_column_of_zeros_and_ones_a_class_is_multi_label_in_the_order_asked_for() -> None:
    table = read(label_columns=("Nodule", "Mass")).usable()
    assert table.info is not None
    assert table.info.classes == ("Nodule", "Mass")
    assert table.labels.tolist() == [[1, 1], [0, 1], [0, 0], [1, 0]]
    assert not table.info.single_label
    assert table.groups.tolist() == ["7", "7", "8", "9"]
    assert table.info.group_kind == "group"


def test_a_separated_column_is_multi_label_with_its_classes_in_alphabetical_order() -> None:
    table = read(**SEPARATED).usable()
    assert table.info is not None
    assert (table.info.classes, table.info.single_label) == (("Mass", "Nodule"), False)
    assert table.labels.tolist() == [[1, 1], [1, 0], [0, 0], [0, 1]]
    assert table.warnings == ("1 images have no value in 'findings': read as none of the classes",)


def test_a_label_column_without_separator_is_single_label() -> None:
    table = read(**SINGLE).usable()
    assert table.info is not None
    assert (table.info.classes, table.info.single_label) == (("both", "mass", "nodule", "none"), True)
    assert table.labels.sum(1).tolist() == [1, 1, 1, 1]


def test_split_words_are_read_in_any_case() -> None:
    table = read(**BINARY, split_column="part").usable()
    assert table.official is not None
    assert table.official.tolist() == [0, 0, 1, 2]


@pytest.mark.parametrize("word", ["val", "valid", "validation", "VALID", "Validation"])
def test_every_word_for_validation_is_known(tmp_path: Path, word: str) -> None:
    root = write(tmp_path, "a,1,train,,x,1,0", f"b,2,{word},,x,0,1", "c,3,TEST,,x,0,1")
    assert read(root, **BINARY, split_column="part").official.tolist() == [0, 1, 2]  # type: ignore[union-attr]


def test_without_groups_every_image_is_its_own_and_that_is_said() -> None:
    table = read(**BINARY, group_column=None)
    assert table.groups.tolist() == table.names.tolist()
    assert table.info is not None
    assert table.info.group_kind == "image"
    assert "one patient's may be in two splits" in table.info.notes[-1]
    assert "leaks between splits cannot be seen" in table.warnings[0]


def test_an_absolute_table_may_lie_outside_of_the_root(tmp_path: Path) -> None:
    table = read(tmp_path, **BINARY, table=str(LAYOUTS / "csv" / "labels.csv"))
    assert len(table) == 4


def test_channels_are_three_unless_one_is_asked_for() -> None:
    assert [read(**BINARY, channels=c).info.channels for c in (None, 1, 3)] == [3, 1, 3]  # type: ignore[union-attr]


def test_names_may_lack_their_extension_and_hold_folders(tmp_path: Path) -> None:
    root = write(
        tmp_path, *(f"ward{i % 2}/n{i},{i},train,,x,{i % 3 // 2},{i % 2}" for i in range(60)), "plain,99,,,x,1,1"
    )
    for i in range(60):
        (root / "images" / f"ward{i % 2}").mkdir(parents=True, exist_ok=True)
        (root / "images" / f"ward{i % 2}" / f"n{i}.{'JPG' if i % 4 else 'png'}").touch()
    (root / "plain.jpeg").touch()
    index = load_index(described(root, **BINARY))
    found = dict(zip(index.names.tolist(), locate(index, root), strict=True))
    assert found["ward1/n3"] == root / "images" / "ward1" / "n3.JPG"
    assert found["ward0/n0"] == root / "images" / "ward0" / "n0.png"
    assert found["plain"] == root / "plain.jpeg"


def test_a_name_without_extension_that_fits_two_files_is_refused(tmp_path: Path) -> None:
    root = write(tmp_path, *(f"n{i},{i},train,,x,{i % 2},{i % 3 // 2}" for i in range(40)))
    for suffix in ("png", "jpg"):
        (root / f"n0.{suffix}").touch()
    index = load_index(described(root, **BINARY))
    with pytest.raises(DataError, match=r"n0 may be n0.jpg and n0.png; give the table's names their extension"):
        find(index, root)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"table": None, **BINARY}, "dataset.table: name the table, relative to .* or absolute; labels.csv lies there"),
        ({"table": "gone.csv", **BINARY}, "dataset.table: .*gone.csv is not a file"),
        ({"image_column": None, **BINARY}, "dataset.image_column: name the column .*are file, patient, part, findings"),
        ({"image_column": "File", **BINARY}, "dataset.image_column: labels.csv has no column 'File'; the columns of"),
        ({"label_columns": ("Mass", "Edema")}, "dataset.label_columns: labels.csv has no column 'Edema'; the columns"),
        ({"label_columns": ("Mass", "Mass")}, "dataset.label_columns: 'Mass' given twice"),
        ({}, "dataset.label_columns, dataset.label_column: neither is given; expected one of them"),
        ({**BINARY, **SINGLE}, "dataset.label_columns, dataset.label_column: both are given; expected one"),
        ({**BINARY, "label_separator": "|"}, "dataset.label_separator: separates the classes of dataset.label_column"),
        ({**BINARY, "split": "official"}, "dataset.split=official: name the column .* by dataset.split_column"),
        ({**BINARY, "encoding": "utf-9"}, "dataset.encoding: 'utf-9' is no text encoding"),
        ({**BINARY, "encoding": "hex"}, "dataset.encoding: 'hex' is no text encoding"),
        ({**BINARY, "encoding": "utf-16"}, "labels.csv: cannot be read as CSV in UTF-16"),
        ({**SEPARATED, "drop_classes": ("Edema",)}, "csv has no class 'Edema'; its classes are Mass, Nodule"),
    ],
)
def test_what_is_wrong_with_the_settings_is_one_clear_error(changes: dict[str, object], expected: str) -> None:
    with pytest.raises(DataError, match=expected) as refused:
        load_index(described(**changes))
    assert "\n" not in str(refused.value)


def test_all_wrong_settings_are_told_at_once() -> None:
    with pytest.raises(DataError) as refused:
        read(image_column="a", group_column="b", label_columns=("c", "Mass"))
    assert [line.split(":")[0] for line in str(refused.value).split("\n")] == [
        "dataset.image_column",
        "dataset.group_column",
        "dataset.label_columns",
    ]


@pytest.mark.parametrize(
    ("row", "changes", "expected"),
    [
        ("a,1,train,,x,2,0", BINARY, "line 3: Mass '2'; expected 0 or 1"),
        ("a,1,train,,x,,yes", BINARY, "line 3: Mass '', Nodule 'yes'; expected 0 or 1"),
        (",1,train,,x,1,0", BINARY, "line 3: column 'file' is empty; expected a value in every row"),
        ("a,,train,,x,1,0", BINARY, "line 3: column 'patient' is empty"),
        ("a,1,,,x,1,0", {**BINARY, "split_column": "part"}, "line 3: column 'part' is empty"),
        ("a,1,dev,,x,1,0", {**BINARY, "split_column": "part"}, "line 3: part 'dev'; expected one of train, val, valid"),
        ("a,1,train,,,1,0", SINGLE, "line 3: column 'diagnosis' is empty; expected the image's class"),
        ("a,1,train,Mass||Edema,x,1,0", SEPARATED, "line 3: findings 'Mass||Edema' names an empty class"),
        ("one,1,train,,x,1,0", BINARY, "line 3: image one is listed already in line 2"),
        ("a,1", BINARY, "line 3: 2 fields; expected 7"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_by_its_line(
    tmp_path: Path, row: str, changes: dict[str, object], expected: str
) -> None:
    root = write(tmp_path, "one,1,train,Mass,x,1,0", row)
    with pytest.raises(DataError, match=expected):
        read(root, **changes).usable()


def test_another_encoding_is_read_where_it_is_named_and_told_where_not(tmp_path: Path) -> None:
    root = write(tmp_path, "a,1,train,,Ödem,1,0", "b,2,train,,sonst,1,0", encoding="cp1252")
    with pytest.raises(DataError, match=r"labels.csv, line 2: cannot be read as CSV in UTF-8; .*dataset.encoding"):
        read(root, **SINGLE)
    table = read(root, **SINGLE, encoding="cp1252").usable()
    assert table.info is not None
    assert table.info.classes == ("sonst", "Ödem")


def test_a_leaking_split_column_is_refused_with_its_groups(tmp_path: Path) -> None:
    rows = [f"n{i},{i},{'test' if i > 30 else 'train'},,x,{i % 2},{i % 3 // 2}" for i in range(40)]
    root = write(tmp_path, *rows, "extra1,35,train,,x,1,0", "extra2,36,train,,x,1,0")
    with pytest.raises(
        DataError,
        match=r"2 group\(s\) have images in two splits \(group 35 in train and test, group 36 in train and test",
    ):
        load_index(described(root, **BINARY, split_column="part"))


def test_a_given_split_is_kept_and_val_is_held_out_of_train_by_group(tmp_path: Path) -> None:
    rows = [f"n{i},{i // 2},{'test' if i >= 160 else 'train'},,x,{i // 2 % 2},{i // 2 % 3 // 2}" for i in range(200)]
    index = load_index(described(write(tmp_path, *rows), **BINARY, split_column="part"), tmp_path / "splits")
    assert set(index.names[index.rows("test")].tolist()) == {f"n{i}" for i in range(160, 200)}
    assert len(index.rows("val")) == pytest.approx(160 / 9, abs=2)


def test_a_split_column_without_a_test_is_refused(tmp_path: Path) -> None:
    root = write(tmp_path, "a,1,train,,x,1,0", "b,2,val,,x,0,1")
    with pytest.raises(DataError, match="column 'part' marks no image as test; mark some, or leave"):
        read(root, **BINARY, split_column="part")


def test_a_split_column_that_changed_since_the_split_was_kept_is_refused(tmp_path: Path) -> None:
    def rows(first_test: int) -> list[str]:
        return [f"n{i},{i},{'test' if i >= first_test else 'train'},,x,{i % 2},{i % 3 // 2}" for i in range(60)]

    chosen = described(tmp_path / "data", **BINARY, split_column="part")
    write(tmp_path / "data", *rows(40))
    load_index(chosen, tmp_path / "splits")
    write(tmp_path / "data", *rows(41))
    with pytest.raises(
        DataError, match=r"says train of n40, the split kept here test \(1 images differ\); restore .*, or delete"
    ):
        load_index(chosen, tmp_path / "splits")


def test_two_tables_have_splits_of_their_own(tmp_path: Path) -> None:
    root = write(tmp_path / "data", *(f"n{i},{i},train,,x,{i % 2},{i % 3 // 2}" for i in range(40)))
    (root / "other.csv").write_text((root / "labels.csv").read_text().replace("n3,", "m3,"))
    for table in ("labels.csv", "other.csv"):
        load_index(described(root, **BINARY, table=table), tmp_path / "splits")
    assert len(list((tmp_path / "splits").iterdir())) == 2


def test_it_reads_chestxray14_and_ham10000_as_their_own_adapters_do(real_data: Path) -> None:
    chest = DatasetSettings(
        name="csv",
        root=str(real_data / "chestxray14"),
        table="Data_Entry_2017_v2020.csv",
        image_column="Image Index",
        group_column="Patient ID",
        label_column="Finding Labels",
        label_separator="|",
        drop_classes=("No Finding",),
    )
    ours, theirs = read_table(chest), read_table(DatasetSettings(name="chestxray14", root=chest.root))
    assert ours.info is not None
    kept = [c for c in ours.info.classes if c != "No Finding"]
    columns = [ours.info.classes.index(name) for name in kept]
    assert np.array_equal(ours.labels[:, columns], theirs.labels[:, [chestxray14.CLASSES.index(name) for name in kept]])
    ham = DatasetSettings(
        name="csv",
        root=str(real_data / "ham10000"),
        table="HAM10000_metadata.csv",
        image_column="image_id",
        group_column="lesion_id",
        label_column="dx",
    )
    ours, theirs = read_table(ham), read_table(DatasetSettings(name="ham10000", root=ham.root))
    assert ours.info is not None
    assert ours.info.classes == ham10000.CLASSES
    assert np.array_equal(ours.labels, theirs.labels)
    rows = plain_rows(real_data / "ham10000" / "HAM10000_metadata.csv")
    assert ours.names.tolist() == [row["image_id"] for row in rows]


@given(st.lists(st.lists(st.text(max_size=12), min_size=7, max_size=8), max_size=6), st.binary(max_size=60))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_the_table_holds_every_row_is_read_or_refused_with_a_reason(
    tmp_path: Path, rows: list[list[str]], tail: bytes
) -> None:
    lines = ["file,patient,part,findings,diagnosis,Mass,Nodule", *(",".join(row) for row in rows)]
    (tmp_path / "labels.csv").write_bytes("\n".join(lines).encode("utf-8", "replace") + b"\n" + tail)
    for labels in (BINARY, SEPARATED, SINGLE):
        try:
            table = read(tmp_path, **labels, split_column="part")
        except DataError as refused:
            assert "labels.csv" in str(refused)
            continue
        assert len(table) == len(table.labels) == len(table.groups)
        assert all(refused.reason and ", line " in refused.place for refused in table.refused)
