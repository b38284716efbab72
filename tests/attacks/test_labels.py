"""Labels off the last layer's gradient: published batches, what each strategy assumes, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lmleak import attack, grant, load_batches, load_model, observe, select
from lmleak.attacks._labels import nearest, recover_labels
from lmleak.attacks._labels_solve import System
from lmleak.records import Batch, Reconstruction, Reference

NET = {"image_size": 8, "hidden": [32]}


@pytest.fixture(scope="module")
def mlp():
    return load_model("mlp", config=NET, device="cpu")


@pytest.fixture(scope="module")
def sure():
    """A network as sure of itself as a trained one: most slopes are far below the largest."""
    victim = load_model("mlp", config=NET, device="cpu", dtype="float64")
    with torch.no_grad():
        victim.module.linear.weight.mul_(40)
    return victim


def batch_of(victim, labels, seed=0):
    draw = torch.Generator().manual_seed(seed)
    dtype = next(victim.module.parameters()).dtype
    pixels = torch.randn(len(labels), 3, 8, 8, generator=draw).to(dtype)
    return Batch({"pixel_values": pixels}, torch.tensor(labels), Reference(labels=tuple(labels)))


def seen(victim, labels, seed=0, defense=None, **chosen):
    return observe(
        victim, batch_of(victim, labels, seed), select(victim, **(chosen or {"components": ["head"]})), defense
    )


@pytest.mark.parametrize("labels", [(1, 3, 3, 7), (1, 2, 3, 7), (5, 5, 5, 5)], ids=str)
def test_published_batches(mlp, sure, labels):
    for seed in range(2):
        assert recover_labels(seen(mlp, labels, seed), mlp) == labels
        assert recover_labels(seen(sure, labels, seed), sure) == labels


@pytest.mark.parametrize("parameters", ["all", "bias"])
def test_counts_of_an_untrained_network(mlp, parameters):
    labels = (0, 1, 1, 4, 6, 6, 6, 9)
    observation = seen(mlp, labels, components=["head"], parameters=parameters)
    assert recover_labels(observation, mlp, "expected") == labels
    assert recover_labels(seen(mlp, (1, 3, 3, 7)), mlp, "bias") == (1, 3, 3, 7)


def test_expected_reads_the_weight_alone(mlp):
    labels = (0, 1, 1, 4)
    assert recover_labels(seen(mlp, labels, components=["head"], parameters="weight"), mlp) == labels


def test_the_published_minimum_never_repeats(mlp):
    assert recover_labels(seen(mlp, (1, 2, 3, 7)), mlp, "minimum") == (1, 2, 3, 7)
    found = recover_labels(seen(mlp, (5, 5, 5, 5)), mlp, "minimum")
    assert len(set(found)) == 4
    many = recover_labels(seen(mlp, tuple(range(10)) * 2), mlp, "minimum")
    assert "each class once" in many.reason


def test_solve_says_when_it_cannot(mlp):
    assert "fewer samples" in recover_labels(seen(mlp, tuple(range(10))), mlp, "solve").reason
    alone = seen(mlp, (1, 2), components=["head"], parameters="weight")
    assert "not both observed" in recover_labels(alone, mlp, "solve").reason
    assert len(recover_labels(seen(mlp, tuple(range(10)) * 2), mlp)) == 20  # best counts, then


def test_the_fits_slopes_are_those_of_finite_differences():
    draw = torch.Generator().manual_seed(0)
    weight, bias = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in ((6, 5), (6,)))
    h = torch.rand(3, 5, generator=draw, dtype=torch.float64)
    labels = torch.tensor([[1, 4, 4]])
    slopes = (h @ weight.T + bias).softmax(1) - torch.nn.functional.one_hot(labels[0], 6)
    gradient = slopes.T @ torch.cat([h, torch.ones(3, 1, dtype=torch.float64)], 1)
    system = System.of(gradient, weight, bias, 3)
    # The true inputs leave nothing, whatever the coordinates.
    at = torch.cat([h, torch.ones(3, 1, dtype=torch.float64)], 1)
    scaled = gradient / gradient.norm(dim=1, keepdim=True)
    frame = torch.linalg.svd(scaled, full_matrices=False).Vh[:3]
    true = ((at @ frame.T - system.origin) @ system.free.T)[None]
    assert float(system.rest(true, labels).norm()) < 1e-12
    # And a fit from near them finds them.
    near = true + 0.05 * torch.randn(true.shape, generator=draw, dtype=torch.float64)
    found, cost = system.fit(near, labels, 60)
    assert float(cost) < 1e-20
    torch.testing.assert_close(found, true, rtol=1e-5, atol=1e-5)


def test_text_classifiers_have_labels_too(tiny_bert):
    victim = tiny_bert
    batch = load_batches(victim, "sample", limit=1, max_length=8)[0]
    for label in (0, 1):
        one = Batch(batch.inputs, torch.tensor([label]), Reference())
        observation = observe(victim, one, select(victim, components=["head"]))
        assert attack(observation, victim, "labels").labels == (label,)


def test_granted_labels_are_taken_as_they_are(mlp):
    batch = batch_of(mlp, (3, 1))
    observation = observe(mlp, batch, select(mlp, layers=[0]))
    assert recover_labels(observation, mlp, knowledge=grant(mlp, batch, labels=True)) == (3, 1)


def test_refuses(mlp, tiny_gpt2):
    def reason(observation, victim=mlp):
        found = recover_labels(observation, victim)
        assert isinstance(found, Reconstruction)
        return found.reason

    assert "not observed" in reason(seen(mlp, (1, 2), layers=[0]))
    assert "noise" in reason(seen(mlp, (1, 2), defense={"kind": "gaussian_noise", "std": 10.0}))
    observation = seen(mlp, (1, 2))
    zero = {name: torch.zeros_like(tensor) for name, tensor in observation.gradients.items()}
    assert "zero" in reason(replace(observation, gradients=zero))
    text = load_batches(tiny_gpt2, "sample", limit=1, max_length=8)[0]
    assert "causal-lm" in reason(observe(tiny_gpt2, text, select(tiny_gpt2, components=["norm"])), tiny_gpt2)


def test_nearest_counts_add_up():
    wanted, least = torch.tensor([0.2, 2.6, 1.2]), torch.tensor([-1.0, 0.4, -0.2])
    assert nearest(wanted, least, 4).tolist() == [1, 1, 1, 2]
