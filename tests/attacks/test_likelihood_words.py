"""Words are named by numbers and by the gradient, a first look scores what it says, and words tried name others."""

from __future__ import annotations

import pytest
import torch

from lmleak import load_model, observe, select
from lmleak.attacks import _likelihood_deltas as deltas
from lmleak.attacks import _likelihood_words as words
from lmleak.attacks._likelihood_block import Block
from lmleak.attacks._likelihood_moves import Moves, Space
from lmleak.attacks._likelihood_parts import upper
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


@pytest.fixture(scope="module")
def decoder():
    config = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 16, "initializer_range": 0.2}
    return load_model("gpt2", weights="random", tokenizer="bytes", config=config, device="cpu", dtype="float64")


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
    first = upper(scorer)
    assert first is not None
    assert all(e.layer is None or e.layer == 2 for e in first.entries)
    candidates = [Candidate(truth, 1), Candidate((11, 41, 90, 60, 12), 1)]
    with frozen(victim.module):
        found, own = first.scores(candidates), [scorer.total(one) for one in candidates]
    for parts, nats in zip(own, found, strict=True):
        product = sum(float((scorer.targets[e.name] * parts[e.name]).sum()) for e in first.entries)
        square = sum(float(parts[e.name].square().sum()) for e in first.entries)
        best = max(f * product - 0.5 * f * f * square for f in torch.linspace(0, 2 * product / square, 2001).tolist())
        assert nats * 1e-6 == pytest.approx(best, rel=1e-5)
    assert first.evaluations < len(candidates)


def test_a_words_evidence_is_the_ratio_of_two_gaussians():
    draw = torch.Generator().manual_seed(0)
    spread = torch.tensor([2.0, 0.5, 0.1], dtype=torch.float64)
    y = torch.randn(6, 3, generator=draw, dtype=torch.float64)
    reach = torch.rand(6, 3, generator=draw, dtype=torch.float64) + 0.5
    noise = torch.tensor([0.3, 0.2, 0.4], dtype=torch.float64)
    found = deltas.log_ratio(reach * y, reach, spread, noise)
    for row in range(6):
        nothing = torch.distributions.Normal(0.0, (noise / reach[row]).sqrt()).log_prob(y[row]).sum()
        parts = [
            torch.distributions.Normal(0.0, (size**2 * spread + noise / reach[row]).sqrt()).log_prob(y[row]).sum()
            for size in deltas.SIZES
        ]
        assert float(found[row]) == pytest.approx(float(torch.stack(parts).logsumexp(0) - nothing))


