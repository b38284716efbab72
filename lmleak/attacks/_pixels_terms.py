"""What candidate pictures are pulled towards besides the observed gradient. Shapes: k candidates, [k, b, c, y, x]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lmleak.gradients.batchnorm import Statistics


class Box:
    """The values that valid pixels have after normalisation."""

    def __init__(self, form: Any, like: Tensor):
        corners = torch.stack([like.new_zeros(form.channels, 1, 1), like.new_ones(form.channels, 1, 1)])
        self.low, self.high = form.normalised(corners)

    def clamp_(self, pixels: Tensor) -> None:
        """Moves pixels into the box, in place."""
        with torch.no_grad():
            torch.clamp(pixels, self.low, self.high, out=pixels)


def total_variation(pixels: Tensor) -> Tensor:
    """Mean absolute difference of neighbours along x plus that along y (Geiping et al. 2020, 2003.14053), [k]."""
    along = (pixels[..., 1:] - pixels[..., :-1]).abs().flatten(1).mean(1)
    down = (pixels[..., 1:, :] - pixels[..., :-1, :]).abs().flatten(1).mean(1)
    return along + down


def rough(pixels: Tensor) -> Tensor:
    """Sum over the four directions of the norms of neighbours' differences (Yin et al. 2021, 2104.07586), [k]."""
    pairs = (
        pixels[..., 1:] - pixels[..., :-1],
        pixels[..., 1:, :] - pixels[..., :-1, :],
        pixels[..., 1:, 1:] - pixels[..., :-1, :-1],
        pixels[..., 1:, :-1] - pixels[..., :-1, 1:],
    )
    return sum(norm(pair) for pair in pairs)  # type: ignore[return-value]


def norm(pixels: Tensor) -> Tensor:
    """Euclidean norm of each candidate, [k], with a finite slope at 0."""
    return (pixels.flatten(1).square().sum(1) + 1e-12).sqrt()


def off_statistics(found: Statistics, known: Mapping[str, tuple[Tensor, Tensor]]) -> Tensor:
    """Sum over BatchNorm layers of the distances of a batch's means and of its variances from known ones, 0-d.

    The regulariser of DeepInversion (Yin et al. 2020, 1912.08795), as GradInversion uses it.
    """
    parts = [
        ((own - wanted).square().sum() + 1e-12).sqrt()
        for name, pair in known.items()
        for own, wanted in zip(found[name], pair, strict=True)
    ]
    return torch.stack(parts).sum()
