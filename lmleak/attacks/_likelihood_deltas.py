"""What matrices say of a word at one place, whatever the word's output gradient is.

A matrix's gradient is sum_i delta_i x_i^T. Take off what it holds along the inputs of the other places; what x_i has
beyond these, times the gradient, is delta_i plus noise. Nobody knows delta_i: a drawn sentence's points elsewhere
(cosine about 0). But the deltas of all sentences share few directions: of MiniLM's 384 at ffn_out of layer 0, 32 hold
60 % of a true sentence's energy. So a Gaussian in these directions is integrated out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lmleak.attacks._rowspace import matrix
from lmleak.models._input import InputLayer
from lmleak.records import Entry, Victim

RANK = 32  #: directions of output gradients
#: A word's output gradient is one of these times what drawn sentences have: MiniLM's for "hall" is six times that for
#: "the". With one size alone, a word of little gradient is ranked by its noise.
SIZES = (0.0, 0.2, 0.5, 1.0, 2.0)
SAMPLED = 768  #: words that a linear fit learns from
RIDGE = 0.01  #: of that fit
MIDDLE = 0.455  #: median of a squared standard normal
SHORT = 1024  #: words looked at exactly after it
CHUNK = 4096  #: words at a time


@dataclass(frozen=True)
class Guess:
    """What is assumed of the places around a word."""

    tokens: tuple[int, ...]
    believed: tuple[int, ...]  #: places whose tokens are taken for true

    @property
    def whole(self) -> bool:
        """Whether all are, so that what attention adds is theirs."""
        return len(self.believed) == len(self.tokens)

    def around(self, place: int) -> list[int]:
        """Places whose inputs explain themselves."""
        return [i for i in self.believed if i != place]


class Part(Protocol):
    """Matrices of one input, or of inputs that follow from one."""

    def nats(self, targets: Mapping[str, Tensor], variance: float, guess: Guess, place: int) -> Tensor:
        """log-likelihood ratio of every word at a place to none, [v]."""
        ...


def log_ratio(along: Tensor, reach: Tensor, spread: Tensor, variance: Tensor) -> Tensor:
    """Nats [v] of y = delta + noise / sqrt(reach) over y = noise alone, delta ~ N(0, size^2 spread), sizes mixed.

    Args:
        along: [v, k] reach times y.
        reach: [v, 1] or [v, k] squared length of the input.
        spread: [k]
        variance: [k] of the noise.
    """
    out = []
    for size in SIZES:
        if size:
            wide = spread * size**2
            fitted = along.square() / (variance * (variance / wide + reach))
            out.append(0.5 * (fitted - torch.log1p(reach * wide / variance)).sum(1))
        else:
            out.append(along.new_zeros(len(along)))
    return torch.stack(out).logsumexp(0)


def directions(deltas: Tensor) -> tuple[Tensor, Tensor]:
    """Basis [o, k] and second moments [k] of output gradients [n, o]."""
    _, values, right = torch.linalg.svd(deltas, full_matrices=False)
    kept = min(RANK, int((values > 1e-6 * values[0].clamp_min(1e-30)).sum()))
    return right[:kept].T, values[:kept].square() / len(deltas)


def outside(rows: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """A gradient [o, d] without what it holds along rows [n, d], and the orthonormal basis [d, m] of these."""
    _, values, right = torch.linalg.svd(rows, full_matrices=False)
    basis = right[values > 1e-5 * values.amax().clamp_min(1e-30)].T
    return gradient - (gradient @ basis) @ basis.T, basis


def beyond(x: Tensor, basis: Tensor) -> Tensor:
    """Squared length [v, 1] of what rows [v, d] hold beyond a basis."""
    return (x.square().sum(1) - (x @ basis).square().sum(1)).clamp_min(0)[:, None]


class Words:
    """The vocabulary, most of which is only priced."""

    def __init__(self, table: Tensor):
        self.table = table
        centred = table - table.mean(0)
        self.unit = torch.nn.functional.normalize(centred, dim=-1)  # what enters a layer is normed
        draw = torch.Generator().manual_seed(0)
        self.sample = torch.randperm(len(table), generator=draw)[:SAMPLED].to(table.device)

    def ratios(self, exact: Callable[[Tensor], tuple[Tensor, Tensor]], spread: Tensor, variance: float) -> Tensor:
        """`log_ratio` of all words [v]: a linear fit to sampled ones prices them, and the best are looked at.

        Args:
            exact: along and reach of words [k].
            spread: of the output gradients.
            variance: of the noise.
        """
        along, reach = exact(self.sample)
        # Unknown words' gradients are in it too.
        seen = (along.square() / reach.clamp_min(1e-12)).median(0).values / MIDDLE
        noise = seen.clamp_min(variance)
        fit, shift = _linear(self.unit[self.sample], torch.cat([along, reach], 1))
        out = []
        for part in self.unit.split(CHUNK):  # all at once takes three times as long
            priced = torch.addmm(shift, part, fit)
            near = priced[:, along.shape[1] :].maximum(reach.amin(0))
            out.append(log_ratio(priced[:, : along.shape[1]], near, spread, noise))
        nats = torch.cat(out)
        best = nats.topk(min(SHORT, len(nats))).indices
        exactly = log_ratio(*exact(best), spread, noise)
        # What is only priced is no better than most of what is looked at.
        nats = nats.clamp_max(float(exactly.median()))
        nats[best] = exactly
        return nats


class Read:
    """Query, key and value: one input, known in closed form."""

    def __init__(self, victim: Victim, words: Words, layer: InputLayer, entries: list[Entry], deltas: Tensor):
        self.victim, self.words, self.layer, self.entries = victim, words, layer, entries
        self.basis, self.spread = directions(deltas.flatten(0, 1))

    def nats(self, targets: Mapping[str, Tensor], variance: float, guess: Guess, place: int) -> Tensor:
        """See `Part`."""
        gradient = torch.cat([matrix(self.victim.module, e, targets[e.name]) for e in self.entries])
        around = guess.around(place)
        known = [self._rows([guess.tokens[i] for i in around], around)]
        if not guess.whole:
            known.append(self._rows(self.words.sample, place).mean(0, keepdim=True))
        gradient, basis = outside(torch.cat(known), gradient)
        turned = gradient.T @ self.basis

        def exact(words: Tensor) -> tuple[Tensor, Tensor]:
            x = self._rows(words, place)
            return x @ turned, beyond(x, basis)

        return self.words.ratios(exact, self.spread, variance)

    def _rows(self, words: Tensor | list[int], places: int | list[int]) -> Tensor:
        device = self.layer.word.device
        words, where = torch.as_tensor(words, device=device), torch.as_tensor(places, device=device)
        return self.layer.rows(words.long(), where.long().expand(len(words)), dtype=self.layer.word.dtype)


def _linear(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares y = x fit + shift, in float64."""
    mean, middle = x.double().mean(0), y.double().mean(0)
    centred = x.double() - mean
    square = centred.T @ centred
    square.diagonal().add_(RIDGE * square.diagonal().mean())
    fit = torch.cholesky_solve(centred.T @ (y.double() - middle), torch.linalg.cholesky(square))
    return fit.to(x.dtype), (middle - mean @ fit).to(x.dtype)
