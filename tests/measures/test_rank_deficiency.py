"""Ranks of a stack's systems: published indices, the closed form, and U against autograd's own matrices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lmleak import load_batches, load_model, select
from lmleak.attacks._layerwise import Layer, rank, stack, system
from lmleak.measures import measure


def convnet(seed=0, **config):
    config = {"paddings": 0, "activation": "leaky_relu"} | config
    return load_model("convnet", seed=seed, config=config, device="cpu")


def measured(victim, **chosen):
    batch = load_batches(victim, "photos", limit=1)[0]
    return measure(victim, batch, select(victim, **chosen), "rank_deficiency")


def test_published_indices():
    victim = convnet(seed=10, channels_out=[1], kernels=3, strides=1)
    assert measured(victim).rows["*"]["index"] == -2146
    victim = convnet(seed=10, channels_out=[6, 3], kernels=[4, 3], strides=2)
    rows = measured(victim).rows
    assert rows["*"]["index"] == -1995
    # Its first convolution alone, as the one layer before the head, is the third of the published networks.
    assert rows["layers.0.conv"]["index"] == -1470


def test_zero_where_every_system_can_be_solved():
    victim = convnet(image_size=8, channels_out=[6, 6], kernels=3, strides=1, hidden=[20])
    rows = measured(victim).rows
    assert rows["*"]["index"] == 0
    assert rows["layers.0.conv"] == {"rank": 192.0, "unknowns": 192.0, "index": 0.0}
    assert rows["layers.2.dense"]["rank"] == rows["layers.2.dense"]["unknowns"] == 96.0
    assert rows["linear"]["rank"] is None


def test_without_a_weights_gradient_its_own_rows_are_left():
    victim = convnet(image_size=8, channels_out=[3], kernels=3, strides=1)
    whole, head = measured(victim).rows["*"], measured(victim, components=["head"]).rows["*"]
    assert whole["rank"] == 180  # 3 * 36 + 81 - 9
    assert head["rank"] == 108


@settings(max_examples=12)
@given(
    st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(1, 2), st.integers(5, 7), st.integers(0, 99)
)
def test_the_closed_form_of_unpadded_convolutions(c_in, c_out, kernel, stride, size, seed):
    draw = torch.Generator().manual_seed(seed)
    part = torch.nn.Conv2d(c_in, c_out, kernel, stride, dtype=torch.float64)
    part.weight.data = torch.randn(part.weight.shape, generator=draw, dtype=torch.float64)
    side = (size - kernel) // stride + 1
    # Rows of W and of the weight's gradient must be as independent as they can be, each by itself.
    assume(c_out * side**2 <= c_in * size**2)
    assume(c_out <= c_in * kernel**2)
    assume(c_out <= side**2)
    layer = Layer("", part, None, (c_in, size, size), (c_out, side, side))
    dz = torch.randn(layer.leaving, generator=draw, dtype=torch.float64)
    expected = min(layer.unknowns, c_out * side**2 + part.weight.numel() - c_out**2)
    own, every = system(layer, dz, observed=False), system(layer, dz, observed=True)
    known = len(set(_read(part, layer)))
    assume(rank(own) == c_out * side**2)  # full rank
    # Where a kernel spans as many places as the output has, two channels' rows z1 * z2 = z2 * z1 depend on each other.
    assume(rank(every[len(own) :]) == min(part.weight.numel(), known))
    assert rank(every) == min(expected, known)


def _read(part, layer):
    """Values of the input that some place reads: a stride may pass over the last ones."""
    x = torch.zeros(1, *layer.entering, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(torch.nn.functional.conv2d(x, part.weight.abs() + 1, None, part.stride).sum(), x)
    return slope.flatten().nonzero().flatten().tolist()


@pytest.mark.parametrize("padding", [0, 1])
def test_the_systems_rows_are_the_layers_output_and_its_weights_gradient(padding):
    """The slow twin: the convolution itself and autograd's gradient of its weight."""
    victim = convnet(image_size=6, channels_out=[4], kernels=3, strides=2, paddings=padding)
    layer = stack(victim)[0]
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(1, *layer.entering, generator=draw, dtype=torch.float64)
    dz = torch.randn(1, *layer.leaving, generator=draw, dtype=torch.float64)
    weight = layer.module.weight.detach().double().requires_grad_()
    z = torch.nn.functional.conv2d(x, weight, None, 2, padding)
    (gradient,) = torch.autograd.grad((z * dz).sum(), weight)
    found = system(layer, dz[0], observed=True) @ x.flatten()
    torch.testing.assert_close(found, torch.cat([z.detach().flatten(), gradient.flatten()]))


def test_says_what_it_is_not_defined_for(tiny_bert):
    batch = load_batches(tiny_bert, "sample", limit=1, max_length=6)[0]
    assert "text" in measure(tiny_bert, batch, select(tiny_bert), "rank_deficiency").reason
    mlp = load_model("mlp", config={"image_size": 8, "hidden": [8]}, device="cpu")
    assert "no plain stack" in measured(mlp).reason  # ReLU
    victim = convnet(image_size=8, channels_out=[2], kernels=3, strides=1)
    pair = load_batches(victim, "photos", limit=2, batch_size=2)[0]
    assert "one picture" in measure(victim, pair, select(victim), "rank_deficiency").reason
