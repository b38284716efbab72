"""Search for the sentence of highest likelihood: coordinate ascent over tokens from fresh starts, a population kept.

The score's own slope proposes the tokens worth scoring at every position at once (HotFlip, Ebrahimi et al. 2018,
1712.06751); then swaps, moves, deletions with an insertion elsewhere, other lengths and other labels where these are
not granted. Starts that perturb the best sentence find it again; fresh ones, whose words are kept, do not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lmleak.attacks._likelihood_score import Candidate, Scorer, Slope
from lmleak.attacks._text import Frame

WIDTHS = (4, 16, 64)  #: tokens tried at every position, the next only where the one before does not help
CHUNK = 128  #: candidates scored before the helpful ones among them are taken
REORDERED = 64  #: swaps and moves tried at a time, by their first-order estimate; as many of every other kind
STARTS = 48  #: fresh sentences a start is the best of
HEATS = 3  #: quick starts before the best sentence of all is ascended from in earnest
SCAN = 12  #: sentences of every length in the first start, where lengths are not granted
LENGTHS = 3  #: that are kept of them
NEAR = 12  #: nearest words tried in place of a word
SURE = 7.0  #: nats beyond the number of single changes by which a sentence that is settled leads every rival scored
FIT = 2.0  #: standard deviations from what the truth would score
EXACT = 1e-5  #: share of a clean gradient left by the sentence that it is of; float32 leaves 1e-7
POOL = 64  #: words of the population tried anywhere
LogPrior = Callable[[Sequence[tuple[int, ...]]], list[float]]


@dataclass(frozen=True)
class Space:
    """What a sentence may be."""

    words: Tensor  #: token ids that may stand at a free position
    weights: Tensor  #: how often each is drawn in a fresh sentence
    frame: Frame
    lengths: tuple[int, ...]  #: special tokens included; one where it is granted
    labels: tuple[int, ...]


class Search:
    """Ascends against one release; every sentence scored is remembered."""

    def __init__(
        self, scorer: Scorer, space: Space, shortlist: int, generator: torch.Generator, prior: LogPrior | None
    ):
        self.scorer, self.space, self.generator, self.prior = scorer, space, generator, prior
        self.widths = (*tuple(w for w in WIDTHS if w < shortlist), shortlist)
        self.allowed = torch.zeros(len(scorer.table), dtype=torch.bool, device=scorer.table.device)
        self.allowed[space.words] = True
        self.unit = torch.nn.functional.normalize(scorer.table[space.words], dim=-1)
        self.likely: tuple[int, ...] = ()  #: lengths that fresh sentences have
        self.known: dict[Candidate, float] = {}
        self.local: dict[Candidate, None] = {}  #: sentences that no change improves, in the order they were found

    @property
    def best(self) -> Candidate:
        """The best of all sentences scored."""
        return max(self.known, key=self.known.__getitem__)

    def score(self, candidates: Iterable[Candidate]) -> list[float]:
        """Nats, with the prior's where there is one; only sentences not met before are evaluated."""
        wanted = list(candidates)
        new = [c for c in dict.fromkeys(wanted) if c not in self.known]
        if new:
            values = self.scorer.scores(new)
            if self.prior is not None:
                values = [a + b for a, b in zip(values, self.prior([c.tokens for c in new]), strict=True)]
            self.known.update(zip(new, values, strict=True))
        return [self.known[c] for c in wanted]

    def fresh(self, count: int) -> list[Candidate]:
        """Drawn sentences, lengths and labels in turn."""
        space, out = self.space, []
        for i in range(count):
            lengths = self.likely or space.lengths
            length = lengths[i % len(lengths)]
            label = space.labels[i // len(lengths) % len(space.labels)]
            free = length - space.frame.size
            drawn = space.weights.multinomial(free, replacement=True, generator=self.generator)
            words = space.words[drawn.to(space.words.device)].tolist()
            out.append(Candidate((*space.frame.first, *words, *space.frame.last), label))
        return out

    def run(self, limit: int, progress: Callable[[Candidate], None], start: Candidate | None = None) -> Candidate:
        """Fresh starts until `limit` evaluations of the scorer are spent; the best sentence of all."""
        if start is not None:
            self.score([replace(start, label=label) for label in self.space.labels])
            if not self._explained(self.best):
                self._ascend(self.best, limit)
        while self.scorer.evaluations < limit and not (self.known and self._settled(self.best)):
            for _ in range(HEATS):
                drawn = self.fresh(STARTS if self.likely else max(STARTS, SCAN * len(self.space.lengths)))
                values = self.score(drawn)
                self._narrow(values, drawn)
                self._ascend(max(zip(values, drawn, strict=True), key=lambda pair: pair[0])[1], limit, quick=True)
                progress(self.best)
            # Words of all starts are in the pool now, and end the best one's being the last word.
            self._ascend(self.best, limit)
            progress(self.best)
        return self.best

    def _settled(self, candidate: Candidate) -> bool:
        """Whether nothing is left to find: it explains the release, or no change of it comes near."""
        if self._explained(candidate):
            return True
        # Of several sentences, one that stands in for another fits as well.
        if candidate not in self.local or not self.scorer.noise or self.prior is not None or self.scorer.batch > 1:
            return False
        product, square = (float(part) for part in self.scorer.measures([candidate]))
        if abs(product - square) > FIT * self.scorer.noise * square**0.5:
            return False  # it misses something of the release that the truth would have
        rival = max((value for other, value in self.known.items() if other != candidate), default=-math.inf)
        return self.known[candidate] - rival > math.log(len(self.space.words) * len(candidate.tokens)) + SURE

    def _explained(self, candidate: Candidate) -> bool:
        """Whether it leaves so little of the gradient, or so little of the truth's score, that no other can be it."""
        product, square = (float(part) for part in self.scorer.measures([candidate]))
        noise = self.scorer.noise
        if not noise:
            energy = sum(float(t.double().square().sum()) for t in self.scorer.targets.values())
            return energy - 2 * product + square < EXACT * energy
        # One of MiniLM's words moves 1 % of the squared norm: five standard deviations and more below this noise.
        return noise < 2e-3 * square**0.5 and abs(product - square) < 2 * noise * square**0.5

    def _narrow(self, values: list[float], drawn: list[Candidate]) -> None:
        """Lengths whose best drawn sentence scores best; the ascent may still change them."""
        if self.likely:
            return
        best: dict[int, float] = {}
        for value, one in zip(values, drawn, strict=True):
            length = len(one.tokens)
            best[length] = max(best.get(length, value), value)
        self.likely = tuple(sorted(best, key=best.__getitem__, reverse=True)[:LENGTHS])

    def _ascend(self, at: Candidate, limit: int, quick: bool = False) -> Candidate:
        """The local optimum that single changes lead to; `quick` tries few words at every position, and orders."""
        self.score([at])
        while self.scorer.evaluations < limit:
            slope = self.scorer.slope(at)
            better = at
            for changes in self._changes(at, slope, quick):
                better = self._better(at, changes)
                if better != at or self.scorer.evaluations >= limit:
                    break
            if better == at:
                self.local[at] = None
                break
            at = better
        return at

    def _changes(self, at: Candidate, slope: Slope, quick: bool) -> Iterable[list[Candidate]]:
        """Changes worth scoring, in the order in which they are asked for.

        Words go in at wrong places first, so orders are tried beside the first few words of every position, not after
        all of them.
        """
        free = self._free(at.tokens)
        gain = slope.gain.masked_fill(~self.allowed, -torch.inf)[free.start : free.stop]
        pool = self._pool()
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
            if quick:
                yield changed
                yield self._estimated(at, slope, [*self._reordered(at)], REORDERED // 2)
                return
            if not tried:
                orders = self._estimated(at, slope, [*self._reordered(at)], REORDERED // 2)
                exchanged = self._estimated(at, slope, [*self._exchanged(at, top.indices[:, :4], pool)], REORDERED // 2)
                yield changed + orders + exchanged
                yield self._estimated(at, slope, [*self._reordered(at)], REORDERED)
                yield [self._put(at, i, word) for i in free for word in self._near(at.tokens[i])]
            else:
                for first in range(0, len(changed), CHUNK):
                    yield changed[first : first + CHUNK]
            tried = width
        yield self._estimated(at, slope, [self._put(at, i, w) for i in free for w in pool], REORDERED)
        yield self._estimated(at, slope, [*self._exchanged(at, top.indices[:, :4], pool)], 2 * REORDERED)
        if len(self.space.labels) > 1:
            yield [replace(at, label=label) for label in self.space.labels if label != at.label]
        if len(self.space.lengths) > 1:
            yield list(self._resized(at, pool, slope))

    def _better(self, at: Candidate, changes: list[Candidate]) -> Candidate:
        """The best of the changes, or of the helpful ones of one length made together."""
        here = self.known[at]
        scored = zip(self.score(changes), changes, strict=True)
        helpful = sorted((pair for pair in scored if pair[0] > here), key=lambda pair: pair[0], reverse=True)
        if not helpful:
            return at
        same = [c for _, c in helpful if len(c.tokens) == len(at.tokens) and c.label == at.label]
        joint, touched, together = list(at.tokens), set[int](), [helpful[0][1]]
        for other in same:
            places = {i for i, (a, b) in enumerate(zip(at.tokens, other.tokens, strict=True)) if a != b}
            if not places & touched:
                touched |= places
                for i in places:
                    joint[i] = other.tokens[i]
                together.append(replace(at, tokens=tuple(joint)))
        return max(zip(self.score(together), together, strict=True), key=lambda pair: pair[0])[1]

    def _free(self, tokens: tuple[int, ...]) -> range:
        frame = self.space.frame
        return range(len(frame.first), len(tokens) - len(frame.last))

    def _put(self, at: Candidate, place: int, token: int) -> Candidate:
        return replace(at, tokens=(*at.tokens[:place], token, *at.tokens[place + 1 :]))

    def _near(self, token: int) -> list[int]:
        """Words of the nearest embeddings: found words are often another form of the true one.

        MiniLM, noise multiplier 0.01: the slope put "moved" 796th in place of "moves", and no word scored better there.
        """
        similar = self.unit @ torch.nn.functional.normalize(self.scorer.table[token], dim=0)
        near = self.space.words[similar.topk(min(NEAR + 1, len(similar))).indices.cpu()].tolist()
        return [word for word in near if word != token][:NEAR]

    def _pool(self) -> list[int]:
        """Words of the local optima, the best sentence's first, and the likeliest words of all."""
        ranked = sorted(self.local, key=self.known.__getitem__, reverse=True)
        words = dict.fromkeys(c.tokens[i] for c in ranked for i in self._free(c.tokens))
        weights = self.space.weights
        if float(weights.max()) > 4 * float(weights.mean()):
            words |= dict.fromkeys(self.space.words[weights.topk(min(POOL, len(weights))).indices].tolist())
        return list(words)[:POOL]

    def _reordered(self, at: Candidate) -> Iterable[Candidate]:
        free = self._free(at.tokens)
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

    def _exchanged(self, at: Candidate, likely: Tensor, pool: list[int]) -> Iterable[Candidate]:
        """One position deleted and a word inserted elsewhere: of the population, or likely there."""
        free = self._free(at.tokens)
        for i in free:
            for j in free:
                if i != j:
                    rest = (*at.tokens[:i], *at.tokens[i + 1 :])
                    for word in dict.fromkeys([*likely[j - free.start].tolist(), *pool]):
                        yield replace(at, tokens=(*rest[:j], word, *rest[j:]))

    def _resized(self, at: Candidate, pool: list[int], slope: Slope) -> Iterable[Candidate]:
        """One position deleted; or one inserted, the word that was there or one of the likeliest."""
        free = self._free(at.tokens)
        if len(at.tokens) - 1 in self.space.lengths:
            for i in free:
                yield replace(at, tokens=(*at.tokens[:i], *at.tokens[i + 1 :]))
        if len(at.tokens) + 1 in self.space.lengths:
            price = slope.gain.masked_fill(~self.allowed, -torch.inf)
            for i in range(free.start, free.stop + 1):
                near = price[min(i, free.stop - 1)].topk(min(4, len(self.space.words))).indices.tolist()
                for word in dict.fromkeys([at.tokens[min(i, free.stop - 1)], *near, *pool[:4]]):
                    yield replace(at, tokens=(*at.tokens[:i], word, *at.tokens[i:]))

    def _estimated(self, at: Candidate, slope: Slope, others: list[Candidate], width: int) -> list[Candidate]:
        """The `width` changes of the highest first-order estimate, best first."""
        others = [c for c in dict.fromkeys(others) if c != at and c not in self.known]
        if not others:
            return []
        rows = torch.tensor([c.tokens for c in others], device=slope.gain.device)
        estimate = slope.gain.T[rows, torch.arange(rows.shape[1], device=rows.device)].sum(1)
        return [others[i] for i in estimate.topk(min(width, len(others))).indices.tolist()]
