"""Which changes of a sentence are worth scoring, most promising first.

The score's own slope proposes tokens at every position at once (HotFlip, Ebrahimi et al. 2018, 1712.06751), but ranks
MiniLM's true word 900th to 10,000th even where all others are right: words lie too far from each other. So words that
are likely there at all are tried beside, and what was scored at a position predicts the rest of the vocabulary. Then
swaps, moves, deletions with an insertion elsewhere, other lengths and other labels where these are not granted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import zip_longest

import torch
from torch import Tensor

from lmleak.attacks._likelihood_score import Candidate, Slope
from lmleak.attacks._text import Frame, put

WIDTHS = (4, 16, 64)  #: tokens tried at every position, the next only where the one before does not help
CHUNK = 128  #: candidates scored before the helpful ones among them are taken
REORDERED = 64  #: swaps and moves tried at a time, by their first-order estimate; as many of every other kind
NEAR = 12  #: nearest words tried in place of a word
POOL = 64  #: words of the population tried anywhere
USUAL = 6  #: words likely at a position that are inserted there
GUESSES = 2  #: how often the words scored at a position say which to score next
GUESSED = 24  #: that are scored then
LEAST = 48  #: words scored at a position from which others may be guessed
RUNNERS = 6  #: other orders of the words whose other forms are tried
RIDGE = 0.1  #: of the guess


@dataclass(frozen=True)
class Space:
    """What a sentence may be."""

    words: Tensor  #: token ids that may stand at a free position
    weights: Tensor  #: [words], or [p, words] by position: how often each is drawn in a fresh sentence
    frame: Frame
    lengths: tuple[int, ...]  #: special tokens included; one where it is granted
    labels: tuple[int, ...]
    common: Tensor | None = None  #: [words] weights before any evidence by position, where that is in `weights`

    def at(self, place: int) -> Tensor:
        """Weights at one position, [words]."""
        return self.weights if self.weights.dim() == 1 else self.weights[place]

    def drawn(self, count: int, generator: torch.Generator) -> list[Candidate]:
        """Sentences by the weights alone, lengths and labels in turn."""
        frame, out = self.frame, []
        for i in range(count):
            length = self.lengths[i % len(self.lengths)]
            label = self.labels[i // len(self.lengths) % len(self.labels)]
            free = range(len(frame.first), length - len(frame.last))
            drawn = torch.stack([self.at(i).multinomial(1, generator=generator) for i in free]).flatten()
            words = self.words[drawn.to(self.words.device)].tolist()
            out.append(Candidate((*frame.first, *words, *frame.last), label))
        return out

    def told(self, nats: Tensor) -> Space:
        """The same space where evidence [t, v] speaks of the first t positions, and what was said of later ones."""
        common = self.weights if self.common is None else self.common
        weights = common * nats[:, self.words].exp()
        if self.weights.dim() > 1:
            weights = torch.cat([weights, self.weights[len(weights) :]])
        return replace(self, weights=weights, common=common)


class Moves:
    """Changes of sentences of one space."""

    def __init__(self, space: Space, table: Tensor, shortlist: int, wide: int):
        self.space, self.table, self.wide = space, table, wide
        self.widths = (*tuple(w for w in WIDTHS if w < shortlist), shortlist)
        self.allowed = torch.zeros(len(table), dtype=torch.bool, device=table.device)
        self.allowed[space.words] = True
        own = table[space.words]
        self.unit = torch.nn.functional.normalize(own, dim=-1)
        self.centred = torch.nn.functional.normalize(own - own.mean(0), dim=-1)
        self.row = {word: i for i, word in enumerate(space.words.tolist())}
        self.kept: dict[int, list[int]] = {}

    def told(self, space: Space) -> None:
        """From now on words are likely by another space's weights."""
        self.space = space
        self.kept.clear()

    def usual(self, place: int) -> list[int]:
        """Words likely at a position before any sentence is scored, likeliest first; none where all are alike."""
        key = place if self.space.weights.dim() > 1 else 0
        if key not in self.kept:
            # Evidence is noise for words of little gradient: at a noise multiplier of 0.01, "in" fell by 300 ranks.
            kinds = [w for w in (self.space.at(place), self.space.common) if w is not None]
            kinds = [w for w in kinds if float(w.max()) > 4 * float(w.mean())]
            best = [w.topk(min(self.widths[-1], len(w))).indices.to(self.space.words.device) for w in kinds]
            ranked = [self.space.words[rows].tolist() for rows in best]
            both = dict.fromkeys(word for pair in zip_longest(*ranked) for word in pair if word is not None)
            self.kept[key] = list(both)[: self.widths[-1]]
        return self.kept[key]

    def of(
        self,
        at: Candidate,
        slope: Slope,
        pool: list[int],
        given: list[int],
        known: Mapping[Candidate, float],
        quick: bool,
    ) -> Iterable[list[Candidate]]:
        """Changes worth scoring, in the order in which they are asked for.

        Words go in at wrong places first, so orders are tried beside the first few words of every position, not after
        all of them.

        Args:
            at: the sentence.
            slope: of the score there.
            pool: words of other sentences.
            given: words of the sentences started from. The slope ranks the true one among these better than among all.
            known: every sentence scored, as it is by the time that it is asked for.
            quick: few words at every position, and orders.
        """
        wide = REORDERED * self.wide
        free = self.free(at.tokens)
        gain = slope.gain.masked_fill(~self.allowed, -torch.inf)[free.start : free.stop]
        top = gain.topk(min(self.widths[-1], len(self.space.words)), -1)
        tried = 0
        for width in self.widths:
            ranked = [
                (float(v), free.start + i, int(token))
                for i in range(len(free))
                for v, token in zip(top.values[i, tried:width], top.indices[i, tried:width], strict=True)
            ]
            ranked.sort(reverse=True)
            changed = [self._put(at, place, token) for _, place, token in ranked]
            # By rank, so that each place has its turn: the slope of one word says little of another far from it.
            usual = [
                self._put(at, i, word) for k in range(tried, width) for i in free for word in self.usual(i)[k : k + 1]
            ]
            changed = [one for pair in zip_longest(changed, usual) for one in pair if one is not None and one != at]
            if quick:
                yield changed
                yield self._estimated(at, slope, [*self.reordered(at)], wide // 2)
                return
            if not tried:
                orders = self._estimated(at, slope, [*self.reordered(at)], wide // 2)
                exchanged = self._estimated(at, slope, [*self._exchanged(at, top.indices[:, :4], pool)], wide // 2)
                others = self._estimated(at, slope, [self._put(at, i, w) for i in free for w in given], wide // 2)
                yield changed + others + orders + exchanged
                yield self._estimated(at, slope, [*self.reordered(at), *self.carried(at)], 4 * wide)
                yield [self._put(at, i, word) for i in free for word in self._near(at.tokens[i])]
                if self.wide > 1:
                    yield from self._shifted(at, top.indices)
            else:
                for first in range(0, len(changed), CHUNK):
                    yield changed[first : first + CHUNK]
            tried = width
        yield self._estimated(at, slope, [self._put(at, i, w) for i in free for w in pool], wide)
        yield self._estimated(at, slope, [*self._exchanged(at, top.indices[:, :4], pool)], 2 * wide)
        if self.wide == 1:
            yield from self._shifted(at, top.indices)
        for _ in range(GUESSES):
            yield [one for i in free for one in self._guessed(at, i, known)]
        if len(self.space.labels) > 1:
            yield [replace(at, label=label) for label in self.space.labels if label != at.label]
        if len(self.space.lengths) > 1:
            yield list(self._resized(at, pool, slope))
        for other in self._runners(at, known):
            moved = [i for i in free if other.tokens[i] != at.tokens[i]]
            yield [self._put(other, i, word) for i in moved for word in self._near(other.tokens[i])]

    def _runners(self, at: Candidate, known: Mapping[Candidate, float]) -> list[Candidate]:
        """The best orders of the same words that were scored: each a step down, from which other forms may lead up.

        "an wind gently moved the curtains" is no change away from anything better; "an gently wind moved" is worse, and
        "a gentle wind moved" two forms away from that.
        """
        words = sorted(at.tokens)
        same = [c for c in known if c != at and len(c.tokens) == len(words) and sorted(c.tokens) == words]
        return sorted(same, key=known.__getitem__, reverse=True)[:RUNNERS]

    def _shifted(self, at: Candidate, likely: Tensor) -> Iterable[list[Candidate]]:
        """Every deletion with an insertion elsewhere of a word that is likely there, in chunks.

        The slope knows little of them, because all words between move by one place: "voices were echoed" for "the
        voices echoed" was never proposed to be changed.
        """
        every = list(self._exchanged(at, likely[:, :2], []))
        for first in range(0, len(every), CHUNK * self.wide):
            yield every[first : first + CHUNK * self.wide]

    def free(self, tokens: tuple[int, ...]) -> range:
        frame = self.space.frame
        return range(len(frame.first), len(tokens) - len(frame.last))

    def _put(self, at: Candidate, place: int, token: int) -> Candidate:
        return replace(at, tokens=put(at.tokens, place, token))

    def _near(self, token: int) -> list[int]:
        """Words of the nearest embeddings: found words are often another form of the true one.

        MiniLM, noise multiplier 0.01: the slope put "moved" 796th in place of "moves", and no word scored better there.
        """
        similar = self.unit @ torch.nn.functional.normalize(self.table[token], dim=0)
        near = self.space.words[similar.topk(min(NEAR + 1, len(similar))).indices.cpu()].tolist()
        return [word for word in near if word != token][:NEAR]

    def _guessed(self, at: Candidate, place: int, known: Mapping[Candidate, float]) -> list[Candidate]:
        """Words that score best at a position by the words scored there: a Gaussian process over their embeddings.

        MiniLM, all others right, 512 usual words scored: the true one of 28,526 is guessed 3rd to 2,500th, half of them
        up to 340th.
        """
        rest = (at.tokens[:place], at.tokens[place + 1 :], at.label)
        pairs = [
            (self.row[c.tokens[place]], value)
            for c, value in known.items()
            if (c.tokens[:place], c.tokens[place + 1 :], c.label) == rest and c.tokens[place] in self.row
        ]
        if len(pairs) < LEAST:
            return []
        rows = torch.tensor([row for row, _ in pairs], device=self.centred.device)
        values = torch.tensor([value for _, value in pairs], dtype=torch.float64)
        values = ((values - values.mean()) / values.std().clamp_min(1e-12)).to(self.centred)
        near = lambda other: (2 * (self.centred[rows] @ other.T - 1)).exp()  # noqa: E731
        inner = near(self.centred[rows]) + RIDGE * torch.eye(len(rows), device=rows.device)
        guess = torch.linalg.solve(inner, values) @ near(self.centred)
        guess[rows] = -torch.inf
        best = self.space.words[guess.topk(min(GUESSED, len(guess))).indices.to(self.space.words.device)].tolist()
        return [self._put(at, place, word) for word in best]

    def reordered(self, at: Candidate) -> Iterable[Candidate]:
        """Two words swapped, or one moved."""
        free = self.free(at.tokens)
        for i in free:
            for j in free:
                other = list(at.tokens)
                if i < j:
                    other[i], other[j] = other[j], other[i]
                    yield replace(at, tokens=tuple(other))
                if abs(i - j) > 1:
                    other = list(at.tokens)
                    other.insert(j, other.pop(i))
                    yield replace(at, tokens=tuple(other))

    def carried(self, at: Candidate) -> Iterable[Candidate]:
        """Several words in a row moved together: "the curtains moved a gentle wind all afternoon"."""
        free = self.free(at.tokens)
        for first in free:
            for last in range(first + 2, free.stop):
                for stop in range(last + 2, free.stop + 1):  # what follows changes places with them
                    words = at.tokens
                    yield replace(at, tokens=words[:first] + words[last:stop] + words[first:last] + words[stop:])

    def _exchanged(self, at: Candidate, likely: Tensor, pool: list[int]) -> Iterable[Candidate]:
        """One position deleted and a word inserted elsewhere: of the population, or likely there."""
        free = self.free(at.tokens)
        for i in free:
            for j in free:
                if i != j:
                    rest = (*at.tokens[:i], *at.tokens[i + 1 :])
                    for word in dict.fromkeys([*likely[j - free.start].tolist(), *self.usual(j)[:USUAL], *pool]):
                        yield replace(at, tokens=(*rest[:j], word, *rest[j:]))

    def _resized(self, at: Candidate, pool: list[int], slope: Slope) -> Iterable[Candidate]:
        """One position deleted; or one inserted, the word that was there or one of the likeliest."""
        free = self.free(at.tokens)
        if len(at.tokens) - 1 in self.space.lengths:
            for i in free:
                yield replace(at, tokens=(*at.tokens[:i], *at.tokens[i + 1 :]))
        if len(at.tokens) + 1 in self.space.lengths:
            price = slope.gain.masked_fill(~self.allowed, -torch.inf)
            for i in range(free.start, free.stop + 1):
                near = price[min(i, free.stop - 1)].topk(min(4, len(self.space.words))).indices.tolist()
                usual = self.usual(min(i, free.stop - 1))[:4]
                for word in dict.fromkeys([at.tokens[min(i, free.stop - 1)], *near, *usual, *pool[:4]]):
                    yield replace(at, tokens=(*at.tokens[:i], word, *at.tokens[i:]))

    def _estimated(self, at: Candidate, slope: Slope, others: list[Candidate], width: int) -> list[Candidate]:
        """The `width` changes of the highest first-order estimate, best first."""
        others = [c for c in dict.fromkeys(others) if c != at]
        if not others:
            return []
        rows = torch.tensor([c.tokens for c in others], device=slope.gain.device)
        estimate = slope.gain.T[rows, torch.arange(rows.shape[1], device=rows.device)].sum(1)
        return [others[i] for i in estimate.topk(min(width, len(others))).indices.tolist()]
