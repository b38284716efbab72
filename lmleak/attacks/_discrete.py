"""The discrete half of the subspace attack: descent over replaced, swapped, moved and re-inserted tokens.

The energy's gradient at the current sentence estimates every change at once, over the whole vocabulary (HotFlip,
Ebrahimi et al. 2018, 1712.06751); only the most promising changes of each kind are evaluated. Blanks (`_blanks`) and
exchanged runs of words lead out of a local minimum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lmleak.attacks._blanks import PRICE, OfEnergy, filled
from lmleak.attacks._energy import Scorer, of_tokens, slope
from lmleak.attacks._text import put

SURPLUS = 4  #: words left out in turn
BLANKS, MORE = 16, 128  #: best places of a blank whose words are asked for, at first and where nothing else helps
ASKED = 4  #: words tried there
ASSIGNED = 8  #: places with the largest residuals whose words are dealt out anew, all at once


class Search:
    """Descends from given sentences, remembers every sentence it has scored.

    Args:
        words: [m] tokens that may stand in a sentence, the commonest first.
        first, last: the free places, from the first to before the last.
    """

    def __init__(
        self,
        energy: Scorer,
        words: Tensor,
        first: int,
        last: int,
        ridge: float,
        shortlist: int,
    ):
        self.energy, self.words, self.ridge, self.shortlist = energy, words, ridge, shortlist
        self.places = range(first, last)  #: free positions
        self.rows = energy.table[words]
        self.blanks = OfEnergy(energy, words, ridge)
        self.scores: dict[tuple[int, ...], float] = {}
        self.local: set[tuple[int, ...]] = set()  #: sentences that no shortlisted change improves
        self.wide: set[tuple[int, ...]] = set()  #: sentences that `widen` has seen

    def score(self, sentences: list[tuple[int, ...]]) -> list[float]:
        """Energies; only sentences not met before are evaluated."""
        new = [s for s in dict.fromkeys(sentences) if s not in self.scores]
        if new:
            values = of_tokens(self.energy, torch.tensor(new, device=self.energy.table.device), self.ridge)
            self.scores.update(zip(new, values.tolist(), strict=True))
        return [self.scores[s] for s in sentences]

    def descend(self, sentence: tuple[int, ...], pool: Tensor, limit: int) -> tuple[int, ...]:
        """Best sentence reached by single changes, until none helps or `limit` evaluations are spent in all.

        Args:
            pool: [free, m] tokens to try at each position beside those the gradient proposes.
        """
        self.score([sentence])
        kinds = [self._replaced, self._dealt, self._reordered]
        while self.energy.tally.sentences < limit and sentence not in self.local:
            slope = self._slope(sentence)
            for changes in kinds:
                better = self._best(sentence, changes(sentence, slope, pool))
                if better != sentence:
                    # What helped once helps again: the others wait.
                    kinds = [changes, *(other for other in kinds if other != changes)]
                    break
            else:
                self.local.add(sentence)
            sentence = better
        return sentence

    def widen(self, sentence: tuple[int, ...]) -> tuple[int, ...]:
        """The first better sentence among changes too many for every step, or the same one."""
        self.wide.add(sentence)
        best = self._best(sentence, self._filled(sentence))
        if best == sentence:
            best = self._exchanged(sentence, range(1, len(self.places) // 2 + 1))
        if best == sentence:
            best = self._best(sentence, self._filled(sentence, len(self.places), MORE))
        return best

    def _filled(self, sentence: tuple[int, ...], surplus: int = SURPLUS, blanks: int = BLANKS) -> list[tuple[int, ...]]:
        """A word left out and another filled in, where the budget has room for it."""
        room = (surplus + 1) * len(self.places) + PRICE * blanks
        if self.energy.tally.sentences + room > self.energy.tally.limit:
            return []
        return filled(self.blanks, sentence, self.places, surplus, blanks, ASKED)

    def _exchanged(self, sentence: tuple[int, ...], sizes: range) -> tuple[int, ...]:
        """The best exchange of two neighbouring runs of words, of the least shorter run that helps; all are tried.

        A first-order estimate ranks them last: "a good yarn these days - - which is nothing to sneeze at", 28 words,
        1,647th to 2,951st of 3,617 at layers 3 and 4.
        """
        first, last = self.places.start, self.places.stop
        runs = [(i, j, k) for i in range(first, last) for j in range(i + 1, last) for k in range(j + 1, last + 1)]
        best = sentence
        for size in sizes:
            turned = [
                (*sentence[:i], *sentence[j:k], *sentence[i:j], *sentence[k:])
                for i, j, k in runs
                if min(j - i, k - j) == size
            ]
            best = self._best(sentence, turned)
            if best != sentence:
                break
        return best

    def _best(self, current: tuple[int, ...], changed: list[tuple[int, ...]]) -> tuple[int, ...]:
        """The best of the changes, or of the helpful ones made together.

        All are evaluated: to stop at the first helpful block of 32 costs fewer sentences a step and ends in more local
        minima (ffn_out of layer 3, 13 words: 100 s without an answer instead of 59 s with one).
        """
        here = self.scores[current]
        helpful = sorted(pair for pair in zip(self.score(changed), changed, strict=True) if pair[0] < here)
        if not helpful:
            return current
        joint, together = list(current), []
        touched: set[int] = set()
        for _, other in helpful:
            places = {i for i, (a, b) in enumerate(zip(current, other, strict=True)) if a != b}
            if not places & touched:
                touched |= places
                for i in places:
                    joint[i] = other[i]
                together.append(tuple(joint))
        best = min(zip(self.score(together), together, strict=True))
        return best[1]

    def _slope(self, sentence: tuple[int, ...]) -> Tensor:
        tokens = torch.tensor(sentence, device=self.energy.table.device)
        return slope(self.energy, self.energy.table[tokens][None], self.ridge)[0]

    def _replaced(self, sentence: tuple[int, ...], slope: Tensor, pool: Tensor) -> list[tuple[int, ...]]:
        """Shortlisted replacements, lowest first-order estimate first."""
        table = self.energy.table
        prices = slope[self.places.start : self.places.stop] @ self.rows.T
        near, nearest = prices.topk(min(self.shortlist, len(self.words)), -1, largest=False)
        ranked = []
        for row, place in enumerate(self.places):
            own = pool[row].unique()
            price = table[own] @ slope[place]
            order = price.argsort()[: self.shortlist]
            here = float(table[sentence[place]] @ slope[place])
            choice = dict(zip(own[order].tolist(), price[order].tolist(), strict=True))
            choice |= dict(zip(self.words[nearest[row]].tolist(), near[row].tolist(), strict=True))
            choice.pop(sentence[place], None)
            ranked += [(cost - here, place, token) for token, cost in choice.items()]
        return [put(sentence, place, token) for _, place, token in sorted(ranked)]

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

    def _dealt(self, sentence: tuple[int, ...], slope: Tensor, pool: Tensor) -> list[tuple[int, ...]]:
        """The words of the worst places, each where its own residual fits best: one assignment for a whole permutation.

        Right words in a wrong order often need three places changed at once: MiniLM, query of layer 1, 28 words, where
        no swap, move or replacement helped after 20,000 sentences.
        """
        from scipy.optimize import linear_sum_assignment

        places = [i for i in self._worst(sentence) if i in self.places][:ASSIGNED]
        words = [sentence[i] for i in places]
        tried = torch.tensor([put(sentence, i, word) for i in places for word in words])
        if self.energy.tally.sentences + len(tried) > self.energy.tally.limit:
            return []
        with torch.no_grad():
            residuals = self.energy(self.energy.table[tried.to(slope.device)], self.ridge)[1]
        own = torch.tensor(places, device=slope.device).repeat_interleave(len(words))
        costs = residuals.gather(1, own[:, None]).view(len(places), len(words))
        dealt = list(sentence)
        for row, column in zip(*linear_sum_assignment(costs.cpu().numpy()), strict=True):
            dealt[places[row]] = words[column]
        return [tuple(dealt)]

    def _worst(self, sentence: tuple[int, ...]) -> list[int]:
        """Positions, the largest residual first."""
        with torch.no_grad():
            embeds = self.energy.table[torch.tensor(sentence, device=self.energy.table.device)][None]
            return self.energy(embeds, self.ridge)[1][0].argsort(descending=True).tolist()

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
