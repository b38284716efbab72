"""Patches that went wrong are found by their rows and begun anew; what is right is left alone."""

from __future__ import annotations

import pytest
import torch

from lmleak import load_batches, load_model, observe, select
from lmleak.attacks._span_prior import Photo
from lmleak.attacks._subspace_descent import PRIOR, RIDGE, Descent, view
from lmleak.attacks._subspace_mending import likeliest, mended
from lmleak.metrics import score
from lmleak.records import Reconstruction
from tests.attacks.test_subspace_pixels import VIT


@pytest.fixture(scope="module")
def case():
    """A descent on the query of block 1, where the patches are, and the true picture."""
    victim = load_model("vit", config=VIT, device="cpu")
    batch = load_batches(victim, "photos", limit=1, batch_size=1)[0]
    observation = observe(victim, batch, select(victim, components="attn_query", layers=1, parameters="weight"))
    descent = Descent(victim, [view(victim, observation, observation.entries[0], 17)])
    return descent, victim.family.patch_layer(victim.module), batch


def psnr(descent, z, batch):
    return score(Reconstruction(images=descent.picture(z).clamp(0, 1)), batch.reference, ["psnr"])["psnr"]


def turned(layer, picture, wrong):
    """The picture with the contrast of some patches turned."""
    patches = layer.cut(picture)
    patches[0, wrong] = 1 - patches[0, wrong]
    return layer.join(patches, *picture.shape[2:])


def test_patches_of_turned_contrast_come_back_where_descent_alone_leaves_them(case):
    descent, layer, batch = case
    z = descent.coordinates(turned(layer, batch.reference.images, [5, 6, 12]))
    with descent.attached():
        alone = descent.down_to(z, RIDGE, PRIOR, 600)
        made = mended(descent, layer, z, 1e2, descent.evaluations + 600)
        assert 3 * descent.nats(made, 1e2) < descent.nats(alone, 1e2)
    assert psnr(descent, alone, batch) < 20
    assert psnr(descent, made, batch) > 30


def test_nothing_gets_worse_and_no_budget_is_overspent(case):
    descent, layer, batch = case
    wrong = descent.coordinates(turned(layer, batch.reference.images, [5]))
    with descent.attached():
        right = descent.down_to(descent.coordinates(batch.reference.images), RIDGE, PRIOR, 300)
        assert descent.nats(mended(descent, layer, right, 1e2, descent.evaluations + 600), 1e2) <= descent.nats(
            right, 1e2
        )
        assert torch.equal(mended(descent, layer, wrong, 1e2, descent.evaluations), wrong)
        before = descent.evaluations
        mended(descent, layer, wrong, 1e2, before + 40)
        assert before + 20 < descent.evaluations < before + 60


def test_what_a_patch_is_taken_for_is_the_mean_of_photos_given_the_others(case):
    _, layer, batch = case
    picture, photo = batch.reference.images.double(), Photo(3, 16, 16)
    wrong = torch.zeros(16, dtype=torch.bool)
    wrong[[5, 6, 12]] = True
    made = likeliest(photo, layer, picture, wrong)
    precision = photo(torch.eye(768, dtype=torch.float64).view(-1, 3, 16, 16)).flatten(1)
    marked = torch.zeros(1, 16, 48)
    marked[0, wrong] = 1
    at = layer.join(marked, 16, 16).flatten() > 0
    known = picture.flatten()[~at] - 0.5
    mean = -torch.linalg.solve(precision[at][:, at], precision[at][:, ~at] @ known) + 0.5
    assert torch.equal(made.flatten()[~at], picture.flatten()[~at])
    assert torch.allclose(made.flatten()[at], mean, atol=1e-4)
