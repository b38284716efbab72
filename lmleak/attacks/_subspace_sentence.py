"""One sentence from the row spaces of an encoder's modules: rounds of relaxation and descent until it explains them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from lmleak.attacks._discrete import Search
from lmleak.attacks._energy import SLOPE, Energy, Judge, Scorer
from lmleak.attacks._energy_heads import HeadEnergy, Heads
from lmleak.attacks._neighbours import Neighbours, Settled
from lmleak.attacks._subspace_relax import Pool, Schedule, relax
from lmleak.attacks._text import Frame, sentence
from lmleak.attacks._vocabulary import frequency, vocabulary
from lmleak.records import Reconstruction, Victim

FRESH = 2  #: every so many rounds start over the whole vocabulary, those between over the tokens met so far
#: A relaxation is begun again over the words that it ended at, once for so many words, at most as often, and as long as
#: its best sentence leaves this share of its inputs unexplained. Its words are the right ones long before they stand in
#: their places: MiniLM, value of layer 4, 28 words, 24 of them are among the ends of the first, 6 at their places; 22
#: after three more. Eight to ten words a descent finds sooner: 1,970 candidates after one, 4,510 after four.
EACH, AGAIN, LOOSE = 6, 4, 0.1
RIDGE = 1e-4  #: of the discrete energy: above float32's rounding of X X^T, below what separates sentences
DOUBTED = 0.5  #: probability among its neighbours below which an answer says so in words

Best = tuple[float, tuple[int, ...]]  #: an energy and its sentence


class Effort(Protocol):
    """What of the attack's fields the search reads."""

    steps: int
    restarts: int
    rate: float
    ridge: float
    shortlist: int
    budget: int


@dataclass(frozen=True)
class Landscape:
    """What is descended on by distributions over tokens, and by changes of tokens, and what judges the end."""

    coarse: Scorer
    fine: Scorer
    judge: Judge
    grain: float = RIDGE  #: of `fine`
    noised: bool = False  #: whether the judge cannot tell a sentence from its neighbours, so that these are scored
    resized: bool = False  #: whether neighbours may be longer or shorter


def landscape(energy: Energy, heads: list[Heads]) -> Landscape:
    """For exact gradients: `energy`, and what attention outputs show head by head."""
    both = HeadEnergy(energy, heads) if heads else energy
    return Landscape(both, both, energy)


