"""The objective from factors, for all candidates at once, equals the plain loop: value and gradient."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lmleak import load_model, observe, select
from lmleak.attacks._objective import Layout, Objective, frozen
from lmleak.gradients.losses import sample_losses
from lmleak.gradients.observe import cut
from lmleak.records import Batch, Reference

BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
        "max_position_embeddings": 16, "initializer_range": 0.2}  # fmt: skip
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 16, "initializer_range": 0.2}
MODELS = {
    "bert": ("bert", "sequence-classification", BERT),
    "bert masked": ("bert", "masked-lm", BERT),
    "roberta": ("roberta", "sequence-classification", BERT),
    "gpt2": ("gpt2", "causal-lm", GPT2),
    "gpt2 classifier": ("gpt2", "sequence-classification", GPT2),
}
SELECTIONS = {
    "query": {"components": ["attn_query"], "layers": 0},
    "biases": {"components": ["attn_value", "ffn_in", "norm"], "parameters": "bias"},
    "layer": {"layers": 1},
    "all": {},
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


def batch_of(victim, lengths) -> Batch:
    b, s = len(lengths), max(lengths)
    mask = (torch.arange(s) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(10, 200, (b, s), generator=torch.Generator().manual_seed(4))
    first = getattr(victim.family, "first_position", None)
    places = torch.arange(s).expand(b, -1) + (first(victim.module) if first else 0)
    tokens = ids.masked_fill(mask == 0, -100)
    labels = torch.arange(b) % 2 if victim.task == "sequence-classification" else tokens
    return Batch({"input_ids": ids, "attention_mask": mask, "position_ids": places}, labels, Reference())


def loop(victim, observation, embeds, labels, lengths, kind, alpha=0.01):
    """One candidate at a time: dense gradients of its batch loss, the objective on them, its gradient."""
    module, entries = (
        victim.module,
        [e for e in observation.entries if "word_emb" not in e.name and "wte" not in e.name],
    )
    parameters = {e.parameter: module.get_parameter(e.parameter) for e in entries}
    first = getattr(victim.family, "first_position", None)
    s = max(lengths)
    places = torch.arange(s).expand(len(lengths), -1) + (first(module) if first else 0)
    mask = (torch.arange(s) < torch.tensor(lengths)[:, None]).long()
    rows = list(enumerate(lengths))
    values, moves = [], []
    for row, label in zip(embeds, labels, strict=True):
        x = row.detach().clone().requires_grad_()
        if victim.task == "sequence-classification":
            # Each sentence by itself, without padding: what the client's model sees of it.
            parts = [module(inputs_embeds=x[i : i + 1, :n], position_ids=places[i : i + 1, :n]) for i, n in rows]
            logits = torch.cat([part.logits for part in parts])
        else:
            logits = module(inputs_embeds=x, attention_mask=mask, position_ids=places).logits
        loss = sample_losses(logits, label, victim.task, observation.reduction).sum()
        grads = torch.autograd.grad(
            loss, list(parameters.values()), create_graph=True, allow_unused=True, materialize_grads=True
        )
        dense = dict(zip(parameters, grads, strict=True))
        terms = []
        for e in entries:
            g, t = cut(dense[e.parameter], e), observation.gradients[e.name]
            if kind == "cosine" and e.component == "attn_key" and len(e.shape) == 1:
                terms.append(torch.ones(()) / len(entries))  # a zero gradient has no direction
            elif kind == "cosine":
                terms.append((1 - (g * t).sum() / (g.norm() * t.norm())) / len(entries))
            else:
                terms.append((g - t).square().sum() + (alpha * (g - t).abs().sum() if kind == "tag" else 0))
        value = sum(terms)
        values.append(value.detach())
        moves.append(torch.autograd.grad(value, x)[0])
    return torch.stack(values), torch.stack(moves)


def compare(victim, lengths, selection, kind, defense=None, tolerance=1e-9):
    batch = batch_of(victim, lengths)
    observation = observe(victim, batch, select(victim, **SELECTIONS[selection]), defense)
    objective = Objective(victim, observation, Layout(lengths), kind)
    k, table = 3, victim.module.get_input_embeddings().weight
    noise = torch.randn(k, *batch.inputs["input_ids"].shape, table.shape[1], generator=torch.Generator().manual_seed(6))
    embeds = (noise.to(table) * table.detach().std()).requires_grad_()
    labels = batch.labels.expand(k, *batch.labels.shape)
    with frozen(victim.module):
        values = objective(embeds, labels, create_graph=True)
        (moves,) = torch.autograd.grad(values.sum(), embeds)
        scores = objective.scored(embeds, labels)
    slow, slow_moves = loop(victim, observation, embeds, labels, lengths, kind)
    assert float((values.detach() - slow).abs().max()) <= tolerance * float(slow.abs().max().clamp_min(1))
    assert float((scores - slow).abs().max()) <= tolerance * float(slow.abs().max().clamp_min(1))
    assert float((moves.detach() - slow_moves).abs().max()) <= tolerance * float(slow_moves.abs().max())
    assert float(slow_moves.abs().max()) > 1e-8


@pytest.mark.parametrize("kind", ["cosine", "euclidean", "tag"])
@pytest.mark.parametrize("selection", ["query", "biases", "layer"])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_value_and_gradient_equal_the_loop(make, name, selection, kind):
    compare(make(name), (5,), selection, kind)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_batches_of_unequal_lengths(make, name, reduction):
    defense = {"kind": "dp_sgd", "max_grad_norm": 1e6, "noise_multiplier": 0.0} if reduction == "sum" else None
    compare(make(name), (6, 3), "query", "euclidean", defense)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_the_whole_model_without_its_word_table(make, name):
    compare(make(name), (5,), "all", "euclidean")


@pytest.mark.parametrize("kind", ["cosine", "euclidean"])
def test_float32(make, kind):
    compare(make("bert", "float32"), (5,), "query", kind, tolerance=1e-5)


@pytest.mark.parametrize("kind", ["cosine", "euclidean"])
def test_a_noised_gradient_of_full_rank(make, kind):
    compare(make("bert"), (5,), "layer", kind, {"kind": "gaussian_noise", "std": 0.1})


@pytest.mark.parametrize("kind", ["cosine", "euclidean", "tag"])
@pytest.mark.parametrize("lengths", [(6,), (6, 3)])
def test_the_truth_scores_best(make, kind, lengths):
    victim = make("bert")
    batch = batch_of(victim, lengths)
    objective = Objective(victim, observe(victim, batch, select(victim, layers=0)), Layout(lengths), kind)
    true = victim.module.get_input_embeddings().weight.detach()[batch.inputs["input_ids"]]
    wrong = torch.stack([true, true.roll(1, 1), true.flip(1)])
    scores = objective.scored(wrong, batch.labels.expand(3, -1))
    # A key's bias has no gradient and so no angle: its share of the cosine's mean is all that is left.
    assert scores.argmin() == 0
    assert float(scores[0]) < (1e-9 if kind != "cosine" else 1.01 / len(objective.entries))


def test_a_causal_classifier_reads_each_sentence_s_own_last_token(make):
    victim = make("gpt2 classifier")
    batch = batch_of(victim, (6, 3))
    ids = batch.inputs["input_ids"].masked_fill(batch.inputs["attention_mask"] == 0, victim.processor.pad_token_id)
    batch = replace(batch, inputs={**batch.inputs, "input_ids": ids})
    objective = Objective(victim, observe(victim, batch, select(victim, layers=0)), Layout((6, 3)), "euclidean")
    true = victim.module.get_input_embeddings().weight.detach()[ids]
    scores = objective.scored(torch.stack([true, true.roll(1, 1)]), batch.labels.expand(2, -1))
    assert float(scores[0]) < 1e-9 < float(scores[1])


def sloped(victim, lengths, selection, kind, defense=None):
    """Distances and slopes by double backward and by finite difference, of 3 candidates."""
    batch = batch_of(victim, lengths)
    observation = observe(victim, batch, select(victim, **SELECTIONS[selection]), defense)
    objective = Objective(victim, observation, Layout(lengths), kind)
    table = victim.module.get_input_embeddings().weight.detach()
    noise = torch.randn(3, *batch.inputs["input_ids"].shape, len(table[0]), generator=torch.Generator().manual_seed(6))
    embeds, labels = noise.to(table) * table.std(), batch.labels.expand(3, *batch.labels.shape)
    with frozen(victim.module):
        return objective.slope(embeds, labels), objective.slope(embeds, labels, "finite_difference")


def close(exact, other, tolerance=1e-6):
    torch.testing.assert_close(other[0], exact[0])
    off = (other[1] - exact[1]).flatten(1).norm(dim=1)
    assert bool((off <= tolerance * exact[1].flatten(1).norm(dim=1)).all())


@pytest.fixture
def short(monkeypatch):
    """A reach at which float64 leaves neither curvature nor rounding."""
    monkeypatch.setattr("lmleak.attacks._objective.REACH", 1e-6)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("kind", ["cosine", "euclidean", "tag"])
@pytest.mark.parametrize("name", MODELS)
def test_a_finite_difference_is_the_slope(make, name, kind):
    close(*sloped(make(name), (5, 3), "all", kind))


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("selection", ["query", "biases"])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_finite_difference_at_part_of_the_model(make, name, selection):
    close(*sloped(make(name), (5,), selection, "cosine"))


@pytest.mark.usefixtures("short")
def test_a_finite_difference_under_noise(make):
    close(*sloped(make("bert"), (5,), "layer", "euclidean", {"kind": "gaussian_noise", "std": 0.1}))


def test_a_finite_difference_in_float32(make):
    close(*sloped(make("bert", "float32"), (5,), "layer", "cosine"), tolerance=5e-3)


def test_a_finite_difference_needs_no_double_backward(make):
    same = load_model(
        "bert",
        weights="random",
        tokenizer="bytes",
        config=BERT,
        device="cpu",
        dtype="float64",
        attn_implementation="sdpa",
    )
    batch = batch_of(same, (5,))
    embeds = torch.randn(2, 1, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    slopes = []
    for victim, derivative in ((make("bert"), "exact"), (same, "finite_difference")):
        objective = Objective(victim, observe(victim, batch, select(victim, layers=0)), Layout((5,)), "cosine")
        with frozen(victim.module):
            slopes.append(objective.slope(embeds, batch.labels.expand(2, -1), derivative))
    close(*slopes, tolerance=1e-3)


@pytest.mark.parametrize("fails", [False, True])
def test_a_finite_difference_leaves_the_model_as_it_was(make, fails, monkeypatch):
    victim = make("bert")
    module, batch = victim.module, batch_of(victim, (5,))
    objective = Objective(victim, observe(victim, batch, select(victim)), Layout((5,)), "cosine")
    embeds = torch.randn(2, 1, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    if fails:
        calls = []

        def broken(*args):
            calls.append(1)
            if len(calls) == 2:  # the pass with moved parameters
                raise RuntimeError("broken")
            return sample_losses(*args)

        monkeypatch.setattr("lmleak.attacks._objective.sample_losses", broken)
        with frozen(module), pytest.raises(RuntimeError, match="broken"):
            objective.slope(embeds, batch.labels.expand(2, -1), "finite_difference")
    else:
        with frozen(module):
            objective.slope(embeds, batch.labels.expand(2, -1), "finite_difference")
    assert not any(m._forward_hooks for m in module.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_scores_do_not_depend_on_the_chunks(make, monkeypatch):
    victim = make("bert")
    batch = batch_of(victim, (5,))
    objective = Objective(victim, observe(victim, batch, select(victim, layers=0)), Layout((5,)), "tag")
    embeds = torch.randn(7, 1, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = batch.labels.expand(7, -1)
    whole = objective.scored(embeds, labels)
    monkeypatch.setattr("lmleak.attacks._objective.TOKENS", {False: 10, True: 10})
    torch.testing.assert_close(objective.scored(embeds, labels), whole)


def test_frozen_puts_everything_back(make):
    module = make("bert").module
    module.train()
    some = module.get_parameter("classifier.weight").requires_grad_(False)
    try:
        with frozen(module):
            assert not any(p.requires_grad for p in module.parameters())
            assert not any(m.training for m in module.modules())
        assert all(m.training for m in module.modules())
        assert [p for p in module.parameters() if not p.requires_grad] == [some]
    finally:
        some.requires_grad_(True)
        module.eval()
