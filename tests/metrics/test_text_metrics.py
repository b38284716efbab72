from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score import tokenize

from lmleak.errors import LmleakError
from lmleak.metrics import score
from lmleak.metrics._align import align
from lmleak.metrics._words import Words
from lmleak.records import Reconstruction, Reference


def pair(truth, found, **kwargs):
    """Texts of letters become tokens by their words."""

    def tokens(texts):
        return tuple(tuple(sum(map(ord, word)) for word in text.split()) for text in texts)

    return Reconstruction(tokens(found), tuple(found), **kwargs), Reference(tokens(truth), tuple(truth))


def test_known_values():
    scores = score(*pair(["the cat sat on the mat"], ["the cat lay on mat"]))
    assert scores["rouge1"] == pytest.approx(2 * 4 / (5 + 6))
    assert scores["rouge2"] == pytest.approx(2 * 1 / (4 + 5))
    assert scores["rougeL"] == pytest.approx(2 * 4 / (5 + 6))
    assert scores["token_accuracy"] == pytest.approx(3 / 6)  # the, cat, on
    assert scores["exact_match"] == 0.0


def test_rouge2_of_one_word_is_undefined_and_leaves_the_batch_mean_alone():
    assert score(*pair(["yes"], ["yes"]))["rouge2"] is None
    both = score(*pair(["yes", "it is so"], ["no", "it is so"]))
    assert both["rouge2"] == 1.0
    assert both["rouge1"] == 0.5


@pytest.mark.parametrize("text", ["привет из Москвы", "नमस्ते दुनिया आज", "東京は雨です", "?! --", "ΑΒΓ δεζ", "🙂 🙃"])
def test_a_perfect_answer_scores_one_in_any_script(text):
    scores = score(*pair([text], [text]))
    assert set(scores.values()) == {1.0}


def test_scripts_are_told_apart_from_wrong_answers():
    assert score(*pair(["привет из Москвы"], ["привет от нас"]))["rouge1"] == pytest.approx(1 / 3)
    assert score(*pair(["東京は雨"], ["東京は雪"]))["rouge1"] == pytest.approx(3 / 4)


@given(st.text(st.characters(codec="ascii"), max_size=40))
def test_on_ascii_the_words_are_those_of_rouge_score(text):
    theirs = tokenize.tokenize(text, None)
    assert theirs == (Words().tokenize(text) if theirs else [])


@pytest.mark.parametrize("status", ["not_applicable", "no_signal", "budget_exhausted", "failed"])
def test_no_answer_is_not_an_answer_of_zero(status):
    made, truth = pair(["it is so"], ["it is so"], status=status, reason="because")
    scores = score(made, truth)
    assert list(scores) == ["rouge1", "rouge2", "rougeL", "token_accuracy", "exact_match"]
    assert set(scores.values()) == {None}


def test_an_image_batch_has_no_text_scores():
    assert set(score(Reconstruction(), Reference()).values()) == {None}


def test_order_in_the_batch_does_not_count():
    truth = ["a b c", "d e f", "g h i", "a b c"]
    for order in itertools.permutations(truth):
        assert set(score(*pair(truth, order)).values()) == {1.0}


def test_missing_answers_count_as_empty():
    scores = score(*pair(["a b c", "d e f"], ["d e f"]))
    assert {round(value, 9) for value in scores.values()} == {0.5}


def test_no_answers_at_all_score_zero():
    assert set(score(*pair(["a b c", "d e f"], [])).values()) == {0.0}


def test_listing_everything_recovers_nothing():
    many = ["x y z", "q r s", "a b c"]
    assert score(*pair(["a b c"], many))["exact_match"] == 0.0
    sure = score(*pair(["a b c"], many, confidence=(0.1, 0.2, 0.9)))
    assert sure["exact_match"] == 1.0


def test_one_answer_serves_one_reference():
    assert score(*pair(["a b c", "a b c"], ["a b c", "x y z"]))["exact_match"] == 0.5


def test_too_long_an_answer_is_not_exact():
    scores = score(*pair(["a b c"], ["a b c d"]))
    assert scores["exact_match"] == 0.0
    assert scores["token_accuracy"] == 1.0


@settings(max_examples=30)
@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4).map(tuple), min_size=1, max_size=4), st.randoms())
def test_the_assignment_is_the_best_of_all(truth, random):
    def same(a, b):
        return sum(x == y for x, y in zip(a, b, strict=False))

    found = [tuple(random.randrange(4) for _ in row) for row in truth]
    got = sum(map(same, truth, align(truth, found, same)))
    assert got == max(sum(map(same, truth, order)) for order in itertools.permutations(found))


@pytest.mark.parametrize(
    ("metric", "says"),
    [
        ("rogue", "did you mean 'rouge'"),
        ({"kind": "rouge", "stemmer": True}, "metric 'rouge': stemmer"),
        ({"kind": "evaluate"}, "path"),
        ({"path": "rouge"}, "has no 'kind'"),
    ],
)
def test_a_wrong_metric_is_named(metric, says):
    with pytest.raises(LmleakError, match=says):
        score(Reconstruction(), Reference(), [metric])