def test_words_that_are_priced_do_not_pass_those_looked_at(monkeypatch):
    draw = torch.Generator().manual_seed(1)
    table = torch.randn(400, 16, generator=draw, dtype=torch.float64)
    turned = torch.randn(16, 4, generator=draw, dtype=torch.float64)
    spread = torch.ones(4, dtype=torch.float64)

    def exact(rows):
        x = table[rows].tanh()  # nearly, and not quite, what a linear fit says
        along = x @ turned
        along[rows == 7] *= 3
        return along, x.square().sum(1, keepdim=True)

    every = torch.arange(400)
    noise = (exact(every)[0].square() / exact(every)[1]).median(0).values / deltas.MIDDLE
    slow = deltas.log_ratio(*exact(every), spread, noise.clamp_min(0.1))
    monkeypatch.setattr(deltas, "SAMPLED", 400)
    fast = deltas.Words(table).ratios(exact, spread, 0.1)
    assert torch.allclose(fast, slow)  # all are looked at
    monkeypatch.setattr(deltas, "SHORT", 40)
    short = deltas.Words(table).ratios(exact, spread, 0.1)
    seen = (short - slow).abs() < 1e-9
    assert int(seen.sum()) >= 40
    assert float(short[~seen].max()) <= float(short[seen].max())
    assert int((slow.topk(10).indices[:, None] == seen.nonzero().flatten()).any(1).sum()) >= 9


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_the_feed_forward_part_is_correlated_as_autograd_would(kind, victim, decoder):
    one = victim if kind == "bert" else decoder
    truth, place = (11, 40, 90, 60, 12), 2
    defense = {"kind": "dp_sgd", "noise_multiplier": 1e-3, "clip_scope": "selection"}
    seen = observe(one, _batch(truth), select(one, components=["ffn_in", "ffn_out"], layers=0), defense)
    scorer = Scorer(one, seen, gaussian(seen.defense))
    drawn = [Candidate((11, 20 + i, 50 + i, 70 + i, 12), 1) for i in range(6)]
    with frozen(one.module):
        (part,) = words._parts(one, scorer, drawn)
    assert isinstance(part, Block)
    # Nothing is taken off, and each word is looked at: what is left is an inner product with an explicit gradient.
    given = {}
    part.words = type(
        "All", (), {"table": scorer.table, "ratios": lambda self, exact, *rest: given.update(exact=exact)}
    )()
    guess = deltas.Guess(truth, ())
    part.mean = tuple(torch.zeros_like(m) for m in part.mean)
    part.rest = torch.stack([part._seen(truth)[0][i] for i in range(5)])
    part.nats(scorer.targets, scorer.noise**2, guess, place)
    along, reach = (value.detach() for value in given["exact"](torch.tensor([truth[place], 91])))
    inner, outer = part.inner, part.outer
    low = part._seen(truth)[1][place]
    weights = [inner.weight.detach().clone().requires_grad_(True), outer.weight.detach().clone().requires_grad_(True)]
    for k in range(3):
        turn = (lambda w: w) if kind == "gpt2" else (lambda w: w.T)
        x = part.act(low @ turn(weights[0]) + inner.bias.detach())
        grads = torch.autograd.grad((x @ turn(weights[1])) @ part.basis[:, k], weights)
        product = sum(float((g * scorer.targets[e.name]).sum()) for g, e in zip(grads, part.pair, strict=True))
        square = sum(float(g.square().sum()) for g in grads)
        assert float(along[0, k]) == pytest.approx(product, rel=1e-6)
        assert float(reach[0, k]) == pytest.approx(square, rel=1e-6)
    assert not torch.allclose(along[0], along[1])


@pytest.mark.parametrize(
    ("chosen", "most"),
    [
        ({"components": ["embedding"]}, 2),
        ({"components": ["attn_value"], "layers": 0}, 5),
        ({"components": ["layer"], "layers": 0}, 5),
    ],
)
def test_evidence_names_words_at_their_places(victim, chosen, most):
    truth = (11, 40, 90, 60, 12)
    defense = {"kind": "dp_sgd", "noise_multiplier": 1e-4, "clip_scope": "selection"}
    seen = observe(victim, _batch(truth), select(victim, **chosen), defense)
    scorer = Scorer(victim, seen, gaussian(seen.defense))
    drawn = [Candidate((11, 20 + i, 50 + i, 70 + i, 12), 1) for i in range(24)]
    with frozen(victim.module):
        evidence = words.Evidence(victim, scorer, drawn, (0, 4))
        nats = evidence.first(scorer)
    assert nats is not None
    ranks = [int((nats[place] > nats[place, truth[place]]).sum()) for place in (1, 2, 3)]
    # The third word's gradient may be next to nothing.
    assert sorted(ranks)[1] < most, ranks
    if "embedding" in chosen["components"]:
        assert evidence.around(scorer, Candidate(truth, 1)) is None
        return
    assert evidence.loud
    with frozen(victim.module):
        again = evidence.around(scorer, Candidate((11, 40, 91, 60, 12), 1))
    assert again is not None
    assert int((again[2] > again[2, 90]).sum()) < 2 * most


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


def test_words_in_a_row_move_together(victim):
    space = Space(torch.arange(13, 200), torch.ones(187), Frame((11,), (12,)), (7,), (1,))
    moves = Moves(space, victim.module.get_input_embeddings().weight.detach(), 4, 1)
    at = Candidate((11, 21, 22, 23, 24, 25, 12), 1)
    found = [one.tokens for one in moves.carried(at)]
    assert (11, 23, 24, 25, 21, 22, 12) in found
    assert (11, 21, 24, 25, 22, 23, 12) in found
    assert len(set(found)) == len(found)
    assert all(
        sorted(row) == sorted(at.tokens) and row[0] == 11 and row[-1] == 12 and row != at.tokens for row in found
    )
