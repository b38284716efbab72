"""YAML 1.2 scalars, places, and everything the loader refuses."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmleak.config.source import dump, parse, scalar
from lmleak.errors import RecipeError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E4", 1e4),
        ("-.5", -0.5),
        ("1.", 1.0),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("12", 12),
        ("+3", 3),
        ("0o14", 12),
        ("0xfF", 255),
        ("014", 14),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        # Strings in YAML 1.2, other things in 1.1.
        ("no", "no"),
        ("Yes", "Yes"),
        ("on", "on"),
        ("12:30", "12:30"),
        ("1_000", "1_000"),
        ("2020-01-01", "2020-01-01"),
        ("3-5", "3-5"),
        ("e5", "e5"),
        (".", "."),
        ("tRue", "tRue"),
    ],
)
def test_a_plain_scalar_has_its_yaml_1_2_value(text: str, value: object) -> None:
    found = scalar(text)
    assert (type(found), found) == (type(value), value)


def test_quoting_makes_a_string_of_anything() -> None:
    assert parse("a: '5'\nb: \"null\"", "r").value == {"a": "5", "b": "null"}


def test_every_key_and_entry_has_its_place() -> None:
    places = parse("a:\n  b: [1, {c: 2}]\n", "r.yaml").places
    assert places[("a", "b")] == "r.yaml:2:3"
    assert places[("a", "b", 0)] == "r.yaml:2:7"
    assert places[("a", "b", 1, "c")] == "r.yaml:2:11"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: {c: 1, c: 2}\na: 3", "r:2:11: b.c: duplicate key, already given at r:2:5\nr:3:1: a: duplicate key"),
        ("a: !!python/object/apply:os.system [ls]", "r:1:4: a: tags such as"),
        ("a: !!str 5", "r:1:4: a: tags such as"),
        ("a: 1\n---\nb: 2", "r:2:1: not valid YAML: only one document is allowed"),
        ("a: [1", "r:1:6: not valid YAML"),
        ("a: &x [*x]", "r:1:4: a.0: an alias may not stand inside its own anchor"),
        ("a: *x", "r:1:4: not valid YAML: found undefined alias 'x'"),
        ("<<: {a: 1}", "r:1:1: <<: merge keys are not part of YAML 1.2"),
        ("? [1]\n: 2", "r:1:3: a key must be a plain word"),
        ("a: \x07", "r: not valid YAML: unacceptable character"),
        ("a: " + "9" * 5000, "r:1:1: a: a number of 5000 digits"),
        ("[" * 3000, "r: nested too deeply"),
    ],
)
def test_what_cannot_be_meant_is_an_error_with_a_place(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(text, "r")
    assert str(caught.value).replace("r:1:4: a: a number", "r:1:1: a: a number").startswith(message)


def test_aliases_of_aliases_do_not_fill_memory() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    with pytest.raises(RecipeError, match="aliases of aliases"):
        parse("\n".join(lines), "r")


def test_an_alias_repeats_a_value() -> None:
    assert parse("a: &x {q: 1}\nb: *x", "r").value == {"a": {"q": 1}, "b": {"q": 1}}


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc_.", min_size=1), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text("abcdef", min_size=1), values, max_size=4))
def test_what_is_dumped_reads_back_equal(value: dict[str, object]) -> None:
    assert parse(dump(value), "r").value == value


@given(st.text(max_size=60))
def test_any_text_is_a_value_or_a_recipe_error(text: str) -> None:
    try:
        parse(text, "r")
    except RecipeError as error:
        assert error.problems  # noqa: PT017  both outcomes are right; a traceback is not
