"""R-GAP's recursion: exact where every layer's system has full rank; refined, and said so, where it has not."""

from __future__ import annotations

import pytest
import torch

from lmleak import attack, load_batches, load_model, observe, score, select
from lmleak.attacks._layerwise import inverse, least, stack
from lmleak.measures import measure

SMALL = {"image_size": 8, "channels_out": [6, 6], "kernels": 3, "strides": 1, "paddings": 0}


def convnet(**config):
    return load_model("convnet", config=SMALL | config, device="cpu")


def seen(victim, size=1, **chosen):
    batch = load_batches(victim, "photos", limit=size, batch_size=size)[0]
    return observe(victim, batch, select(victim, **chosen)), batch


def psnr(made, batch):
    return score(made, batch.reference, ["psnr"])["psnr"]


@pytest.mark.parametrize(
    "config",
    [
        {"activation": "leaky_relu"},
        {"activation": "tanh", "paddings": 1},
        {"activation": "sigmoid", "hidden": [20]},
        {"activation": "softplus", "channels_out": [8, 8], "strides": [1, 2], "paddings": 1},
        {"activation": "leaky_relu", "bias": False},
    ],
    ids=str,
)
def test_exact_where_the_security_index_is_zero(config):
    victim = convnet(**config)
    observation, batch = seen(victim)
    assert measure(victim, batch, select(victim), "rank_deficiency").rows["*"]["index"] == 0
    made = attack(observation, victim, "layerwise")
    assert made.labels == batch.reference.labels
    assert psnr(made, batch) > 60
    assert made.confidence[0] > 0.99


def test_a_deficient_layer_is_refined_and_named():
    victim = convnet(channels_out=[4, 3], strides=[1, 2], activation="leaky_relu")
    observation, batch = seen(victim)
    rows = measure(victim, batch, select(victim), "rank_deficiency").rows
    alone = attack(observation, victim, "layerwise", steps=0)
    refined = attack(observation, victim, "layerwise", steps=300)
    for made in (alone, refined):
        missing = {name: int(row["unknowns"] - row["rank"]) for name, row in rows.items() if name.endswith("conv")}
        assert made.details["deficient"] == {name: count for name, count in missing.items() if count}
        assert made.confidence[0] < 0.95
    assert psnr(refined, batch) > psnr(alone, batch)


def test_a_layer_that_is_not_observed_has_its_own_weights_still():
    victim = convnet(activation="leaky_relu")
    observation, _ = seen(victim, target_modules=["layers.0.conv", "linear"])
    made = attack(observation, victim, "layerwise", steps=0)
    assert made.status == "ok"
    # 6 * 16 values tell of 216.
    assert made.details["deficient"]["layers.1.conv"] == 120


@pytest.mark.parametrize("name", ["leaky_relu", "tanh", "sigmoid", "softplus"])
def test_activations_are_undone(name):
    activation = stack(convnet(activation=name))[0].activation
    z = torch.linspace(-3, 3, 31, dtype=torch.float64, requires_grad=True)
    y = activation(z)
    (slope,) = torch.autograd.grad(y.sum(), z)
    back, steep = inverse(activation, y.detach())
    torch.testing.assert_close(back, z.detach())
    torch.testing.assert_close(steep, slope)


@pytest.mark.parametrize(("rows", "unknowns", "rank"), [(9, 5, 5), (4, 7, 4), (9, 6, 4), (6, 9, 3)])
def test_least_is_the_pseudo_inverse(rows, unknowns, rank):
    draw = torch.Generator().manual_seed(rows)
    matrix = torch.randn(rows, rank, generator=draw, dtype=torch.float64)
    matrix = matrix @ torch.randn(rank, unknowns, generator=draw, dtype=torch.float64)
    matrix = matrix / matrix.norm(dim=1, keepdim=True)
    target = torch.randn(rows, generator=draw, dtype=torch.float64)
    x, missing = least(matrix, target)
    torch.testing.assert_close(x, torch.linalg.pinv(matrix, rtol=1e-9) @ target, rtol=1e-6, atol=1e-8)
    assert missing == unknowns - rank


def refused(made, status, words):
    assert made.status == status
    assert words in made.reason


def test_refuses():
    victim = convnet(activation="leaky_relu")
    refused(attack(seen(victim, size=2)[0], victim, "layerwise"), "not_applicable", "one picture")
    refused(attack(seen(victim, layers=[0])[0], victim, "layerwise"), "not_applicable", "linear.weight")
    unfit = {"ReLU": {"activation": "relu"}, "BatchNorm": {"norm": "batch"}, "MaxPool": {"pools": [1, 2]}}
    for words, config in unfit.items():
        other = convnet(**config)
        refused(attack(seen(other)[0], other, "layerwise"), "not_applicable", words)
    mlp = load_model("mlp", config={"image_size": 8, "hidden": [8]}, device="cpu")
    refused(attack(seen(mlp)[0], mlp, "layerwise"), "not_applicable", "linear")
