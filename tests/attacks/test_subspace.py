"""subspace: exact sentences from one matrix of an encoder, lengths and labels not granted; honest where it cannot."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from lmleak import attack, load_batches, observe, select
from lmleak.attacks._batch_energy import batch_site, batch_space
from lmleak.attacks._batch_places import admitted
from lmleak.attacks._energy import Energy, of_tokens, site
from lmleak.attacks._energy_heads import HeadEnergy, heads
from lmleak.attacks._energy_likelihood import noised
from lmleak.attacks._energy_marginal import GRAIN, Marginal
from lmleak.attacks._subspace_relax import relax
from lmleak.attacks._text import special_frame
from lmleak.records import Knowledge


def seen_at(victim, component, layer):
    batch = load_batches(victim, "sample", max_tokens=9, limit=1)[0]
    return observe(victim, batch, select(victim, components=component, layers=layer, parameters="weight")), batch


@pytest.mark.parametrize(
    ("component", "layer"), [("attn_key", 0), ("attn_query", 1), ("attn_output", 1), ("ffn_in", 0)]
)
def test_reads_a_sentence_off_one_matrix(minilm, component, layer):
    seen, batch = seen_at(minilm, component, layer)
    result = attack(seen, minilm, "subspace")
    assert result.status == "ok", result.reason
    assert result.tokens == batch.reference.tokens
    assert result.confidence[0] > 0.9


@pytest.mark.parametrize("component", ["attn_query", "attn_key", "attn_value", "attn_output", "ffn_in", "ffn_out"])
@pytest.mark.parametrize("layer", [0, 2, 4])
def test_only_the_truth_meets_the_floor(minilm, component, layer):
    seen, batch = seen_at(minilm, component, layer)
    one = site(minilm, seen, seen.entries[0])
    ids = batch.inputs["input_ids"][0]
    assert one.tokens == len(ids)
    with Energy(minilm, [one]).attached() as energy:
        assert energy.verdict(ids) < 0.1
        wrong = ids.clone()
        wrong[2], wrong[3] = ids[3], ids[2]
        assert energy.verdict(wrong) > 2
        wrong = ids.clone()
        wrong[3] = minilm.processor.convert_tokens_to_ids("the") + (ids[3] == 1996)
        assert energy.verdict(wrong) > 2


@pytest.mark.parametrize("component", ["attn_query", "attn_output", "ffn_in", "ffn_out"])
def test_says_why_the_last_layer_shows_one_direction(minilm, component):
    seen, _ = seen_at(minilm, component, 5)
    result = attack(seen, minilm, "subspace")
    assert result.status == "not_applicable"
    assert "rank 1" in result.reason


def test_an_exhausted_budget_is_no_answer(minilm):
    seen, batch = seen_at(minilm, "attn_output", 4)
    result = attack(seen, minilm, "subspace", steps=2, budget=1)
    assert result.status == "budget_exhausted"
    assert result.tokens != batch.reference.tokens
    assert result.confidence[0] < 0.5


def test_a_relaxation_begins_again_over_the_words_it_ended_at(minilm, monkeypatch):
    seen, _ = seen_at(minilm, "attn_output", 4)
    calls = []

    def spied(energy, frame, free, words, *rest):
        calls.append((words, relax(energy, frame, free, words, *rest)))
        return calls[-1][1]

    monkeypatch.setattr("lmleak.attacks._subspace_sentence.relax", spied)
    monkeypatch.setattr("lmleak.attacks._subspace_sentence.EACH", 1)
    result = attack(seen, minilm, "subspace", steps=3, budget=600)
    assert result.status == "budget_exhausted"
    assert len(calls) > 2
    for (_, before), (words, _) in pairwise(calls):
        assert set(words.tolist()) == set(before.best(16).unique().tolist())
    assert result.details["evaluations"] <= 600 + 3 + 1  # a last slope, and the sentence that it moves


def test_a_space_of_no_sentence_is_never_a_confident_answer(minilm):
    seen, _ = seen_at(minilm, "attn_query", 1)
    order = torch.randperm(384, generator=torch.Generator().manual_seed(0))
    wrong = {name: g[:, order] for name, g in seen.gradients.items()}
    result = attack(replace(seen, gradients=wrong), minilm, "subspace", steps=10, budget=200)
    assert result.status == "budget_exhausted"
    assert result.confidence[0] < 0.5


def test_granted_length_that_the_rank_denies_is_refused(minilm):
    seen, batch = seen_at(minilm, "attn_query", 1)
    length = batch.inputs["input_ids"].shape[1]
    result = attack(seen, minilm, "subspace", knowledge=Knowledge(lengths=(length + 1,)))
    assert result.status == "not_applicable"
    assert str(length) in result.reason


def test_refuses_noise(minilm):
    seen, _ = seen_at(minilm, "attn_query", 1)
    draw = torch.Generator().manual_seed(0)
    noise = {name: torch.randn(g.shape, generator=draw) for name, g in seen.gradients.items()}
    assert attack(replace(seen, gradients=noise), minilm, "subspace").status == "no_signal"


@pytest.fixture(scope="module")
def pair(minilm):
    batch = load_batches(minilm, "sample", max_tokens=9, batch_size=2, limit=2)[0]
    return observe(minilm, batch, select(minilm, components="attn_query", layers=[0, 1], parameters="weight")), batch


def test_reads_two_sentences_off_layers_0_and_1(minilm, pair):
    seen, batch = pair
    result = attack(seen, minilm, "subspace")
    assert result.status == "ok", result.reason
    assert sorted(result.tokens) == sorted(batch.reference.tokens)
    assert min(result.confidence) > 0.9


def test_two_sentences_not_found_are_doubtful(minilm, pair):
    seen, batch = pair
    result = attack(seen, minilm, "subspace", steps=1, budget=1)
    assert result.status == "budget_exhausted"
    # What its first pass proves may be believed, if it is true; nothing else.
    sure = {tokens for tokens, c in zip(result.tokens, result.confidence, strict=True) if c >= 0.5}
    assert sure < set(batch.reference.tokens)


def test_two_sentences_of_another_model_are_no_answer(minilm, pair):
    seen, _ = pair
    order = torch.randperm(384, generator=torch.Generator().manual_seed(0))
    wrong = {name: g[:, order] for name, g in seen.gradients.items()}
    result = attack(replace(seen, gradients=wrong), minilm, "subspace", steps=10, budget=200)
    assert result.status != "ok"
    assert max(result.confidence, default=0.0) < 0.5


def test_layer_0_admits_every_true_pair(minilm, pair):
    seen, batch = pair
    reader, deeper = seen.entries
    space = batch_space([seen.gradients[reader.name]])
    frame = special_frame(minilm, Knowledge())
    places = admitted(minilm, [reader], space, frame, torch.Generator().manual_seed(0))
    lengths = batch.inputs["attention_mask"].sum(1).tolist()
    assert set(lengths) <= set(places.lengths)
    assert batch_site(minilm, seen, deeper).space.rank == sum(lengths)
    words = places.words.tolist()
    for row in batch.reference.tokens:
        assert all(places.allowed[place, words.index(token)] for place, token in enumerate(row))


def test_a_ridge_for_every_sentence_is_that_sentence_s_own(minilm):
    seen, batch = seen_at(minilm, "ffn_in", 1)
    embeds = minilm.module.get_input_embeddings().weight.detach()[batch.inputs["input_ids"].roll(1, 1)]
    with Energy(minilm, [site(minilm, seen, seen.entries[0])]).attached() as energy, torch.no_grad():
        both, _ = energy(embeds.expand(2, -1, -1), torch.tensor([0.1, 1e-4]))
        alone = torch.cat([energy(embeds, ridge)[0] for ridge in (0.1, 1e-4)])
    torch.testing.assert_close(both, alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("layer", [0, 2, 4])
def test_an_attention_output_shows_its_values_head_by_head(minilm, layer):
    seen, batch = seen_at(minilm, "attn_output", layer)
    ids = batch.inputs["input_ids"][0]
    one = heads(minilm, seen, seen.entries[0], len(ids))
    embeds = minilm.module.get_input_embeddings().weight.detach()[torch.stack([ids, ids.flip(0)])]
    caught = {}
    hook = one.value.register_forward_hook(lambda module, args, out: caught.update(values=out))
    with Energy(minilm, [site(minilm, seen, seen.entries[0])]).attached() as energy, torch.no_grad():
        fast = HeadEnergy(energy, [one])(embeds, 1e-3)[0] - energy(embeds, 1e-3)[0]
    hook.remove()
    slow = []
    for values in caught["values"].double():
        total = 0.0
        for head, basis, metric in zip(one.places.tolist(), one.basis.double(), one.metric.double(), strict=True):
            x = values[:, 32 * head : 32 * (head + 1)] @ metric
            x = x / x.norm(dim=1, keepdim=True)
            p = x @ basis.T
            inside = torch.linalg.inv(x @ x.T + 1e-3 * torch.eye(len(x)))
            total += len(x) - p.square().sum() + 0.3 * (len(basis) - (p.T @ inside @ p).trace())
        slow.append(total / len(one.places))
    torch.testing.assert_close(fast.double(), torch.stack(slow), rtol=1e-3, atol=1e-3)
    assert fast[0] < 0.1 * fast[1]


def test_heads_whose_dimensions_a_sentence_all_but_fills_are_not_read(minilm):
    seen, _ = seen_at(minilm, "attn_output", 2)
    assert heads(minilm, seen, seen.entries[0], 29) is None  # of 32 dimensions


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reads_a_sentence_off_a_rounded_gradient(minilm, dtype):
    seen, batch = seen_at(minilm, "attn_query", 1)
    rounded = {name: g.to(dtype) for name, g in seen.gradients.items()}
    result = attack(replace(seen, gradients=rounded), minilm, "subspace")
    assert result.status == "ok", result.reason
    assert result.tokens == batch.reference.tokens
    assert 0.5 < result.confidence[0] <= 1


def noised_by(seen, std):
    draw = torch.Generator().manual_seed(0)
    return replace(
        seen, gradients={n: g + std * torch.randn(g.shape, generator=draw) for n, g in seen.gradients.items()}
    )


def test_reads_a_sentence_off_layer_0_under_noise(minilm):
    batch = load_batches(minilm, "sample", max_tokens=9, limit=1)[0]
    seen = observe(
        minilm, batch, select(minilm, components=["attn_query", "attn_value"], layers=0, parameters="weight")
    )
    result = attack(noised_by(seen, 2e-5), minilm, "subspace")
    assert result.status == "ok", result.reason
    assert result.tokens == batch.reference.tokens


@pytest.mark.parametrize("component", ["attn_query", "attn_key", "ffn_in"])
def test_the_marginal_equals_the_profile_where_noise_is_small_and_knows_the_truth(minilm, component):
    seen, batch = seen_at(minilm, component, 2)
    seen, ids = noised_by(seen, 1e-5), batch.inputs["input_ids"][0]
    one = noised(minilm, seen, seen.entries[0])
    assert one.variance**0.5 == pytest.approx(1e-5, rel=0.05)
    changed = ids.clone()
    changed[2] = 2003
    table = minilm.module.get_input_embeddings().weight.detach()
    owner, slow, caught = minilm.module.get_submodule(seen.entries[0].module), [], {}
    energy = Energy(minilm, [one.site])
    hook = owner.register_forward_pre_hook(lambda module, args: caught.update(x=args[0]))
    judge = Marginal(energy, [one])
    with energy.attached(), torch.no_grad():
        fast = of_tokens(judge, torch.stack([ids, changed]), GRAIN)
        for row in (ids, changed):
            energy.inputs(table[row][None])
            x = caught["x"][0].double()
            x = x - x.mean(0) if component == "attn_key" else x
            span = torch.linalg.svd(x, full_matrices=False).Vh[: len(x) - (component == "attn_key")]
            slow.append((one.gradient - one.gradient @ span.T @ span).square().sum() / one.variance / 2)
        hook.remove()
        assert judge.verdict(ids) < 1 < judge.verdict(changed)
    # Strengths differ by log factors: a few hundred of the thousands of nats that tell sentences apart.
    torch.testing.assert_close(fast[1] - fast[0], slow[1] - slow[0], rtol=0.2, atol=100.0)
