"""Blind search of a batch's sentences, one after the other, where layer 0 does not say which word stands with which.

A sentence's inputs lie in the observed space whatever its neighbours are, so one is relaxed at a time, over the words
that layer 0 admits. What is found is deflated.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lmleak.attacks._batch_energy import Deflated
from lmleak.attacks._batch_places import Places
from lmleak.attacks._discrete import Search
from lmleak.attacks._subspace_relax import Schedule, framed, relax
from lmleak.attacks._text import Frame


class Filtered(Search):
    """Search among the words that layer 0 admits at each position."""

    def __init__(
        self, energy: Deflated, words: Tensor, allowed: Tensor, length: int, frame: Frame, ridge: float, n: int
    ):
        super().__init__(energy, words, len(frame.first), length - len(frame.last), ridge, n)
        column = {t: i for i, t in enumerate(words.tolist())}
        table = allowed.tolist()
        self._may = [{t for t, i in column.items() if row[i]} for row in table]

    def _best(self, current: tuple[int, ...], changed: list[tuple[int, ...]]) -> tuple[int, ...]:
        first = self.places.start
        fits = lambda s: all(s[p] in self._may[p - first] for p in self.places if s[p] != current[p])  # noqa: E731
        return super()._best(current, [s for s in changed if fits(s)])


class BatchSearch:
    """Finds the sentences of a batch one after the other."""

    def __init__(
        self,
        energy: Deflated,
        frame: Frame,
        places: Places,
        batch_size: int,
        schedule: Schedule,
        ridge: float,
        shortlist: int,
        budget: int,
        generator: torch.Generator,
        progress: Callable[[tuple[int, ...]], None],
    ):
        self.energy, self.frame, self.places, self.size = energy, frame, places, batch_size
        self.schedule, self.ridge, self.shortlist, self.budget = schedule, ridge, shortlist, budget
        self.generator, self.progress = generator, progress
        self.total = energy.left + (batch_size if all(s.centred for s in energy.sites) else 0)
        self.found: dict[tuple[int, ...], float] = {}  #: sentence -> verdict
        self.guesses: dict[int, tuple[float, tuple[int, ...]]] = {}  #: best of each length that is not the truth
        self.rounds = 0
        self.prior = torch.where(places.allowed, 0.0, -math.inf)

    def run(self) -> None:
        """Until every sentence is found, nothing is left to explain, or the budget is spent."""
        self.prepare()
        while self.missing and self.energy.evaluations < self.budget:
            spent = self.energy.evaluations
            for length in self.lengths():
                while self.missing and length in self.lengths() and self.energy.evaluations < self.budget:
                    if not self.attempt(length):
                        break
            self.rounds += 1
            if self.energy.evaluations == spent:
                break  # no length fits what is left

    @property
    def missing(self) -> int:
        """Sentences still to be found; none once nothing is left to explain."""
        return self.size - len(self.found) if self.energy.left else 0

    def doubtful(self) -> list[tuple[int, ...]]:
        """The best of what was not found, one of each length, as many as are missing."""
        return [tokens for _, tokens in sorted(self.guesses.values()) if tokens not in self.found][: self.missing]

    def lengths(self) -> list[int]:
        """Lengths that the next sentence may have, long ones first: what is left is the sum of the missing ones."""
        rest = self.total - sum(map(len, self.found))
        if self.missing == 1:
            return [rest]
        least = (self.missing - 1) * (self.frame.size + 1)
        return [n for n in sorted(self.places.lengths, reverse=True) if n <= rest - least]

    @torch.no_grad()
    def prepare(self, rounds: int = 8, width: int = 48) -> None:
        """Ranks the pairs that layer 0 admits by the least a deeper module shows of them outside its space.

        Sentences are drawn, each pair remembers its best, and the next are drawn from the better pairs: a true pair
        needs few true neighbours to lie near the space. Rotten Tomatoes, 4 sentences, drawn at their lengths, 43
        admitted words a position: half of the true pairs are among the best two, 7 of 10 among the best four.
        """
        energy, words, start = self.energy, self.places.words, len(self.frame.first)
        least = torch.full_like(self.prior, math.inf)
        longest = sorted(self.lengths(), reverse=True)
        for trust in range(rounds):
            for length in longest[:: max(1, len(longest) // 4)]:
                free = length - self.frame.size
                draw = torch.rand(width, free, len(words), generator=self.generator).clamp_min(1e-9).to(least)
                pick = (self.prior[:free] - (-draw.log()).log()).argmax(-1)
                residual = energy(energy.table[framed(words[pick], self.frame)], self.ridge)[1]
                for place in range(free):
                    least[place].scatter_reduce_(0, pick[:, place], residual[:, start + place], "amin")
            met = least.isfinite() & self.places.allowed
            best = least.min(1, keepdim=True).values.clamp_min(1e-9)
            known = -(1 + 0.2 * trust) * (least.clamp_min(1e-9) / best).log()
            self.prior = torch.where(met, known, self.prior)

    def attempt(self, length: int) -> bool:
        """One relaxation and a descent from its best end; whether they found a sentence."""
        free = length - self.frame.size
        if not 0 < free <= len(self.prior):
            return False
        words, prior, before = self.places.words, self.prior[:free], len(self.found)
        allowed = self.places.allowed[:free]
        search = Filtered(self.energy, words, allowed, length, self.frame, self.ridge, self.shortlist)
        done = lambda rows: self._check(search, rows)  # noqa: E731
        pool = relax(self.energy, self.frame, free, words, self.schedule, self.generator, done, prior=prior)
        if len(self.found) > before:
            return True
        rows = list(dict.fromkeys(map(tuple, pool.sentences(self.frame).tolist())))
        start = min(zip(search.score(rows), rows, strict=True))[1]
        end = search.descend(start, pool.best(2 * self.schedule.restarts), self.budget)
        if self._accept(end):
            return True
        self.guesses[length] = min(self.guesses.get(length, (math.inf, ())), (search.scores[end] / length, end))
        return False

    def _check(self, search: Search, rows: Tensor) -> bool:
        sentences = [tuple(row) for row in rows.tolist()]
        values = search.score(sentences)
        place = min(range(len(values)), key=values.__getitem__)
        return self._accept(sentences[place])

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
