"""Blanks under the likelihood: words too many and words missing in a local optimum, see `_blanks`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

from torch import Tensor

from lmleak.attacks._blanks import filled
from lmleak.attacks._likelihood_moves import Space
from lmleak.attacks._likelihood_score import Candidate, Scorer
from lmleak.attacks._subspace_relax import Distributions

SURPLUS, BLANKS, WORDS = 4, 16, 4  #: words left out in turn, the best open places, words tried in each


class Blanks:
    """Of one release."""

    def __init__(self, scorer: Scorer, space: Space):
        self.scorer, self.among = scorer, space.words

    @cached_property
    def held(self) -> Distributions:
        """Every word that the space has."""
        return Distributions(self.scorer.table, self.among.to(self.scorer.table.device))

    def of(self, at: Candidate, space: Space, free: range) -> list[Candidate]:
        """Changes of a sentence: a word left out and another filled in."""
        changed = filled(self.asked(space, at.label), at.tokens, free, SURPLUS, BLANKS, WORDS)
        return [replace(at, tokens=row) for row in changed]

    def asked(self, space: Space, label: int) -> Likelihood:
        """The release, asked for sentences of one label."""
        return Likelihood(self.scorer, self.held, space, label)


class Likelihood:
    """Nats of a sentence, the sign turned."""

    def __init__(self, scorer: Scorer, held: Distributions, space: Space, label: int):
        self.scorer, self.held, self.space, self.label = scorer, held, space, label

    def values(self, rows: Tensor, filling: Tensor) -> Tensor:
        """See `_blanks.Asked`."""
        return -self.scorer.blank(self._candidates(rows), filling)

    def slopes(self, rows: Tensor, filling: Tensor) -> Tensor:
        """See `_blanks.Asked`."""
        return -self.scorer.blank(self._candidates(rows), filling, slopes=True)

    def words(self, places: Tensor) -> Distributions:
        """See `_blanks.Asked`: by how common words are, everywhere the same.

        What the release itself says of words at places is sure of some where they do not stand, and a blank that begins
        at one word is no blank: MiniLM, layer 0, six cells, 4 found with half of it and 6 without.
        """
        weights = self.space.weights if self.space.common is None else self.space.common
        return self.held.told((weights / weights.sum()).log()[None].to(self.held.table))

    def _candidates(self, rows: Tensor) -> Sequence[Candidate]:
        return [Candidate(tuple(row), self.label) for row in rows.tolist()]
