"""Mends the few patches of a picture that went wrong, where the rest of it is right.

A descent from grey ends in a wrong minimum a few patches at a time: their contrast is turned, and attention tells the
others little of it. The rows say which. *Measured*, query of block 2 of a briefly trained ViT (d = 192, patches of 4 x
4), a picture at 18 dB: 5 of 64 patches are off by 0.35 to 0.57, the others by 0.02 to 0.11, and their rows lie 51 to
113e-4 outside the space for at most 15e-4. Taken from their neighbours, as photos are, and descended on again: 38 dB
after 300 steps, where other starts end at 18 to 24. Deeper blocks' inputs are mixed more, and not all rows of wrong
patches stand out; so those next to them are begun anew too: block 4, 12 dB to 28.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lmleak.attacks._span_prior import Photo, alone, conjugate
from lmleak.attacks._subspace_descent import PRIOR, RIDGE, Descent
from lmleak.models._patches import PatchLayer

APART = 4.0  #: times the median of what rows leave outside the space: a right picture's worst has 1.9 to 3.4
MOST = 0.5  #: share of the patches that are mended at once
STEPS = 250  #: of the descent after it
HELPS = 0.95  #: nats after it, as a share of those before
TRIED = ((0, 0.0), (1, 0.0), (0, -1.0))  #: (how far around the wrong patches, how much of what they deviated is kept)
EXACTLY = 1e-6  #: of the prior's nats in which the patches are taken from the others


def mended(descent: Descent, layer: PatchLayer, z: Tensor, cap: float, most: int) -> Tensor:
    """Coordinates at which no patch stands apart, or nats are those of a true picture; or the best on the way there.

    Args:
        layer: where patches are in the picture.
        z: where a descent ended.
        cap: of the weights of the nats that have to fall, see `Descent.nats`.
        most: `descent.evaluations` at most.
    """
    now, expected, tried = descent.nats(z, cap), descent.expected(cap), 0
    while now > expected and tried < len(TRIED) and descent.evaluations < most:
        wrong = _apart(descent, layer, z)
        if not wrong.any():
            break
        around, kept = TRIED[tried]
        wrong = _widened(wrong, around)
        if int(wrong.sum()) > MOST * wrong.numel():
            tried += 1
            continue
        picture = descent.picture(z).detach()
        usual = likeliest(descent.photo, layer, picture, wrong.flatten())
        new = descent.coordinates(usual + kept * (picture - usual))
        new = descent.down_to(new, RIDGE, PRIOR, min(STEPS, most - descent.evaluations))
        after = descent.nats(new, cap)
        if after < HELPS * now:
            z, now, tried = new, after, 0
        else:
            tried += 1
    return z


def likeliest(photo: Photo, layer: PatchLayer, picture: Tensor, wrong: Tensor) -> Tensor:
    """The picture [1, c, y, x] with its wrong patches, [n] of booleans, as photos most likely have them."""
    height, width = picture.shape[2:]
    patches = layer.cut(picture.double().cpu() - 0.5)[0]
    wrong = wrong.cpu()
    patches[wrong] = 0
    root = torch.linalg.cholesky(alone(photo, layer))

    def rough(z: Tensor) -> Tensor:
        whole = torch.zeros_like(patches)
        whole[wrong] = z
        return layer.cut(photo(layer.join(whole[None], height, width)))[0, wrong]

    slope = -layer.cut(photo(layer.join(patches[None], height, width)))[0, wrong]
    start = torch.zeros_like(slope)
    patches[wrong] = conjugate(rough, lambda z: torch.cholesky_solve(z.T, root).T, slope, start, EXACTLY * len(start))
    return (layer.join(patches[None], height, width) + 0.5).to(picture)


@torch.no_grad()
def _apart(descent: Descent, layer: PatchLayer, z: Tensor) -> Tensor:
    """Which patches' rows lie much farther outside the space than others', in the picture's rows and columns."""
    outside = torch.stack([view.astray(x) for view, x in zip(descent.views, descent.rows(z), strict=True)]).sum(0)
    outside = outside[len(layer.first) :]
    return (outside > APART * outside.median()).view(descent.shape[2] // layer.patch[1], -1)


def _widened(wrong: Tensor, around: int) -> Tensor:
    """The same with the patches next to them."""
    wide = torch.nn.functional.max_pool2d(wrong[None].double(), 2 * around + 1, stride=1, padding=around)
    return wide[0] > 0
