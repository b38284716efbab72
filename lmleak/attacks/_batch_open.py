"""Sentences of a batch from one module at any depth, where layer 0 says nothing: no words, positions or lengths.

One sentence's inputs lie in the observed space whatever its neighbours are. The rank is the sum of the lengths: those
near their mean are tried first. Relaxations over the whole vocabulary end in blends of the sentences, but of their own
words: what follows searches among these words only, with many restarts, and makes the best end longer or shorter by a
word. What is found is deflated, which leaves a smaller batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lmleak.attacks._batch_energy import Deflated
from lmleak.attacks._discrete import Search
from lmleak.attacks._subspace_relax import Schedule, relax
from lmleak.attacks._text import Frame

DESCENTS = 4  #: ends of a relaxation that descend
RESTARTS = 4  #: times those of the whole vocabulary, where only words met before are searched
SPREAD = 5  #: lengths tried at first; all in the end
FRESH = 3  #: every so many rounds start over the whole vocabulary


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
        self.grown: set[tuple[int, ...]] = set()  #: guesses whose longer and shorter neighbours were tried
        self.met = words.new_zeros(0)  #: words that relaxations over the whole vocabulary ended near

    @property
    def missing(self) -> int:
        """Sentences still to be found; none once nothing is left to explain."""
        return self.size - len(self.found) if self.energy.left else 0

    def doubtful(self) -> list[tuple[int, ...]]:
        """The best of what was not found, as many as are missing."""
        return [tokens for _, tokens in sorted(self.guesses.values()) if tokens not in self.found][: self.missing]

    def lengths(self) -> list[int]:
        """Lengths that the next sentence may have, those near the mean first."""
        rest = self.total - sum(map(len, self.found))
        if self.missing == 1:
            return [rest]
        least = self.frame.size + 1
        mean = rest / max(1, self.missing)
        return sorted(range(least, rest - (self.missing - 1) * least + 1), key=lambda n: abs(n - mean))

    def run(self) -> None:
        """Until every sentence is found or the budget is spent."""
        while self.missing and self.lengths() and self.energy.evaluations < self.budget:
            before = len(self.found)
            self._round()
            if len(self.found) > before:
                self.guesses.clear()
            self.rounds += 1

    def _round(self) -> None:
        fresh = self.rounds % FRESH == 0
        lengths = self.lengths()[: SPREAD * (1 + self.rounds // FRESH)]
        for length in lengths[:: max(1, len(lengths) // 3)] if fresh else lengths:
            if self._attempt(length, fresh) or self.energy.evaluations >= self.budget:
                return
            if not fresh and self._resized():
                return

    def _resized(self) -> bool:
        """The best guess not tried so with one word more or less; whether that is a sentence."""
        untried = sorted(guess for guess in self.guesses.values() if guess[1] not in self.grown)
        if not untried:
            return False
        _, tokens = untried[0]
        self.grown.add(tokens)
        first, last = len(self.frame.first), len(tokens) - len(self.frame.last)
        longer = [(*tokens[:i], t, *tokens[i:]) for i in range(first, last + 1) for t in self.met.tolist()]
        shorter = [(*tokens[:i], *tokens[i + 1 :]) for i in range(first, last)]
        for others in (longer, shorter):
            length = len(others[0])
            if length not in self.lengths():
                continue
            free = length - self.frame.size
            search = Search(self.energy, self.met, first, first + free, self.ridge, self.shortlist)
            start = min(zip(search.score(others), others, strict=True))[1]
            if self._descended(search, start, self.met.expand(free, -1)):
                return True
        return False

    def _descended(self, search: Search, start: tuple[int, ...], near: Tensor) -> bool:
        best = search.descend(start, near, self.budget)
        if self._accept(best):
            return True
        value = search.score([best])[0] / len(best)
        self.guesses[len(best)] = min(self.guesses.get(len(best), (value, best)), (value, best))
        return False

    def _attempt(self, length: int, fresh: bool) -> bool:
        """One relaxation and descents from its best ends; whether a sentence is found."""
        first, free, before = len(self.frame.first), length - self.frame.size, len(self.found)
        words = self.words if fresh else self.met
        schedule = self.schedule if fresh else replace(self.schedule, restarts=RESTARTS * self.schedule.restarts)
        search = Search(self.energy, words, first, first + free, self.ridge, self.shortlist)
        done = lambda rows: self._accept(min(zip(*self._rated(search, rows), strict=True))[1])  # noqa: E731
        pool = relax(self.energy, self.frame, free, words, schedule, self.generator, done)
        near = pool.best(3 * schedule.restarts)
        if fresh:
            self.met = torch.cat([self.met, near.flatten()]).unique()
        if len(self.found) > before:
            return True
        for _, start in sorted(zip(*self._rated(search, pool.sentences(self.frame)), strict=True))[:DESCENTS]:
            if self._descended(search, start, near):
                return True
        return False

    def _rated(self, search: Search, rows: Tensor) -> tuple[list[float], list[tuple[int, ...]]]:
        sentences = list(dict.fromkeys(map(tuple, rows.tolist())))
        return search.score(sentences), sentences

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
