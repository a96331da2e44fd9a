"""Study files as data: only plain YAML is read, and whatever is wrong with a file is one line that says where."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_studies import write

from study.documents import KeysError, StudyError, apply, flatten, parse_override, read_document


def refusal(path: Path) -> str:
    with pytest.raises(StudyError) as caught:
        read_document(path)
    (problem,) = caught.value.problems
    assert "\n" not in problem
    assert problem.startswith(f"{path}:")
    return problem.removeprefix(f"{path}:").strip()


# ----------------------------------------------------------------------------------------------- what is not read


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            "a: 1\nb: !!python/object/apply:os.system ['true']\n",
            "2: !!python/object/apply:os.system asks for an object; text, numbers, lists and mappings alone are read",
        ),
        ("a: !!python/name:os.system\n", "1: !!python/name:os.system asks for an object"),
        ("a: 1\nb: 2\na: 3\n", "3: key 'a' is given twice, first in line 1"),
        ("top:\n  a: 1\n  b: {c: 1, c: 1}\n", "3: key 'c' is given twice, first in line 3"),
        ("a:\n\tb: 1\n", "2: a tab; indent with spaces"),
        ("a: [1, 2\nb: 3\n", "2: expected ',' or ']', but got ':'"),
        ("? [a, b]\n: 1\n", "1: a key must be plain text"),
        ("a: &x\n  b: *x\n", "1: found unconstructable recursive node"),
        ("a: 1\n---\nb: 2\n", "2: a second document; a file declares one study"),
        ("a: !!timestamp 2026-13-45\n", "1: !!timestamp asks for an object"),
        ("a: !!set {x}\n", "1: !!set asks for an object"),
        ("a: 1\nb: " + "9" * 5000, "2: a number too long to be read"),
        ("a: 1\nb: \x00\n", "2: a control character; a study file is plain text"),
        ("- a\n- b\n", "expected a mapping of keys such as study, seeds, rows at the top; found a list"),
        ("just text\n", "expected a mapping of keys such as study, seeds, rows at the top; found plain text"),
        ("", "expected a mapping of keys such as study, seeds, rows at the top; found an empty file"),
        ("seeds: [0]\nstudy: \xe9t\xe9\n".encode("latin-1"), "2: not UTF-8 text; save the file as UTF-8"),
        ("a: 1\n".encode("utf-16"), "1: not UTF-8 text"),
        ("a: " + "[" * 1200 + "]" * 1200, "nested too deeply"),
        ("# " + "x" * 600_000, "too large: more than 500,000 bytes; is it a study file?"),
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
    document = read_document(write(tmp_path, "one: &one {depth: 4}\ntwo: *one\n")).document
    assert document == {"one": {"depth": 4}, "two": {"depth": 4}}


def test_merge_keys_give_way_to_the_mapping_s_own_keys(tmp_path: Path) -> None:
    text = "base: &base {depth: 4, step: 2}\nother: {<<: *base, depth: 6}\nthird: {depth: 8, <<: *base}\n"
    document = read_document(write(tmp_path, text)).document
    assert document["other"] == {"depth": 6, "step": 2}
    assert document["third"] == {"depth": 8, "step": 2}


def test_merges_of_merges_do_not_grow_without_end(tmp_path: Path) -> None:
    """Eleven levels that merge nine times the one above: PyYAML alone would hold 9¹¹ pairs of one key."""
    lines = ["x0: &x0 {k: 1}"]
    lines += [f"x{i}: &x{i} {{<<: [{', '.join([f'*x{i - 1}'] * 9)}]}}" for i in range(1, 12)]
    started = time.monotonic()
    assert read_document(write(tmp_path, "\n".join(lines))).document["x11"] == {"k": 1}
    assert time.monotonic() - started < 5


def test_a_merge_of_too_many_keys_is_refused(tmp_path: Path) -> None:
    many = ", ".join(f"k{i}: 0" for i in range(4000))
    lines = [f"x: &x {{{many}}}", *[f"y{i}: {{<<: *x}}" for i in range(60)]]
    assert "too large once its merges are written out" in refusal(write(tmp_path, "\n".join(lines)))


# ------------------------------------------------------------------------------------------------- text as it was typed


def test_keys_are_kept_as_they_were_typed(tmp_path: Path) -> None:
    document = read_document(write(tmp_path, "{1: a, on: b, 1e-4: c, 007: d, ~: e, 2026-01-02: f}")).document
    assert document == {"1": "a", "on": "b", "1e-4": "c", "007": "d", "~": "e", "2026-01-02": "f"}


@pytest.mark.parametrize(
    "typed", ["1e-4", "1.0e-4", "on", "no", "007", "0x10", "1_000", "1:30", "2026-01-02", ".5", "-.inf", "plain text"]
)
def test_a_value_of_a_text_key_is_kept_as_it_was_typed(tmp_path: Path, typed: str) -> None:
    text = f"name: {typed}\nall.name: {typed}\nnames: {{name: [{typed}, {typed}]}}\nother: 7\n"
    document = read_document(write(tmp_path, text), text_keys={"name"}).document
    assert document == {"name": typed, "all.name": typed, "names": {"name": [typed, typed]}, "other": 7}
    assert parse_override(f"row.name={typed}", {"name"}) == ("row.name", typed)


def test_no_text_at_all_is_nothing_for_a_text_key_too(tmp_path: Path) -> None:
    assert read_document(write(tmp_path, "name:\nb: {name: null}\n"), {"name"}).document == {
        "name": None,
        "b": {"name": None},
    }


# ---------------------------------------------------------------------------------------------------------- lines


def test_every_key_and_item_has_the_line_it_stands_on(tmp_path: Path) -> None:
    path = write(tmp_path, "# a comment\nstudy: s\nrows:\n  list:\n    - name: a\n      set: {x.y: 1}\n    - name: b\n")
    assert read_document(path).lines == {
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


def test_a_key_that_was_merged_stands_on_the_line_of_what_it_was_merged_from(tmp_path: Path) -> None:
    lines = read_document(write(tmp_path, "base: &base\n  depth: 4\nother:\n  <<: *base\n")).lines
    assert lines["base", "depth"] == 2
    assert lines["other",] == 3


# ------------------------------------------------------------------------------------------------------ overrides


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("strategy.depth=6", "strategy.depth", 6),
        ("strategy.depth=all", "strategy.depth", "all"),
        ("seeds=[0, 1]", "seeds", [0, 1]),
        ("optimiser.encoder_lr=1e-4", "optimiser.encoder_lr", "1e-4"),
        ("optimiser.encoder_lr=3.0E-6", "optimiser.encoder_lr", 0.000003),
        ("optimiser.clip_norm=null", "optimiser.clip_norm", None),
        ("ema.enabled=true", "ema.enabled", True),
        ("weighting.boosts={mel: 1.5}", "weighting.boosts", {"mel": 1.5}),
        ("title=a = b", "title", "a = b"),
        (" title =x", "title", "x"),
        ("description=", "description", None),
    ],
)
def test_an_override_is_a_key_and_a_yaml_value(text: str, key: str, value: object) -> None:
    assert parse_override(text) == (key, value)


@pytest.mark.parametrize(
    "text",
    ["strategy.depth", "=3", " =3", ".=3", "a..b=3", "a.=3", "a=[1", "a=!!python/name:os.system", "a={x: 1, x: 2}"],
)
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
    mixed = {"strategy": {"depth": 6}, "ema.decay": 0.99, "ema": {"enabled": True}, "strategy.step": 2}
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


@pytest.mark.parametrize(
    ("given", "key", "said"),
    [
        ({"a.b": 4, "a": {"b": 6}}, "a.b", "given twice, dotted and nested; remove one of them"),
        ({"a": {"b": {"c": 1}, "b.c": 1}}, "a.b.c", "given twice, dotted and nested; remove one of them"),
        ({"a": 3, "a.b": 4}, "a", "given twice, as a value and as a group with a.b; remove one of them"),
        ({"a.b": 4, "a": 3}, "a", "given twice, as a value and as a group with a.b; remove one of them"),
        ({"a.b": 4, "a": None}, "a", "given twice, as a value and as a group with a.b; remove one of them"),
    ],
)
def test_of_a_key_that_is_given_twice_no_value_is_lost_silently(given: dict[str, object], key: str, said: str) -> None:
    for act in (flatten, lambda changes: apply({"a": {"b": 1}}, changes)):
        with pytest.raises(KeysError) as caught:
            act(given)
        assert caught.value.found == {key: said}


def test_an_empty_group_changes_nothing() -> None:
    assert apply({"a": {"b": 1}}, {"a": {}}) == {"a": {"b": 1}}
    assert apply({"weighting": {"boosts": {"mel": 2}}}, {"weighting.boosts": {}}) == {"weighting": {"boosts": {}}}
