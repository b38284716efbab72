"""What every metric keeps, whoever adds it: each file of lmleak/metrics is found by itself."""

from __future__ import annotations

import copy

import pytest

from lmleak import registry
from lmleak.records import Reconstruction, Reference

TRUTH = Reference(tokens=((5, 6, 7, 8), (9, 10, 11)), texts=("five six seven eight", "nine ten eleven"), labels=(0, 1))
PERFECT = Reconstruction(TRUTH.tokens, TRUTH.texts, labels=TRUTH.labels)
SWAPPED = Reconstruction(TRUTH.tokens[::-1], TRUTH.texts[::-1], labels=TRUTH.labels[::-1])
WRONG = Reconstruction(((1, 2, 3, 4), (1, 2, 3)), ("one two three four", "one two three"), labels=(7, 8))
#: `evaluate` is whatever its path names; a path is needed to speak of it at all.
ALL = [kind for kind in registry.kinds("metrics") if kind != "evaluate"]
#: A file that scores images says so by `IMAGES`; tests/metrics/test_image_metrics.py holds its promises.
KINDS = [kind for kind in ALL if not hasattr(registry.load("metrics", kind), "IMAGES")]


@pytest.fixture(params=KINDS)
def metric(request):
    module = registry.load("metrics", request.param)
    return lambda made, truth=TRUTH: module.score(module.Config(), made, truth)


def test_the_perfect_answer_scores_best(metric):
    best = metric(PERFECT)
    assert set(best.values()) <= {1.0}
    for worse in (WRONG, Reconstruction(), Reconstruction(TRUTH.tokens[:1], TRUTH.texts[:1], labels=TRUTH.labels[:1])):
        assert all(value < best[key] for key, value in metric(worse).items())


def test_values_are_plain_numbers_between_0_and_1(metric):
    for made in (PERFECT, WRONG, Reconstruction()):
        assert all(type(value) is float and 0 <= value <= 1 for value in metric(made).values())


def test_order_in_the_batch_does_not_count(metric):
    assert metric(SWAPPED) == metric(PERFECT)


def test_more_answers_than_references_do_not_help(metric):
    padded = Reconstruction(WRONG.tokens + TRUTH.tokens, WRONG.texts + TRUTH.texts, labels=WRONG.labels + TRUTH.labels)
    assert metric(padded) == metric(WRONG)


def test_records_are_left_alone(metric):
    before = copy.deepcopy((SWAPPED, TRUTH))
    metric(SWAPPED)
    assert before == (SWAPPED, TRUTH)


@pytest.mark.parametrize("kind", registry.kinds("metrics"))
def test_the_file_says_what_it_is(kind):
    module = registry.load("metrics", kind)
    assert module.Config.model_config["extra"] == "forbid"
    assert module.Config.model_config["frozen"]
    assert "arXiv:" in registry.summary("metrics", kind) or "aclanthology" in registry.summary("metrics", kind)


@pytest.mark.parametrize("kind", KINDS)
def test_keys_are_those_that_score_returns(kind, metric):
    module = registry.load("metrics", kind)
    assert set(module.keys(module.Config())) == set(module.score(module.Config(), PERFECT, TRUTH))
