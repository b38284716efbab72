"""What a noised weight gradient says of a module's next input: a profile likelihood, no rank and no threshold to set.

The gradient is a matrix of low rank (one row a token) plus noise. Its noise level, and how many directions rise above
it, follow from its own spectrum: the largest singular value of a pure noise matrix [o, d] is known (Tracy-Widom). If an
input x is one of the rows, forcing x into the fitted rows costs little likelihood; the cost is the smallest root of a
secular equation, in closed form for all candidates at once. Rows that are settled are projected out for good.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lmleak.attacks._rowspace import RowSpace

TAIL = 3.3  #: Tracy-Widom (beta 1) at 99.9 %: so far above its mean, in its own unit, is chance once in a thousand
HALVES = (torch.bfloat16, torch.float16)
LEAN = 128  #: directions below the noise's edge that the screening of the whole vocabulary looks along
HALVINGS = 40  #: of the interval that holds the secular equation's root: more than float32 resolves
DRAWS = 3  #: of rounding noise; the largest singular value of them is where directions begin to speak
SURE = 5.0  #: standard deviations of the noise's energy: beyond it, rows have left something unexplained


@dataclass(frozen=True)
class Rounding:
    """What the number format of a rounded gradient [o, d] says of its noise."""

    columns: Tensor  #: [d] float64, expected energy of the noise in every column
    spread: float  #: standard deviation of the noise's energy
    rank: int  #: directions that rise above it

    def above(self, gradient: Tensor, frame: Tensor) -> float:
        """What orthonormal rows frame [n, d] leave of the gradient [o, d] above the expected rounding, as energy."""
        left = float((gradient - gradient @ frame.T @ frame).square().sum())
        return left - float((self.columns * (1 - frame.square().sum(0)).clamp_min(0)).sum())


@dataclass(frozen=True)
class Rows:
    """What is left of one gradient's row space behind the settled rows."""

    basis: Tensor  #: [r, d] orthonormal directions above the noise
    strength: Tensor  #: [r] what turning each away costs: its energy without noise, squared, over its energy
    settled: Tensor  #: [n, d] orthonormal


