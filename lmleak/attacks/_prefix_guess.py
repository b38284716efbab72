"""Which next tokens to run first: a ridge regression from word embeddings to a deep module's input, fitted as we go.

A deep module's input is not linear in the token's embedding, but near enough to sort by. Measured on GPT-2 small's
shape (random weights, ffn_in of layer 5): fitted on 512 of 50,257 tokens it explains half of the variance, and the
true token comes first; on a trained 4-layer model, layer 2, after 1,024 tokens among the first 1,000 or so. The order
only saves time: what is accepted is decided by the exact test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lmleak.attacks._prefix_words import Words

KEEP = 0.5  #: weight of what was learned at earlier prefixes
SKETCH = 96  #: random directions that estimate a prediction's length; its share in the space costs one product more
PAIRS = 1 << 22  #: pairs scored at once


@dataclass(frozen=True)
class Prediction:
    """Coordinates of predicted features, as parts that add up over the slots."""

    words: Words
    coefficients: Tensor  #: [slots, f, r + SKETCH]
    centre: Tensor  #: [slots, r + SKETCH] what a slot's average word contributes
    constant: Tensor  #: [r + SKETCH]

    def part(self, slot: int, rows: Tensor) -> Tensor:
        """What words with rows [k, f] contribute in a slot, centred: [k, r + SKETCH]. The last SKETCH coordinates are
        random ones whose squares sum to the squared length on average."""
        return rows @ self.coefficients[slot] - self.centre[slot]

    def scores(self, slot: int, score: Callable[[Tensor], Tensor]) -> Tensor:
        """[v] `score` of the coordinates [k, r + SKETCH] with each word in a slot, the other slots averaged out."""
        return self.words.each(lambda rows: score(self.part(slot, rows) + self.constant))


class Guess:
    """Ridge regression of features [d] on the unit embeddings of one or two tokens. All sums, no examples are kept."""

    def __init__(self, words: Words, slots: int, d: int, before: Guess | None = None):
        """Args: words: rows to regress on; slots: tokens a candidate; d: width of the feature; before: the guess
        at another prefix, whose slope (not its mean) serves here until this prefix has examples of its own."""
        self.words, self.slots = words, slots
        f = words.width * slots
        self.count = 0
        self.sum_f, self.sum_x = words.mean.new_zeros(f), words.mean.new_zeros(d)
        self.ff, self.fx = words.mean.new_zeros(f, f), words.mean.new_zeros(f, d)
        self.slope = None if before is None else before.centred()

    def add(self, tokens: Tensor, x: Tensor) -> None:
        """Learns from candidates tokens [k, slots] and their features x [k, d]."""
        phi, x = self.words[tokens].flatten(1), x.float()
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

    def project(self, basis: Tensor, without: Tensor | None = None) -> Prediction:
        """Predicted features' coordinates in a space and along random directions.

        Args:
            basis: [r, d] orthonormal rows.
            without: [n, d] orthonormal rows whose share of a feature does not count as length.
        """
        d, f = len(self.sum_x), len(self.sum_f)
        draw = torch.Generator().manual_seed(0)
        sketch = torch.randn(d, SKETCH, generator=draw).to(self.sum_x) / SKETCH**0.5
        if without is not None:
            without = without.to(sketch)
            sketch = sketch - without.T @ (without @ sketch)
        onto = torch.cat([basis.T.to(sketch), sketch], 1)
        mean_f, mean_x = self.sum_f / self.count, self.sum_x / self.count
        gram, cross, weight = self.centred()
        # A tenth of the mean eigenvalue while examples are scarce, less when they outnumber the unknowns.
        ridge = 0.1 * min(1.0, 2 * f / weight) * gram.diagonal().mean()
        gram.diagonal().add_(ridge + 1e-12)
        coefficients = torch.linalg.solve(gram, cross @ onto).view(self.slots, -1, onto.shape[1])
        centre = (mean_f.view(self.slots, 1, -1) @ coefficients)[:, 0]
        return Prediction(self.words, coefficients, centre, mean_x @ onto)


def outside(coordinates: Tensor) -> Tensor:
    """Predicted share of the squared length outside the space, [...]; coordinates [..., r + SKETCH]."""
    inside, length = coordinates[..., :-SKETCH].pow(2).sum(-1), coordinates[..., -SKETCH:].pow(2).sum(-1)
    return 1 - inside / length.clamp_min(1e-30)


def best_pairs(prediction: Prediction, width: int, count: int) -> Tensor:
    """The `count` pairs (first, second) with the smallest predicted share outside, among the `width` tokens that are
    best in each slot when the other is averaged out: [count, 2] token ids, best first."""
    words = prediction.words
    short = [prediction.scores(s, outside).topk(min(width, len(words)), largest=False).indices for s in range(2)]
    first, second = (prediction.part(s, words[short[s]]) for s in range(2))
    first = first + prediction.constant
    r = first.shape[1] - SKETCH

    def squared(a: Tensor, b: Tensor) -> Tensor:
        return a.pow(2).sum(1)[:, None] + b.pow(2).sum(1) + 2 * a @ b.T

    kept, which = [], []
    for rows in torch.arange(len(first), device=first.device).split(max(1, PAIRS // len(second))):
        a = first[rows]
        scores = 1 - squared(a[:, :r], second[:, :r]) / squared(a[:, r:], second[:, r:]).clamp_min(1e-30)
        values, at = scores.flatten().topk(min(count, scores.numel()), largest=False)
        kept.append(values)
        which.append(int(rows[0]) * len(second) + at)
    best = torch.cat(which)[torch.cat(kept).argsort()[:count]]
    return torch.stack([short[0][best // len(second)], short[1][best % len(second)]], 1)
