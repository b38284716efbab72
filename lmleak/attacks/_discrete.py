"""The discrete half of the subspace attack: descent over replaced, swapped, moved and re-inserted tokens.

The energy's gradient at the current sentence estimates every change at once, over the whole vocabulary (HotFlip,
Ebrahimi et al. 2018, 1712.06751); only the most promising changes of each kind are evaluated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lmleak.attacks._energy import Scorer, of_tokens, slope

WIDE = 512  #: words tried at one place where nothing else helps: the true one was found 179th by its estimate
COMMON = 128  #: commonest words tried at the `PLACES` places with the largest residuals where nothing else helps
PLACES, WORST = 4, 2  #: the first for the commonest words, the second for `WIDE` others
USUAL = 8  #: commonest words tried in the new place of every word that moves
#: Words tried in the new place of a word that moved, by the rank of the move: the true one of MiniLM's layer 4 was the
#: 5th least harmful with the true word 53rd by its estimate, the 8th (232nd) and the 18th (first).
SHIFTS = (WIDE,) * 8 + (32,) * 16
SHORT = 3  #: words of a run from which on an exchange of runs comes after the commonest words
ASSIGNED = 8  #: places with the largest residuals whose words are dealt out anew, all at once
ALL = 20  #: free places up to which every move is looked at; beyond it, those to the largest residuals


def put(sentence: tuple[int, ...], place: int, word: int) -> tuple[int, ...]:
    return (*sentence[:place], word, *sentence[place + 1 :])


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
        """The first better sentence among changes too many for every step, or the same one.

        The commonest words where the residuals are large: a first-order estimate is worth nothing for them (MiniLM,
        attention output of layer 4, "." for "apparently" and all else right: 6,101st). Then these in the new place of
        a word that has moved: a local minimum often has one word twice, all behind it one place late, and the last word
        missing, so that neither deletion nor insertion helps alone. Then `WIDE` other words, in the same two ways.
        """
        self.wide.add(sentence)
        best = self._exchanged(sentence, range(1, SHORT))
        if best != sentence:
            return best
        worst = self._worst(sentence)
        places = [i for i in worst if i in self.places][:PLACES]
        best = self._best(sentence, [put(sentence, i, w) for i in places for w in self.words[:COMMON].tolist()])
        if best != sentence:
            return best
        best = self._exchanged(sentence, range(SHORT, len(self.places) // 2 + 1))
        if best != sentence:
            return best
        targets = list(self.places)
        if len(targets) > ALL:
            # A residual of the last special token speaks of the place before it.
            targets = sorted({min(max(i, self.places.start), self.places.stop - 1) for i in worst[: ALL // 2]})
        moved = self._moved(sentence, targets)
        if moved and self.scores[moved[0][1]] < self.scores[sentence]:
            return moved[0][1]
        best = self._anywhere(sentence, places[:WORST])
        for (place, shifted), width in zip(moved, SHIFTS, strict=False):
            if self.scores[best] < self.scores[sentence]:
                return best
            best = self._anywhere(shifted, [place], width)
        return min(sentence, best, key=self.scores.__getitem__)

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

    def _moved(self, sentence: tuple[int, ...], targets: list[int]) -> list[tuple[int, tuple[int, ...]]]:
        """New place of a word that moved and the sentence with it or a common word there, least harmful moves first."""
        moves: dict[tuple[int, ...], tuple[int, tuple[int, ...]]] = {}
        for i in self.places:
            for j in targets:
                rest = (*sentence[:i], *sentence[i + 1 :])
                for word in (sentence[i], *self.words[:USUAL].tolist()):
                    moves.setdefault((*rest[:j], word, *rest[j:]), (j, rest))
        moves.pop(sentence, None)
        ranked: dict[tuple[int, tuple[int, ...]], tuple[int, ...]] = {}  # the best word of every move
        for _, changed in sorted(zip(self.score(list(moves)), moves, strict=True)):
            ranked.setdefault(moves[changed], changed)
        return [(place, changed) for (place, _), changed in ranked.items()]

    def _anywhere(self, sentence: tuple[int, ...], places: list[int], width: int = WIDE) -> tuple[int, ...]:
        """The best of so many words in one of the places: the commonest third, the others by first-order estimate."""
        price = self._slope(sentence)[places] @ self.rows.T
        price[:, : width // 3] = -torch.inf
        near = self.words[price.topk(min(width, len(self.words)), -1, largest=False).indices].tolist()
        others = [put(sentence, i, word) for i, row in zip(places, near, strict=True) for word in row]
        return min(zip(self.score(others), others, strict=True))[1]

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
