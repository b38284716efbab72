"""The relaxation's distributions, which pass the words in blocks, against ones that hold all of them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmleak.attacks import _subspace_relax
from lmleak.attacks._subspace_relax import Distributions

PLACES = 3


def dense(table, words, pull, prior, hint, bonus):
    """Probabilities [k, free, v] as the definition has them."""
    logits = -torch.einsum("kfd,vd->kfv", pull, table[words])
    if prior is not None:
        logits = logits + prior
    for k, row in enumerate(bonus):
        for place, value in enumerate(row):
            logits[k, place] += value * (words == hint[place])
    return logits.softmax(-1)


@given(
    seed=st.integers(0, 99),
    count=st.integers(2, 40),
    block=st.integers(1, 50),
    restarts=st.integers(1, 3),
    informed=st.sampled_from([None, 1, PLACES]),
)
@settings(max_examples=40)
def test_blocks_of_words_are_all_words_at_once(seed, count, block, restarts, informed):
    draw = torch.Generator().manual_seed(seed)
    table = torch.randn(60, 5, generator=draw, dtype=torch.float64)
    words = torch.randperm(60, generator=draw)[:count]
    prior = None if informed is None else torch.randn(informed, count, generator=draw, dtype=torch.float64)
    pull = torch.randn(restarts, PLACES, 5, generator=draw, dtype=torch.float64)
    hint, bonus = words[torch.arange(PLACES) % count], torch.rand(restarts, PLACES, generator=draw) * 4
    patched = pytest.MonkeyPatch()
    with patched.context() as context:
        context.setattr(_subspace_relax, "BLOCK", block)
        held = Distributions(table, words, prior, hint, bonus)
        mean, best, spread = held.mean(pull), held.likeliest(pull, 4), held.spread(pull)
        fewer = held.pruned(pull, 2)
        some = fewer.likeliest(pull, 2)
    shares = dense(table, words, pull, prior, hint, bonus)
    torch.testing.assert_close(mean, shares @ table[words])
    assert torch.equal(best, words[shares.topk(min(4, count), -1).indices])
    torch.testing.assert_close(spread, (pull @ table[words].T).std(-1, keepdim=True))
    kept = words[shares.topk(2, -1).indices]
    assert set(fewer.words.tolist()) == set(kept.flatten().tolist())
    assert torch.equal(some, kept)


def test_a_word_of_no_prior_has_no_share_and_drawn_pulls_spread_alike():
    draw = torch.Generator().manual_seed(0)
    table = torch.randn(60, 5, generator=draw) * torch.tensor([3.0, 1, 1, 0.1, 0.01])
    words = torch.arange(40)
    held = Distributions(table, words, torch.zeros(1, 40).index_fill(1, torch.tensor([7]), -torch.inf))
    pull = held.drawn(torch.randn(200, 1, 5, generator=draw))
    assert 7 not in held.likeliest(pull, 39)
    drawn = pull[:, 0] @ (table[words] - held.centre).T
    assert float(drawn.square().mean()) == pytest.approx(1, rel=0.1)
    # A direction in which words differ little has as much of it as another.
    by_direction = [pull[:, 0, i].square().mean() * held.covariance[i, i] for i in (0, 4)]
    assert float(by_direction[0]) == pytest.approx(float(by_direction[1]), rel=0.5)
