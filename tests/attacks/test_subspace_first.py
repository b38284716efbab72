"""Layer 0 under noise: words that stand in each other's places."""

from __future__ import annotations

from itertools import combinations

import torch

from lmleak.attacks._rowspace import known_input
from lmleak.attacks._subspace_first import _row, _swap


def _rows(layer, tokens):
    return [_row(layer, torch.tensor([token]), place)[0] for place, token in enumerate(tokens)]


def _explained(gram, rows):
    q = torch.linalg.qr(torch.stack(rows).T).Q
    return float(torch.trace(q.T @ gram @ q))


def test_swaps_put_words_back_where_the_gradient_shows_them(minilm):
    layer = known_input(minilm)
    truth = [101, 1996, 3185, 2003, 2200, 2204, 102]
    true_rows = _rows(layer, truth)
    noise = torch.randn(384, 384, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.stack(true_rows)
    gram = x.T @ x + 1e-4 * noise @ noise.T / 384
    tokens = [101, 2204, 1996, 2003, 3185, 2200, 102]
    rows = _rows(layer, tokens)
    _swap(tokens, rows, [1, 2, 3, 4, 5], layer, gram)
    assert tokens == truth
    assert all(torch.equal(a, b) for a, b in zip(rows, true_rows, strict=True))


def test_swaps_end_where_none_explains_more(minilm):
    layer = known_input(minilm)
    draw = torch.Generator().manual_seed(1)
    noise = torch.randn(384, 40, generator=draw, dtype=torch.float64)
    gram = noise @ noise.T
    # A word twice among them, and the first place is not to be touched.
    tokens = [101, 1996, 3185, 1996, 2200, 102]
    start = _rows(layer, tokens)
    rows = list(start)
    _swap(tokens, rows, [1, 2, 3, 4], layer, gram)
    here = _explained(gram, rows)
    assert (tokens[0], tokens[5]) == (101, 102)
    assert sorted(tokens) == sorted([101, 1996, 3185, 1996, 2200, 102])
    assert here >= _explained(gram, start) - 1e-9
    for i, j in combinations(range(1, 5), 2):
        other = list(tokens)
        other[i], other[j] = other[j], other[i]
        assert _explained(gram, _rows(layer, other)) <= here * (1 + 1e-6)
