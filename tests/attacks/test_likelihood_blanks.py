"""Scores and slopes with an embedding in an open place, against the words themselves and finite differences."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lmleak import observe, select
from lmleak.attacks._blanks import OPEN
from lmleak.attacks._likelihood_blanks import BLANKS, SURPLUS, WORDS, Blanks
from lmleak.attacks._likelihood_moves import Space
from lmleak.attacks._likelihood_score import Candidate, Scorer
from lmleak.attacks._objective import frozen
from lmleak.attacks._text import Frame
from lmleak.defenses import gaussian
from tests.attacks.test_likelihood import MODELS, batch_of, make

__all__ = ["make"]

TRUTH = (11, 40, 90, 60, 12, 77)
NOISED = {"kind": "dp_sgd", "noise_multiplier": 1e-3, "max_grad_norm": 1.0, "clip_scope": "selection"}


def scorer_of(victim, **chosen) -> Scorer:
    seen = observe(victim, batch_of(victim, [TRUTH]), select(victim, **chosen), NOISED)
    return Scorer(victim, seen, gaussian(seen.defense))


@pytest.mark.parametrize("model", ["bert", "gpt2 classifier"])
def test_a_place_filled_with_a_words_embedding_is_that_word(make, model):
    victim = make(model)
    scorer = scorer_of(victim, layers=[0, 1])
    rows = [(11, 50, 90, 61, 12, 77), (12, 40, 91, 60, 13, 70)]
    places = (1, 4)
    open_rows = [Candidate((*r[:i], OPEN, *r[i + 1 :]), 1) for r, i in zip(rows, places, strict=True)]
    words = scorer.table[torch.tensor([r[i] for r, i in zip(rows, places, strict=True)])]
    with frozen(victim.module):
        expected = scorer.scores([Candidate(r, 1) for r in rows])
        assert scorer.blank(open_rows, words).tolist() == pytest.approx(expected, rel=1e-9)
        # What is filled in is gone afterwards.
        assert scorer.scores([Candidate(r, 1) for r in rows]) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("model", list(MODELS))
def test_slopes_are_derivatives_and_count_as_three(make, model):
    victim = make(model)
    scorer = scorer_of(victim)
    rows = [Candidate((11, OPEN, 90, 61, 12, 77), 1), Candidate((12, 40, 91, OPEN, 13, 70), 0)]
    draw = torch.Generator().manual_seed(0)
    filling = torch.randn(2, scorer.table.shape[1], generator=draw, dtype=torch.float64)
    step = 1e-5 * torch.randn(filling.shape, generator=draw, dtype=torch.float64)
    with frozen(victim.module):
        before = scorer.evaluations
        slopes = scorer.blank(rows, filling, slopes=True)
        assert scorer.evaluations - before == 6
        rise = scorer.blank(rows, filling + step) - scorer.blank(rows, filling - step)
    torch.testing.assert_close(rise / 2, (slopes * step).sum(1), rtol=1e-4, atol=1e-8)


def test_the_missing_word_of_a_shifted_sentence_is_filled_in(make):
    victim = make("bert")
    scorer = scorer_of(victim)
    words = torch.arange(30, 100)
    space = Space(words, torch.ones(len(words)), Frame((), ()), (len(TRUTH),), (1,))
    doubled = Candidate((11, 90, 60, 60, 12, 77), 1)  # 40 is missing, 60 there twice
    with frozen(victim.module):
        found = Blanks(scorer, space).of(doubled, space, range(1, 5))
    assert replace(doubled, tokens=TRUTH) in found
    assert doubled not in found
    assert len(found) <= BLANKS * WORDS
    assert scorer.evaluations <= 4 + 4 * SURPLUS + 12 * BLANKS


def test_blanks_begin_with_common_words_whatever_is_said_of_the_place(make):
    victim = make("bert")
    scorer = scorer_of(victim)
    words = torch.arange(30, 100)
    weights = torch.ones(6, len(words))
    weights[2, 5] = 1e6
    common = 1.0 + torch.arange(len(words))
    space = Space(words, weights, Frame((), ()), (6,), (1,), common=common)
    with frozen(victim.module):
        held = Blanks(scorer, space).asked(space, 1).words(torch.tensor([2, 3]))
        start = held.mean(torch.zeros(1, 2, scorer.table.shape[1], dtype=torch.float64))[0]
    expected = (common / common.sum()).double() @ scorer.table[words]
    torch.testing.assert_close(start, expected.expand(2, -1), rtol=1e-6, atol=1e-8)
