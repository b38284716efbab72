"""The module that `precode` puts before another: what passes is encoded, drawn anew, and decoded."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Bottleneck(nn.Module):
    """Rows x [..., d] -> rows [..., d] of a code drawn from N(mu(x), sigma(x)^2), in training and in evaluation."""

    def __init__(self, width: int, size: int, kl_weight: float):
        super().__init__()
        self.encode = nn.Linear(width, 2 * size)
        self.decode = nn.Linear(size, width)
        self.kl_weight = kl_weight
        #: of the draws: every pass with the same seed draws the same; None: the global generator, for training
        self.noise_seed: int | None = 0
        #: a code [..., size] that is used instead of a drawn one, as if the noise had been what leads to it
        self.given: Tensor | None = None
        #: while it is a list, every pass appends what it adds to each sample's loss, [b]
        self.added: list[Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        mu, raw = self.encode(x).chunk(2, -1)
        sigma = F.softplus(raw)
        if self.added is not None:
            bits = (mu.square() + sigma.square() - 1 - 2 * sigma.log()).sum(-1) / (2 * math.log(2))
            self.added.append(self.kl_weight * bits.reshape(len(x), -1).mean(1))
        if self.given is None:
            return self.decode(mu + self._noise(mu) * sigma)
        # The value is the given code; slopes are those of mu + noise * sigma, where the noise depends on x, but is no
        # function of the parameters.
        noise = (self.given - mu) / sigma
        return self.decode(self.given + (mu - mu.detach()) + noise * (sigma - sigma.detach()))

    def _noise(self, like: Tensor) -> Tensor:
        if self.noise_seed is None:
            return torch.randn_like(like)
        if like.device.type == "meta":
            return torch.zeros_like(like)
        # On the CPU, so that every device meets the same draw.
        return torch.randn(like.shape, generator=torch.Generator().manual_seed(self.noise_seed)).to(like)


class Through:
    """A module's hook that sends its input through a bottleneck first: the module keeps its name and its own hooks."""

    def __init__(self, bottleneck: Bottleneck):
        self.bottleneck = bottleneck

    def __call__(self, module: nn.Module, args: tuple) -> tuple:
        return (self.bottleneck(args[0]), *args[1:])
