"""Noise: likelihood with output gradients averaged out, and what the neighbours of an answer leave of it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from scipy.optimize import minimize

from lmleak import attack, load_batches, load_model, observe, select
from lmleak.attacks import _neighbours
from lmleak.attacks._discrete import Search
from lmleak.attacks._energy import Energy, of_tokens, slope
from lmleak.attacks._energy_likelihood import noised
from lmleak.attacks._energy_marginal import GRAIN, Marginal, evidence
from lmleak.attacks._neighbours import Neighbours

COMPONENTS = ["attn_query", "attn_value", "ffn_in", "ffn_out"]


def noised_by(seen, std, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return replace(
        seen, gradients={n: g + std * torch.randn(g.shape, generator=draw) for n, g in seen.gradients.items()}
    )


@pytest.fixture(scope="module")
def tiny():
    config = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
              "max_position_embeddings": 16, "initializer_range": 0.2}  # fmt: skip
    return load_model(
        "bert", weights="random", task="sequence-classification", tokenizer="bytes", config=config, device="cpu"
    )


@pytest.fixture(scope="module")
def release(tiny):
    batch = load_batches(tiny, "sample", limit=1, max_length=6)[0]
    return observe(tiny, batch, select(tiny, components=COMPONENTS, layers=1, parameters="weight")), batch


@pytest.mark.parametrize(("seed", "scale"), [(0, 3.0), (1, 0.5), (2, 300.0)])
def test_evidence_is_the_least_of_the_dense_gaussian(seed, scale):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 9, generator=draw, dtype=torch.float64)
    strength = torch.tensor([1.0, 0.3, 0.0, 0.1], dtype=torch.float64) * scale
    g = (strength[:, None] * torch.randn(4, 20, generator=draw, dtype=torch.float64)).T @ x
    g = g + torch.randn(20, 9, generator=draw, dtype=torch.float64)

    def slow(log_w):
        covariance = torch.eye(9, dtype=torch.float64) + x.T @ torch.diag(torch.tensor(log_w).exp()) @ x
        each = torch.distributions.MultivariateNormal(torch.zeros(9, dtype=torch.float64), covariance).log_prob(g)
        return float(torch.distributions.Normal(0.0, 1.0).log_prob(g).sum() - each.sum())

    best = min(minimize(slow, [start] * 4, method="L-BFGS-B").fun for start in (-3.0, 2 * math.log(scale)))
    value, worth = evidence((x @ x.T)[None], (x @ g.T @ g @ x.T)[None], 20)
    assert float(value) == pytest.approx(best, rel=1e-3, abs=0.1)
    assert bool((worth <= 1e-6).all())


def test_slope_is_the_marginal_s_derivative(tiny, release):
    seen, batch = noised_by(release[0], 1e-3), release[1]
    parts = [noised(tiny, seen, e) for e in seen.entries]
    energy = Energy(tiny, [one.site for one in parts])
    judge, draw = Marginal(energy, parts), torch.Generator().manual_seed(0)
    with energy.attached():
        embeds = judge.table[batch.inputs["input_ids"] + 7]  # at the truth the minimum is too sharp for differences
        way = torch.randn(embeds.shape, generator=draw)
        there, back = (float(judge(embeds + h * way, GRAIN)[0].detach()) for h in (1e-3, -1e-3))
        assert float((slope(judge, embeds, GRAIN) * way).sum()) == pytest.approx((there - back) / 2e-3, rel=0.05)


@pytest.mark.parametrize("std", [1e-3, 0.3])
def test_probability_is_that_among_all_neighbours(tiny, release, std, monkeypatch):
    monkeypatch.setattr(_neighbours, "WORDS", 1000)
    monkeypatch.setattr(_neighbours, "FEW", 1000)
    seen, batch = noised_by(release[0], std), release[1]
    parts = [noised(tiny, seen, e) for e in seen.entries]
    energy = Energy(tiny, [one.site for one in parts])
    judge = Marginal(energy, parts)
    truth = tuple(batch.inputs["input_ids"][0].tolist())
    words = torch.tensor(sorted({*range(60, 100), *truth}))
    start = (truth[1], truth[0], *truth[2:])
    with energy.attached():
        search = Search(judge, words, 0, len(truth), GRAIN, 8)
        found = Neighbours(search, len(truth), resized=False).settle(start)
        own, n = found.tokens, len(found.tokens)
        slow = {(*own[:i], w, *own[i + 1 :]) for i in range(n) for w in words.tolist()}
        for i in range(n):
            for j in range(n):
                swapped, moved = list(own), list(own)
                swapped[i], swapped[j] = own[j], own[i]
                moved.insert(j, moved.pop(i))
                slow |= {tuple(swapped), tuple(moved)}
        slow.discard(own)
        values = of_tokens(judge, torch.tensor([own, *sorted(slow)]), GRAIN)
    gaps = values[1:] - values[0]
    assert found.neighbours == len(gaps)
    assert float(gaps.min()) >= -_neighbours.TOLD
    assert found.rival == pytest.approx(float(gaps.min()), abs=0.02)
    assert found.probability == pytest.approx(1 / (1 + float((-gaps).exp().sum())), rel=0.05)
    if std == 1e-3:
        assert own == truth
        assert found.probability > 0.99
    else:
        assert found.probability < 0.9


def test_lengths_differ_by_one_among_neighbours_where_they_are_open(tiny, release):
    seen, batch = noised_by(release[0], 1e-3), release[1]
    parts = [noised(tiny, seen, e) for e in seen.entries]
    energy = Energy(tiny, [one.site for one in parts])
    judge = Marginal(energy, parts)
    truth = tuple(batch.inputs["input_ids"][0].tolist())
    with energy.attached():
        search = Search(judge, torch.arange(3, 259), 0, len(truth), GRAIN, 8)
        near = Neighbours(search, len(truth), resized=True)
        longer, shorter = (*truth[:2], 77, *truth[2:]), (*truth[:2], *truth[3:])
        search.score([longer])
        search.score([shorter])
        dropped = near._near(longer, "shorter", near._price([longer])[0])
        grown = near._near(shorter, "longer", near._price([shorter])[0])
        assert near._better(longer, dropped) == truth
        found = near.settle(truth)
    assert {len(one) for one in grown} == {len(truth)}
    assert {one[:i] + one[i + 1 :] for one in grown for i in range(len(one))} >= {shorter}
    assert found.tokens == truth
    assert found.probability > 0.99


@pytest.mark.parametrize("seed", range(3))
def test_what_noise_hides_is_no_confident_answer(tiny, release, seed):
    seen, batch = noised_by(release[0], 0.3, seed), release[1]
    result = attack(seen, tiny, "subspace", steps=5, budget=1500)
    assert result.tokens == batch.reference.tokens or max(result.confidence, default=0.0) < 0.5


def test_the_budget_holds_under_noise(tiny, release):
    result = attack(noised_by(release[0], 1e-3), tiny, "subspace", steps=5, budget=300)
    assert result.details["evaluations"] <= 300 + 70  # a descent looks at its budget once a step
    assert result.status == "budget_exhausted"
    assert result.confidence[0] < 0.5


@pytest.mark.parametrize("std", [1e-3, 0.02])
def test_another_model_s_gradient_is_no_confident_answer(tiny, release, std):
    seen = noised_by(release[0], std)
    draw = torch.Generator().manual_seed(0)
    wrong = {n: g[:, torch.randperm(g.shape[1], generator=draw)] for n, g in seen.gradients.items()}
    result = attack(replace(seen, gradients=wrong), tiny, "subspace", steps=5, budget=1500)
    assert result.status != "ok"
    assert max(result.confidence, default=0.0) < 0.5
