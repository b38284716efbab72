"""Labels and inputs of the last layer together: the only ones that make its gradient.

`G = sum_i (softmax(W h_i + b) - e_{y_i}) (h_i, 1)^T` has rank B where B < classes, so every (h_i, 1) lies in its row
space: B (B - 1) unknowns and B (classes - 1) equations, and labels that are not the true ones leave a rest. Rows are
scaled to length 1 first: a class that nobody is near has a small row, which rounding has spared as much as the others.

The samples are found one after another. What is left of G points, in its first singular pair, to the next one's input
and to its slopes; log slopes are linear in the input, which gives a start for every label; all samples found so far are
then fitted together (Levenberg and Marquardt), and the best sets of labels go on. In the end the columns are scaled to
length 1, too, so that samples of small slope count, and single labels are changed as long as that helps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BEAM, LABELS = 24, 5  #: sets of labels kept, and labels tried for each next sample
KEPT = 4  #: sets that are improved in the end
SWEEPS = 6
TINY = 1e-300


@dataclass
class System:
    """The gradient in the coordinates of its row space. Shapes: n starts, k samples, r rank, c classes."""

    sizes: Tensor  #: [c] lengths of G's rows
    values: Tensor  #: [r] singular values of the scaled G
    wanted: Tensor  #: [c, r] G in these coordinates
    origin: Tensor  #: [r] of an input whose last value is 1
    free: Tensor  #: [r - 1, r] directions that keep it so
    logits: Tensor  #: [r, c] what a coordinate adds to the logits
    bias: Tensor  #: [c]
    weight: Tensor  #: [r] of the columns in a fit

    @classmethod
    def of(cls, gradient: Tensor, layer_weight: Tensor, bias: Tensor, rank: int) -> System:
        """Of G [c, d + 1], the bias's gradient last."""
        sizes = gradient.norm(dim=1).clamp_min(TINY)
        scaled = gradient / sizes[:, None]
        _, values, right = torch.linalg.svd(scaled, full_matrices=False)
        frame = right[:rank]
        last = frame[:, -1]
        free = torch.linalg.svd(last[None], full_matrices=True).Vh[1:]
        return cls(
            sizes, values[:rank], scaled @ frame.T, last / last.square().sum(), free,
            frame[:, :-1] @ layer_weight.T, bias, torch.ones_like(last),
        )  # fmt: skip

    @property
    def classes(self) -> int:
        return len(self.sizes)

    def slopes(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Coordinates [n, k, r], probabilities and scaled slopes [n, k, c] of inputs [n, k, r - 1]."""
        at = self.origin + inputs @ self.free
        chance = (at @ self.logits + self.bias).softmax(-1)
        return at, chance, (chance - torch.nn.functional.one_hot(labels, self.classes)) / self.sizes

    def rest(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """What the samples make less what is wanted, [n, c, r], columns weighted."""
        at, _, slopes = self.slopes(inputs, labels)
        return (slopes.transpose(1, 2) @ at - self.wanted) * self.weight

    def fit(self, inputs: Tensor, labels: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """Inputs moved to the least rest, and that rest's squared length [n]."""
        turn, n = self.free @ self.logits, len(inputs)
        damping = torch.full((n,), 1e-3, dtype=inputs.dtype, device=inputs.device)
        rest = self.rest(inputs, labels)
        cost = rest.square().sum((1, 2))
        for _ in range(steps):
            at, chance, slopes = self.slopes(inputs, labels)
            moved = chance[:, :, None] * (turn - (chance @ turn.T)[..., None]) / self.sizes  # [n, k, r - 1, c]
            jacobian = torch.einsum("nkjc,nkm->ncmkj", moved, at) + torch.einsum("nkc,jm->ncmkj", slopes, self.free)
            jacobian = (jacobian * self.weight[:, None, None]).reshape(n, rest[0].numel(), -1)
            normal = jacobian.transpose(1, 2) @ jacobian
            size = normal.diagonal(dim1=1, dim2=2)
            ridge = damping[:, None] * size + 1e-15 * size.amax(1, keepdim=True) + 1e-30
            pull = -jacobian.transpose(1, 2) @ rest.reshape(n, -1, 1)
            step = torch.linalg.solve_ex(normal + torch.diag_embed(ridge), pull)[0]
            there = inputs + torch.nan_to_num(step).view_as(inputs)
            new = self.rest(there, labels)
            worth = new.square().sum((1, 2))
            better = worth < cost
            inputs = torch.where(better[:, None, None], there, inputs)
            rest = torch.where(better[:, None, None], new, rest)
            cost = torch.where(better, worth, cost)
            damping = torch.where(better, damping / 4, damping * 5).clamp(1e-14, 1e8)
        return inputs, torch.nan_to_num(cost, nan=float("inf"))

    def next(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The input [n, r - 1] and the slopes [n, c] to which what is left of G points most."""
        left, values, right = torch.linalg.svd(-self.rest(inputs, labels), full_matrices=False)
        at = right[:, 0] / self.weight
        last = at @ (self.origin / self.origin.square().sum())
        last = torch.where(last.abs() < 1e-12, 1e-12, last)
        slopes = left[:, :, 0] * (values[:, 0] * last)[:, None] * self.sizes
        return (at / last[:, None] - self.origin) @ self.free.T, slopes

    def starts(self, near: Tensor, slopes: Tensor, labels: Tensor) -> Tensor:
        """Inputs [n, m, r - 1] near `near` whose log slopes are nearest to those given, for labels [n, m]."""
        classes = self.classes
        own = torch.nn.functional.one_hot(labels, classes).bool()
        slopes = slopes[:, None].expand(-1, labels.shape[1], -1)
        wrong = (-slopes.gather(2, labels[..., None])).clamp(1e-12, 0.98)  # 1 - the label's probability
        chance = (slopes.clamp_min(0) + 1e-3 * wrong).masked_fill(own, 0)
        chance = chance / chance.sum(-1, keepdim=True) * wrong
        trust = torch.where(slopes > 1e-2 * wrong, 1.0, 0.04).masked_fill(own, 0)
        base, turn = self.origin @ self.logits + self.bias, self.free @ self.logits
        lead = turn - turn.T[labels][..., None]  # [n, m, r - 1, c]
        miss = chance.clamp_min(TINY).log() - (1 - wrong).log() - (base - base[labels][..., None])
        normal = torch.einsum("nmjc,nmc,nmkc->nmjk", lead, trust, lead)
        ridge = 0.3
        pull = torch.einsum("nmjc,nmc->nmj", lead, trust * miss) + ridge * near[:, None]
        eye = torch.eye(normal.shape[-1], dtype=normal.dtype, device=normal.device)
        return torch.linalg.solve(normal + ridge * eye, pull[..., None])[..., 0]


def solve(
    gradient: Tensor, weight: Tensor, bias: Tensor, batch: int, rounding: float, hints: Sequence[Tensor] = ()
) -> tuple[Tensor, float]:
    """Labels of the samples that the gradient shows, and how far what they make is from it.

    Args:
        gradient: [classes, d + 1] float64, summed over the batch; the bias's is the last column.
        weight: [classes, d] of the layer.
        bias: [classes] of the layer.
        batch: samples.
        rounding: of the observed values, over their size.
        hints: batches of labels [batch] that are tried beside those that the search finds: of equal labels the slopes
            are nearly one, and a search from the largest down prefers different ones.

    Returns:
        Labels [<= batch], for samples whose slopes drown in rounding show none; and the rest over the scaled gradient.
    """
    sizes = gradient.norm(dim=1, keepdim=True).clamp_min(TINY)
    values = torch.linalg.svdvals(gradient / sizes)
    rank = max(1, min(batch, len(values) - 1, int((values > rounding).sum())))
    system = System.of(gradient, weight, bias, rank)
    free = torch.full_like(sizes[:, 0], batch)
    found = [_searched(system, counts) for counts in (free, *(torch.bincount(h, minlength=len(free)) for h in hints))]
    inputs, labels, cost = (torch.cat(parts) for parts in zip(*found, strict=True))
    rest = float((cost.min() / system.wanted.square().sum()).sqrt())
    return _improved(system, inputs, labels, rounding), rest


def memory(batch: int, classes: int) -> int:
    """Values of the largest tensor that `solve` makes: every change of one label of each kept set."""
    return KEPT * 2 * batch * classes * classes * batch * batch * (batch - 1)


def _searched(system: System, allowed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The best sets of samples, of each label no more than allowed [c]."""
    rank = len(system.values)
    inputs = system.wanted.new_zeros(1, 0, rank - 1)
    labels = torch.zeros(1, 0, dtype=torch.long, device=inputs.device)
    for _ in range(rank):
        inputs, labels, _ = _kept(*_grown(system, inputs, labels, allowed), BEAM)
    inputs, cost = system.fit(inputs, labels, 40)
    order = cost.argsort()[:KEPT]
    return inputs[order], labels[order], cost[order]


def _grown(system: System, inputs: Tensor, labels: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Every set of samples with one more."""
    near, slopes = system.next(inputs, labels)
    used = torch.nn.functional.one_hot(labels, system.classes).sum(1)
    tried = slopes.masked_fill(used >= allowed, float("inf")).argsort(1)[:, :LABELS]
    m = tried.shape[1]
    over = (used >= allowed).gather(1, tried).flatten().repeat(2)
    more = torch.cat([labels[:, None].expand(-1, m, -1), tried[..., None]], 2).flatten(0, 1)
    grown = [
        torch.cat([inputs[:, None].expand(-1, m, -1, -1), start[:, :, None]], 2).flatten(0, 1)
        for start in (system.starts(near, slopes, tried), near[:, None].expand(-1, m, -1))
    ]
    starts, more = torch.cat(grown)[~over], torch.cat([more, more])[~over]
    return _fitted(system, starts, more)


def _fitted(system: System, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    inputs, cost = system.fit(inputs, labels, 8)
    return inputs, labels, cost


def _kept(inputs: Tensor, labels: Tensor, cost: Tensor, count: int, each: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """The best, no more than `each` of one multiset of labels."""
    seen: dict[tuple[int, ...], int] = {}
    rows = []
    for row in cost.argsort().tolist():
        key = tuple(sorted(labels[row].tolist()))
        if seen.get(key, 0) < each:
            seen[key] = seen.get(key, 0) + 1
            rows.append(row)
        if len(rows) == count:
            break
    return inputs[rows], labels[rows], cost[rows]


def _improved(system: System, inputs: Tensor, labels: Tensor, rounding: float) -> Tensor:
    """Labels after changes of single ones, all samples counting alike."""
    system.weight = 1 / system.values.clamp_min(rounding)
    inputs, cost = system.fit(inputs, labels, 10)
    costs = [float(cost.min())]
    every = torch.arange(system.classes, device=labels.device)
    for _ in range(SWEEPS):
        moved, named = [inputs], [labels]
        for place in range(labels.shape[1]):
            others = [other for other in range(labels.shape[1]) if other != place]
            near, slopes = system.next(inputs[:, others], labels[:, others])
            tried = every.expand(len(inputs), -1)
            for start in (near, inputs[:, place]):
                own = inputs[:, None].repeat(1, system.classes, 1, 1)
                own[:, :, place] = system.starts(start, slopes, tried)
                other = labels[:, None].repeat(1, system.classes, 1)
                other[:, :, place] = tried
                moved.append(own.flatten(0, 1))
                named.append(other.flatten(0, 1))
        inputs, labels, cost = _kept(*_fitted(system, torch.cat(moved), torch.cat(named)), KEPT, 1)
        costs.append(float(cost[0]))
        if costs[-1] < 1e-12 or (len(costs) > 2 and costs[-1] > 0.9 * costs[-3]):
            break
    return labels[0]
