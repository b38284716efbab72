"""Words are named by numbers and by the gradient, a first look scores what it says, and words tried name others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lmleak import load_model, observe, select
from lmleak.attacks import _likelihood_words as words
from lmleak.attacks._likelihood_moves import Moves, Space
from lmleak.attacks._likelihood_score import Candidate, Scorer
from lmleak.attacks._objective import frozen
from lmleak.attacks._text import Frame
from lmleak.defenses import gaussian
from lmleak.records import Batch, Reference

BERT = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48,
        "max_position_embeddings": 16, "initializer_range": 0.2}  # fmt: skip


@pytest.fixture(scope="module")
def victim():
    return load_model("bert", weights="random", tokenizer="bytes", config=BERT, device="cpu", dtype="float64")


def _batch(tokens) -> Batch:
    ids = torch.tensor([tokens])
    places = torch.arange(len(tokens))[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": places}
    return Batch(inputs, torch.tensor([1]), Reference())


def test_a_first_look_takes_the_best_factor_of_the_clipping(victim):
    truth = (11, 40, 90, 60, 12)
    seen = observe(victim, _batch(truth), select(victim), {"kind": "dp_sgd", "noise_multiplier": 1e-3})
    scorer = Scorer(victim, seen, gaussian(seen.defense))
    # Without the lower layers' part the upper ones hold nearly everything.
    scorer.targets = {e.name: t * (1.0 if e.layer in (None, 2) and e.component != "embedding" else 1e-3)
                      for e, t in zip(scorer.entries, scorer.targets.values(), strict=True)}  # fmt: skip
    upper = scorer.upper()
    assert upper is not None
    assert all(e.layer is None or e.layer == 2 for e in upper.entries)
    candidates = [Candidate(truth, 1), Candidate((11, 41, 90, 60, 12), 1)]
    with frozen(victim.module):
        found, own = upper.scores(candidates), [scorer.total(one) for one in candidates]
    for parts, nats in zip(own, found, strict=True):
        product = sum(float((scorer.targets[e.name] * parts[e.name]).sum()) for e in upper.entries)
        square = sum(float(parts[e.name].square().sum()) for e in upper.entries)
        best = max(f * product - 0.5 * f * f * square for f in torch.linspace(0, 2 * product / square, 2001).tolist())
        assert nats * 1e-6 == pytest.approx(best, rel=1e-5)
    assert upper.evaluations < len(candidates)


def test_evidence_of_inputs_is_the_gaussians_of_explicit_rows(victim):
    layer = victim.family.input_layer(victim.module)
    draw = torch.Generator().manual_seed(0)
    gradient = torch.randn(32, 32, generator=draw, dtype=torch.float64)
    deltas = torch.randn(5, 3, 32, generator=draw, dtype=torch.float64)
    found = words._by_inputs(layer, gradient, deltas, 3)
    every = torch.arange(len(layer.word))
    mean = deltas.mean(0)
    spread = float((deltas - mean).square().mean()) * 5 / 4
    rows = [layer.rows(every, torch.full_like(every, p), dtype=torch.float64) for p in range(3)]
    middle = torch.nn.functional.layer_norm(
        layer.word + layer.position[:3].mean(0), (32,), layer.weight, layer.bias, layer.eps
    )
    reach = (middle - middle.mean(0)).norm(dim=1)
    for place, x in enumerate(rows):
        y = (x - x.mean(0)) @ gradient.T / reach[:, None]
        variance = float(y.square().sum(1).median()) / 32
        parts = []
        for size in words.SIZES:
            a = size * float(reach.median())
            wide = variance + a * a * spread
            normal = torch.distributions.Normal(a * mean[place], wide**0.5)
            parts.append(normal.log_prob(y).sum(1))
        nothing = torch.distributions.Normal(torch.zeros(32, dtype=torch.float64), variance**0.5).log_prob(y).sum(1)
        nats = (torch.stack(parts).logsumexp(0) - nothing) / words.TEMPER
        assert torch.allclose(nats - nats.mean(), found[place] - found[place].mean(), atol=1e-8)


@pytest.mark.parametrize(
    ("chosen", "most"), [({"components": ["embedding"]}, 2), ({"components": ["attn_value"], "layers": 0}, 40)]
)
def test_evidence_names_words_at_their_places(victim, chosen, most):
    truth = (11, 40, 90, 60, 12)
    defense = {"kind": "dp_sgd", "noise_multiplier": 1e-4, "clip_scope": "selection"}
    seen = observe(victim, _batch(truth), select(victim, **chosen), defense)
    scorer = Scorer(victim, seen, gaussian(seen.defense))
    drawn = [Candidate((11, 20 + i, 50 + i, 70 + i, 12), 1) for i in range(6)]
    with frozen(victim.module):
        nats = words.evidence(victim, scorer, drawn, 5)
    assert nats is not None
    ranks = [int((nats[place] > nats[place, truth[place]]).sum()) for place in (1, 2, 3)]
    assert max(ranks) < most, ranks
    noisy = replace(seen, gradients={k: torch.zeros_like(g) for k, g in seen.gradients.items()})
    with frozen(victim.module):
        assert words.evidence(victim, Scorer(victim, noisy, None), drawn, 5) is None


def test_frequent_words_are_numbered_first(minilm):
    common = words.frequency(minilm)
    code = minilm.processor.convert_tokens_to_ids
    assert common[code("the")] > common[code("harbor")] > common[code("talisman")] > 0
    assert common[code(".")] > common[code("x")] > common[code("ð")]


def test_words_scored_at_a_position_say_which_to_score_next(victim):
    table = victim.module.get_input_embeddings().weight.detach()
    space = Space(torch.arange(200), torch.ones(200), Frame((), ()), (3,), (1,))
    moves = Moves(space, table, 16, 1)
    wanted = torch.nn.functional.normalize(moves.centred @ moves.centred[150], dim=0)
    at = Candidate((5, 6, 7), 1)
    known = {Candidate((5, i, 7), 1): float(wanted[i]) for i in range(120)}
    guessed = [one.tokens[1] for one in moves._guessed(at, 1, known)]
    assert min(guessed) >= 120  # nothing twice
    assert 150 in guessed
    assert not moves._guessed(at, 0, known)
