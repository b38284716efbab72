"""Parts of a release against dense gradients, several open places against words, and what a relaxation ends with."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from lmleak import observe, select
from lmleak.attacks._blanks import OPEN
from lmleak.attacks._likelihood_moves import Space
from lmleak.attacks._likelihood_parts import DRAWN, LOUD, lower
from lmleak.attacks._likelihood_relax import PRICE, RESTARTS, _usual, relaxed
from lmleak.attacks._likelihood_score import Candidate, Scorer
from lmleak.attacks._objective import frozen
from lmleak.attacks._text import Frame
from lmleak.defenses import gaussian
from tests.attacks.test_likelihood import batch_of, make

__all__ = ["make"]

TRUTH = (11, 40, 90, 60, 72, 85, 12)
WORDS = torch.arange(30, 100)


def space_of(labels=(1,)) -> Space:
    return Space(WORDS, torch.ones(len(WORDS)), Frame((11,), (12,)), (len(TRUTH),), labels)


def scorer_of(victim, noise=1e-3, scope="model", **chosen) -> Scorer:
    given = {"kind": "dp_sgd", "noise_multiplier": noise, "max_grad_norm": 1.0, "clip_scope": scope}
    seen = observe(victim, batch_of(victim, [TRUTH]), select(victim, **chosen), given)
    return Scorer(victim, seen, gaussian(seen.defense))


@pytest.mark.parametrize("model", ["bert", "gpt2 classifier"])
@pytest.mark.parametrize("profiled", [False, True])
def test_open_places_filled_with_a_sentences_embeddings_are_that_sentence(make, model, profiled):
    # The whole model's norm has the token table's rows, of which open places have none.
    scorer = scorer_of(make(model), scope="model" if profiled else "selection", layers=[0, 1])
    scorer = scorer.profile() if profiled else scorer
    rows = [(11, 50, 90, 61, 44, 85, 12), TRUTH]
    blank = [Candidate((11, OPEN, 90, OPEN, OPEN, 85, 12), 1), Candidate((11, 40, OPEN, OPEN, 72, OPEN, 12), 1)]
    filling = scorer.table[torch.tensor([50, 61, 44, 90, 60, 85])]
    draw = torch.Generator().manual_seed(0)
    step = 1e-5 * torch.randn(filling.shape, generator=draw, dtype=torch.float64)
    with frozen(scorer.victim.module):
        expected = scorer.scores([Candidate(r, 1) for r in rows])
        assert scorer.blank(blank, filling).tolist() == pytest.approx(expected, rel=1e-9)
        slopes = scorer.blank(blank, filling, slopes=True)
        rise = scorer.blank(blank, filling + step) - scorer.blank(blank, filling - step)
    torch.testing.assert_close(rise / 2, (slopes * step).sum(1).view(2, 3).sum(1), rtol=1e-4, atol=1e-8)


def test_a_part_scores_by_its_own_entries_and_is_clipped_as_the_whole(make):
    scorer = scorer_of(make("bert"))
    part = scorer.part([e for e in scorer.entries if e.layer == 0])
    candidates = [Candidate(TRUTH, 1), Candidate((11, 50, 90, 61, 44, 85, 12), 0)]
    with frozen(scorer.victim.module):
        own = [scorer.total(one) for one in candidates]
        found = part.scores(candidates)
    for dense, nats in zip(own, found, strict=True):
        names = [e.name for e in part.entries]
        product = sum(float((scorer.targets[n] * dense[n]).sum()) for n in names)
        square = sum(float(dense[n].square().sum()) for n in names)
        assert nats == pytest.approx((product - 0.5 * square) / scorer.noise**2, rel=1e-9)
    assert part.energy() == pytest.approx(sum(float(scorer.targets[n].square().sum()) for n in names))
    assert part.numel == sum(e.numel for e in part.entries)


def test_the_lowest_layers_that_rise_above_the_noise_are_chosen(make):
    victim = make("bert")
    scorer = scorer_of(victim)
    drawn = space_of().drawn(DRAWN, torch.Generator().manual_seed(0))

    def length(most: int) -> float:
        """Median norm of the drawn sentences' clipped gradients in the first layers, densely."""
        norms = []
        for one in drawn:
            dense = scorer.total(one)
            parts = [dense[e.name] for e in scorer.entries if e.layer is not None and e.layer <= most]
            norms.append(float(sum(p.square().sum() for p in parts) ** 0.5))
        return float(torch.tensor(norms).median())

    with frozen(victim.module):
        first, both = length(0), length(1)
        assert first < both
        chosen = {}
        for noise in (0.9 * first / LOUD, 0.5 * (first + both) / LOUD, 1.1 * both / LOUD):
            scorer.noise = noise
            chosen[noise] = {e.layer for e in lower(scorer, drawn)}
    assert list(chosen.values()) == [{0}, {0, 1}, set()]


@pytest.mark.parametrize("labels", [(1,), (0, 1)])
def test_a_relaxation_ends_with_the_sentences_words(make, labels):
    victim = make("bert")
    scorer = scorer_of(victim, noise=1e-4, layers=[0])
    state = torch.get_rng_state()
    with frozen(victim.module):
        found = relaxed(scorer, space_of(labels), 1000, torch.Generator().manual_seed(0))
        spent = scorer.evaluations
        again = relaxed(scorer, space_of(labels), 1000, torch.Generator().manual_seed(0))
        assert relaxed(scorer, space_of(labels), PRICE - 1, torch.Generator().manual_seed(0)) == []
    assert found == again
    assert 0 <= spent - (1000 // PRICE) * PRICE <= 2 * RESTARTS * (len(labels) - 1)
    assert len(found) <= 1000 // PRICE * RESTARTS
    assert torch.equal(torch.get_rng_state(), state)
    assert all(one.label == 1 and one.tokens[0] == 11 and one.tokens[-1] == 12 for one in found)
    best = max(found, key=lambda one: len(Counter(one.tokens[1:-1]) & Counter(TRUTH[1:-1])))
    # Chance has one word of five in place once in three sentences.
    assert len(set(best.tokens[1:-1]) & set(TRUTH[1:-1])) >= 4, (best, TRUTH)


def test_a_relaxation_begins_half_with_common_words_and_half_with_what_is_said_of_a_place():
    weights = torch.ones(len(TRUTH), len(WORDS))
    weights[2, 5] = 1e6
    space = Space(WORDS, weights, Frame((11,), (12,)), (len(TRUTH),), (1,), common=torch.ones(len(WORDS)))
    shares = _usual(space, torch.tensor([2, 3])).exp()
    assert float(shares[0, 5]) == pytest.approx(0.5, abs=0.01)
    assert float(shares[0].sum()) == pytest.approx(1.0)
    assert shares[1].tolist() == pytest.approx([1 / len(WORDS)] * len(WORDS))
