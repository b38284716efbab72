"""The discrete half of the subspace attack: descent over replaced, swapped, moved and re-inserted tokens.

The energy's gradient at the current sentence estimates every change at once, over the whole vocabulary (HotFlip,
Ebrahimi et al. 2018, 1712.06751); only the most promising changes of each kind are evaluated.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lmleak.attacks._energy import Energy


class Search:
    """Descends from given sentences, remembers every sentence it has scored."""

    def __init__(self, energy: Energy, words: Tensor, first: int, last: int, ridge: float, shortlist: int):
        self.energy, self.words, self.ridge, self.shortlist = energy, words, ridge, shortlist
        self.places = range(first, last)  #: free positions
        self.scores: dict[tuple[int, ...], float] = {}
        self.local: set[tuple[int, ...]] = set()  #: sentences that no shortlisted change improves

    def score(self, sentences: list[tuple[int, ...]]) -> list[float]:
        """Energies; only sentences not met before are evaluated."""
        new = [s for s in dict.fromkeys(sentences) if s not in self.scores]
        if new:
            values = self.energy.of_tokens(torch.tensor(new, device=self.energy.table.device), self.ridge)
            self.scores.update(zip(new, values.tolist(), strict=True))
        return [self.scores[s] for s in sentences]

    def descend(self, sentence: tuple[int, ...], pool: Tensor, limit: int) -> tuple[int, ...]:
        """Best sentence reached by single changes, until none helps or `limit` evaluations are spent in all.

        Args:
            pool: [free, m] tokens to try at each position beside those the gradient proposes.
        """
        self.score([sentence])
        while self.energy.evaluations < limit and sentence not in self.local:
            slope = self._slope(sentence)
            for changes in (self._replaced(sentence, slope, pool), self._reordered(sentence, slope, pool)):
                better = self._best(sentence, list(changes))
                if better != sentence:
                    break
            else:
                self.local.add(sentence)
            sentence = better
        return sentence

    def _best(self, current: tuple[int, ...], changed: list[tuple[int, ...]]) -> tuple[int, ...]:
        """The best of the changes, or of the helpful ones made together."""
        if not changed:
            return current
        here = self.scores[current]
        ranked = sorted(zip(self.score(changed), changed, strict=True))
        if ranked[0][0] >= here:
            return current
        joint, together = list(current), []
        touched: set[int] = set()
        for value, other in ranked:
            places = {i for i, (a, b) in enumerate(zip(current, other, strict=True)) if a != b}
            if value >= here:
                break
            if not places & touched:
                touched |= places
                for i in places:
                    joint[i] = other[i]
                together.append(tuple(joint))
        best = min(zip(self.score(together), together, strict=True))
        return best[1]

    def _slope(self, sentence: tuple[int, ...]) -> Tensor:
        embeds = self.energy.table[torch.tensor(sentence, device=self.energy.table.device)][None].requires_grad_(True)
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(self.energy(embeds, self.ridge)[0].sum(), embeds)
        self.energy.evaluations += 2
        return slope[0]

    def _replaced(self, sentence: tuple[int, ...], slope: Tensor, pool: Tensor) -> Iterator[tuple[int, ...]]:
        table = self.energy.table
        for row, place in enumerate(self.places):
            near = (table[self.words] @ slope[place]).topk(min(self.shortlist, len(self.words)), largest=False).indices
            own = pool[row].unique()
            own = own[(table[own] @ slope[place]).argsort()[: self.shortlist]]
            for token in dict.fromkeys(self.words[near].tolist() + own.tolist()):
                if token != sentence[place]:
                    yield (*sentence[:place], token, *sentence[place + 1 :])

    def _reordered(self, sentence: tuple[int, ...], slope: Tensor, pool: Tensor) -> list[tuple[int, ...]]:
        """Swaps, moves, and deletions with an insertion elsewhere, shortlisted by their estimate."""
        places = list(self.places)
        swaps, moves = [], []
        for i in places:
            for j in places:
                if i < j:
                    other = list(sentence)
                    other[i], other[j] = other[j], other[i]
                    swaps.append(tuple(other))
                if i != j:
                    other = list(sentence)
                    other.insert(j, other.pop(i))
                    moves.append(tuple(other))
        tokens = pool.unique()
        inserted = []
        for i in places:
            for j in places:
                if i == j:
                    continue
                other = list(sentence)
                other.pop(i)
                other.insert(j, -1)
                choice = tokens[(self.energy.table[tokens] @ slope[j]).topk(min(4, len(tokens)), largest=False).indices]
                inserted += [(*other[:j], token, *other[j + 1 :]) for token in choice.tolist()]
        width = self.shortlist * len(places)
        return [s for kind in (swaps, moves, inserted) for s in self._estimated(sentence, slope, kind, width)]

    def _estimated(
        self, sentence: tuple[int, ...], slope: Tensor, others: list[tuple[int, ...]], width: int
    ) -> list[tuple[int, ...]]:
        """The `width` changes with the lowest first-order estimate."""
        others = [s for s in dict.fromkeys(others) if s != sentence]
        if len(others) <= width // 2:
            return others
        device = slope.device
        vocabulary = sorted({t for s in others for t in s})
        index = {t: i for i, t in enumerate(vocabulary)}
        price = slope @ self.energy.table[torch.tensor(vocabulary, device=device)].T  # [n, m]
        rows = torch.tensor([[index[t] for t in s] for s in others], device=device)
        cost = price.expand(len(rows), -1, -1).gather(2, rows[..., None])[..., 0].sum(1)
        return [others[i] for i in cost.topk(min(width // 2, len(others)), largest=False).indices.tolist()]
