"""Distances of candidate pictures' gradients, against one plain backward pass a candidate."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lmleak import load_batches, load_model, observe, select
from lmleak.attacks._pixels import Matcher, confidence

MODELS = {
    "mlp": {"kind": "mlp", "config": {"image_size": 8, "hidden": [40]}},
    "convnet": {"kind": "convnet", "config": {"image_size": 16, "channels_out": [4, 4], "strides": 2}},
    "resnet": {"kind": "resnet", "config": {"depth": 8, "width": 4, "image_size": 16}},
    "resnet in training": {
        "kind": "resnet",
        "config": {"depth": 8, "width": 4, "image_size": 16},
        "mode": "train",
    },
}


def twin(victim, names, wanted, pixels, labels):
    """Slow and obvious: gradients of one candidate's mean loss, then each distance by its formula."""
    module = victim.module.train(victim.mode == "train")
    loss = F.cross_entropy(module(pixel_values=pixels).logits, labels)
    own = torch.autograd.grad(loss, [module.get_parameter(name) for name in names], create_graph=True)
    pairs = list(zip(own, wanted, strict=True))
    product = sum((a * b).sum() for a, b in pairs)
    norms = [sum(part.square().sum() for part in side).sqrt() for side in (own, wanted)]
    return {
        "cosine": 1 - product / (norms[0] * norms[1]),
        "squared": sum((a - b).square().sum() for a, b in pairs),
        "norms": sum((a - b).norm() for a, b in pairs),
    }


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("restarts", [1, 3])
@pytest.mark.parametrize("chosen", [{}, {"layers": [-1]}, {"components": ["head"], "parameters": "weight"}], ids=str)
def test_distances_and_their_slopes_are_those_of_plain_backward_passes(name, restarts, chosen):
    victim = load_model(**MODELS[name], dtype="float64", device="cpu")
    batch = load_batches(victim, "photos", limit=2, batch_size=2)[0]
    seen = observe(victim, batch, select(victim, **chosen))
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randn(restarts, *batch.inputs["pixel_values"].shape, generator=draw, dtype=torch.float64)
    pixels.requires_grad_()
    labels = torch.randn(restarts, 2, 10, generator=draw, dtype=torch.float64).softmax(-1)
    matcher = Matcher(victim, seen, restarts)
    for kind in ("cosine", "squared", "norms"):
        for target in (batch.labels, labels):
            with matcher.ready():
                values = getattr(matcher(pixels, target), kind)()
                (slope,) = torch.autograd.grad(values.sum(), pixels)
            for i in range(restarts):
                own = pixels[i].detach().requires_grad_()
                one = target if target.dim() == 1 else target[i]
                truth = twin(victim, [e.parameter for e in seen.entries], seen.gradients.values(), own, one)[kind]
                torch.testing.assert_close(values[i], truth, rtol=1e-6, atol=1e-9)
                torch.testing.assert_close(slope[i], torch.autograd.grad(truth, own)[0], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_the_true_pictures_are_at_no_distance(name):
    victim = load_model(**MODELS[name], device="cpu")
    batch = load_batches(victim, "photos", limit=2, batch_size=2)[0]
    for restarts in (1, 2):
        matcher = Matcher(victim, observe(victim, batch, select(victim)), restarts)
        with matcher.ready():
            copies = batch.inputs["pixel_values"].expand(restarts, -1, -1, -1, -1)
            found = matcher(copies, batch.labels, create_graph=False)
            assert float(found.cosine().detach().abs().max()) < 1e-5
            assert float(found.squared().detach().max()) < 1e-4 * matcher.norm**2


def test_running_statistics_modes_and_frozen_parameters_stay():
    victim = load_model(**MODELS["resnet in training"], device="cpu")
    batch = load_batches(victim, "photos", limit=2, batch_size=2)[0]
    seen = observe(victim, batch, select(victim))
    first = next(victim.module.parameters())
    first.requires_grad_(False)
    victim.module.eval()
    before = {name: tensor.clone() for name, tensor in victim.module.state_dict().items()}
    matcher = Matcher(victim, seen)
    assert not matcher.factored
    with matcher.ready():
        matcher(batch.inputs["pixel_values"][None], batch.labels).cosine()
    with pytest.raises(ValueError, match="4D"), matcher.ready():
        matcher(batch.inputs["pixel_values"][None, 0], batch.labels)
    assert all(torch.equal(tensor, before[name]) for name, tensor in victim.module.state_dict().items())
    assert not any(part.training for part in victim.module.modules())
    assert [p.requires_grad for p in victim.module.parameters()].count(False) == 1
    assert not first.requires_grad


@given(st.floats(-1, 1), st.integers(1, 10**6), st.integers(1, 10**6))
@settings(max_examples=50)
def test_confidence_is_zero_at_what_noise_allows_and_one_at_a_perfect_match(cosine, values, unknowns):
    sure = confidence(cosine, values, unknowns)
    assert 0 <= sure <= 1
    assert confidence((unknowns / values) ** 0.5 * 0.999, values, unknowns) == 0
    assert confidence(1.0, values, unknowns) == (1 if values > unknowns else 0)
