"""Finds the sentences of a batch from what layer 0's gradient says of every word: where it stands, and with which.

Words that occur once give outlines of the sentences; a deeper module decides the words that several tokens share, and
the lengths. A sentence found has a gradient of its own, the same for every label up to a factor: it is subtracted, and
words that it shared with one other sentence then occur once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lmleak.attacks._batch_fill import WIDEST, Fill, Outline
from lmleak.attacks._batch_pairs import Basis, clusters, counts, pairs
from lmleak.gradients.observe import own_gradient
from lmleak.records import Observation, Victim

WIDTHS = (8, 32)  #: words tried at an open position: more only where fewer end short of the truth


class Effort(NamedTuple):
    """How hard a reading is tried."""

    lengths: int  #: tried of a sketch
    all_words: bool  #: whether every word is tried in the end, also where one is known
    relaxing: bool
    least: float  #: of `pairs`: a full stop with most of its gradient in one sentence passes for one that occurs once
    most: float


EFFORTS = (Effort(2, False, False, 0.7, 0.7), Effort(4, True, False, 0.9, 0.2), Effort(4, True, True, 0.97, 0.1))
ELSEWHERE = 0.05  #: least share by which a word that seems to occur once is tried at another position


@dataclass(frozen=True)
class Sketch:
    """What layer 0 says of one sentence."""

    own: dict[int, int]  #: position -> token, of its words that occur once in the batch
    ends: Tensor  #: [p] share of every position's sum that the end token's own explains
    scores: Tensor  #: [p, m] how much speaks for every word at every other position; 0 for what cannot stand there

    @property
    def key(self) -> tuple[tuple[int, int], ...]:
        """Tells sketches apart."""
        return tuple(sorted(self.own.items()))


class Guided:
    """State of one batch: what is found, and what layer 0 says of the rest."""

    def __init__(
        self,
        victim: Victim,
        observation: Observation,
        basis: Basis,
        fill: Fill,
        budget: int,
    ):
        self.victim, self.observation, self.basis = victim, observation, basis
        self.found, self.energy, self.fill, self.frame, self.budget = fill.found, fill.energy, fill, fill.frame, budget
        self.sums = basis.solve(observation.gradients)
        self.guesses: dict[tuple[int, ...], float] = {}  #: best of every outline of the latest reading, energy a token
        self.effort = 0
        special = set(victim.processor.all_special_ids)
        self.special = [i for i, token in enumerate(basis.tokens.tolist()) if token in special]

    def run(self) -> None:
        """Until every sentence is found, no effort helps any more, or the budget is spent."""
        tried: dict[tuple, int] = {}
        self.effort = 0
        limit = len(EFFORTS)
        while self.found.missing and self.effort < limit and self.energy.evaluations < self.budget:
            sketches = self.read()
            self.guesses.clear()
            for sketch in sorted(sketches, key=lambda one: (tried.get(one.key, 0), -len(one.own))):
                tried[sketch.key] = tried.get(sketch.key, 0) + 1
                if self.complete(sketch):
                    break
                if self.energy.evaluations >= self.budget:
                    break
            else:
                self.effort += 1

    def read(self) -> list[Sketch]:
        """What the sums left say of every missing sentence."""
        effort = EFFORTS[self.effort]
        read = pairs(self.sums, len(self.basis.tokens), effort.least, effort.most)
        once = [i for i in read.once if i not in self.special and read.once[i] >= len(self.frame.first)]
        tokens = self.basis.tokens.tolist()
        weight = read.weight.clone()
        weight[:, self.special] = -1.0
        for i in once:
            weight[:, i] = torch.where(weight[:, i] > ELSEWHERE, weight[:, i], 1e-6)
            if not self.effort:
                weight[read.once[i], i] = -1.0  # its sentence is known
        # Rests of sums are noisy about 0: what is not excluded stays possible.
        base = torch.where(weight < 0, 0.02 * (weight > -1), weight.clamp_min(0.02))
        base[:, once] = weight[:, once].clamp_min(0)
        last = self.frame.last[:1]
        ends = read.weight[:, tokens.index(last[0])] if last and last[0] in tokens else weight.new_ones(len(weight))
        if not once:
            return [Sketch({}, ends, base)]
        heads = self.victim.module.config.num_attention_heads
        values = read.sums[:, self.basis.value]
        groups = clusters(values[once], [read.once[i] for i in once], self.found.missing, heads)
        groups = [[once[i] for i in group] for group in groups]
        often = counts(values, groups, heads).clamp(0.05, 1)
        return [
            Sketch({read.once[i]: tokens[i] for i in group}, ends, base * often[:, k] ** 2)
            for k, group in enumerate(groups)
        ]

    def complete(self, sketch: Sketch) -> bool:
        """Searches the sentence that holds the words known of it; whether it is found."""
        outlines = self.outlines(sketch)
        if not outlines:
            return False
        with self.energy.attached():
            before = len(self.found.sentences)
            end, value = self._search(outlines)
            if len(self.found.sentences) == before:
                self.guesses[end] = value
                return False
        self.subtract()
        return True

    def _search(self, outlines: list[Outline]) -> tuple[tuple[int, ...], float]:
        """The best end of the outlines, and its energy a token; accepted if it is true."""
        lengths, all_words, relaxing, *_ = EFFORTS[self.effort]
        ends: list[tuple[float, int, tuple[int, ...]]] = []

        def descend(start: tuple[int, ...], i: int, widths: tuple[int, ...]) -> bool:
            for width in widths:
                start = self.fill.descend(start, outlines[i], width, self.budget)
                if self.found.accept(start):
                    break
            ends.append(
                (self.found.score([start])[0] / len(start) if start not in self.found.sentences else -1.0, i, start)
            )
            return start in self.found.sentences

        def ended() -> bool:
            if any(descend(self.fill.first(outline), i, WIDTHS) for i, outline in enumerate(outlines[:lengths])):
                return True
            best = sorted(ends)[:2]
            if all_words and any(descend(end, i, (WIDEST,)) for _, i, end in best):
                return True
            if not relaxing:
                return False
            before = len(self.found.sentences)
            for _, i, _ in best:
                start = self.fill.relaxed(outlines[i], self._any)
                if len(self.found.sentences) > before or descend(start, i, WIDTHS):
                    return True
            return False

        ended()
        value, _, end = min(ends)
        return end, value

    def _any(self, rows: Tensor) -> bool:
        return self.found.accept(self.found.best([tuple(row) for row in rows.tolist()]))

    def outlines(self, sketch: Sketch) -> list[Outline]:
        """One for every length that the words known leave, likeliest first.

        A sentence ends where the position's sum holds the end token's, most often soon after the last word known.
        """
        start, tokens = len(self.frame.first), self.basis.tokens.tolist()
        last = max(sketch.own, default=start)
        choices: list[tuple[int, ...]] = []
        shares: list[tuple[float, ...]] = []
        out: list[tuple[float, Outline]] = []
        known = frozenset(place - start for place in sketch.own)
        for place in range(start, self.basis.places):
            if place > last and place + len(self.frame.last) <= self.basis.places:
                likely = math.log(max(float(sketch.ends[place]), 0.005)) - 0.1 * (place - last)
                out.append((likely, Outline(tuple(choices), tuple(shares), known)))
            row = sketch.scores[place]
            order = [i for i in row.argsort(descending=True).tolist() if row[i] > 0]
            if not order and place not in sketch.own:
                break
            words, values = [tokens[i] for i in order], [float(row[i]) for i in order]
            if place in sketch.own:
                own = sketch.own[place]
                words, values = (
                    [own, *(w for w in words if w != own)],
                    [1.0, *(v for w, v in zip(words, values, strict=True) if w != own)],
                )
            choices.append(tuple(words))
            shares.append(tuple(values))
        fits = [
            o
            for _, o in sorted(out, key=lambda pair: -pair[0])
            if self.found.missing > 1 or self.frame.size + len(o.choices) == self.found.rest
        ]
        return fits

    def doubtful(self) -> list[tuple[int, ...]]:
        """The best of what is not found, as many as are missing."""
        return self.found.doubtful((value, tokens) for tokens, value in self.guesses.items())

    def subtract(self) -> None:
        """Takes the newest sentence's own gradient out of the sums; its label is the one that leaves least."""
        tokens = next(reversed(self.found.sentences))
        share = self.observation.batch_size if self.observation.reduction == "mean" else 1
        ids = torch.tensor(tokens, device=self.energy.table.device)[None]
        here = [i for i, token in enumerate(self.basis.tokens.tolist()) if token in set(tokens)]
        rests = []
        for label in range(self.victim.module.config.num_labels):
            own = own_gradient(self.victim, ids, label, self.basis.readers)
            rests.append(self.sums - self.basis.solve(own) / share)
        rest = min(rests, key=lambda sums: float(sums[here].norm(dim=1).sum()))
        # A clipped or otherwise changed gradient is not this one: then not even a word of its own goes to nothing.
        if float((rest[here].norm(dim=1) / self.sums[here].norm(dim=1).clamp_min(1e-300)).min()) < 0.5:
            self.sums = rest
