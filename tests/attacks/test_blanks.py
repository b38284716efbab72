"""Blanks on a landscape whose words are known, beside a loop over single sentences and all words at once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmleak.attacks._blanks import OPEN, PRICE, RATE, STEPS, OfEnergy, filled, likeliest, ranked
from lmleak.attacks._energy import slope
from lmleak.attacks._vocabulary import FIRST
from tests.attacks.test_discrete import TRUTH, WORDS, Landscape

FREE = range(1, len(TRUTH) - 1)


def asked() -> OfEnergy:
    return OfEnergy(Landscape(TRUTH), torch.arange(2, WORDS), 0.0)


def opened(seed: int, count: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randint(2, WORDS, (count, len(TRUTH)), generator=draw)
    return rows.scatter(1, torch.randint(1, len(TRUTH) - 1, (count, 1), generator=draw), OPEN)


def common() -> torch.Tensor:
    return torch.tensor([1 / (rank + FIRST) for rank in range(WORDS - 2)])


@given(seed=st.integers(0, 1000), count=st.integers(1, 200))
@settings(max_examples=20, deadline=None)
def test_rows_are_ranked_by_their_energy_with_the_mean_word_in_the_open_place(seed, count):
    blanks, rows = asked(), opened(seed, count)
    table, weight = blanks.energy.table, common()
    mean = (weight[:, None] * table[2:]).sum(0) / weight.sum()
    value = lambda row: float(  # noqa: E731
        blanks.energy(torch.stack([mean if t == OPEN else table[t] for t in row])[None], 0.0)[0]
    )
    slow = sorted(value(row) for row in rows)
    assert blanks.energy.tally.sentences == count
    found = ranked(blanks, map(tuple, rows.tolist()))
    assert blanks.energy.tally.sentences == 2 * count
    assert sorted(found.tolist()) == sorted(rows.tolist())
    assert [value(row) for row in found] == pytest.approx(slow, abs=1e-3)


@given(seed=st.integers(0, 1000), count=st.integers(1, 70))
@settings(max_examples=10, deadline=None)
def test_words_of_many_open_places_are_those_of_each_alone(seed, count):
    blanks, rows = asked(), opened(seed, count)
    found = likeliest(blanks, rows, 4)
    assert found.shape == (count, 4)
    assert blanks.energy.tally.sentences == PRICE * count
    table = blanks.energy.table
    for row, told in zip(rows, found, strict=True):
        place = int((row == OPEN).nonzero())
        logits = common().log()
        for _ in range(STEPS):
            embeds = table[row.clamp_min(0)].clone()
            embeds[place] = logits.softmax(0) @ table[2:]
            price = table[2:] @ slope(blanks.energy, embeds[None], 0.0)[0, place]
            logits = logits - RATE * price / price.std()
        torch.testing.assert_close(logits[told - 2], logits.topk(4).values, rtol=1e-3, atol=1e-3)


def test_the_word_that_belongs_in_the_open_place_is_the_likeliest():
    rows = torch.tensor([[OPEN if k == place else t for k, t in enumerate(TRUTH)] for place in FREE])
    assert likeliest(asked(), rows, 1)[:, 0].tolist() == list(TRUTH[1:-1])


@given(i=st.sampled_from(FREE), j=st.sampled_from(FREE))
@settings(max_examples=30, deadline=None)
def test_a_missing_word_is_filled_in_for_one_too_many(i, j):
    rest = (*TRUTH[:j], *TRUTH[j + 1 :])
    wrong = (*rest[:i], rest[i - 1] if i > 1 else 5, *rest[i:])
    blanks = asked()
    found = filled(blanks, wrong, FREE, len(FREE), 16, 4)
    assert TRUTH in found or wrong == TRUTH
    assert wrong not in found
    assert len(found) == len(set(found)) <= 64
    assert blanks.energy.tally.sentences <= len(FREE) + len(FREE) ** 2 + 16 * PRICE


def test_the_word_left_out_is_the_most_harmful_one():
    wrong = (*TRUTH[:3], 5, *TRUTH[4:])
    left = [t for k, t in enumerate(wrong) if k != 3]
    found = filled(asked(), wrong, FREE, 1, 3, 2)
    assert len(found) <= 6
    assert TRUTH in found
    for one in found:
        assert any([t for k, t in enumerate(one) if k != place] == left for place in FREE)