class Evidence:
    """One module's gradient [o, d] under noise."""

    def __init__(self, gradient: Tensor):
        self.raw = g = gradient.double()
        self.out, self.d = g.shape
        # Rounding moves every value in proportion to itself: with rows and columns of like size, the error is nearly
        # even. How large it is in all, and how many directions rise above it, the format's own steps say.
        self.columns = g.new_ones(self.d)
        self.rounding = rounding(gradient)
        if self.rounding is not None:
            rows, self.columns = (g.square().mean(i).clamp_min(1e-300).rsqrt() for i in (1, 0))
            g = g * rows[:, None] * self.columns
        self.gradient = g
        # Squares lose half of float64's digits; noise that matters is above that.
        wide = self.out < self.d
        energy, vectors = torch.linalg.eigh(g @ g.T if wide else g.T @ g)
        energy, vectors = energy.flip(0).clamp_min(0), vectors.flip(1)
        self.noise, self.rank = noise_level(energy, self.out, self.d)
        # The attacker's own forward rounds: a strong row that is off by so little leaves energy that is no other row's.
        if self.rounding is not None:
            # Uneven noise raises directions of its own (26 where 13 tokens stand): it is as large as the first of them.
            self.rank = self.rounding.rank
            self.noise = max(self.noise, float(energy[self.rank]) / edge(self.out, self.d))
        off = 4 * torch.finfo(torch.float32).eps * self.d**0.5
        self.noise = max(self.noise, float(energy[0]) * off**2 / edge(self.out, self.d))
        self.edge = edge(self.out, self.d) * self.noise
        self.rank = min(self.rank, int((energy > self.edge).sum()))
        top = vectors[:, : self.rank]
        right = (g.T @ top / energy[: self.rank].sqrt()) if wide else top
        self.scaled = right.T * energy[: self.rank].sqrt()[:, None]  # [r, d], the gradient without its tail
        # Rows too weak to rise above the noise still lean towards its largest directions, and a row taken for another
        # leaves some of the largest half explained.
        wanted = self.rank + LEAN
        near, kept = vectors[:, :wanted], energy[:wanted]
        self.near = ((g.T @ near / kept.clamp_min(1e-300).sqrt()) if wide else near).T
        rest = float(energy[wanted:].sum()) / max(1, self.d - wanted)
        self.lean, self.rest = (kept - rest) / self.noise, rest / self.noise

    def start(self) -> Rows:
        """Nothing settled."""
        return self._rows(self.scaled.new_zeros(0, self.d))

    def settle(self, rows: Rows, x: Tensor) -> Rows:
        """With the row x [d] settled: projected out, and with it one direction, if x explains one."""
        x = x.double() * self.columns
        new = _off(x, rows.settled)
        if float(new.norm()) <= 1e-9 * float(x.norm()):
            return rows
        return self._rows(torch.cat([rows.settled, (new / new.norm())[None]]))

    def _rows(self, settled: Tensor) -> Rows:
        _, values, right = torch.linalg.svd(_off(self.scaled, settled), full_matrices=False)
        energy = values.square()
        left = int((energy > self.edge).sum())
        floor = self.noise * self.out
        # The k-th direction is off by noise of variance sigma^2 E / (E - floor)^2 in every coordinate.
        strength = (energy[:left] - floor).square() / energy[:left]
        return Rows(right[:left], strength, settled)

    def left(self, rows: Rows) -> int:
        """Directions that no settled row explains: none, under rounding, once the rest is what rounding leaves."""
        if self.rounding is not None and len(rows.settled):
            frame = torch.linalg.qr((rows.settled / self.columns).T).Q.T
            if self.rounding.above(self.raw, frame) < SURE * self.rounding.spread:
                return 0
        return len(rows.basis)

    def cost(self, rows: Rows, x: Tensor) -> Tensor:
        """Likelihood lost by forcing x [..., d] into the rows, in units of -2 log p, about 0 for a true row.

        One further row, beyond what rises above the noise, may also explain x; its price is what the best direction of
        pure noise would gain, its reward the energy it finds (`gain`).
        """
        if not len(rows.basis):
            return -self.gain(rows, x)
        left = _off(x.double() * self.columns, rows.settled)
        coordinates = (left @ rows.basis.T).square()
        turned = self.turn(rows, coordinates, (left.square().sum(-1) - coordinates.sum(-1)).clamp_min(0))
        return torch.minimum(turned, self.extra - self.gain(rows, x))

    @property
    def extra(self) -> float:
        """What the best direction of pure noise gains above the mean one."""
        return 2.0 * (self.out * self.d) ** 0.5

    def screen(self, rows: Rows, x: Tensor) -> Tensor:
        """`cost`, up to a constant, to first order and in x's precision: good enough to sort by. x [k, d]."""
        x = x * self.columns.to(x.dtype)
        frame = torch.cat([rows.settled, rows.basis]).to(x.dtype)
        near = _off(_off(self.near, rows.settled), rows.basis).to(x.dtype)
        n, r = len(rows.settled), len(rows.basis)
        seen = x @ torch.cat([frame, near]).T
        # Not as a difference of squares: what it loses in float32 outweighs the noise where that is small (GPT-2
        # small's shape, 1e-5: the last of 25 tokens was not among the 128 of lowest cost).
        outside = (x - seen[:, : n + r] @ frame).square().sum(-1).clamp_min(1e-12)
        gain = seen[:, n + r :].square() @ self.lean.to(x.dtype) / outside + self.rest - self.out
        if not r:
            return -gain
        turned = self.turn(rows, seen[:, n : n + r].square(), outside, roughly=True)
        return torch.minimum(turned, self.extra - gain)

    def turn(self, rows: Rows, coordinates: Tensor, outside: Tensor, *, roughly: bool = False) -> Tensor:
        """Cost of turning the fitted rows onto x, less its mean for a true row.

        Args:
            rows: what is left.
            coordinates: [..., r] squared coordinates of x in `rows.basis`.
            outside: [...] squared length of the rest.
            roughly: to first order, up to the weakest direction's strength; 40 times cheaper, good enough to sort by.
        """
        mean = self.d - len(rows.basis) - len(rows.settled)
        if roughly:
            small = outside / (coordinates @ rows.strength.reciprocal().to(coordinates)).clamp_min(1e-30)
            return 1 / (1 / small.clamp_min(1e-30) + 1 / float(rows.strength.min())) / self.noise - mean
        low, high = torch.zeros_like(outside), rows.strength.min().expand_as(outside).clone()
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            short = (coordinates / (rows.strength - middle[..., None])).sum(-1) * middle < outside
            low, high = torch.where(short, middle, low), torch.where(short, high, middle)
        return high / self.noise - mean

    def gain(self, rows: Rows, x: Tensor) -> Tensor:
        """Energy of the gradient along what the fitted rows leave of x, above noise; mean 0 for a wrong row."""
        left = _off(_off(x.double() * self.columns, rows.settled), rows.basis)
        return (left @ self.gradient.T).square().sum(-1) / left.square().sum(-1).clamp_min(
            1e-300
        ) / self.noise - self.out

    @property
    def tolerance(self) -> float:
        """Four standard deviations of a true row's cost."""
        return 4.0 * (2.0 * self.d) ** 0.5


