"""Sentences with one place left open: what the energy says of the place, and of the word that belongs there.

A blank is the words' mean by how common they are. It ranks the places where a word is missing with one evaluation each,
and from it a few steps of mirror descent lead to the word; the slope at a wrong word does not. MiniLM, layers 3 and 4,
20 to 30 tokens, a word doubled and another one missing: of 306 to 756 places the right one is mostly among the first
10, and its word the likeliest after three steps, where one slope put it up to 300th.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from lmleak.attacks._energy import CHUNK, Scorer, slope
from lmleak.attacks._subspace_relax import Distributions

OPEN = -1  #: stands where a word is left out
STEPS, RATE = 4, 0.8  #: of a blank's distribution, as a relaxation's
ZIPF = 10  #: added to ranks, see `_vocabulary.FIRST`


class Blanks:
    """Of one energy.

    Args:
        words: [m] tokens that may stand in a sentence, the commonest first.
    """

    def __init__(self, energy: Scorer, words: Tensor, ridge: float):
        self.energy, self.words, self.ridge = energy, words, ridge

    @cached_property
    def held(self) -> Distributions:
        """Words by how common they are."""
        prior = -(torch.arange(len(self.words)) + ZIPF).to(self.energy.table).log()
        return Distributions(self.energy.table, self.words, prior[None])

    @torch.no_grad()
    def values(self, sentences: Tensor) -> Tensor:
        """Energies [k] of sentences [k, n], each with one place open."""
        blank = self.held.mean(self._pull(1))[0]
        rows = [
            self.energy(self._embedded(part, blank.expand(len(part), -1)), self.ridge)[0]
            for part in sentences.split(CHUNK)
        ]
        return torch.cat(rows)

    def words_of(self, sentences: Tensor, count: int) -> Tensor:
        """The likeliest words of the open places, [k, count]."""
        pull, places = self._pull(len(sentences)), (sentences == OPEN)
        for _ in range(STEPS):
            steep = slope(self.energy, self._embedded(sentences, self.held.mean(pull)[:, 0]), self.ridge)
            steep = steep[places][:, None]
            pull = pull + RATE * steep / self.held.spread(steep)
        return self.held.likeliest(pull, count)[:, 0]

    def _pull(self, count: int) -> Tensor:
        table = self.energy.table
        return torch.zeros(count, 1, table.shape[1], dtype=table.dtype, device=table.device)

    def _embedded(self, sentences: Tensor, filling: Tensor) -> Tensor:
        """Embeddings [k, n, d] with filling [k, d] at the open places."""
        embeds = self.energy.table[sentences.clamp_min(0)]
        return torch.where((sentences == OPEN)[..., None], filling[:, None], embeds)
