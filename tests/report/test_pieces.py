"""Words, colours and differences on their own."""

from __future__ import annotations

import pytest
from markupsafe import Markup

from lmleak.report import _diff, _palette, _study, _words


@pytest.mark.parametrize("stops", [_palette._LIGHT, _palette._DARK])
def test_lightness_alone_carries_the_score_and_text_is_readable_on_it(stops) -> None:
    levels = [_palette.luminance(_palette._at(stops, i / _palette.STEPS)) for i in range(_palette.STEPS + 1)]
    assert levels == sorted(levels) or levels == sorted(levels, reverse=True)
    for i, level in enumerate(levels):
        ink = _palette._ink(_palette._at(stops, i / _palette.STEPS)).lstrip("#")
        other = _palette.luminance(tuple(int(ink[k : k + 2], 16) / 255 for k in (0, 2, 4)))
        assert (max(level, other) + 0.05) / (min(level, other) + 0.05) >= 4.5


def test_only_zero_looks_like_zero_and_only_one_like_one() -> None:
    assert [_palette.shade(v) for v in (0.0, 0.001, 0.999, 1.0)] == [0, 1, _palette.STEPS - 1, _palette.STEPS]


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0, "0"), (0.004, "<1"), (0.996, "99"), (1.0, "100"), (0.5, "50"), (None, "–"), (float("nan"), "–")],
)
def test_percent_rounds_no_miss_into_a_hit(value: float | None, shown: str) -> None:
    assert _words.percent(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"), [(0.0054, "0.54 %"), (0.25, "25 %"), (1.0, "100 %"), (1.2e-5, "0.0012 %"), (0, "0 %")]
)
def test_share_keeps_two_digits(value: float, shown: str) -> None:
    assert _words.share(value) == shown


@pytest.mark.parametrize(("value", "shown"), [(None, "all"), ([0], "0"), ([0, 3, 4, 5], "0, 3–5"), ([-1], "-1")])
def test_layers(value: object, shown: str) -> None:
    assert _words.layers(value) == shown


@pytest.mark.parametrize(
    ("select", "shown"),
    [
        ({"components": ["attn_query"], "layers": [0]}, "one query matrix of layer 0"),
        ({"components": ["attn_query"], "layers": [0, 1]}, "the query matrices of layers 0–1"),
        ({"components": ["attn_query"]}, "the query matrices"),
        ({"components": ["embedding"]}, "the embedding table"),
        ({"target_modules": ["attention.self.query"], "layers": [2]}, "attention.self.query of layer 2"),
        ({}, "the whole model"),
    ],
)
def test_selection_in_words(select: dict, shown: str) -> None:
    assert _words.seen(select) == shown


def test_differences_are_marked_where_they_are() -> None:
    found = _diff.pair("The parcel for Amir never left.", "the parcel of amir left . <b>")
    assert found.reference == "The parcel <del>for</del> Amir <del>never</del> left."
    assert found.recovered == (
        "<mark>the parcel</mark> <ins>of</ins> <mark>amir</mark> <mark>left .</mark> <ins>&lt;b&gt;</ins>"
    )
    assert not found.same
    assert found.recovered.striptags() == "the parcel of amir left . <b>"


def test_case_and_spacing_are_no_difference() -> None:
    found = _diff.pair("Paid 4,200 Euros.", "paid 4 , 200 euros .")
    assert found.same
    assert found.recovered == Markup("<mark>paid 4 , 200 euros .</mark>")


def test_recovered_sentences_meet_their_reference() -> None:
    example = {
        "reference": {"texts": ["a red door", "the blue car"]},
        "reconstruction": {"texts": ["the blue car", "red door"]},
    }
    assert [pair.same for pair in _diff.pairs(example)] == [False, True]
    missing = {"reference": {"texts": ["a red door", "the blue car"]}, "reconstruction": {"texts": ["the blue car"]}}
    assert [pair.recovered != "" for pair in _diff.pairs(missing)] == [False, True]


def test_best_median_and_worst() -> None:
    assert _diff.worth_showing({0: 0.5, 1: 1.0, 2: 0.0, 3: None}) == [("best", 1), ("median", 2), ("worst", 3)]
    assert _diff.worth_showing({0: 1.0, 1: 1.0}) == [("every batch alike", 0), ("every batch alike", 1)]
    assert _diff.worth_showing({}) == []


def test_axes_settle_into_the_recipe_and_leave_it_alone() -> None:
    recipe = {"select": {"layers": [0], "components": ["attn_key"]}, "defense": {"kind": "none"}, "sweep": {}}
    settled = _study.settle(
        recipe, {"select.layers": [3], "defense": {"kind": "prune"}, "defense.noise_multiplier": None}
    )
    assert settled == {"select": {"layers": [3], "components": ["attn_key"]}, "defense": {"kind": "prune"}}
    assert recipe["select"]["layers"] == [0]
