"""The score is the mechanism's own likelihood, the search finds short sentences, and noise is not answered."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from lmleak import attack, grant, load_batches, load_model, observe, select
from lmleak.attacks import likelihood
from lmleak.attacks._likelihood_moves import Space
from lmleak.attacks._likelihood_score import Candidate, Scorer
from lmleak.attacks._likelihood_search import Search
from lmleak.attacks._likelihood_verdict import LUCK, hopeless
from lmleak.attacks._objective import frozen
from lmleak.attacks._text import Frame, special_frame
from lmleak.defenses import gaussian
from lmleak.errors import LmleakError
from lmleak.gradients.observe import cut
from lmleak.records import Batch, Knowledge, Reference

BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
        "max_position_embeddings": 16, "initializer_range": 0.2}  # fmt: skip
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 16, "initializer_range": 0.2}
MODELS = {
    "bert": ("bert", "sequence-classification", BERT),
    "gpt2": ("gpt2", "causal-lm", GPT2),
    "gpt2 classifier": ("gpt2", "sequence-classification", GPT2 | {"pad_token_id": 0}),
}


@pytest.fixture(scope="module")
def make():
    made = {}

    def victim(name, dtype="float64"):
        if (name, dtype) not in made:
            kind, task, config = MODELS[name]
            made[name, dtype] = load_model(
                kind, weights="random", task=task, tokenizer="bytes", config=config, device="cpu", dtype=dtype
            )
        return made[name, dtype]

    return victim


def batch_of(victim, rows, classes=(1, 0)) -> Batch:
    ids = torch.tensor(rows)
    labels = torch.tensor(classes[: len(ids)]) if victim.task == "sequence-classification" else ids
    places = torch.arange(ids.shape[1]).expand(len(ids), -1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": places}
    return Batch(inputs, labels, Reference())


def by_hand(victim, observation, candidate, clip=None, scope=None, share=1.0):
    """<G~, w g> - |w g|^2 / 2 by one backward, dense gradients and explicit clipping; and w g itself."""
    module = victim.module
    batch = batch_of(victim, [candidate.tokens], (candidate.label,))
    logits = module(**batch.inputs).logits
    if logits.dim() == 2:
        loss = torch.nn.functional.cross_entropy(logits, batch.labels)
    else:
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], batch.labels[0, 1:])
    names, parameters = zip(*module.named_parameters(), strict=True)
    dense = dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)))  # noqa: B905
    own = {e.name: cut(dense[e.parameter], e) for e in observation.entries}
    weights = dict.fromkeys(own, share)
    if scope == "per_layer":
        weights = {k: min(1.0, clip / len(own) ** 0.5 / (float(g.norm()) + 1e-6)) for k, g in own.items()}
    elif scope is not None:
        over = dense if scope == "model" else own
        norm = float(sum(g.square().sum() for g in over.values()) ** 0.5)
        weights = dict.fromkeys(own, min(1.0, clip / (norm + 1e-6)))
    own = {k: g * weights[k] for k, g in own.items()}
    return sum(float((observation.gradients[k] * g).sum() - 0.5 * g.square().sum()) for k, g in own.items()), own


@pytest.mark.parametrize("model", list(MODELS))
@pytest.mark.parametrize("scope", ["model", "selection", "per_layer"])
@pytest.mark.parametrize("chosen", [{}, {"layers": 0}, {"components": ["attn_query"], "layers": 0}], ids=str)
def test_score_equals_a_backward_with_explicit_clipping(make, model, scope, chosen):
    victim = make(model)
    defense = {"kind": "dp_sgd", "noise_multiplier": 0.1, "max_grad_norm": 0.7, "clip_scope": scope}
    seen = observe(victim, batch_of(victim, [[11, 40, 90, 60, 12]]), select(victim, **chosen), defense)
    scorer = Scorer(victim, seen, gaussian(seen.defense))
    candidates = [Candidate((11, 40, 41, 60, 12), 1), Candidate((20, 30, 20, 31), 0), Candidate((9, 8, 7, 6, 7), 0)]
    with frozen(victim.module):
        found = scorer.scores(candidates)
        totals = [scorer.total(one) for one in candidates]
    for one, nats, total in zip(candidates, found, totals, strict=True):
        raw, own = by_hand(victim, seen, one, 0.7, scope)
        assert nats * 0.07**2 == pytest.approx(raw, rel=1e-9)
        assert all(torch.allclose(total[name], own[name], rtol=1e-8, atol=1e-12) for name in own)


@pytest.mark.parametrize("defense", [{"kind": "none"}, {"kind": "gaussian_noise", "std": 0.01}], ids=str)
def test_unclipped_score_weighs_a_sentence_as_the_mean_does(make, defense):
    victim = make("bert")
    rows = [[11, 40, 90, 60, 12], [11, 41, 42, 43, 12]]
    seen = observe(victim, batch_of(victim, rows), select(victim), defense)
    scorer = Scorer(victim, seen, gaussian(seen.defense))
    one = Candidate((11, 40, 90, 60, 12), 1)
    with frozen(victim.module):
        (product,), (square,) = scorer.measures([one])
    raw, _ = by_hand(victim, seen, one, share=0.5)
    assert float(product - 0.5 * square) == pytest.approx(raw, rel=1e-9)


@pytest.mark.parametrize("model", ["bert", "gpt2"])
@pytest.mark.parametrize("chosen", [{"layers": 0}, {}], ids=str)
def test_slope_is_the_scores_derivative_along_the_way_to_another_token(make, model, chosen):
    victim = make(model)
    defense = {"kind": "dp_sgd", "noise_multiplier": 0.1, "max_grad_norm": 1e6}
    seen = observe(victim, batch_of(victim, [[11, 40, 90, 60, 12]]), select(victim, **chosen), defense)
    scorer = Scorer(victim, seen, gaussian(seen.defense))
    at, step = Candidate((11, 41, 90, 61, 12), 1), 1e-5
    table = victim.module.get_input_embeddings().weight
    # A token whose embedding is a step from another's: the estimate for it is exact to second order.
    near = (table[90] + step * torch.randn(32, generator=torch.Generator().manual_seed(0), dtype=table.dtype)).detach()
    before = table.data[77].clone()
    try:
        table.data[77] = near
        with frozen(victim.module):
            slope = scorer.slope(at)
            there, here = scorer.scores([replace(at, tokens=(11, 41, 77, 61, 12)), at])
    finally:
        table.data[77] = before
    assert slope.value == pytest.approx(here, rel=1e-9)
    assert slope.gain[2, 90] == 0
    if not chosen:
        return  # the row of the table that the gradient falls into jumps, whatever the distance
    if model == "bert":
        assert float(slope.gain[2, 77]) == pytest.approx(there - here, rel=1e-2)


def test_estimate_counts_the_row_of_the_token_table(make):
    victim = make("bert")
    defense = {"kind": "dp_sgd", "noise_multiplier": 1e-3, "max_grad_norm": 1.0}
    truth = (11, 40, 90, 60, 12)
    seen = observe(victim, batch_of(victim, [truth]), select(victim, components=["embedding"]), defense)
    scorer = Scorer(victim, seen, gaussian(seen.defense))
    with frozen(victim.module):
        slope = scorer.slope(Candidate((11, 40, 41, 60, 12), 1))
    assert int(slope.gain[2].argmax()) == 90


def tiny(task="sequence-classification", kind="bert"):
    config = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
              "max_position_embeddings": 64, "initializer_range": 0.1}  # fmt: skip
    if kind == "gpt2":
        config = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.1}
    return load_model(kind, weights="random", task=task, tokenizer="bytes", config=config, device="cpu")


def released(victim, sigma, **chosen):
    batch = load_batches(victim, "sample", limit=1, max_length=8)[0]
    defense = {"kind": "dp_sgd", "noise_multiplier": sigma}
    return batch, observe(victim, batch, select(victim, **chosen), defense)


@pytest.mark.parametrize(("kind", "task"), [("bert", "sequence-classification"), ("gpt2", "causal-lm")])
def test_reads_a_short_sentence_through_little_noise(kind, task):
    victim = tiny(task, kind)
    batch, seen = released(victim, 1e-3)
    known = grant(victim, batch, lengths=True)
    result = attack(seen, victim, "likelihood", knowledge=known, budget=2500, shortlist=32, exact=False)
    assert result.status == "ok", result.reason
    assert result.tokens == batch.reference.tokens
    assert result.confidence[0] > 0.5
    if batch.reference.labels:
        assert result.details["labels"] == list(batch.reference.labels)


def test_finds_the_length_too():
    victim = tiny()
    batch, seen = released(victim, 1e-3)
    result = attack(seen, victim, "likelihood", budget=3000, shortlist=32, longest=12, exact=False)
    assert result.details["lengths"] == list(grant(victim, batch, lengths=True).lengths)


@pytest.mark.parametrize(("seed", "noise"), [(0, 0.3), (1, 0.3), (2, 3.0)])
def test_large_noise_is_not_answered(seed, noise):
    victim = tiny()
    batch = load_batches(victim, "sample", limit=1, max_length=8)[0]
    seen = observe(victim, batch, select(victim), {"kind": "dp_sgd", "noise_multiplier": noise}, seed)
    result = attack(
        seen, victim, "likelihood", knowledge=grant(victim, batch, labels=True, lengths=True), budget=500, seed=seed
    )
    assert result.status == "no_signal"
    assert "nats" in result.reason
    assert not result.texts
    assert (result.details["evaluations"] < 100) == (noise == 3.0)  # what no search can find is not sought


def test_the_truth_never_leads_by_more_than_a_hopeless_case_allows(make):
    victim = make("bert")
    batch = batch_of(victim, [(5, 9, 11, 7)], (1,))
    truth = Candidate((5, 9, 11, 7), 1)
    leads = []
    for seed in range(60):
        seen = observe(victim, batch, select(victim), {"kind": "dp_sgd", "noise_multiplier": 1.0}, seed)
        scorer = Scorer(victim, seen, gaussian(seen.defense))
        with frozen(victim.module):
            leads += scorer.scores([truth])
    frame = Frame((), ())
    space = Space(torch.arange(30), torch.ones(30), frame, (4,), (1,))
    others = [Candidate((3, 4, 5, 6), 1), Candidate((8, 12, 13, 14), 1)]
    with frozen(victim.module):
        why = hopeless(scorer, space, others, 1e-3)
        assert hopeless(scorer.aimed(scorer.targets, 0.01), space, others, 1e-3) is None
    said = re.search(r"lead by (\S+) nats at most", why or "")
    assert said
    assert max(leads) < float(said[1]) <= 1 / 2 + LUCK  # clipped to one deviation of the noise


def test_one_of_several_sentences_is_found_given_the_others():
    victim = tiny()
    batch = load_batches(victim, "sample", limit=2, batch_size=2, max_length=6)[0]
    seen = observe(victim, batch, select(victim), {"kind": "dp_sgd", "noise_multiplier": 1e-3})
    known = grant(victim, batch, labels=True, lengths=True)
    config = likelihood.Config(budget=4000, shortlist=32)
    scorer = Scorer(victim, seen, gaussian(seen.defense))
    spaces = likelihood._spaces(config, seen, known, victim, scorer, special_frame(victim, known), None)
    rows = [tuple(row[:n]) for row, n in zip(batch.inputs["input_ids"].tolist(), known.lengths, strict=True)]
    starts = [Candidate(rows[0], known.labels[0]), None]
    draw = torch.Generator().manual_seed(0)
    with frozen(victim.module):
        found, verdicts, _ = likelihood._sought(
            config, victim, scorer, (), spaces, None, starts, None, draw, lambda text: None
        )
    assert [one.tokens for one in found] == rows
    assert all(verdict.signal for verdict in verdicts)


def test_several_sentences_come_back_with_what_is_known_of_each():
    victim = tiny()
    batch = load_batches(victim, "sample", limit=2, batch_size=2, max_length=6)[0]
    seen = observe(victim, batch, select(victim), {"kind": "dp_sgd", "noise_multiplier": 1e-3})
    known = grant(victim, batch, labels=True, lengths=True)
    result = attack(seen, victim, "likelihood", knowledge=known, budget=800, shortlist=16, exact=False)
    assert [len(row) for row in result.tokens] == [len(row) for row in batch.reference.tokens]
    assert result.details["labels"] == list(batch.reference.labels)
    # A sentence that stands in for another says so by its misfit.
    for own, truth, one, sure in zip(
        result.tokens, batch.reference.tokens, result.details["sentences"], result.confidence, strict=True
    ):
        assert own == truth or abs(one["fit"]) > 2
        assert own == truth or sure < 0.5


def test_no_sentence_is_scored_twice(make):
    victim = make("bert")
    seen = observe(victim, batch_of(victim, [[11, 40, 90, 60, 12]]), select(victim), {"kind": "none"})
    scorer = Scorer(victim, seen, None)
    words = torch.arange(200)
    space = Space(words, torch.ones(200), Frame((), ()), (5,), (1,))
    search = Search(scorer, space, 16, torch.Generator().manual_seed(0), None)
    drawn = search.fresh(8)
    with frozen(victim.module):
        assert search.score([*drawn, *drawn]) == search.score(drawn) * 2
    assert scorer.evaluations == len(set(drawn))


def test_a_prior_from_a_text_file_prefers_its_own_sentences(tmp_path):
    from lmleak.attacks._likelihood_prior import log_prior

    path = tmp_path / "prior.txt"
    path.write_text("the boat is old\nthe boat is red\n", encoding="utf-8")
    victim = tiny()
    prior, counts = log_prior(str(path), victim, "causal-lm")
    code = lambda text: tuple(victim.processor(text)["input_ids"])  # noqa: E731
    own, scrambled = prior([code("the boat is red"), code("der siotab the ")])
    assert own > scrambled
    assert counts is not None
    assert int(counts.argmax()) in code(" the boat")
    with pytest.raises(LmleakError, match="cannot read"):
        log_prior(str(tmp_path / "none.txt"), victim, "causal-lm")


def test_withheld_modules_are_no_evidence_against_the_truth():
    victim = tiny()
    batch = load_batches(victim, "sample", limit=1, max_length=8)[0]
    seen = observe(victim, batch, select(victim), {"kind": "withhold", "components": ["embedding"]})
    scorer = Scorer(victim, seen, None)
    truth = Candidate(tuple(batch.inputs["input_ids"][0].tolist()), int(batch.labels[0]))
    with frozen(victim.module):
        (product,), (square,) = scorer.measures([truth])
    assert float(product) == pytest.approx(float(square), rel=1e-5)


def test_refuses_what_it_cannot_score():
    victim = tiny("masked-lm")
    batch = load_batches(victim, "sample", limit=1, max_length=8)[0]
    seen = observe(victim, batch, select(victim), {"kind": "dp_sgd", "noise_multiplier": 0.1})
    assert attack(seen, victim, "likelihood", knowledge=Knowledge()).status == "not_applicable"
