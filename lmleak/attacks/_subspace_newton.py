"""Gauss-Newton steps for a picture that is nearly right: the decibels that no gradient descent finds.

Where noise of one size s fills the gradient, direction k of its space, with singular value sigma_k, is known to s /
sigma_k, so the share that a picture's inputs leave of it open weighs sigma_k^2 / 2 s^2 nats: the likelihood, with the
output gradients profiled out. Those weights span ten orders of magnitude; L-BFGS stalls, and a Gauss-Newton step from
afar goes astray. So all directions count alike at first, and the weights' cap rises step by step. *Measured*, query of
block 4 of a briefly trained ViT (d = 192, 65 inputs, 3,072 pixels), from 22.8 dB: 1,000 steps of L-BFGS on capped
weights 26.2; one Jacobian at caps of 1e2, 1e4 and 1e6 each 27.3, 32.2, 35.2. Block 1 of an untrained small one, from
31.9 dB: 103.

The Jacobian costs a forward pass a pixel. Variable projection after Kaufman (1975, BIT 15): dP v = -(1 - P) dX^T c.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from lmleak.attacks._subspace_descent import Descent, View

CAPS = (1e3, 1e6, 1e9)  #: largest weight of a direction, in those of the weakest above the noise
STEPS = 2  #: with one Jacobian
DAMPING = (0.0, 1.0, 1e2, 1e4)  #: tried in turn, in the prior's units, until a step helps
TANGENTS = 64  #: pushed forward at once
NONE = 0.01  #: of a direction is left by the rows where it counts as theirs
ROOM = 2**28  #: numbers of a Jacobian; 3,072 pixels and 65 inputs of width 192 have 4e7


def price(descent: Descent) -> int:
    """Evaluations that one Jacobian takes, a forward pass a pixel; 0 where it has no room."""
    pixels = descent.spread.numel()
    inputs = sum(x.numel() for x in descent.rows(torch.zeros(descent.shape).to(descent.spread)))
    return pixels if pixels * max(pixels, inputs) <= ROOM else 0


@torch.no_grad()
def refined(descent: Descent, z: Tensor, cap: float) -> Tensor:
    """Coordinates after at most `STEPS` steps at weights up to `cap`, each of which lowered `descent.nats`."""
    jacobian = _jacobian(descent, z)
    for _ in range(STEPS):
        here = descent.nats(z, cap)
        curve, slope = torch.eye(z.numel(), dtype=torch.float64, device=z.device), -z.flatten().double()
        for view, x, moved in zip(descent.views, descent.rows(z), jacobian, strict=True):
            bent, along = _quadratic(view, x, moved, cap)
            curve, slope = curve + bent, slope + along
        for damping in DAMPING:
            curve.diagonal().add_(damping)
            new = z + torch.linalg.solve(curve, slope).view(z.shape).to(z)
            if descent.nats(new, cap) < here:
                break
        else:
            return z
        z = new
    return z


def _jacobian(descent: Descent, z: Tensor) -> list[Tensor]:
    """What every coordinate moves in every view's inputs, [p, n, d] each."""
    along = vmap(lambda tangent: jvp(lambda q: tuple(descent.rows(q)), (z,), (tangent,))[1])
    pixels = torch.eye(z.numel(), dtype=z.dtype, device=z.device).view(-1, *z.shape)
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no forward derivative
        parts = [along(part) for part in pixels.split(TANGENTS)]
    descent.evaluations += z.numel() // 3  # a step of the descent, which also goes back, costs three
    return [torch.cat(one) for one in zip(*parts, strict=True)]


def _quadratic(view: View, x: Tensor, moved: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """Second order [p, p] and downward first order [p] of a view's nats around inputs x [n, d] that move by `moved`."""
    unit, size = view.unit(x)
    moved = view.centre(moved) / (view.columns * size).to(moved)
    moved = moved - (moved * unit.to(moved)).sum(-1, keepdim=True) * unit.to(moved)
    inside = unit @ view.basis.T
    gram = unit @ unit.T + view.ridge(cap) * torch.eye(len(unit)).to(unit)
    share = torch.linalg.solve(gram, inside)  # [n, r]
    left = view.basis - share.T @ unit
    weighed = share * view.weights(cap)
    # What lies outside the space is taken for what lies outside the rows' own, which they nearly fill: one product.
    values, vectors = torch.linalg.eigh(weighed @ share.T + view.trust * torch.eye(len(unit)).to(unit))
    root = vectors * values.clamp_min(0).sqrt()
    rest, across = torch.linalg.eigh(torch.eye(unit.shape[1]).to(unit) - unit.T @ torch.linalg.solve(gram, unit))
    free = (across * rest)[:, rest > NONE]
    opened = torch.einsum("ab,paq->pbq", root.to(moved), moved @ free.to(moved)).flatten(1)
    bent = opened @ opened.T
    away = torch.eye(unit.shape[1]).to(unit) - view.basis.T @ view.basis
    along = (moved * (weighed @ left - view.trust * unit @ away).to(moved)).sum((1, 2))
    return 2 * view.scale * bent.double(), 2 * view.scale * along.double()
