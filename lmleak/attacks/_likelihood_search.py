"""Search for the sentence of highest likelihood: coordinate ascent over tokens from fresh starts, a population kept.

`_likelihood_moves` says which changes of a sentence are worth scoring, and `_likelihood_held` which of them first where
layer 0 is seen; here they are scored, and the helpful ones made. Starts that perturb the best sentence find it again;
fresh ones, whose words are kept, do not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import torch

from lmleak.attacks._likelihood_blanks import Blanks
from lmleak.attacks._likelihood_held import held
from lmleak.attacks._likelihood_moves import POOL, Moves, Space
from lmleak.attacks._likelihood_score import Candidate, Scorer
from lmleak.attacks._likelihood_words import Evidence

STARTS = 48  #: fresh sentences a start is the best of
HEATS = 3  #: quick starts before the best sentence of all is ascended from in earnest
SCAN = 12  #: sentences of every length in the first start, where lengths are not granted
LENGTHS = 3  #: that are kept of them
WORTH = 0.03  #: share by which a sentence is better than the last that was asked about
ORDERED = 1  #: turn of `Moves.of` at which all orders of the words were tried
SURE = 7.0  #: nats beyond the number of single changes by which a sentence that is settled leads every rival scored
FIT = 2.0  #: standard deviations from what the truth would score
EXACT = 1e-5  #: share of a clean gradient left by the sentence that it is of; float32 leaves 1e-7
LogPrior = Callable[[Sequence[tuple[int, ...]]], list[float]]


class Search:
    """Ascends against one release; every sentence scored is remembered."""

    def __init__(
        self,
        scorer: Scorer,
        space: Space,
        shortlist: int,
        generator: torch.Generator,
        prior: LogPrior | None,
        evidence: Evidence | None = None,
        led: bool = False,
    ):
        """
        Args:
            led: whether layer 0 rises above the noise, so that its matrices say which changes come first.
        """
        self.scorer, self.space, self.generator, self.prior = scorer, space, generator, prior
        self.evidence = evidence
        self.asked: float | None = None  #: score of the last sentence around which the release was asked
        self.moves = Moves(space, scorer.table, shortlist, round(1 / scorer.price))
        # Not where the token table is observed, whose rows name the words: there, and in the first look before it, four
        # of eight cells ended with fewer words in place for what blanks cost, one with more.
        self.blanks = None if scorer.profiled or scorer.rows() is not None else Blanks(scorer, space)
        self.held = held(scorer, space) if led and not scorer.profiled else None
        self.opened: set[Candidate] = set()  #: sentences whose words were left out in turn
        self.likely: tuple[int, ...] = ()  #: lengths that fresh sentences have
        self.known: dict[Candidate, float] = {}
        self.others: list[Candidate] = []  #: sentences whose words are tried too
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
        """Drawn sentences, of likely lengths."""
        return replace(self.space, lengths=self.likely or self.space.lengths).drawn(count, self.generator)

    def run(self, limit: float, progress: Callable[[Candidate], None], starts: Sequence[Candidate] = ()) -> Candidate:
        """Fresh starts until `limit` evaluations of the scorer are spent; the best sentence of all.

        Args:
            limit: evaluations.
            progress: told the best sentence now and then.
            starts: sentences to start from.
        """
        if starts:
            self.score([replace(one, label=label) for one in starts for label in self.space.labels])
            self.others = list(starts)
            if self.scorer.profiled or not self._explained(self.best):
                self._ascend(self.best, limit)
        # Where words stand out, every start finds the same, at the price of a thousand sentences.
        told = self.evidence is not None and self.evidence.loud and len(self.space.lengths) == 1
        heats = 1 if told else HEATS
        while self.scorer.evaluations < limit and not (self.known and self._settled(self.best)):
            for _ in range(heats):
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
        if self.scorer.profiled:
            return False  # a part of the release settles nothing
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
        if not noise or self.scorer.batch > 1:
            energy = self.scorer.energy()
            left = energy - 2 * product + square
            if not noise:
                return left < EXACT * energy
            # Of several sentences, one that stands in for another fits; together they leave more than noise.
            if self.scorer.excess(left) > FIT:
                return False
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

    def _ascend(self, at: Candidate, limit: float, quick: bool = False) -> Candidate:
        """The local optimum that single changes lead to; `quick` tries few words at every position, and orders."""
        self.score([at])
        given = self._words(self.others)[:POOL]
        while self.scorer.evaluations < limit:
            better, asked = at, False
            for changes in () if quick else self._led(at):
                better = self._better(at, changes)
                if better != at or self.scorer.evaluations >= limit:
                    break
            if better == at and self.scorer.evaluations < limit:
                better, asked = self._tried(at, given, limit, quick)
            if better == at and not asked:
                self.local[at] = None
                break
            at = better
        return at

    def _led(self, at: Candidate) -> Iterator[list[Candidate]]:
        """Changes that layer 0's own matrices put first, a few and then many, and between them blanks."""
        if self.held is None:
            return
        around = self.held.around(at)
        yield self.held.changes(around, self.moves, self._pool())
        yield self._blanked(at)
        yield self.held.more(around, self.moves)

    def _tried(self, at: Candidate, given: list[int], limit: float, quick: bool) -> tuple[Candidate, bool]:
        """The best of the changes that the slope puts first; and whether the release was asked around the sentence."""
        slope = self.scorer.slope(at)
        better, asked = at, False
        for turn, changes in enumerate(self.moves.of(at, slope, self._pool(), given, self.known, quick)):
            better = self._better(at, changes)
            if better == at and not quick and turn == ORDERED:
                better = self._better(at, self._blanked(at))
            # Before many words are tried at every place, the release is asked about these around the others.
            asked = better == at and not quick and turn == ORDERED and self._ask(at, limit)
            if better != at or asked or self.scorer.evaluations >= limit:
                break
        return better, asked

    def _blanked(self, at: Candidate) -> list[Candidate]:
        """A word left out and another filled in, once for each sentence."""
        if self.blanks is None or at in self.opened:
            return []
        self.opened.add(at)
        return self.blanks.of(at, self.space, self.moves.free(at.tokens))

    def _ask(self, at: Candidate, limit: float) -> bool:
        """Takes up what the release says of words around this sentence; whether it was asked now."""
        if self.evidence is None or self.scorer.evaluations >= limit:
            return False
        if self.asked is not None and self.known[at] < self.asked + WORTH * abs(self.asked):
            return False  # one word more says little, and asking costs 25 sentences a place
        self.asked = self.known[at]
        nats = self.evidence.around(self.scorer, at)
        if nats is not None:
            self.space = self.space.told(nats)
            self.moves.told(self.space)
        return nats is not None

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

    def _pool(self) -> list[int]:
        """Words of the local optima, the best sentence's first."""
        ranked = sorted(self.local, key=self.known.__getitem__, reverse=True)
        return self._words([*ranked, *self.others])[:POOL]

    def _words(self, some: Sequence[Candidate]) -> list[int]:
        return list(dict.fromkeys(c.tokens[i] for c in some for i in self.moves.free(c.tokens)))
