"""How far candidate pictures' gradients are from the observed ones, for all restarts in one forward and backward.

Two ways to the same numbers. By factors, k restarts are one batch and no large gradient is formed: a step of a restart
of an MLP of 4.2 M parameters takes 7 ms at k = 1 and 2 ms at k = 8 on one CPU core, a loop over parameter gradients
45 ms. One candidate at a time, by parameter gradients: for a single convolutional candidate (unfolding costs 1.3 times
the convolution's own backward), for modules without factors, and where BatchNorm mixes a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lmleak.gradients.batchnorm import norms, untracked
from lmleak.gradients.factors import Factor, LowRank, capture, inner, low_rank, squared_norms, unfactored
from lmleak.gradients.losses import model_losses
from lmleak.gradients.observe import cut
from lmleak.records import Observation, Victim

TINY = 1e-24  #: under square roots, so that their slope at a perfect match is finite


@dataclass(frozen=True)
class Gradients:
    """Gradients of k candidates: formed ones side by side, and factors where forming them would cost more."""

    formed: Sequence[Tensor]  #: [k, values] each
    wanted: Sequence[Tensor]  #: [values] each: what was observed there
    joined: Tensor  #: [all their values]: the same in one piece
    products: Sequence[Tensor]  #: [k] each: of an unformed gradient with the observed one
    squares: Sequence[Tensor]  #: [k] each: squared norm of an unformed gradient
    wanted_squares: Sequence[float]
    norm: float  #: of all that was observed

    def cosine(self) -> Tensor:
        """1 - the cosine over all observed tensors together (Geiping et al. 2020, 2003.14053), [k] in 0..2."""
        products, squares = list(self.products), list(self.squares)
        if self.formed:
            own = torch.cat(list(self.formed), 1)
            # Not `own @ joined`: in float32 on a CPU a dot product of 4 M values is off by 7e-5, this by 1e-7.
            products.append((own * self.joined).sum(1))
            squares.append(own.square().sum(1))
        return 1 - _sum(products) / ((_sum(squares) + TINY).sqrt() * max(self.norm, TINY))

    def squared(self) -> Tensor:
        """Squared Euclidean distance over all observed tensors (DLG, Zhu et al. 2019, 1906.08935), [k]."""
        return _sum(self._misses())

    def norms(self) -> Tensor:
        """Sum over tensors of the distances themselves, not squared (Yin et al. 2021, 2104.07586), [k]."""
        return _sum([(miss + TINY).sqrt() for miss in self._misses()])

    def _misses(self) -> list[Tensor]:
        formed = [(own - wanted).square().sum(1) for own, wanted in zip(self.formed, self.wanted, strict=True)]
        # Differences of large numbers: exact to 1e-7 of the observed square, so below that there is no slope.
        rest = [
            (square - 2 * product + wanted).clamp_min(1e-7 * wanted)
            for square, product, wanted in zip(self.squares, self.products, self.wanted_squares, strict=True)
        ]
        return formed + rest


class Matcher:
    """The observed gradients and the model that candidates go through, in the client's mode but without dropout."""

    def __init__(self, victim: Victim, observation: Observation, restarts: int = 1):
        module, weight = victim.module, next(victim.module.parameters())
        self.victim, self.entries, self.reduction = victim, observation.entries, observation.reduction
        self.targets = {e.name: observation.gradients[e.name].detach().to(weight).flatten() for e in self.entries}
        self.squares = {name: float(target.double().square().sum()) for name, target in self.targets.items()}
        self.norm = sum(self.squares.values()) ** 0.5
        self.values = sum(e.numel for e in self.entries)
        self.joined: dict[tuple[str, ...], Tensor] = {}
        self.training = observation.mode == "train"
        names = dict.fromkeys(e.parameter for e in self.entries)
        self.parameters = {name: module.get_parameter(name) for name in names}
        single = restarts == 1 and any(isinstance(part, nn.Conv2d) for part in module.modules())
        mixed = self.training and norms(module)
        with self._modes():
            self.factored = not (single or mixed or unfactored(module, self.entries))
        self.thin = self._thin(observation.batch_size) if self.factored else {}

    @property
    def zero(self) -> bool:
        """Whether nothing was observed."""
        return not any(self.squares.values())

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Inside, candidates can be compared; modes and requires_grad are put back. Running statistics never move."""
        wanted = {p: p.requires_grad for p in self.victim.module.parameters()}
        own = set() if self.factored else set(self.parameters.values())
        try:
            for p in wanted:
                p.requires_grad_(p in own)
            with self._modes(), torch.enable_grad():
                yield
        finally:
            for p, before in wanted.items():
                p.requires_grad_(before)

    def __call__(self, pixels: Tensor, labels: Tensor, *, create_graph: bool = True) -> Gradients:
        """Gradients of every candidate's batch loss; inside `ready` only.

        Args:
            pixels: [k, b, c, y, x], normalised as the model reads them.
            labels: [b] classes, or [k, b, classes] probabilities.
            create_graph: to differentiate the distances by the pixels.
        """
        if not self.factored:
            rows = [
                self._one(own, labels if labels.dim() == 1 else labels[i], create_graph)
                for i, own in enumerate(pixels.unbind())
            ]
            formed = [torch.stack(parts) if len(parts) > 1 else parts[0][None] for parts in zip(*rows, strict=True)]
            return self._gradients(dict(zip(self.targets, formed, strict=True)), {}, {})
        k, b = pixels.shape[:2]
        with capture(self.victim.module, self.entries) as tape:
            each = labels.expand(k, b).flatten() if labels.dim() == 1 else labels.flatten(0, 1)
            losses = self._losses(pixels.flatten(0, 1), each, b)
        factors = tape.factors(losses, create_graph=create_graph)
        return self._gathered({name: [use.grouped(b) for use in uses] for name, uses in factors.items()})

    def _one(self, pixels: Tensor, labels: Tensor, create_graph: bool) -> list[Tensor]:
        """One candidate's gradients, flat, in the order of the entries."""
        loss = self._losses(pixels, labels, len(pixels)).sum()
        grads = torch.autograd.grad(
            loss, list(self.parameters.values()), create_graph=create_graph, allow_unused=True, materialize_grads=True
        )
        found = dict(zip(self.parameters, grads, strict=True))
        return [cut(found[e.parameter], e).flatten() for e in self.entries]

    def _losses(self, pixels: Tensor, labels: Tensor, batch: int) -> Tensor:
        losses = model_losses(self.victim.module, {"pixel_values": pixels}, labels, self.victim.task, "sum")
        return losses / batch if self.reduction == "mean" else losses

    def _gathered(self, factors: dict[str, list[Factor]]) -> Gradients:
        formed, products, squares = {}, {}, {}
        for name, uses in factors.items():
            if all(_cheaper_formed(use) for use in uses):
                formed[name] = _sum([use.each().flatten(1) for use in uses])
            else:
                products[name], squares[name] = inner(uses, self.thin[name]), squared_norms(uses)
        return self._gradients(formed, products, squares)

    def _gradients(
        self, formed: dict[str, Tensor], products: dict[str, Tensor], squares: dict[str, Tensor]
    ) -> Gradients:
        wanted, names = [self.targets[name] for name in formed], tuple(formed)
        if names not in self.joined:
            self.joined[names] = torch.cat(wanted) if wanted else next(iter(self.targets.values()))[:0]
        known = [self.squares[name] for name in products]
        return Gradients(
            list(formed.values()),
            wanted,
            self.joined[names],
            list(products.values()),
            list(squares.values()),
            known,
            self.norm,
        )

    def _thin(self, rank: int) -> dict[str, Tensor | LowRank]:
        """Observed gradients of linear layers that see each sample once: a clean one has as many rows as samples."""
        full = {e.name: self.targets[e.name].view(e.shape) for e in self.entries}
        return {name: low_rank(target, rank) or target for name, target in full.items()}

    @contextmanager
    def _modes(self) -> Iterator[None]:
        """Evaluation mode, but for BatchNorm where the client trained: attacks cannot replay dropout, but batches."""
        module = self.victim.module
        modes = {part: part.training for part in module.modules()}
        module.eval()
        if self.training:
            for part in norms(module).values():
                part.training = True
        try:
            with untracked(module):
                yield
        finally:
            for part, training in modes.items():
                part.training = training


def confidence(cosine: float, values: int, unknowns: int) -> float:
    """How much more of the observed direction a candidate explains than pixels could explain of noise, 0..1.

    `unknowns` free numbers fit about unknowns / values of the energy of noise; this is the rest's share that is
    explained (the adjusted R squared of regression). 0 where fewer values were observed than pixels are sought: there
    a match proves nothing.

    Args:
        cosine: between the candidate's gradient and the observed one.
        values: observed.
        unknowns: pixels sought.
    """
    free = unknowns / values
    if free >= 1:
        return 0.0
    return float(min(1.0, max(0.0, (max(cosine, 0.0) ** 2 - free) / (1 - free))))


def _cheaper_formed(use: Factor) -> bool:
    """Long samples of a small layer: its gradient has fewer values than the products of its rows."""
    rows, t, columns = use.rows, use.right.shape[1], use.right.shape[2]
    return not use.one_hot and t * (rows + columns) > 2 * rows * columns


def _sum(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
