"""Sentences of a batch from one module at any depth, where layer 0 says nothing: no words, positions or lengths.

One sentence's inputs lie in the observed space whatever its neighbours are. The rank is the sum of the lengths, and the
shortest sentence is not longer than their mean: all lengths up to it are relaxed over the whole vocabulary, the best
end descends. What is found is deflated, which leaves a smaller batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lmleak.attacks._batch_energy import Deflated
from lmleak.attacks._discrete import Search
from lmleak.attacks._subspace_relax import Pool, Schedule, relax
from lmleak.attacks._text import Frame

DESCENTS = 2  #: lengths a round that descend, of all that were relaxed


@dataclass(frozen=True)
class _End:
    """Where the relaxation of one length stopped."""

    value: float  #: energy a token
    sentence: tuple[int, ...]
    search: Search
    pool: Pool


class OpenSearch:
    """Finds the sentences of a batch one after the other."""

    def __init__(
        self,
        energy: Deflated,
        frame: Frame,
        words: Tensor,
        batch_size: int,
        schedule: Schedule,
        ridge: float,
        shortlist: int,
        budget: int,
        generator: torch.Generator,
        progress: Callable[[tuple[int, ...]], None],
    ):
        self.energy, self.frame, self.words, self.size = energy, frame, words, batch_size
        self.schedule, self.ridge, self.shortlist, self.budget = schedule, ridge, shortlist, budget
        self.generator, self.progress = generator, progress
        # A key's rank is short by one a sentence: its space holds differences.
        self.total = energy.left + (batch_size if all(s.centred for s in energy.sites) else 0)
        self.found: dict[tuple[int, ...], float] = {}  #: sentence -> verdict
        self.guesses: dict[int, tuple[float, tuple[int, ...]]] = {}  #: best of each length
        self.rounds = 0

    @property
    def missing(self) -> int:
        """Sentences still to be found; none once nothing is left to explain."""
        return self.size - len(self.found) if self.energy.left else 0

    def doubtful(self) -> list[tuple[int, ...]]:
        """The best of what was not found, as many as are missing."""
        return [tokens for _, tokens in sorted(self.guesses.values()) if tokens not in self.found][: self.missing]

    def lengths(self) -> list[int]:
        """Lengths that the shortest missing sentence may have, long ones first."""
        rest = self.total - sum(map(len, self.found))
        if self.missing == 1:
            return [rest]
        return list(range(rest // max(1, self.missing), self.frame.size, -1))

    def run(self) -> None:
        """Until every sentence is found or the budget is spent."""
        while self.missing and self.lengths() and self.energy.evaluations < self.budget:
            if self._round():
                self.guesses.clear()
            self.rounds += 1

    def _round(self) -> bool:
        before, ends = len(self.found), []
        for length in self.lengths():
            end = self._relax(length)
            if len(self.found) > before:
                return True
            ends.append(end)
            if self.energy.evaluations >= self.budget:
                break
        for end in sorted(ends, key=lambda end: end.value)[:DESCENTS]:
            best = end.search.descend(end.sentence, end.pool.best(2 * self.schedule.restarts), self.budget)
            if self._accept(best):
                return True
            value = end.search.score([best])[0] / len(best)
            self.guesses[len(best)] = min(self.guesses.get(len(best), (value, best)), (value, best))
        return False

    def _relax(self, length: int) -> _End:
        first, free = len(self.frame.first), length - self.frame.size
        search = Search(self.energy, self.words, first, first + free, self.ridge, self.shortlist)
        hint, trust = None, None
        if length in self.guesses:
            hint, trust = self._trust(self.guesses[length][1])
        done = lambda rows: self._accept(self._best(search, rows)[1])  # noqa: E731
        pool = relax(self.energy, self.frame, free, self.words, self.schedule, self.generator, done, hint, trust)
        value, best = self._best(search, pool.sentences(self.frame))
        return _End(value / length, best, search, pool)

    def _best(self, search: Search, rows: Tensor) -> tuple[float, tuple[int, ...]]:
        sentences = list(dict.fromkeys(map(tuple, rows.tolist())))
        return min(zip(search.score(sentences), sentences, strict=True))

    @torch.no_grad()
    def _trust(self, tokens: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """The free tokens of a sentence, and a probability for each that falls with its residual's rank."""
        ids = torch.tensor(tokens, device=self.energy.table.device)
        residual = self.energy(self.energy.table[ids][None], self.ridge)[1][0]
        free = slice(len(self.frame.first), len(tokens) - len(self.frame.last))
        rank = residual[free].argsort().argsort().float() / max(1, len(residual[free]) - 1)
        return ids[free], 0.9 - 0.8 * rank

    def _accept(self, tokens: tuple[int, ...]) -> bool:
        if tokens in self.found:
            return False
        ids = torch.tensor(tokens, device=self.energy.table.device)
        verdict = self.energy.verdict(ids)
        if verdict >= 1:
            return False
        self.found[tokens] = verdict
        self.energy.deflate(ids)
        self.progress(tokens)
        return True
