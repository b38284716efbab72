"""Sentences with one place left open: what a score says of the place, and of the word that belongs there.

A local optimum often has one word twice, all behind it one place late, and another word missing, so that neither
deletion nor insertion helps alone. Which word is too many, the score without it says; where one is missing, the score
with a blank there, the words' mean; which one, a few steps of mirror descent from the blank, where the slope at a wrong
word says little. MiniLM, layers 3 and 4, 20 to 30 tokens: the word too many is the first or second of all (15 times of
15), of 306 to 756 places for a blank the right one is mostly among the first 10, and its word the likeliest after three
steps. Nine words tried everywhere, and 512 at the best places, took ten times the candidates and found less.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn

from lmleak.attacks._energy import CHUNK, SLOPE, Scorer, slope
from lmleak.attacks._subspace_relax import Distributions
from lmleak.attacks._text import put
from lmleak.attacks._vocabulary import FIRST

OPEN = -1  #: stands where a word is left out
STEPS, RATE = 4, 0.8  #: of a blank's distribution, as a relaxation's
PRICE = SLOPE * STEPS  #: evaluations that one blank's words take
FEW = 32  #: blanks whose slopes are held at once

Sentence = tuple[int, ...]


class Asked(Protocol):
    """What is low for the true sentence."""

    def values(self, rows: Tensor, filling: Tensor) -> Tensor:
        """[k] of sentences [k, n] with embeddings [k, d] in their open places."""
        ...

    def slopes(self, rows: Tensor, filling: Tensor) -> Tensor:
        """Gradients of the values by the filling, [k, d]."""
        ...

    def words(self, places: Tensor) -> Distributions:
        """How likely words are at places [k] before anything is asked; pulls are [1, k, d]."""
        ...


def filled(asked: Asked, sentence: Sentence, places: range, surplus: int, blanks: int, count: int) -> list[Sentence]:
    """One of the most harmful words left out, and another filled in, in its place or elsewhere.

    Args:
        places: the free ones.
        surplus: words left out.
        blanks: the best open places of all, `count` words tried in each.
    """
    harm = ranked(asked, (put(sentence, i, OPEN) for i in places))
    rows = []
    for row in harm[:surplus].tolist():
        rest = [word for word in row if word != OPEN]
        rows += [(*rest[:j], OPEN, *rest[j:]) for j in places]
    best = ranked(asked, dict.fromkeys(rows))[:blanks]
    told = likeliest(asked, best, count)
    every = torch.where(best[:, None] == OPEN, told[..., None], best[:, None]).flatten(0, 1)
    return [row for row in dict.fromkeys(map(tuple, every.tolist())) if row != sentence]


def ranked(asked: Asked, rows: Iterable[Sentence]) -> Tensor:
    """Sentences with an open place [k, n], the best first."""
    found = torch.tensor(list(rows))
    held = asked.words(_places(found))
    values = asked.values(found, held.mean(_pull(held, len(found)))[0])
    return found[values.argsort().to(found.device)]


def likeliest(asked: Asked, rows: Tensor, count: int) -> Tensor:
    """The likeliest words of the open places, [k, count]."""
    held = asked.words(_places(rows))
    pull = _pull(held, len(rows))
    for _ in range(STEPS):
        steep = asked.slopes(rows, held.mean(pull)[0])[None]
        pull = pull + RATE * steep / held.spread(steep)
    return held.likeliest(pull, count)[0].to(rows.device)


@contextmanager
def filled_in(table: nn.Module, blank: Tensor, filling: Tensor | None) -> Iterator[None]:
    """Inside, the token table gives embeddings [p, d] in the open places of [k, n], row by row, if there are any."""
    if filling is None:
        yield
        return
    put = lambda module, args, output: output.masked_scatter(blank[..., None], filling)  # noqa: E731
    hook = table.register_forward_hook(put)
    try:
        yield
    finally:
        hook.remove()


class OfEnergy:
    """Asks an energy over embeddings.

    Args:
        words: [m] tokens that may stand in a sentence, the commonest first.
    """

    def __init__(self, energy: Scorer, words: Tensor, ridge: float):
        self.energy, self.among, self.ridge = energy, words, ridge

    @cached_property
    def held(self) -> Distributions:
        """Words by how common they are."""
        prior = -(torch.arange(len(self.among)) + FIRST).to(self.energy.table).log()
        return Distributions(self.energy.table, self.among, prior[None])

    @torch.no_grad()
    def values(self, rows: Tensor, filling: Tensor) -> Tensor:
        """See `Asked`."""
        parts = zip(rows.split(CHUNK), filling.split(CHUNK), strict=True)
        return torch.cat([self.energy(self._embedded(*part), self.ridge)[0] for part in parts])

    def slopes(self, rows: Tensor, filling: Tensor) -> Tensor:
        """See `Asked`."""
        out = []
        for part, some in zip(rows.split(FEW), filling.split(FEW), strict=True):
            steep = slope(self.energy, self._embedded(part, some), self.ridge)
            out.append(steep[(part == OPEN).to(steep.device)])
        return torch.cat(out)

    def words(self, places: Tensor) -> Distributions:
        """See `Asked`: everywhere the same."""
        return self.held

    def _embedded(self, rows: Tensor, filling: Tensor) -> Tensor:
        rows = rows.to(filling.device)
        return torch.where((rows == OPEN)[..., None], filling[:, None], self.energy.table[rows.clamp_min(0)])


def _places(rows: Tensor) -> Tensor:
    return (rows == OPEN).nonzero()[:, 1]


def _pull(held: Distributions, count: int) -> Tensor:
    return held.table.new_zeros(1, count, held.table.shape[1])
