"""Gauss-Newton on pictures: against autograd, against drawn noise, and what it is for."""

from __future__ import annotations

import pytest
import torch

from lmleak import attack, load_batches, load_model, observe, select
from lmleak.attacks import _subspace_newton as newton
from lmleak.attacks._subspace_descent import Descent, view
from lmleak.metrics import score
from tests.attacks.test_subspace_pixels import VIT

SMALL = {**VIT, "image_size": 8, "hidden_size": 72}


def case(dtype="float64", defense=None, component="attn_query", seed=0):
    """A descent on one matrix of block 1, and the true picture's coordinates."""
    victim = load_model("vit", config=SMALL, dtype=dtype, device="cpu")
    batch = load_batches(victim, "photos", limit=1)[0]
    chosen = select(victim, components=component, layers=[1], parameters="weight")
    seen = observe(victim, batch, chosen, defense, seed)
    descent = Descent(victim, [view(victim, seen, seen.entries[0], 5)])
    return descent, descent.coordinates(batch.reference.images), batch


def test_fused_attention_has_the_same_jacobian():
    found = []
    for kind in ("eager", "sdpa"):
        victim = load_model("vit", config=SMALL, device="cpu", attn_implementation=kind)
        batch = load_batches(victim, "photos", limit=1)[0]
        seen = observe(victim, batch, select(victim, components="ffn_in", layers=[1], parameters="weight"))
        descent = Descent(victim, [view(victim, seen, seen.entries[0], 5)])
        with descent.attached(), torch.no_grad():
            found += newton._jacobian(descent, torch.zeros(descent.shape))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def smooth(descent, z, cap):
    """`Descent.nats` with a graph."""
    parts = [
        one.scale * sum(one(x, one.ridge(cap), cap)) for one, x in zip(descent.views, descent.rows(z), strict=True)
    ]
    return sum(parts) + 0.5 * z.square().sum()


@pytest.mark.parametrize("component", ["attn_query", "attn_key"])
def test_slope_and_curvature_are_those_of_the_nats(component):
    noise = {"kind": "gaussian_noise", "std": 1e-5}
    descent, true, _ = case(defense=noise, component=component)
    near = true + 1e-3 * torch.randn(true.shape, generator=torch.Generator().manual_seed(1)).double()
    cap = 1e2
    with descent.attached():
        assert float(smooth(descent, near, cap)) == pytest.approx(descent.nats(near, cap), rel=1e-9)
        moved = newton._jacobian(descent, near)[0]
        slow = torch.autograd.functional.jacobian(lambda q: descent.rows(q)[0], near)
        torch.testing.assert_close(moved, slow.flatten(2).permute(2, 0, 1))
        bent, along = newton._quadratic(descent.views[0], descent.rows(near)[0], moved, cap)
        slope = torch.autograd.functional.jacobian(lambda q: smooth(descent, q, cap), near).flatten()
        torch.testing.assert_close(along - near.flatten(), -slope, rtol=1e-6, atol=1e-6 * float(slope.abs().max()))
        # At the true picture of a clean release nothing is left over, and Gauss-Newton's curvature is the whole one's.
        descent, true, _ = case(component=component)
    with descent.attached():
        moved = newton._jacobian(descent, true)[0]
        bent, _ = newton._quadratic(descent.views[0], descent.rows(true)[0], moved, cap)
        along = torch.randn(true.shape, generator=torch.Generator().manual_seed(2)).double()
        _, whole = torch.autograd.functional.hvp(lambda q: smooth(descent, q, cap), true, along)
        whole = (whole - along).flatten()
        assert float((bent @ along.flatten() - whole).norm()) < 0.05 * float(whole.norm())


def test_nats_at_the_true_picture_are_what_is_expected_of_noise():
    over = []
    for seed in range(20):
        descent, true, _ = case(defense={"kind": "gaussian_noise", "std": 1e-6}, seed=seed)
        one = descent.views[0]
        with descent.attached():
            data = descent.nats(true, 1e3) - 0.5 * float(true.square().sum())
        over.append(data / one.expected(1e3))
    assert 0.8 < sum(over) / len(over) < 1.25, over


@pytest.mark.parametrize("room", [newton.ROOM, 0])
def test_pictures_are_refined_where_there_is_room(room, monkeypatch):
    descent, _, batch = case("float32")
    monkeypatch.setattr(newton, "ROOM", room)
    chosen = select(descent.victim, components="attn_query", layers=[1], parameters="weight")
    said: list[str] = []
    made = attack(observe(descent.victim, batch, chosen), descent.victim, "subspace", progress=said.append)
    assert made.status == "ok"
    quality = score(made, batch.reference, ["psnr"])["psnr"]
    assert (quality > 80) == (room > 0), quality
    assert any("weights to" in line for line in said) == (room > 0)
