"""`span` on pictures: exact from one matrix of block 0, and a reason where it cannot be."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmleak import attack, load_batches, load_model, observe, registry, select
from lmleak.attacks import _span_prior
from lmleak.attacks._applicability import read, readers
from lmleak.metrics import score
from lmleak.records import Reconstruction

VIT = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "initializer_range": 0.1,
}


@pytest.fixture(scope="module")
def vit():
    return load_model("vit", config=VIT, device="cpu")


def seen(victim, component="attn_query", layer=0, size=1, **defense):
    batch = load_batches(victim, "photos", limit=size, batch_size=size)[0]
    return observe(victim, batch, select(victim, components=[component], layers=[layer]), defense or None), batch


def psnr(made, batch):
    return score(made, batch.reference, ["psnr"])["psnr"]


@pytest.mark.parametrize("component", ["attn_query", "attn_key", "attn_value", "attn_qkv"])
def test_one_matrix_of_block_0_gives_the_picture(vit, component):
    observation, batch = seen(vit, component)
    made = attack(observation, vit, "span")
    assert made.status == "ok", made.reason
    assert made.images.shape == batch.reference.images.shape
    assert psnr(made, batch) > 50
    assert 0 < made.confidence[0] <= 1


@pytest.mark.parametrize("component", ["attn_query", "attn_key", "attn_value"])
def test_norms_of_a_trained_model_and_another_normalisation_are_undone(component):
    victim = load_model("vit", config=VIT, mean=[0.2, 0.4, 0.6], std=[0.3, 0.2, 0.1], dtype="float64", device="cpu")
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in victim.module.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
    observation, batch = seen(victim, component)
    # Softmax goes through float32: a key's output gradients sum to zero to that precision only.
    assert psnr(attack(observation, victim, "span"), batch) > (90 if component == "attn_key" else 140)


def test_is_deterministic_and_changes_nothing(vit):
    observation, _ = seen(vit)
    before = {name: tensor.clone() for name, tensor in observation.gradients.items()}
    weights = {name: tensor.clone() for name, tensor in vit.module.state_dict().items()}
    rng = torch.get_rng_state()
    one, two = (attack(observation, vit, "span", seed=seed) for seed in (0, 1))
    assert torch.equal(one.images, two.images)
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(tensor, observation.gradients[name]) for name, tensor in before.items())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in vit.module.state_dict().items())


def equations(victim, component="attn_query"):
    observation, batch = seen(victim, component)
    gradient = observation.gradients[observation.entries[0].name]
    layer = victim.family.patch_layer(victim.module)
    differences = component == "attn_key"
    return (
        _span_prior.equations(layer, victim.processor, gradient, differences=differences, relative=True),
        layer,
        batch,
    )


@pytest.mark.parametrize("component", ["attn_query", "attn_key", "attn_value"])
def test_agrees_with_least_squares_place_by_place(component):
    victim = load_model("vit", config=VIT, dtype="float64", device="cpu")
    known, layer, batch = equations(victim, component)
    found, share = _span_prior.solve(layer, victim.processor, known)
    picture = batch.reference.images.double()
    patches = [
        torch.linalg.lstsq(torch.cat([known.pixels, known.stretch[:, None]], 1), wanted).solution[:-1]
        if component == "attn_key"  # for the others that column is zero: these weights have no shift
        else torch.linalg.lstsq(known.pixels, wanted).solution
        for wanted in known.wanted
    ]
    by_hand = layer.join(torch.stack(patches)[None], 16, 16)
    assert (by_hand - picture).abs().max() < 1e-5
    assert (found - by_hand).abs().max() < 1e-5
    assert share > 0.97


def test_where_pixels_outnumber_equations_the_likeliest_solution_is_taken():
    victim = load_model("vit", config=VIT | {"hidden_size": 56}, dtype="float64", device="cpu")
    known, layer, batch = equations(victim)
    n, (m, p) = len(known.wanted), known.pixels.shape
    assert m < p
    found, share = _span_prior.solve(layer, victim.processor, known)
    # The slow twin: all pixels and all equations in one dense system, with multipliers for the equations.
    photo = _span_prior.Photo(3, 16, 16)
    units = torch.eye(n * p, dtype=torch.float64).view(n * p, n, p)
    inverse = torch.stack([layer.cut(photo(layer.join(one[None], 16, 16)))[0].flatten() for one in units])
    system = torch.block_diag(*[known.pixels] * n)
    centre = torch.full((n * p,), 0.5, dtype=torch.float64)
    wanted = known.wanted.flatten() - system @ centre
    spread = torch.linalg.solve(inverse, system.T)
    dense = centre + spread @ torch.linalg.solve(system @ spread, wanted)
    picture = layer.join(dense.view(1, n, p), 16, 16).clamp(0, 1)
    assert (found - picture).abs().max() < 2e-2
    assert psnr(Reconstruction(images=found.float()), batch) > 20
    assert m / p - 0.1 < share < m / p


@given(height=st.integers(2, 9), width=st.integers(2, 9), channels=st.sampled_from([1, 3, 4]))
@settings(max_examples=15, deadline=None)
def test_the_prior_is_symmetric_positive_and_prefers_smooth_pictures(height, width, channels):
    photo = _span_prior.Photo(channels, height, width)
    units = torch.eye(channels * height * width, dtype=torch.float64).view(-1, channels, height, width)
    matrix = photo(units).flatten(1)
    assert torch.allclose(matrix, matrix.T, atol=1e-8)
    assert torch.linalg.eigvalsh(matrix).min() > 0
    board = ((torch.arange(height)[:, None] + torch.arange(width)) % 2).double().expand(1, channels, -1, -1)
    ramp = torch.linspace(0, 1, height).double()[:, None].expand(1, channels, height, width)
    energy = lambda x: float(((x - 0.5) * photo(x - 0.5)).sum())  # noqa: E731
    assert energy(board) > energy(ramp)


def refused(made, status, words):
    assert made.status == status
    assert words in made.reason
    assert made.images is None


@pytest.mark.parametrize("component", ["attn_query", "attn_key", "attn_value"])
def test_noise_and_nothing_are_told(vit, component):
    observation, _ = seen(vit, component)
    zero = {name: torch.zeros_like(tensor) for name, tensor in observation.gradients.items()}
    refused(attack(replace(observation, gradients=zero), vit, "span"), "no_signal", "zero")
    for seed in range(3):
        draw = torch.Generator().manual_seed(seed)
        noise = {name: torch.randn(tensor.shape, generator=draw) for name, tensor in observation.gradients.items()}
        assert attack(replace(observation, gradients=noise), vit, "span").status == "no_signal"
    strong, _ = seen(vit, component, kind="gaussian_noise", std=1.0)
    assert attack(strong, vit, "span").status == "no_signal"


def test_what_it_cannot_read_is_refused_with_the_reason(vit):
    refused(attack(seen(vit, layer=1)[0], vit, "span"), "not_applicable", "block 0")
    refused(attack(seen(vit, "ffn_in")[0], vit, "span"), "not_applicable", "block 0")
    refused(attack(seen(vit, size=2)[0], vit, "span"), "not_applicable", "2 pictures")
    narrow = load_model("vit", config=VIT | {"hidden_size": 16}, device="cpu")
    refused(attack(seen(narrow)[0], narrow, "span"), "not_applicable", "17 inputs fill the width 16")
    mlp = load_model("mlp", config={"image_size": 16, "hidden": [8]}, device="cpu")
    batch = load_batches(mlp, "photos", limit=1)[0]
    refused(attack(observe(mlp, batch, select(mlp)), mlp, "span"), "not_applicable", "'mlp'")


@pytest.mark.parametrize(
    "kind", [k for k in registry.kinds("attacks") if not hasattr(registry.load("attacks", k), "IMAGES")]
)
def test_attacks_on_text_say_so(vit, kind):
    observation, _ = seen(vit)
    refused(attack(observation, vit, kind), "not_applicable", "reads text")


def test_the_table_of_modules_names_span_only_where_it_answers(vit):
    for layer, expected in ((0, True), (1, False)):
        observation, _ = seen(vit, layer=layer)
        one = read(vit, observation, observation.entries[0])
        assert ("span" in readers(one, vit, observation)) == expected
