"""Study files as data: only plain YAML is read, and whatever is wrong with a file is one line that says where."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_studies import write

from study.documents import StudyError, apply, flatten, key_lines, number, parse_override, read_document


def refusal(path: Path) -> str:
    with pytest.raises(StudyError) as caught:
        read_document(path)
    (problem,) = caught.value.problems
    assert "\n" not in problem
    assert problem.startswith(f"{path}: ")
    return problem.removeprefix(f"{path}: ")


# ----------------------------------------------------------------------------------------------- what is not read


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            "a: 1\nb: !!python/object/apply:os.system ['true']\n",
            "line 2: could not determine a constructor for the tag",
        ),
        ("a: !!python/name:os.system\n", "line 1: could not determine a constructor for the tag"),
        ("a: 1\nb: 2\na: 3\n", "line 3: key 'a' is given twice"),
        ("top:\n  a: 1\n  b: {c: 1, c: 1}\n", "line 3: key 'c' is given twice"),
        ("a:\n\tb: 1\n", "line 2: found character '\\t' that cannot start any token"),
        ("a: [1, 2\nb: 3\n", "line 2: "),
        ("? [a, b]\n: 1\n", "line 1: a key must be plain text"),
        ("a: &x\n  b: *x\n", "line 1: found unconstructable recursive node"),
        ("a: 1\n---\nb: 2\n", "line 2: but found another document"),
        ("a: 2026-13-45\n", "not valid YAML"),
        ("a: \x00\n", "not valid YAML"),
        ("- a\n- b\n", "expected a mapping of keys such as study, seeds, rows at the top"),
        ("just text\n", "expected a mapping of keys"),
        ("", "expected a mapping of keys"),
        ("1: one\n", "expected a mapping of keys"),
        ("study: \xe9t\xe9\n".encode("latin-1"), "not UTF-8 text"),
        ("a: " + "[" * 1200 + "]" * 1200, "not valid YAML"),
    ],
)
def test_what_is_no_plain_mapping_is_one_line_that_says_what_and_where(
    tmp_path: Path, content: str | bytes, said: str
) -> None:
    assert refusal(write(tmp_path, content)).startswith(said)


def test_an_object_tag_runs_nothing(tmp_path: Path) -> None:
    witness = tmp_path / "ran"
    path = write(
        tmp_path, f"a: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{witness}']]\n"
    )
    refusal(path)
    assert not witness.exists()


def test_a_missing_file_and_a_folder_are_one_line_each(tmp_path: Path) -> None:
    assert refusal(tmp_path / "absent.yaml") == "cannot be read (No such file or directory)"
    assert refusal(tmp_path) == "cannot be read (Is a directory)"


def test_aliases_that_expand_without_end_are_refused_at_once(tmp_path: Path) -> None:
    """Nine levels of nine aliases: 400 characters that would be 3·10⁸ values once copied."""
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{n}: &{n} [{', '.join([f'*{before}'] * 9)}]" for before, n in zip("abcdefgh", "bcdefghi", strict=True)]
    started = time.monotonic()
    assert "too large" in refusal(write(tmp_path, "\n".join(lines)))
    assert time.monotonic() - started < 5


def test_aliases_within_reason_are_read_as_copies(tmp_path: Path) -> None:
    document = read_document(write(tmp_path, "one: &one {depth: 4}\ntwo: *one\n"))
    assert document == {"one": {"depth": 4}, "two": {"depth": 4}}


def test_merge_keys_give_way_to_the_mapping_s_own_keys(tmp_path: Path) -> None:
    document = read_document(write(tmp_path, "base: &base {depth: 4, step: 2}\nother: {<<: *base, depth: 6}\n"))
    assert document["other"] == {"depth": 6, "step": 2}


# ---------------------------------------------------------------------------------------------------------- lines


def test_every_key_and_item_has_the_line_it_stands_on(tmp_path: Path) -> None:
    path = write(tmp_path, "# a comment\nstudy: s\nrows:\n  list:\n    - name: a\n      set: {x.y: 1}\n    - name: b\n")
    assert key_lines(path) == {
        ("study",): 2,
        ("rows",): 3,
        ("rows", "list"): 4,
        ("rows", "list", 0): 5,
        ("rows", "list", 0, "name"): 5,
        ("rows", "list", 0, "set"): 6,
        ("rows", "list", 0, "set", "x.y"): 6,
        ("rows", "list", 1): 7,
        ("rows", "list", 1, "name"): 7,
    }


@pytest.mark.parametrize(
    "content", ["? [a, b]\n: 1\n", "? {a: 1}\n: 1\n", "a: [", "", "[" * 1200, b"\xff\xfe\x00", "a: &x [*x]\n"]
)
def test_a_file_that_cannot_be_parsed_has_no_lines_and_no_exception(tmp_path: Path, content: str | bytes) -> None:
    lines = key_lines(write(tmp_path, content))
    assert all(isinstance(line, int) for line in lines.values())


# ------------------------------------------------------------------------------------------------------ overrides


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("strategy.depth=6", "strategy.depth", 6),
        ("strategy.depth=all", "strategy.depth", "all"),
        ("seeds=[0, 1]", "seeds", [0, 1]),
        ("optimiser.encoder_lr=1e-4", "optimiser.encoder_lr", 0.0001),
        ("optimiser.encoder_lr=3.0E-6", "optimiser.encoder_lr", 0.000003),
        ("optimiser.clip_norm=null", "optimiser.clip_norm", None),
        ("ema.enabled=true", "ema.enabled", True),
        ("weighting.boosts={mel: 15e-1}", "weighting.boosts", {"mel": 1.5}),
        ("title=a = b", "title", "a = b"),
        (" title =x", "title", "x"),
        ("description=", "description", None),
    ],
)
def test_an_override_is_a_key_and_a_yaml_value(text: str, key: str, value: object) -> None:
    assert parse_override(text) == (key, value)


@pytest.mark.parametrize("text", ["strategy.depth", "=3", " =3", "a=[1", "a=!!python/name:os.system", "a={x: 1, x: 2}"])
def test_an_override_that_is_none_is_said_with_its_text(text: str) -> None:
    with pytest.raises(StudyError) as caught:
        parse_override(text)
    (problem,) = caught.value.problems
    assert problem.startswith(f"-o {text}: ")


def test_dotted_and_nested_overrides_are_equal() -> None:
    base = {"strategy": {"depth": 10, "step": 2}, "seeds": [0]}
    expected = {"strategy": {"depth": 6, "step": 2}, "seeds": [0], "ema": {"decay": 0.99, "enabled": True}}
    dotted = {"strategy.depth": 6, "ema.decay": 0.99, "ema.enabled": True}
    nested = {"strategy": {"depth": 6}, "ema": {"decay": 0.99, "enabled": True}}
    mixed = {"strategy": {"depth": 6}, "ema.decay": 0.99, "ema": {"enabled": True}}
    assert apply(base, dotted) == apply(base, nested) == apply(base, mixed) == expected
    assert base == {"strategy": {"depth": 10, "step": 2}, "seeds": [0]}


def test_boosts_are_replaced_whole_and_not_merged() -> None:
    base = {"weighting": {"boosts": {"mel": 1.5, "df": 1.3}}}
    assert apply(base, {"weighting.boosts": {"bkl": 2.0}}) == {"weighting": {"boosts": {"bkl": 2.0}}}
    assert apply(base, {"weighting": {"boosts": {"bkl": 2.0}}}) == {"weighting": {"boosts": {"bkl": 2.0}}}


def test_paths_through_something_that_is_no_group_are_all_said() -> None:
    with pytest.raises(StudyError) as caught:
        apply({"seeds": [0], "title": "t"}, {"seeds.first": 1, "title.a.b": 2, "strategy.depth": 3})
    assert caught.value.problems == (
        "seeds.first: seeds is not a group of keys",
        "title.a.b: title is not a group of keys",
    )


KEYS = st.text(alphabet="abc", min_size=1, max_size=2)
TREES = st.recursive(
    st.dictionaries(KEYS, st.integers(), min_size=1, max_size=3),
    lambda inner: st.dictionaries(KEYS, inner | st.integers(), min_size=1, max_size=3),
    max_leaves=8,
)


@given(TREES)
def test_whatever_the_tree_it_is_the_same_flat_or_nested(tree: dict[str, object]) -> None:
    flat = flatten(tree)
    assert not any(isinstance(value, dict) for value in flat.values())
    assert flatten(flat) == flat
    assert apply({}, tree) == apply({}, flat) == tree


# -------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("written", "read"),
    [("1e-4", 0.0001), ("5E3", 5000.0), ("-2e0", -2.0), (".5e1", 5.0), ("+1e1", 10.0)],
)
def test_a_number_without_a_dot_is_a_number(tmp_path: Path, written: str, read: float) -> None:
    value = number(read_document(write(tmp_path, f"rate: {written}\n")))["rate"]
    assert value == read
    assert type(value) is float


@pytest.mark.parametrize("text", ["1e-4 of it", "tiny-phantom", "e", "1e", "0xe", "microsoft/rad-dino", "all", "", "3"])
def test_text_that_only_looks_like_a_number_stays_text(text: str) -> None:
    assert number(text) is text


def test_numbers_are_read_at_every_depth() -> None:
    assert number({"a": ["1e-1", {"b": "2e1"}], "c": True}) == {"a": [0.1, {"b": 20.0}], "c": True}
