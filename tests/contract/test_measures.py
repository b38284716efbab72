"""What every measure promises; a new file in lmleak/measures is picked up by itself.

A file states `EXAMPLE`, cheap fields to try it with, and `UNITS`, what each of its values is.
"""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from lmleak import load_batches, registry, select
from lmleak.measures import _release, measure, over_data, units

KINDS = registry.kinds("measures")
DEFENSES = {
    "none": {"kind": "none"},
    "noise": {"kind": "gaussian_noise", "std": 0.01},
    "clip": {"kind": "dp_sgd", "max_grad_norm": 1.0, "noise_multiplier": 0.0},
    "dp": {"kind": "dp_sgd", "max_grad_norm": 1.0, "noise_multiplier": 0.5},
}


@pytest.fixture(scope="module")
def client(tiny_bert):
    batches = load_batches(tiny_bert, "sample", batch_size=2, limit=48, max_length=12)
    return tiny_bert, batches, select(tiny_bert, components=["attn_query", "norm"], layers=[0])


def measured(kind: str, client, defense: str, seed: int = 0):
    fields = registry.load("measures", kind).EXAMPLE
    victim, batches, selection = client
    data = batches if over_data(kind) else batches[0]
    return measure(victim, data, selection, kind, defense=DEFENSES[defense], seed=seed, **fields)


@pytest.mark.parametrize("kind", KINDS)
def test_states_itself(kind):
    config = registry.load("measures", kind).Config
    assert config.model_config["extra"] == "forbid"
    assert config.model_config["frozen"]
    assert "arXiv" in registry.load("measures", kind).__doc__
    assert all(text for text in units(kind).values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("defense", DEFENSES)
def test_rows_are_the_observed_modules_and_values_are_finite_and_documented(kind, defense, client):
    found = measured(kind, client, defense)
    json.dumps([dict(found.rows), dict(found.details)], allow_nan=False)
    if not found.rows:
        assert found.reason, "no rows come with the reason"
        return
    assert set(found.rows) == set(_release.modules(client[2].entries))
    for row in found.rows.values():
        assert set(row) == set(units(kind))
        assert all(value is None or (type(value) is float and math.isfinite(value)) for value in row.values())


# A file that speaks of image models alone says so by `IMAGES`; tests/measures holds its promises.
@pytest.mark.parametrize("kind", [kind for kind in KINDS if not hasattr(registry.load("measures", kind), "IMAGES")])
def test_has_something_to_say_of_dp(kind, client):
    assert measured(kind, client, "dp").rows


@pytest.mark.parametrize("kind", KINDS)
def test_is_deterministic_for_a_seed(kind, tiny_bert):
    def fresh():
        batches = load_batches(tiny_bert, "sample", limit=24, max_length=10)
        return tiny_bert, batches, select(tiny_bert, components=["attn_query"], layers=[0])

    assert measured(kind, fresh(), "dp", seed=3) == measured(kind, fresh(), "dp", seed=3)


@pytest.mark.parametrize("kind", KINDS)
def test_leaves_model_batch_and_global_rng_as_they_were(kind, tiny_bert):
    module = tiny_bert.module
    batches = load_batches(tiny_bert, "sample", limit=24, max_length=10)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    inputs = [{name: tensor.clone() for name, tensor in batch.inputs.items()} for batch in batches]
    flags = [(p.requires_grad, p.grad) for p in module.parameters()]
    rng, theirs = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    measured(kind, (tiny_bert, batches, select(tiny_bert, layers=[0])), "dp")
    assert torch.equal(torch.random.get_rng_state(), rng)
    assert (np.random.get_state()[1] == theirs).all()
    assert [(p.requires_grad, p.grad) for p in module.parameters()] == flags
    assert not module.training
    assert all(not m._forward_hooks and not m._backward_hooks for m in module.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    for batch, known in zip(batches, inputs, strict=True):
        assert all(torch.equal(tensor, known[name]) for name, tensor in batch.inputs.items())
