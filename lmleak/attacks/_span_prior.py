"""Patches by a linear system with a prior: equations weighed by their own noise, the rest from what photos are like.

`_span_patches` has the equations: A p_i = b_i for every patch i, the same A at all places. Two things are added here.

Noise. The row space of a rounded or noisy gradient G = U S V^T is known to the noise's spread over S, direction by
direction, so a patch's equations carry the covariance K = noise^2 C S^-2 C^T between patches (C: the coordinates of
their inputs in the space). Rounding is in proportion to what is rounded, so rows and columns of G are scaled to one
size first (not where noise of one size was added).

Prior. Photos are nearly Gaussian with a spectrum that falls with the square of the frequency (Ruderman 1994; Burton and
Moorhead 1987), much stronger in grey than in colour. That keeps the answer linear, where patches meet too: the mean of
the posterior, by conjugate gradients. Where pixels outnumber equations it fills what is missing: a patch can only be
mistaken for itself plus a mixture of the other inputs, and those carry other places' positions, noise to a photo.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmleak.models._patches import PatchLayer
from lmleak.records import Observation

#: Spectrum of photos in [0, 1]: variance of the orthonormal DCT's grey coefficients at frequency f (1 is the highest
#: along an axis), LEVEL / f^2 / (1 + f^2 / CORNER)^1.5, on 100 CIFAR-10 pictures and 8 photos at 224 pixels.
LEVEL, CORNER = 0.02, 0.36
COLOUR = (1.0, 12.0, 60.0)  #: how much weaker red against blue is than grey, and green against both
INPUTS = 3e-7  #: relative error of a float32 model's own inputs
HIDDEN = 1e-2  #: of the noise's largest value squared: what is left of a direction that it hides
ROUNDS = 5  #: the noise of an input depends on the input
STEPS = 300  #: of conjugate gradients a round, at most
ENOUGH = 1e-2  #: of a nat a patch


class Photo:
    """Inverse covariance of photos as an operator on [k, c, y, x]."""

    def __init__(self, channels: int, height: int, width: int):
        self.down, self.across = _cosines(height), _cosines(width)
        f = (torch.arange(height).double()[:, None] / height) ** 2 + (torch.arange(width).double() / width) ** 2
        inverse = (f + 0.09 / (height * width)) * (1 + f / CORNER) ** 1.5 / LEVEL
        mix = torch.eye(channels, dtype=torch.float64)
        if channels == 3:
            mix = torch.tensor([[1, 1, 1], [1, 0, -1], [1, -2, 1]], dtype=torch.float64)
            mix = mix / mix.norm(dim=1, keepdim=True)
        self.mix = mix
        self.inverse = inverse * torch.tensor(COLOUR if channels == 3 else [1.0] * channels).double()[:, None, None]

    def __call__(self, images: Tensor) -> Tensor:
        """Product with the inverse covariance."""
        y = torch.einsum("ij,kjyx->kiyx", self.mix, images)
        y = self.down.T @ ((self.down @ y @ self.across.T) * self.inverse) @ self.across
        return torch.einsum("ji,kjyx->kiyx", self.mix, y)


def _cosines(n: int) -> Tensor:
    """The orthonormal DCT-II, [n, n]."""
    i = torch.arange(n).double()
    matrix = torch.cos(math.pi * (i + 0.5) * i[:, None] / n) * math.sqrt(2 / n)
    matrix[0] /= math.sqrt(2)
    return matrix


@dataclass(frozen=True)
class Equations:
    """`pixels p + stretch t = wanted[i]` for every patch p in [0, 1] and the divisor t of its norm."""

    spectrum: Tensor  #: [r + 1 or more] of the scaled gradient
    noise: float  #: standard deviation of the scaled gradient's entries
    edge: float  #: the largest value that the noise has by itself
    inside: Tensor  #: [r, d] takes an input to its coordinates in the row space
    pixels: Tensor  #: [m, p]
    stretch: Tensor  #: [m]
    wanted: Tensor  #: [n, m]
    origin: Tensor  #: [d] what is subtracted from inputs first
    projection: Tensor  #: [d, p] of pixels in [0, 1]
    offset: Tensor  #: [n, d]


def equations(layer: PatchLayer, form: Any, gradient: Tensor, *, differences: bool, relative: bool) -> Equations:
    """What one gradient [d_out, d] says of patches.

    Args:
        layer: the public first layer.
        form: the victim's image format.
        gradient: of one matrix, or of several that read the same inputs, stacked.
        differences: the row space holds differences of inputs only (a key's).
        relative: the noise is in proportion to the entries; else it has one size everywhere.
    """
    std, mean = (gradient.new_tensor(x, dtype=torch.float64) for x in (form.std, form.mean))
    projection = layer.projection.double().unflatten(1, (len(std), -1))
    offset = layer.offset.double() - (projection.sum(-1) * (mean / std)).sum(-1)
    projection = (projection / std[:, None]).flatten(1)
    scaled, columns = gradient.double(), gradient.new_ones(gradient.shape[1], dtype=torch.float64)
    if relative:
        scaled, columns = even(scaled)
    d, rows = scaled.shape[1], len(scaled)
    _, values, right = torch.linalg.svd(scaled, full_matrices=True)
    rank = min(len(layer.offset) + len(layer.first) - differences, len(values) - 1)
    outside = right[rank:] / columns
    known = layer.known()[0]
    origin = known if differences else torch.zeros_like(known)
    weighed, stretch, wanted = outside, outside[:, 0] * 0, (origin - offset) @ outside.T
    if layer.weight is not None and layer.bias is not None:
        weighed = outside * layer.weight.double()
        weighed = weighed - weighed.mean(1, keepdim=True)  # the centring, moved to the other side
        stretch, wanted = outside @ (layer.bias.double() - origin), -(offset @ weighed.T)
    behind = values[rank:].square().sum() / max(1, (rows - rank) * (d - rank))
    return Equations(
        spectrum=values[: rank + 1],
        noise=float(behind.sqrt()),
        edge=float(behind.sqrt()) * (math.sqrt(rows) + math.sqrt(d)),
        inside=right[:rank] / columns,
        pixels=weighed @ projection,
        stretch=stretch,
        wanted=wanted,
        origin=origin,
        projection=projection,
        offset=offset,
    )


def even(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns scaled to one size, so that noise in proportion to the entries is; and what columns [d] had."""
    size = gradient.norm(dim=1, keepdim=True)
    scaled = gradient / torch.where(size > 0, size, 1.0)
    columns = scaled.square().mean(0).sqrt()
    columns = columns.clamp_min(max(1e-3 * float(columns.max()), 1e-300))
    return scaled / columns, columns


def proportional(observation: Observation) -> bool:
    """Whether the release's noise is in proportion to what is released, as a float's rounding; else it has one size."""
    defense = observation.defense
    return not (defense.get("kind") in ("gaussian_noise", "dp_sgd") or defense.get("to") in ("int8", "sign"))


def solve(layer: PatchLayer, form: Any, known: Equations) -> tuple[Tensor, float]:
    """The posterior's mean [1, c, y, x] in [0, 1], and the share of what the prior left open that was read, 0..1."""
    n, p = len(known.wanted), known.pixels.shape[1]
    c = layer.patch[0]
    photo = Photo(c, form.height, form.width)
    picture = torch.full((1, c, form.height, form.width), 0.5, dtype=torch.float64)
    inputs, stretch = _inputs(layer, known, picture)
    typical = stretch.mean()
    # Coordinates in which one patch's prior is the identity and its equations are diagonal.
    block = torch.eye(p + 1, dtype=torch.float64)
    block[:p, :p] = alone(photo, layer)
    block[p, p] = 1e-2  # the divisor is free within ten times its size
    root = torch.linalg.cholesky(block)
    system = torch.cat([known.pixels, (known.stretch * typical)[:, None]], 1)
    left, gains, right = torch.linalg.svd(torch.linalg.solve_triangular(root, system.T, upper=False).T)
    frame = torch.linalg.solve_triangular(root.T, right.T, upper=True)  # [p + 1, p + 1]: unknowns = frame y
    full = gains.new_zeros(p + 1)
    full[: len(gains)] = gains
    wanted = known.wanted @ left[:, : len(gains)]
    centre = torch.full((n, p + 1), 0.5, dtype=torch.float64)
    centre[:, p] = 1.0
    unknowns, share = centre, 0.0
    start = torch.linalg.solve(frame, centre.T).T
    now = torch.zeros_like(start)
    for turn in range(ROUNDS):
        spread, turned = _noise(known, inputs, stretch)
        strength = full.square() / spread[:, None]  # [n, p + 1]

        def prior(z: Tensor) -> Tensor:
            q = z @ frame.T
            rough = photo(layer.join(q[None, :, :p], form.height, form.width))
            return torch.cat([layer.cut(rough)[0], block[p, p] * q[:, p:]], 1) @ frame

        def curved(z: Tensor, strength: Tensor = strength, turned: Tensor = turned) -> Tensor:
            return turned @ (strength * (turned.T @ z)) + prior(z)

        def nearly(z: Tensor, strength: Tensor = strength, turned: Tensor = turned) -> Tensor:
            return turned @ ((turned.T @ z) / (strength + 1))

        missing = wanted - (start * full)[:, : len(gains)]
        slope = torch.zeros_like(start)
        slope[:, : len(gains)] = turned @ ((turned.T @ missing) / spread[:, None]) * gains
        now = conjugate(curved, nearly, slope, nearly(slope) if turn == 0 else now, ENOUGH * n)
        unknowns = centre + now @ frame.T
        picture = layer.join(unknowns[None, :, :p], form.height, form.width).clamp(0, 1)
        inputs, stretch = _inputs(layer, known, picture)
        share = float((strength / (strength + 1))[:, : p + 1].mean())
    return picture, share


def _inputs(layer: PatchLayer, known: Equations, picture: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs [n, d] of a picture in [0, 1], less the origin, and the divisors [n] of their norms."""
    z = layer.cut(picture)[0] @ known.projection.T + known.offset
    if layer.weight is None or layer.bias is None:
        return z - known.origin, torch.ones_like(z[:, 0])
    z = z - z.mean(1, keepdim=True)
    t = (z.square().mean(1) + layer.eps).sqrt()
    return layer.weight.double() * z / t[:, None] + layer.bias.double() - known.origin, t


def _noise(known: Equations, inputs: Tensor, stretch: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [n] and eigenvectors [n, n] of the covariance of the patches' equations."""
    rank = len(known.inside)
    # Noise adds its own to every value of the spectrum: one that is no larger than noise makes shows no direction.
    clear = (known.spectrum[:rank].square() - known.edge**2).clamp_min(known.edge**2 * HIDDEN).sqrt()
    coordinates = (inputs @ known.inside.T) / clear.clamp_min(1e-300)
    own = INPUTS * float(inputs.square().mean().sqrt() * known.inside.norm() / math.sqrt(max(1, rank)))
    covariance = known.noise**2 * coordinates @ coordinates.T
    covariance = covariance + (own**2 + 1e-9 * covariance.diagonal().mean()) * torch.eye(len(inputs)).double()
    return torch.linalg.eigh(covariance * stretch[:, None] * stretch)  # type: ignore[return-value]


def alone(photo: Photo, layer: PatchLayer) -> Tensor:
    """Inverse covariance of one patch inside a photo, [p, p], from a window three patches wide."""
    c, y, x = layer.patch
    window = Photo(c, 3 * y, 3 * x)
    units = torch.eye(c * y * x, dtype=torch.float64).view(-1, c, y, x)
    wide = torch.nn.functional.pad(units, (x, x, y, y))
    return window(wide)[..., y : 2 * y, x : 2 * x].flatten(1)


def conjugate(curved: Any, nearly: Any, slope: Tensor, start: Tensor, enough: float) -> Tensor:
    """Solves curved(z) = slope, with `nearly` its approximate inverse."""
    z = start
    rest = slope - curved(z)
    scaled = nearly(rest)
    direction, size = scaled, (rest * scaled).sum()
    for _ in range(STEPS):
        if float(size) < enough:
            break
        bent = curved(direction)
        step = size / (direction * bent).sum()
        z = z + step * direction
        rest = rest - step * bent
        scaled = nearly(rest)
        size, before = (rest * scaled).sum(), size
        direction = scaled + size / before * direction
    return z
