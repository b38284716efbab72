"""Released gradients of image models, against one backward pass a sample."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lmleak import load_batches, load_model, observe, select
from lmleak.gradients.observe import ClientGradients

VIT = {
    "image_size": 16,
    "patch_size": 8,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
SMALL = {"vit": VIT, "resnet": {"depth": 8, "width": 4, "image_size": 16}, "mlp": {"image_size": 16, "hidden": [20]}}
SMALL["convnet"] = {"image_size": 16, "channels_out": [4, 6], "strides": 2, "hidden": [20], "norm": "batch"}


@pytest.fixture(scope="module", params=SMALL)
def case(request):
    victim = load_model(request.param, config=SMALL[request.param], dtype="float64", device="cpu")
    return victim, load_batches(victim, "photos", limit=3, batch_size=3)[0]


def one_by_one(victim, batch):
    """Per-sample gradients, parameter -> [b, ...]."""
    names = [name for name, _ in victim.module.named_parameters()]
    rows = []
    for i in range(len(batch.labels)):
        logits = victim.module(pixel_values=batch.inputs["pixel_values"][i : i + 1]).logits
        loss = F.cross_entropy(logits, batch.labels[i : i + 1])
        rows.append(torch.autograd.grad(loss, list(victim.module.parameters())))
    return {name: torch.stack([row[k] for row in rows]) for k, name in enumerate(names)}


def test_the_release_is_the_mean(case):
    victim, batch = case
    truth, seen = one_by_one(victim, batch), observe(victim, batch, select(victim))
    assert seen.task == "image-classification"
    for name, gradient in seen.gradients.items():
        torch.testing.assert_close(gradient, truth[name].mean(0))


def test_norms_and_clipped_sums_are_those_of_single_samples(case):
    victim, batch = case
    truth, chosen = one_by_one(victim, batch), select(victim)
    client = ClientGradients(victim, batch, chosen.entries)
    norms = torch.stack([g.flatten(1).square().sum(1) for g in truth.values()]).sum(0).sqrt()
    torch.testing.assert_close(client.per_sample_norms("model"), norms)
    bound = float(norms.median())
    weights = (bound / (norms + 1e-6)).clamp(max=1)
    for name, gradient in client.clipped_sum(bound, "model").items():
        torch.testing.assert_close(gradient, torch.tensordot(weights, truth[name], 1))


def test_convolutions_are_clipped_by_their_factors():
    victim = load_model("resnet", config=SMALL["resnet"], device="cpu")
    batch = load_batches(victim, "photos", limit=2, batch_size=2)[0]
    assert ClientGradients(victim, batch, select(victim).entries)._factored
