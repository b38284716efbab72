"""Blanks on a landscape whose words are known, beside a loop over single sentences and all words at once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmleak.attacks._blanks import OPEN, RATE, STEPS, ZIPF, Blanks
from lmleak.attacks._energy import slope
from tests.attacks.test_discrete import TRUTH, WORDS, Landscape


@pytest.fixture
def blanks():
    return Blanks(Landscape(TRUTH), torch.arange(2, WORDS), 0.0)


def opened(seed: int, count: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randint(2, WORDS, (count, len(TRUTH)), generator=draw)
    return rows.scatter(1, torch.randint(1, len(TRUTH) - 1, (count, 1), generator=draw), OPEN)


def common(words: torch.Tensor) -> torch.Tensor:
    return torch.tensor([1 / (rank + ZIPF) for rank in range(len(words))])


@given(seed=st.integers(0, 1000), count=st.integers(1, 200))
@settings(max_examples=20, deadline=None)
def test_values_are_energies_with_the_mean_word_in_the_open_place(seed, count):
    blanks, rows = Blanks(Landscape(TRUTH), torch.arange(2, WORDS), 0.0), opened(seed, count)
    table, weight = blanks.energy.table, common(blanks.words)
    mean = (weight[:, None] * table[blanks.words]).sum(0) / weight.sum()
    slow = [
        float(blanks.energy(torch.stack([mean if t == OPEN else table[t] for t in row])[None], 0.0)[0]) for row in rows
    ]
    assert blanks.energy.tally.sentences == count
    torch.testing.assert_close(blanks.values(rows), torch.tensor(slow), rtol=1e-4, atol=1e-4)
    assert blanks.energy.tally.sentences == 2 * count


@given(seed=st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_words_of_many_open_places_are_those_of_each_alone(seed):
    blanks, rows = Blanks(Landscape(TRUTH), torch.arange(2, WORDS), 0.0), opened(seed, 3)
    found = blanks.words_of(rows, 4)
    assert found.shape == (3, 4)
    assert blanks.energy.tally.sentences == 3 * 3 * STEPS
    table = blanks.energy.table[blanks.words]
    for row, told in zip(rows, found, strict=True):
        place = int((row == OPEN).nonzero())
        logits = common(blanks.words).log()
        for _ in range(STEPS):
            embeds = blanks.energy.table[row.clamp_min(0)].clone()
            embeds[place] = logits.softmax(0) @ table
            price = table @ slope(blanks.energy, embeds[None], 0.0)[0, place]
            logits = logits - RATE * price / price.std()
        torch.testing.assert_close(logits[told - 2], logits.topk(4).values, rtol=1e-3, atol=1e-3)


def test_the_word_that_belongs_in_the_open_place_is_the_likeliest(blanks):
    rows = torch.tensor(
        [[OPEN if k == place else t for k, t in enumerate(TRUTH)] for place in range(1, len(TRUTH) - 1)]
    )
    assert blanks.words_of(rows, 1)[:, 0].tolist() == list(TRUTH[1:-1])