def _off(x: Tensor, frame: Tensor) -> Tensor:
    return x - (x @ frame.T) @ frame


def rounding(gradient: Tensor) -> Rounding | None:
    """What rounding to half precision did to a gradient [o, d] whose every value has that format, whatever tensor
    carries it; None for others, and where more is left behind the directions that speak than rounding explains."""
    kind = next((kind for kind in HALVES if bool((gradient == gradient.to(kind).to(gradient.dtype)).all())), None)
    if kind is None:
        return None
    step = _step(gradient, torch.finfo(kind))
    error, draw = step.square() / 12, torch.Generator().manual_seed(0)
    draws = [torch.rand(step.shape, generator=draw, dtype=torch.float64).to(step.device) - 0.5 for _ in range(DRAWS)]
    top = max(float(torch.linalg.matrix_norm(one * step, 2)) for one in draws)
    energy = torch.linalg.svdvals(gradient.double()).square()
    rank = int((energy > top**2).sum())
    # The tail of rounded numbers is no plain noise: it speaks only where it is larger than rounding explains.
    if 2 * rank > len(energy) or float(energy[rank:].sum()) >= 2 * float(error.sum()):
        return None
    return Rounding(error.sum(0), float((2 * error.square().sum()).sqrt()), rank)


def rounded_space(gradient: Tensor, told: Rounding) -> RowSpace:
    """The directions of a rounded gradient [o, d] that rise above its rounding, as a row space.

    A trained 4-layer GPT-2, bfloat16, a sentence of 13 tokens: the spectrum falls by 40 to 260 there; true inputs lie
    0.001 outside or less, the nearest of 1,000 wrong ones 0.22 or more.
    """
    _, values, right = torch.linalg.svd(gradient.double(), full_matrices=False)
    gap = float(values[told.rank - 1] / values[told.rank].clamp_min(1e-300)) if told.rank else 1.0
    return RowSpace(right[: told.rank], values, gap)


def _step(values: Tensor, kind: torch.finfo) -> Tensor:
    """Distance to the next number of the format, float64."""
    exponent = torch.frexp(values.double().abs().clamp_min(kind.tiny)).exponent - 1
    return torch.ldexp(torch.full_like(values, kind.eps, dtype=torch.float64), exponent)


def edge(out: int, d: int) -> float:
    """Largest squared singular value that pure noise of variance 1 has, once in a thousand matrices [out, d]."""
    a, b = out**0.5, d**0.5
    return (a + b) ** 2 + TAIL * (a + b) * (1 / a + 1 / b) ** (1 / 3)


def noise_level(energy: Tensor, out: int, d: int) -> tuple[float, int]:
    """Variance of the noise and the number of directions above it, from squared singular values, descending."""
    count, total, top = 0, energy.sum(), torch.cumsum(energy, 0)
    most = min(out, d) // 2
    while True:
        rest = float(total - (top[count - 1] if count else 0.0))
        variance = rest / ((out - count) * (d - count))
        above = int((energy > variance * edge(out, d)).sum())
        if above <= count:
            return variance, count
        if above > most:
            return variance, 0
        count = above
