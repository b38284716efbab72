"""Completes a sentence of a batch of which some words and their positions are known."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lmleak.attacks._batch_found import Found
from lmleak.attacks._subspace_relax import Schedule, relax
from lmleak.attacks._text import Frame

SWEEPS = 16  #: of single changes, far more than any descent took
WIDEST = 1_000_000  #: all choices, also where a word is known


@dataclass(frozen=True)
class Outline:
    """A sentence as far as it is known: what may stand at each position between the frame's tokens, likeliest first."""

    choices: tuple[tuple[int, ...], ...]
    shares: tuple[tuple[float, ...], ...]  #: how much speaks for each choice, any positive scale
    known: frozenset[int]  #: of the choices, those whose first is most probably the word


class Fill:
    """Search of the sentences that outlines leave open."""

    def __init__(self, found: Found, frame: Frame, schedule: Schedule, generator: torch.Generator):
        self.found, self.energy, self.frame = found, found.energy, frame
        self.schedule, self.generator = schedule, generator

    def first(self, outline: Outline) -> tuple[int, ...]:
        """The likeliest sentence of an outline."""
        return (*self.frame.first, *(choice[0] for choice in outline.choices), *self.frame.last)

    def descend(self, sentence: tuple[int, ...], outline: Outline, width: int, limit: int) -> tuple[int, ...]:
        """Replaces words by one of the first `width` choices while one replacement or several lower the energy."""
        start = len(self.frame.first)
        for _ in range(SWEEPS):
            changed = [
                (*sentence[: start + i], word, *sentence[start + i + 1 :])
                for i in range(len(outline.choices))
                for word in self._tried(outline, i, width)
                if word != sentence[start + i]
            ]
            if not changed or self.energy.evaluations >= limit:
                break
            better = self.found.together(sentence, changed)
            if better == sentence:
                break
            sentence = better
        return sentence

    @staticmethod
    def _tried(outline: Outline, place: int, width: int) -> tuple[int, ...]:
        if place in outline.known and width < WIDEST:
            return outline.choices[place][:1]
        # Full stops stand in every sentence: the sums say least of them, and they come last.
        return outline.choices[place][: max(width, 40 * (place == len(outline.choices) - 1))]

    def relaxed(self, outline: Outline, done: Callable[[Tensor], bool]) -> tuple[int, ...]:
        """The best end of a relaxation over all choices at once."""
        words = sorted({word for choice in outline.choices for word in choice})
        column = {word: i for i, word in enumerate(words)}
        device = self.energy.table.device
        prior = torch.full((len(outline.choices), len(words)), -math.inf, device=device)
        for i, (choice, share) in enumerate(zip(outline.choices, outline.shares, strict=True)):
            best = max(share)
            for word, value in zip(choice, share, strict=True):
                prior[i, column[word]] = math.log(max(value / best, 1e-2)) - 9.0 * (
                    i in outline.known and word != choice[0]
                )
        tokens = torch.tensor(words, device=device)
        free = len(outline.choices)
        pool = relax(self.energy, self.frame, free, tokens, self.schedule, self.generator, done, prior=prior)
        rows = list(dict.fromkeys(map(tuple, pool.sentences(self.frame).tolist())))
        return self.found.best(rows)
