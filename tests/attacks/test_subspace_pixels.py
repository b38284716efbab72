"""`subspace` on pictures: any block but the last, and a reason where it cannot."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lmleak import attack, load_batches, load_model, observe, select
from lmleak.attacks._applicability import read, readers
from lmleak.attacks._subspace_descent import Descent, view
from lmleak.metrics import score

VIT = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "initializer_range": 0.05,
}


@pytest.fixture(scope="module")
def vit():
    return load_model("vit", config=VIT, device="cpu")


def seen(victim, component="attn_query", layer=1, size=1):
    batch = load_batches(victim, "photos", limit=size, batch_size=size)[0]
    layers = None if layer is None else [layer]
    return observe(victim, batch, select(victim, components=component, layers=layers, parameters="weight")), batch


@pytest.mark.parametrize("component", ["attn_query", "attn_key", "ffn_in"])
def test_one_matrix_of_a_middle_block_gives_the_picture(vit, component):
    observation, batch = seen(vit, component)
    state = {name: tensor.clone() for name, tensor in vit.module.state_dict().items()}
    made = attack(observation, vit, "subspace")
    assert made.status == "ok", made.reason
    assert score(made, batch.reference, ["psnr"])["psnr"] > 28
    assert made.confidence[0] > 0.9
    assert all(torch.equal(tensor, state[name]) for name, tensor in vit.module.state_dict().items())
    assert all(p.requires_grad for p in vit.module.parameters())


def test_the_energy_is_what_projections_say_and_the_true_picture_has_next_to_none():
    victim = load_model("vit", config=VIT, dtype="float64", device="cpu")
    observation, batch = seen(victim)
    one = view(victim, observation, observation.entries[0], 17)
    descent = Descent(victim, [one])
    z = descent.coordinates(batch.reference.images)
    assert (descent.picture(z) - batch.reference.images).abs().max() < 1e-6
    with descent.attached(), torch.no_grad():
        true = descent(z, 1e-12)
        grey = descent(0 * z, 1e-3)
        x = torch.nn.functional.normalize(descent._seen[one.owner][0] / one.columns, dim=-1)
        rest = x - x @ one.basis.T @ one.basis
        # Ridge regression of every direction of the space on the rows, one at a time.
        open_ = []
        for direction in one.basis:
            a = torch.linalg.solve(x @ x.T + 1e-3 * torch.eye(len(x)).double(), x @ direction)
            open_.append((direction - a @ x).square().sum() + 1e-3 * a.square().sum())
    assert float(true[0]) < 1e-8
    assert float(true[1]) < 1e-4
    assert float(grey[0]) == pytest.approx(float(rest.square().sum()), rel=1e-5)
    assert float(grey[1]) == pytest.approx(float(torch.stack(open_).sum()), rel=1e-5)


def refused(made, status, words):
    assert made.status == status
    assert words in made.reason
    assert made.images is None


def test_noise_and_what_shows_nothing_are_told(vit):
    observation, _ = seen(vit)
    zero = {name: torch.zeros_like(tensor) for name, tensor in observation.gradients.items()}
    refused(attack(replace(observation, gradients=zero), vit, "subspace"), "no_signal", "zero")
    draw = torch.Generator().manual_seed(0)
    noise = {name: torch.randn(tensor.shape, generator=draw) for name, tensor in observation.gradients.items()}
    made = attack(replace(observation, gradients=noise), vit, "subspace", budget=600)
    refused(made, "no_signal", "directions are above the noise")
    refused(attack(seen(vit, layer=2)[0], vit, "subspace"), "not_applicable", "last block")
    refused(attack(seen(vit, size=2)[0], vit, "subspace"), "not_applicable", "2 pictures")
    refused(attack(seen(vit, "patch_embedding", layer=None)[0], vit, "subspace"), "not_applicable", "needs the weight")


def test_the_table_of_modules_names_it(vit):
    for layer, expected in ((0, True), (1, True), (2, False)):
        observation, _ = seen(vit, layer=layer)
        assert ("subspace" in readers(read(vit, observation, observation.entries[0]), vit, observation)) == expected