class SentenceSearch:
    """State of one search for one sentence."""

    def __init__(
        self,
        config: Effort,
        landscape: Landscape,
        victim: Victim,
        frame: Frame,
        length: int,
        generator: torch.Generator,
        progress: Callable[[str], None],
    ):
        self.config, self.energy, self.victim, self.frame = config, landscape.judge, victim, frame
        self.coarse = landscape.coarse
        self.generator, self.progress = generator, progress
        self.length, self.free = length, length - frame.size
        self.words = vocabulary(victim).to(self.energy.table.device)
        # Where a relaxation begins. With all words alike it never reaches common ones, whose embeddings are unlike the
        # others: MiniLM, attention output of layer 3, 8 sentences, 33 % of their words at its ends and 69 % with this.
        self.prior = frequency(victim).log().to(self.energy.table.device)
        first = len(frame.first)
        self.grain = landscape.grain
        self.search = Search(landscape.fine, self.words, first, first + self.free, self.grain, config.shortlist)
        self.near = Neighbours(self.search, length, landscape.resized) if landscape.noised else None
        self.settled: Settled | None = None
        self.energy.tally.limit = config.budget

    def run(self, details: dict, start: tuple[int, ...] | None = None, pool: Tensor | None = None) -> Reconstruction:
        """Rounds until the sentence is found or the budget spent.

        Args:
            start: what the first descent begins at, where something is known.
            pool: [free, m] tokens that may stand at its free places instead.
        """
        config = self.config
        schedule = Schedule(config.steps, config.restarts, config.rate, config.ridge, 0.1 * config.ridge)
        best: Best | None = None
        seen: Tensor | None = None
        rounds, verdict = 0, float("inf")
        if start is not None:
            seen = torch.tensor(start, device=self.words.device)[len(self.frame.first) :][: self.free, None]
            seen = seen if pool is None else torch.cat([seen, pool], 1)
            # The tally counts for all lengths: half of what is left, not half of the whole.
            spent = self.energy.tally.sentences
            end = self.search.descend(start, seen, spent + max(0, config.budget - spent) // 2)
            best, verdict = self._widened((self.search.scores[end], end), seen)
        while verdict >= 1 and (best is None or self.energy.tally.sentences + self._round(rounds) <= config.budget):
            relaxed = self._relaxed(schedule, None if seen is None or rounds % FRESH == 0 else seen, best)
            near = self._ranked(relaxed)[0]
            for _ in range(min(AGAIN, self.free // EACH)):
                if near[0] < LOOSE * self.length or self.energy.tally.sentences + self._round(1) > config.budget:
                    break
                relaxed = self._relaxed(schedule, relaxed.best(4 * config.restarts), near)
                near = min(near, self._ranked(relaxed)[0])
            tokens = relaxed.best(4 * config.restarts)
            seen = tokens if seen is None else torch.cat([seen, tokens], 1)
            for start in self._starts(relaxed, near, best):
                end = self.search.descend(start, seen, config.budget)
                value = self.search.scores[end]
                if best is None or value < best[0]:
                    best, verdict = self._widened((value, end), seen)
                    self.progress(f"energy {best[0]:.3f}: {self._text(best[1])}")
                if verdict < 1 or self.energy.tally.sentences >= config.budget:
                    break
            rounds += 1
        assert best is not None
        return self._answer(best, verdict, rounds, details)

    def _relaxed(self, schedule: Schedule, seen: Tensor | None, hint: Best | None) -> Pool:
        """A relaxation over the vocabulary, or over words seen."""
        words, given = (self.words, self.prior[self.words][None]) if seen is None else (seen.unique(), None)
        if seen is not None:
            schedule = replace(schedule, restarts=2 * schedule.restarts)
        own, trust = self._trust(hint[1]) if hint else (None, None)
        return relax(self.coarse, self.frame, self.free, words, schedule, self.generator, self._done, own, trust, given)

    def _ranked(self, pool: Pool) -> list[Best]:
        """The restarts' likeliest sentences, best first."""
        rows = list(dict.fromkeys(tuple(row) for row in pool.sentences(self.frame).tolist()))
        return sorted(zip(self.search.score(rows), rows, strict=True))

    def _round(self, rounds: int) -> int:
        """Evaluations that the relaxation of a round takes at most, a backward pass counted as two."""
        return SLOPE * self.config.steps * self.config.restarts * (1 if rounds % FRESH == 0 else 2)

    def _answer(self, best: Best, verdict: float, rounds: int, details: dict) -> Reconstruction:
        found = {"energy": best[0], "verdict": verdict, "rounds": rounds, "evaluations": self.energy.tally.sentences}
        details = details | found | {"length": len(best[1])}
        if verdict < 1 and self.near is not None:
            return self._likeliest(best[1], details)
        if verdict < 1:
            return sentence(self.victim, [best[1]], [1.0 - 0.5 * max(0.0, verdict)], details)
        why = f"not found: the best sentence misses the gradient's floor {verdict:.1f} times over"
        confidence = [min(0.4, 0.5 / verdict)]
        return sentence(self.victim, [best[1]], confidence, details, status="budget_exhausted", reason=why)

    def _likeliest(self, tokens: tuple[int, ...], details: dict) -> Reconstruction:
        """The answer under noise: as sure as the sentence is likely among its neighbours."""
        settled = self.settled
        if settled is None or settled.tokens != tokens or not settled.probability:
            why = "not found: the budget ended before all neighbours of the best sentence were tried"
            return sentence(self.victim, [tokens], [0.0], details, status="budget_exhausted", reason=why)
        details = details | {"neighbours": settled.neighbours, "rival": settled.rival}
        why = f"the noise leaves other words as likely: the nearest sentence is {settled.rival:.1f} nats away"
        doubt = why if settled.probability < DOUBTED else None
        return sentence(self.victim, [tokens], [settled.probability], details, reason=doubt)

    def _judged(self, best: Best) -> tuple[Best, float]:
        """The verdict on a sentence; under noise on the best that its neighbours lead to."""
        verdict = self._verdict(best[1])
        if verdict >= 1 or self.near is None:
            return best, verdict
        self.settled = self.near.settle(best[1])
        end = self.settled.tokens
        return (self.search.scores[end], end), self._verdict(end)

    def _widened(
        self, best: tuple[float, tuple[int, ...]], seen: Tensor
    ) -> tuple[tuple[float, tuple[int, ...]], float]:
        """The best so far after changes too many for every step, as long as these help, and the verdict on it.

        Each leads on to others: MiniLM, attention output of layers 3 and 4, twelve sentences missed where they were
        made once a round are found.
        """
        best, verdict = self._judged(best)
        while verdict >= 1 and best[1] not in self.search.wide and self.energy.tally.sentences < self.config.budget:
            end = self.search.widen(best[1])
            best, verdict = self._judged((self.search.scores[end], end))
            if verdict >= 1:
                end = self.search.descend(best[1], seen, self.config.budget)
                best, verdict = self._judged((self.search.scores[end], end))
        return best, verdict

    def _verdict(self, tokens: tuple[int, ...]) -> float:
        return self.energy.verdict(torch.tensor(tokens, device=self.words.device))

    def _starts(self, pool: Pool, near: Best, best: Best | None) -> list[tuple[int, ...]]:
        """The two best of the restarts' likeliest sentences and of `near`, and the best so far."""
        ranked = [row for _, row in sorted({near, *self._ranked(pool)})]
        return ranked[:2] + ([best[1]] if best else [])

    def _trust(self, tokens: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """The free tokens of a sentence, and a probability for each that falls with its residual's rank."""
        ids = torch.tensor(tokens, device=self.energy.table.device)
        with torch.no_grad():
            residual = self.search.energy(self.energy.table[ids][None], self.grain)[1][0]
        start = len(self.frame.first)
        free = residual[start : start + self.free]
        rank = free.argsort().argsort().float() / max(1, self.free - 1)
        return ids[start : start + self.free], 0.9 - 0.8 * rank

    def _done(self, rows: Tensor) -> bool:
        """Whether one of the sentences [k, n] is the answer."""
        values = self.search.score([tuple(row) for row in rows.tolist()])
        place = min(range(len(values)), key=values.__getitem__)
        return self.energy.verdict(rows[place]) < 1

    def _text(self, tokens: tuple[int, ...]) -> str:
        return self.victim.processor.decode(list(tokens), skip_special_tokens=True)
