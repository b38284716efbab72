from __future__ import annotations

import numpy as np
import pytest

from lmleak.metrics import paired_difference, summarise
from lmleak.records import Score


def test_nothing_known_is_no_score():
    assert summarise([]) is None
    assert summarise([None, None]) is None


def test_one_batch_has_no_interval():
    assert summarise([None, 0.25]) == Score(0.25, None, None, 1)


def test_equal_values_are_exact():
    assert summarise([1.0] * 7) == Score(1.0, 1.0, 1.0, 7)


def test_the_same_seed_gives_the_same_interval_and_leaves_numpy_alone():
    values = list(np.random.default_rng(0).random(20))
    state = np.random.get_state()[1].copy()
    assert summarise(values, 3) == summarise(values, 3)
    assert summarise(values, 3) != summarise(values, 4)
    assert (np.random.get_state()[1] == state).all()


def test_the_interval_covers_the_mean_as_often_as_it_says():
    draws = np.random.default_rng(1).binomial(1, 0.4, (200, 50)).astype(float)
    made = [summarise(list(row), seed) for seed, row in enumerate(draws)]
    covered = np.mean([score.low <= 0.4 <= score.high for score in made])
    # The percentile interval of 50 coin throws covers 93 to 95 %; 200 trials have a standard error of 1.7 points.
    assert 0.88 < covered < 0.99


def test_pairing_uses_the_batches_that_both_have():
    assert paired_difference([1.0, None, 0.5], [0.5, 0.1, 0.0]) == Score(0.5, 0.5, 0.5, 2)
    with pytest.raises(ValueError, match="zip"):
        paired_difference([1.0], [1.0, 2.0])


def test_pairing_is_tighter_than_two_intervals():
    rng = np.random.default_rng(2)
    hard = rng.random(40)
    a, b = list(hard), list(hard - 0.1 + 0.01 * rng.standard_normal(40))
    both = paired_difference(a, b)
    assert both.low > 0.09
    assert summarise(a).low < summarise(b).high
