"""The matching attack's own parts: what saves gradients must not change what is chosen."""

from __future__ import annotations

import pytest
import torch

from lmleak import attack, grant, load_batches, observe, select
from lmleak.attacks import matching
from lmleak.attacks._objective import Layout, Objective, frozen
from lmleak.attacks._text import special_frame
from lmleak.attacks.matching import Config


@pytest.fixture
def search(tiny_bert):
    batch = load_batches(tiny_bert, "sample", limit=1, max_length=10)[0]
    known = grant(tiny_bert, batch, labels=True, lengths=True)
    objective = Objective(tiny_bert, observe(tiny_bert, batch, select(tiny_bert)), Layout(known.lengths), "cosine")
    draw = torch.Generator().manual_seed(0)
    # Surprised by long words at the beginning: a prior that tells orders apart and needs no model.
    prior = lambda texts: torch.tensor([sum(len(w) / (i + 1) for i, w in enumerate(t.split())) / 9 for t in texts])  # noqa: E731
    return matching._Search(
        Config(moves=40), objective, tiny_bert, special_frame(tiny_bert, known), draw, prior
    ), torch.tensor([known.labels])


@pytest.mark.parametrize("weight", [0.0, 0.2, 2.0])
def test_pruning_by_surprise_chooses_what_scoring_all_would(search, weight):
    search, labels = search
    own = search._drawn(1)[0]
    orders = torch.stack([torch.arange(own.shape[1])[None]] + [search._permuted(matching.reorder) for _ in range(80)])
    tokens = torch.stack([search.tokens(own[:, order[0]][None])[0] for order in orders])
    moved = search.tokens(own[None])[0].expand(len(orders), -1, -1).gather(2, orders)
    assert torch.equal(moved, tokens)
    surprise = weight * search._surprise(tokens)
    with frozen(search.victim.module):
        scores = search.objective.scored(search._gathered(own, orders), labels.expand(len(orders), -1)) + surprise
        best = search._least(own, orders, tokens, labels, 0, surprise)
    assert float(scores[best]) == pytest.approx(float(scores.min()), abs=1e-6)


def test_plain_gradients_lead_to_the_same_sentence(tiny_bert):
    batch = load_batches(tiny_bert, "sample", limit=1, max_length=8)[0]
    known = grant(tiny_bert, batch, labels=True, lengths=True)
    seen = observe(tiny_bert, batch, select(tiny_bert, layers=0))
    fields = {"steps": 8, "inits": 4, "permutations": 4, "moves": 0, "knowledge": known}
    one = attack(seen, tiny_bert, "matching", **fields)
    other = attack(seen, tiny_bert, "matching", derivative="finite_difference", **fields)
    assert other.details["objective"] == pytest.approx(one.details["objective"], abs=2e-3)
    assert other.tokens == one.tokens


def test_starts_are_as_long_as_the_words_of_a_text(search, tiny_bert):
    search, labels = search
    words = tiny_bert.processor(matching.TEXT, add_special_tokens=False)["input_ids"]
    with frozen(search.victim.module):
        start = search._start(labels, 0)
    length = search.table[words].norm(dim=1).mean()
    torch.testing.assert_close(start[~search.fixed].norm(dim=-1).mean(), length)
