"""What every attack that reads pictures keeps on every family of image models, whether it can read them or not.

A file of lmleak/attacks with `IMAGES` is picked up by itself. Whether it reads well is its own tests' business and, on
its easy case, that of test_attacks.py.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from lmleak import attack, grant, load_batches, load_model, observe, registry, select

KINDS = [kind for kind in registry.kinds("attacks") if hasattr(registry.load("attacks", kind), "IMAGES")]
VIT = {
    "image_size": 16,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
CONVNET = {"image_size": 16, "channels_out": [4, 4], "strides": 2, "norm": "batch", "activation": "leaky_relu"}
#: Family -> model block, and what of it is released beside everything: one module in its depth.
VICTIMS = {
    "vit": ({"config": VIT}, {"components": ["ffn_out"], "layers": [-1]}),
    "mlp": ({"config": {"image_size": 16, "hidden": [12, 8]}}, {"target_modules": ["hidden.1"]}),
    "convnet": ({"config": CONVNET, "mode": "train"}, {"components": ["conv"], "layers": [1]}),
    "resnet": ({"config": {"depth": 8, "width": 4, "image_size": 16}}, {"components": ["norm"], "layers": [1]}),
}
CHEAP = {"steps": 3, "budget": 20, "seeds": 2, "restarts": 1}


def fields(kind):
    """A run of milliseconds: what matters here is not how good it gets."""
    known = registry.load("attacks", kind).Config.model_fields
    return {name: value for name, value in CHEAP.items() if name in known}


def state(module):
    return (
        [(part.training, len(part._forward_hooks), len(part._forward_pre_hooks)) for part in module.modules()],
        [(p.requires_grad, p.grad) for p in module.parameters()],
        {name: tensor.sum().item() for name, tensor in module.state_dict().items()},
        torch.random.get_rng_state().tolist(),
        str(np.random.get_state()),
        random.getstate(),
        torch.is_grad_enabled(),
    )


@pytest.mark.parametrize("whole", [True, False], ids=["everything", "one module"])
@pytest.mark.parametrize("family", VICTIMS)
@pytest.mark.parametrize("kind", KINDS)
def test_answers_in_range_or_says_why_not_the_same_twice_and_leaves_no_trace(kind, family, whole):
    block, part = VICTIMS[family]
    victim = load_model(family, device="cpu", **block)
    batch = load_batches(victim, "photos", limit=2, batch_size=2)[0]
    seen = observe(victim, batch, select(victim, **({} if whole else part)))
    known = grant(victim, batch, labels=whole)
    gradients = {name: tensor.clone() for name, tensor in seen.gradients.items()}
    before = state(victim.module)
    first, second = (attack(seen, victim, kind, knowledge=known, **fields(kind)) for _ in range(2))
    assert state(victim.module) == before
    assert all(torch.equal(tensor, gradients[name]) for name, tensor in seen.gradients.items())
    assert (first.status, first.reason, first.labels) == (second.status, second.reason, second.labels)
    if first.images is None:
        assert first.labels or (first.status != "ok" and first.reason)
        return
    assert torch.equal(first.images, second.images)
    assert first.images.shape == batch.reference.images.shape
    assert first.images.dtype == torch.float32
    assert 0 <= first.images.min() <= first.images.max() <= 1
    assert first.texts == ()
