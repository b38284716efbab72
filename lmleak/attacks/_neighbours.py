"""Whether any sentence near the best one explains noised gradients as well: descent over a wide neighbourhood.

Every swap, every move and the likeliest few hundred words at every place; where the length is open, every deletion and
the likeliest insertions too. While one of them is better, the search goes on from there. What is left is a sentence and
its probability among its neighbours, all equally likely beforehand: the answer's confidence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lmleak.attacks._discrete import Search
from lmleak.attacks._energy import slope

WORDS = 256  #: tried at each place: half by the slope, half by how near their embeddings are
FEW = 64  #: of them tried where the best of these is `CLEAR` nats from the sentence
CLEAR = 30.0  #: all other words together are then unlikely
INSERTED = 16  #: tried in each gap
TOLD = 0.5  #: nats by which a neighbour has to be better: float32's rounding of the inputs moves the values by less

Sentence = tuple[int, ...]


@dataclass(frozen=True)
class Settled:
    """A sentence that no neighbour tried beats."""

    tokens: Sentence
    probability: float  #: among its neighbours; 0 where the budget did not reach all of them
    neighbours: int  #: tried
    rival: float  #: nats to the best of them


class Neighbours:
    """Around the sentences of one search."""

    def __init__(self, search: Search, length: int, resized: bool):
        self.search, self.energy, self.length, self.resized = search, search.energy, length, resized
        self._unit = torch.nn.functional.normalize(self.energy.table[search.words], dim=-1)

    def settle(self, sentence: Sentence) -> Settled:
        """Moves to better neighbours, kind after kind, until none has one or the tally's limit is reached.

        Its length may change if `resized`.
        """
        self.search.score([sentence])
        kinds, turn, price = self._kinds(sentence), 0, None
        gaps: dict[Sentence, float] = {}
        rests: list[float] = []
        while len(rests) < len(kinds):
            price = self._price([sentence])[0] if price is None else price
            near = self._near(sentence, kinds[turn % len(kinds)], price)
            better = self._better(sentence, near)
            turn += 1
            if better != sentence:
                if len(better) != len(sentence):
                    kinds, turn = self._kinds(better), 0
                sentence, price = better, None
                gaps.clear()
                rests.clear()
                continue
            own = [value - self.search.scores[sentence] for value in self.search.score(near)]
            gaps.update(zip(near, own, strict=True))
            if math.inf in own:
                return Settled(sentence, 0.0, len(gaps), min(gaps.values()))
            rests.append(self._rest(own) if isinstance(kinds[(turn - 1) % len(kinds)], int) else 0.0)
        odds = sum(math.exp(-gap) for gap in gaps.values()) + sum(rests)
        return Settled(sentence, 1 / (1 + odds), len(gaps), min(gaps.values(), default=math.inf))

    def _kinds(self, sentence: Sentence) -> list[str | int]:
        """Of neighbours; a number is a place whose word is exchanged."""
        return ["swapped", "moved", *self._places(sentence), *(["shorter", "longer"] if self.resized else [])]

    def _near(self, sentence: Sentence, kind: str | int, price: Tensor) -> list[Sentence]:
        """Neighbours of one kind, without repeats; price [n, v] estimates the search's words at every place."""
        places = self._places(sentence)
        if isinstance(kind, int):
            words = self._words(price[kind], sentence[kind])
            near = [(*sentence[:kind], word, *sentence[kind + 1 :]) for word in words]
            few = near[:FEW]
            clear = min(self.search.score(few), default=math.inf) - self.search.scores[sentence]
            return few if clear > CLEAR or clear < -TOLD else near
        if kind == "shorter":
            near = [(*sentence[:i], *sentence[i + 1 :]) for i in places] if len(places) > 1 else []
        elif kind == "longer":
            gaps = [*places, places.stop]
            # A gap has no slope: that of its neighbour, repeated in it, stands for it.
            opened = [(*sentence[:i], sentence[min(i, places.stop - 1)], *sentence[i:]) for i in gaps]
            price = self._price(opened)[range(len(gaps)), gaps]
            chosen = self.search.words[price.topk(min(INSERTED, price.shape[1]), -1, largest=False).indices].tolist()
            near = [(*sentence[:i], word, *sentence[i:]) for i, row in zip(gaps, chosen, strict=True) for word in row]
        else:
            near = _reordered(sentence, places, moved=kind == "moved")
        return [one for one in dict.fromkeys(near) if one != sentence]

    def _better(self, sentence: Sentence, near: list[Sentence]) -> Sentence:
        """The best of the neighbours, or of those that help made together; the sentence itself where none does."""
        values = self.search.score(near)
        if min(values, default=math.inf) >= self.search.scores[sentence] - TOLD:
            return sentence
        if len(near[0]) != len(sentence):
            return near[values.index(min(values))]
        return self.search._best(sentence, near)

    def _rest(self, gaps: list[float]) -> float:
        """Weight of a place's words that were not tried: each taken to be like the less likely half of those tried."""
        worse = sorted(gaps)[len(gaps) // 2 :]
        untried = len(self.search.words) - 1 - len(gaps)
        return max(0, untried) * sum(math.exp(-gap) for gap in worse) / max(1, len(worse))

    def _places(self, sentence: Sentence) -> range:
        """Free places of a sentence of any length."""
        own = self.search.places
        return range(own.start, own.stop + len(sentence) - self.length)

    def _words(self, price: Tensor, token: int) -> list[int]:
        """Words [m] for one place: the lowest first-order estimates, and the nearest embeddings."""
        half = min(WORDS // 2, len(self.search.words))
        own = torch.nn.functional.normalize(self.energy.table[token], dim=-1)
        near = (self._unit @ own).topk(half).indices
        picked = torch.stack([price.topk(half, largest=False).indices, near], 1).flatten()  # the likeliest first
        return [word for word in dict.fromkeys(self.search.words[picked].tolist()) if word != token]

    def _price(self, sentences: list[Sentence]) -> Tensor:
        """First-order estimates [k, n, v] of the search's words at every place of sentences of one length."""
        table = self.energy.table
        ids = torch.tensor(sentences, device=table.device)
        return slope(self.energy, table[ids], self.search.ridge) @ self.search.rows.T


def _reordered(sentence: Sentence, places: range, *, moved: bool) -> list[Sentence]:
    """Every swap of two places, or every move of one word to another place."""
    out = []
    for i in places:
        for j in places:
            other = list(sentence)
            if moved and i != j:
                other.insert(j, other.pop(i))
            elif i < j:
                other[i], other[j] = other[j], other[i]
            out.append(tuple(other))
    return out
