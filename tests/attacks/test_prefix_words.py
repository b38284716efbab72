"""prefix's view of the vocabulary: chunks against the whole table at once, and no tensor as large as the table."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lmleak.attacks import _prefix_guess, _prefix_words
from lmleak.attacks._prefix_guess import SKETCH, Guess, best_pairs, outside
from lmleak.attacks._prefix_words import Words


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor made inside."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {t.untyped_storage()._cdata for t in tree_leaves(args) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in before:
                self.most = max(self.most, t.untyped_storage().nbytes())
        return out


def _table(v, f):
    return torch.randn(v, f, generator=torch.Generator().manual_seed(0)) + 0.3


def _learned(words, slots, count=300, d=24):
    draw = torch.Generator().manual_seed(1)
    guess = Guess(words, slots, d)
    tokens = torch.randint(len(words), (count, slots), generator=draw)
    mix = torch.randn(slots * words.width, d, generator=draw)
    guess.add(tokens, words[tokens].flatten(1) @ mix)
    return guess.project(torch.linalg.qr(torch.randn(d, 5, generator=draw).double()).Q.T)


def _unit(table):
    words = table - table.mean(0)
    return words / words.norm(dim=1, keepdim=True)


def test_rows_are_the_centred_tables_unit_rows(monkeypatch):
    monkeypatch.setattr(_prefix_words, "CHUNK", 7)
    table = _table(50, 6)
    tokens = torch.tensor([[3, 49], [0, 7]])
    assert torch.allclose(Words(table)[tokens], _unit(table)[tokens], atol=1e-6)
    half = table.half()
    assert torch.allclose(Words(half)[tokens], _unit(half.float())[tokens], atol=1e-6)


def test_scores_in_chunks_are_those_of_the_whole_table(monkeypatch):
    monkeypatch.setattr(_prefix_words, "CHUNK", 7)
    table = _table(50, 6)
    prediction = _learned(Words(table), 1)
    whole = _unit(table) @ prediction.coefficients[0] - prediction.centre[0] + prediction.constant
    slow = 1 - whole[:, :-SKETCH].square().sum(1) / whole[:, -SKETCH:].square().sum(1)
    assert torch.allclose(prediction.scores(0, outside), slow, atol=1e-5)


def test_best_pairs_in_chunks_are_those_of_all_pairs(monkeypatch):
    monkeypatch.setattr(_prefix_guess, "PAIRS", 100)
    table = _table(40, 6)
    prediction = _learned(Words(table), 2)
    first, second = (_unit(table) @ prediction.coefficients[s] - prediction.centre[s] for s in range(2))
    slow = outside(first[:, None] + second + prediction.constant).flatten()
    best = best_pairs(prediction, 40, 12)
    assert torch.allclose(slow[best[:, 0] * 40 + best[:, 1]], slow.sort().values[:12], atol=1e-4)


def test_no_tensor_is_as_large_as_the_table(monkeypatch):
    monkeypatch.setattr(_prefix_words, "CHUNK", 1024)
    monkeypatch.setattr(_prefix_guess, "PAIRS", 1 << 18)
    table = _table(20_000, 64)
    with Largest() as largest:
        words = Words(table)
        _learned(words, 1).scores(0, outside)
        best_pairs(_learned(words, 2), 1024, 64)
    assert largest.most < table.numel() * 4 / 4
