"""What every defense promises; a new file in lmleak/defenses is picked up by itself.

A file states `IDENTITY`, fields at which it releases the clean gradient, and `EXAMPLE`, fields at which it works.
"""

from __future__ import annotations

import json

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from lmleak import registry
from lmleak.gradients import select
from lmleak.gradients.observe import ClientGradients
from lmleak.records import Batch, Reference, Victim

KINDS = registry.kinds("defenses")


@pytest.fixture(scope="module", params=[torch.float32, torch.float64], ids=["float32", "float64"])
def client(request) -> ClientGradients:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12, "vocab_size": 30}
        module = BertForSequenceClassification(BertConfig(num_hidden_layers=2, max_position_embeddings=8, **sizes))
    module = module.to(request.param).eval()
    victim = Victim(module, None, registry.load("models", "bert"), "bert", "sequence-classification", "random")
    ids = torch.randint(5, 30, (2, 6), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": torch.arange(6).expand(2, 6)}
    batch = Batch(inputs, torch.tensor([0, 1]), Reference())
    return ClientGradients(victim, batch, select(victim).entries)


def release(kind: str, client: ClientGradients, fields: str = "EXAMPLE", seed: int = 0) -> dict[str, torch.Tensor]:
    module = registry.load("defenses", kind)
    config = module.Config(**getattr(module, fields))
    if hasattr(module, "install") and fields == "EXAMPLE":
        victim = module.install(config, client.victim, seed)
        client = ClientGradients(victim, client.batch, client.entries, client.seed)
    return module.release(config, client, torch.Generator().manual_seed(seed))


def clean(kind: str, client: ClientGradients) -> dict[str, torch.Tensor]:
    size = len(client.batch.labels) if registry.load("defenses", kind).REDUCTION == "sum" else 1
    return {name: tensor * size for name, tensor in client.mean().items()}


@pytest.mark.parametrize("kind", KINDS)
def test_states_itself(kind):
    module = registry.load("defenses", kind)
    assert module.REDUCTION in ("mean", "sum")
    config = module.Config
    assert config.model_config["extra"] == "forbid"
    assert config.model_config["frozen"]
    summary = registry.summary("defenses", kind)
    assert "arXiv" in summary, "the docstring's first line cites the paper"


@pytest.mark.parametrize("kind", KINDS)
def test_keeps_names_shapes_dtype_and_device(kind, client):
    released = release(kind, client)
    assert list(released) == [entry.name for entry in client.entries]
    for entry in client.entries:
        tensor = released[entry.name]
        assert tuple(tensor.shape) == entry.shape
        assert tensor.dtype == client.victim.module.dtype
        assert tensor.device == client.victim.module.device
        assert torch.isfinite(tensor).all()
        assert not tensor.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_is_the_identity_at_zero_strength(kind, client):
    released = release(kind, client, "IDENTITY")
    for name, tensor in clean(kind, client).items():
        torch.testing.assert_close(released[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "none"])
def test_changes_what_leaves(kind, client):
    released = release(kind, client)
    assert any(not torch.allclose(released[name], tensor, rtol=1e-3) for name, tensor in clean(kind, client).items())


@pytest.mark.parametrize("kind", KINDS)
def test_is_deterministic_for_a_seed(kind, client):
    once, again = (release(kind, client, seed=5) for _ in range(2))
    assert all(torch.equal(once[name], again[name]) for name in once)


@pytest.mark.parametrize("kind", KINDS)
def test_leaves_model_and_global_rng_as_they_were(kind, client):
    module = client.victim.module
    # The client computes its factors once and keeps them: a fresh one, so that all of its work is watched.
    fresh = ClientGradients(client.victim, client.batch, client.entries)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    flags = [(p.requires_grad, p.grad) for p in module.parameters()]
    rng = torch.random.get_rng_state()
    released = release(kind, fresh)
    assert torch.equal(torch.random.get_rng_state(), rng)
    assert [(p.requires_grad, p.grad) for p in module.parameters()] == flags
    assert not module.training
    assert all(not m._forward_hooks and not m._backward_hooks for m in module.modules())
    # What was released is the attacker's own copy: writing to it reaches neither model nor client.
    again = {name: tensor.clone() for name, tensor in release(kind, fresh).items()}
    for tensor in released.values():
        tensor.zero_()
    assert all(torch.equal(tensor, again[name]) for name, tensor in release(kind, fresh).items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_privacy_is_json_or_none(kind):
    module = registry.load("defenses", kind)
    for fields in (module.IDENTITY, module.EXAMPLE):
        stated = module.privacy(module.Config(**fields), 2)
        json.dumps(stated, allow_nan=False)
        assert stated is None or {"epsilon", "delta", "unit", "adjacency", "accountant", "statement"} <= set(stated)
    # Doing nothing guarantees nothing.
    stated = module.privacy(module.Config(**module.IDENTITY), 2)
    assert stated is None or stated["epsilon"] is None
