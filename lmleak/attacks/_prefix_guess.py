"""Which next tokens to run first: a ridge regression from word embeddings to a deep module's input, fitted as we go.

A deep module's input is not linear in the token's embedding, but near enough to sort by. Measured on GPT-2 small's
shape (random weights, ffn_in of layer 5): fitted on 512 of 50,257 tokens it explains half of the variance, and the
true token comes first; on a trained 4-layer model, layer 2, after 1,024 tokens among the first 1,000 or so. The order
only saves time: what is accepted is decided by the exact test.
"""

from __future__ import annotations

import torch
from torch import Tensor

KEEP = 0.5  #: weight of what was learned at earlier prefixes
SKETCH = 96  #: random directions that estimate a prediction's length; its share in the space costs one product more


class Guess:
    """Ridge regression of features [d] on the unit embeddings of one or two tokens. All sums, no examples are kept."""

    def __init__(self, words: Tensor, slots: int, d: int, before: Guess | None = None):
        """Args: words: [v, f] rows to regress on; slots: tokens a candidate; d: width of the feature; before: the guess
        at another prefix, whose slope (not its mean) serves here until this prefix has examples of its own."""
        self.words, self.slots = words, slots
        f = words.shape[1] * slots
        self.count = 0
        self.sum_f, self.sum_x = words.new_zeros(f), words.new_zeros(d)
        self.ff, self.fx = words.new_zeros(f, f), words.new_zeros(f, d)
        self.slope = None if before is None else before.centred()

    def add(self, tokens: Tensor, x: Tensor) -> None:
        """Learns from candidates tokens [k, slots] and their features x [k, d]."""
        phi, x = self.words[tokens].flatten(1), x.to(self.words.dtype)
        self.count += len(phi)
        self.sum_f += phi.sum(0)
        self.sum_x += x.sum(0)
        self.ff += phi.T @ phi
        self.fx += phi.T @ x

    @property
    def weight(self) -> float:
        """Examples that the fit stands on, earlier prefixes' at their weight."""
        return self.count + (KEEP * self.slope[2] if self.slope else 0.0)

    def centred(self) -> tuple[Tensor, Tensor, float]:
        """Moments about the means, those of earlier prefixes at half their weight, and the weight of all."""
        mean_f, mean_x = self.sum_f / self.count, self.sum_x / self.count
        ff = self.ff - self.count * torch.outer(mean_f, mean_f)
        fx = self.fx - self.count * torch.outer(mean_f, mean_x)
        if self.slope is None:
            return ff, fx, self.weight
        return ff + KEEP * self.slope[0], fx + KEEP * self.slope[1], self.weight

    def project(self, basis: Tensor, without: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Predicted features' coordinates as parts that add up.

        Args:
            basis: [r, d] orthonormal rows.
            without: [n, d] orthonormal rows whose share of a feature does not count as length.

        Returns:
            [slots, v, r + SKETCH] each token's contribution in each slot, centred on the sample; [r + SKETCH] constant;
            the last SKETCH coordinates are random ones whose squares sum to the squared length on average.
        """
        d, f = len(self.sum_x), len(self.sum_f)
        draw = torch.Generator().manual_seed(0)
        sketch = torch.randn(d, SKETCH, generator=draw).to(self.words) / SKETCH**0.5
        if without is not None:
            without = without.to(self.words)
            sketch = sketch - without.T @ (without @ sketch)
        onto = torch.cat([basis.T.to(self.words), sketch], 1)
        mean_f, mean_x = self.sum_f / self.count, self.sum_x / self.count
        gram, cross, weight = self.centred()
        # A tenth of the mean eigenvalue while examples are scarce, less when they outnumber the unknowns.
        ridge = 0.1 * min(1.0, 2 * f / weight) * gram.diagonal().mean()
        gram.diagonal().add_(ridge + 1e-12)
        coefficients = torch.linalg.solve(gram, cross @ onto).view(self.slots, -1, onto.shape[1])
        centre = mean_f.view(self.slots, -1)
        parts = torch.stack([self.words @ c - m @ c for c, m in zip(coefficients, centre, strict=True)])
        return parts, mean_x @ onto


def outside(coordinates: Tensor) -> Tensor:
    """Predicted share of the squared length outside the space, [...]; coordinates [..., r + SKETCH]."""
    inside, length = coordinates[..., :-SKETCH].pow(2).sum(-1), coordinates[..., -SKETCH:].pow(2).sum(-1)
    return 1 - inside / length.clamp_min(1e-30)


def best_pairs(parts: Tensor, constant: Tensor, width: int, count: int) -> Tensor:
    """The `count` pairs (first, second) with the smallest predicted share outside, among the `width` tokens that are
    best in each slot when the other is averaged out: [count, 2] token ids, best first."""
    short = [outside(part + constant).topk(min(width, part.shape[0]), largest=False).indices for part in parts]
    first, second = parts[0][short[0]] + constant, parts[1][short[1]]
    r = first.shape[1] - SKETCH

    def squared(a: Tensor, b: Tensor) -> Tensor:
        return a.pow(2).sum(1)[:, None] + b.pow(2).sum(1) + 2 * a @ b.T

    scores = 1 - squared(first[:, :r], second[:, :r]) / squared(first[:, r:], second[:, r:]).clamp_min(1e-30)
    best = scores.flatten().topk(min(count, scores.numel()), largest=False).indices
    return torch.stack([short[0][best // scores.shape[1]], short[1][best % scores.shape[1]]], 1)
