"""The words of rows that were solved for: a linear model of a row given its word and place, fitted on random sentences.

The context of a word is noise in that model. MiniLM, 8 CoLA sentences, 9,000 rows of random words: of 68 words of which
the row at layer 4 is known, 68 are the likeliest of 29,000, and all stand in their place; words known are then kept in
the sentences sampled, and the noise falls.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from lmleak.attacks._energy import Energy
from lmleak.attacks._subspace_relax import framed
from lmleak.attacks._subspace_rows import Hidden, Rows
from lmleak.attacks._text import Frame

ROUNDS = 6  #: of sampling, solving and reading
SAMPLE = 16  #: rows in the first sample, over a row's dimensions; half as many later
KEPT = 0.7  #: of the words read, in every later sentence sampled: the others vary, for the fit
TOP = 300  #: words a row that are looked at place by place
SCAN = 3  #: places unread, up to which every word is tried there
PATIENCE = 2  #: rounds after which a search takes over what is left, where that is one row or a word misread
POOL = 32  #: words proposed for every place


@dataclass(frozen=True)
class Guess:
    """A sentence, and words that may stand at its free places instead."""

    tokens: tuple[int, ...]
    pool: Tensor  #: [free, m]
    rows: int  #: solved for
    verdict: float  #: below 1 where the sentence explains the gradient


class Model:
    """Rows as mean of the place + linear map of the word + Gaussian noise."""

    def __init__(self, rows: Tensor, bodies: Tensor, start: int, table: Tensor, words: Tensor):
        """Fitted to rows [k, n, d] of sentences whose free tokens, from place `start` on, are `bodies` [k, free]."""
        free = range(start, start + bodies.shape[1])
        known, mean = table[bodies], rows.mean(0)
        centre = known.mean(0)  # of every place: words already read stand there more often than others
        y = (known - centre).flatten(0, 1)
        x = (rows - mean)[:, free.start : free.stop].flatten(0, 1)
        gram = y.T @ y
        gram.diagonal().add_(1e-4 * gram.diagonal().mean())
        map_ = torch.linalg.solve(gram, y.T @ x)
        noise = x - y @ map_
        cov = noise.T @ noise / len(noise)
        cov.diagonal().add_(1e-3 * cov.diagonal().mean())
        self.free = free
        self.factor = torch.linalg.cholesky(cov)
        self.mean, self.shifts = mean.clone(), table[words] @ map_
        self.mean[free.start : free.stop] -= centre @ map_
        self.words, self.places = self._white(self.shifts), self._white(self.mean)

    def _white(self, x: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.factor, x.T, upper=False).T

    def rows(self, place: int, words: Tensor | slice = slice(None)) -> Tensor:
        """Expected rows [m, d] of words, indices, at a place."""
        return self.mean[place] + self.shifts[words]

    def read(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Likeliest words of rows [k, d], each row at a place of its own.

        Returns:
            Places [k]; words of every row at its place, likeliest first, [k, m] indices into the vocabulary's words.
        """
        at = self._white(rows)
        length = self.words.square().sum(1)
        middle = at - self.places[self.free.start : self.free.stop].mean(0)
        close = (length - 2 * middle @ self.words.T).topk(min(TOP, len(length)), largest=False).indices  # [k, top]
        known = self.words[close]
        price = at.new_zeros(len(at), len(self.places), close.shape[1])
        for place, mean in enumerate(self.places):
            left = at - mean
            price[:, place] = left.square().sum(1)[:, None]
            if place in self.free:
                price[:, place] += length[close] - 2 * (known @ left[..., None])[..., 0]
        row, place = linear_sum_assignment(price.amin(-1).cpu().numpy())
        places = torch.from_numpy(place).to(at.device)
        order = price[torch.from_numpy(row).to(at.device), places].argsort(-1)
        return places, close.gather(1, order)


def guess(
    hidden: Hidden, energy: Energy, frame: Frame, free: int, words: Tensor, generator: torch.Generator, limit: int
) -> Guess:
    """Samples, solves and reads until the sentence explains the gradient, for `ROUNDS` rounds at most.

    Args:
        energy: attached, the block's second matrix its first site.
        limit: evaluations of `energy` that may be spent.
    """
    start, n = len(frame.first), free + frame.size
    rows = Rows(hidden)
    told = words.new_full((free,), -1)
    pool = words.new_zeros(free, 0)
    verdict = math.inf
    for turn in range(ROUNDS):
        count = math.ceil(SAMPLE * hidden.weight.shape[1] / n / (2 if turn else 1))
        bodies = words[torch.randint(len(words), (count, free), generator=generator).to(words.device)]
        kept = (torch.rand(count, free, generator=generator) < KEPT).to(words.device) & (told >= 0)
        bodies = torch.where(kept, told, bodies)
        z, x = hidden.sample(energy, framed(bodies, frame))
        model = Model(z, bodies, start, energy.table, words)
        # Places whose word is known are solved. Where nothing is read: words that show most of what is not explained.
        unread = (told < 0).nonzero().flatten()
        share = rows.unexplained(x[:, start : start + free].flatten(0, 1)).view(count, free)
        pool = bodies.gather(0, share.topk(min(POOL, count, len(words)), 0).indices).T.clone()
        if rows.missing:
            places = [i for i in range(n) if not start <= i < start + free or told[i - start] < 0]
            starts = [z[:, places].flatten(0, 1)]
            if turn and len(unread) <= SCAN:
                for place in unread.tolist():
                    close = _close(rows, model, start + place)
                    pool[place] = words[close]
                    starts.append(model.rows(start + place, close))
            rows.extend(torch.cat(starts))
        told = words.new_full((free,), -1)
        if len(rows.solved):
            for place, likely in zip(*model.read(rows.solved), strict=True):
                if int(place) in model.free:
                    told[place - start] = words[likely[0]]
                    pool[place - start] = words[likely[: pool.shape[1]]]
        tokens = framed(torch.where(told >= 0, told, pool[:, 0])[None], frame)[0]
        verdict = energy.verdict(tokens) if rows.missing < 2 else math.inf
        # What is left of a few words, a search finds sooner.
        if verdict < 1 or (turn >= PATIENCE and rows.missing < 2) or energy.evaluations >= limit:
            break
    return Guess(tuple(tokens.tolist()), pool, len(rows.solved), verdict)


def _close(rows: Rows, model: Model, place: int) -> Tensor:
    """Words, indices [m], whose expected row at a place shows most of what is not explained."""
    share = [rows.unexplained(rows.hidden.activations(part)) for part in model.rows(place).split(4096)]
    return torch.cat(share).topk(min(POOL, len(model.words))).indices
