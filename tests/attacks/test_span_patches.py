"""`span` on pictures: exact from one matrix of block 0, and a reason where it cannot be."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lmleak import attack, load_batches, load_model, observe, registry, select
from lmleak.attacks._applicability import read, readers
from lmleak.metrics import score

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
    narrow = load_model("vit", config=VIT | {"hidden_size": 64}, device="cpu")
    refused(attack(seen(narrow)[0], narrow, "span"), "not_applicable", "49 unknowns, and 17 inputs leave 47 equations")
    mlp = load_model("mlp", config={"image_size": 16, "hidden": [8]}, device="cpu")
    batch = load_batches(mlp, "photos", limit=1)[0]
    refused(attack(observe(mlp, batch, select(mlp)), mlp, "span"), "not_applicable", "'mlp'")


@pytest.mark.parametrize(
    "kind", [k for k in registry.kinds("attacks") if not hasattr(registry.load("attacks", k), "IMAGES")]
)
def test_attacks_on_text_say_so(vit, kind):
    observation, _ = seen(vit)
    refused(attack(observation, vit, kind), "not_applicable", "reads text")


def test_the_table_of_modules_names_span_alone_and_only_where_it_answers(vit):
    for layer, expected in ((0, ("span",)), (1, ())):
        observation, _ = seen(vit, layer=layer)
        one = read(vit, observation, observation.entries[0])
        assert readers(one, vit, observation) == expected
