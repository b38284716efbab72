"""Which words stand in a batch, and where: by their inputs' shares outside the space in sentences of random words.

Near the model's beginning an input depends on its own word first: at MiniLM's layer 1 the context makes 4 % of its
variance. One query matrix of layer 1, 4 CoLA sentences: of 29,523 words, each met once, all 31 true ones are among the
first 33. Deeper, the contexts must be true as well: those are drawn from the words kept so far. Layer 3, 2 sentences:
the last of 17 true words is 1851st, then 138th, 94th and 53rd.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lmleak.attacks._batch_energy import Deflated
from lmleak.attacks._batch_places import Places
from lmleak.attacks._energy import CHUNK
from lmleak.attacks._subspace_relax import framed
from lmleak.attacks._text import Frame

# Passes over the words left, each in new sentences, and the share kept. Least shares, not means, tell the true words:
# a mean at layer 3 drops one of 17.
PASSES = ((1, 4), (3, 4), (8, 4), (16, 2))
LEAST = 1e-3  #: share outside the space below which a word is as good as certain
UNMET = 9.0  #: above any share
EXPLAINED = 3.0  #: by how much less likely a pair is that a found sentence has already


def scan(
    energy: Deflated,
    frame: Frame,
    words: Tensor,
    lengths: Sequence[int],
    keep: int,
    ridge: float,
    limit: int,
    draw: torch.Generator,
) -> Tensor:
    """The `keep` of `words` [v] that come nearest to the space, nearest first; stops after `limit` evaluations."""
    for passes, share in PASSES:
        least = energy.table.new_full((len(words),), UNMET)
        for _ in range(passes):
            order, turn, at = torch.randperm(len(words), generator=draw).to(words.device), 0, 0
            while at < len(words) and energy.evaluations < limit:
                free = lengths[turn % len(lengths)] - frame.size
                part = order[at : at + CHUNK * free]
                at, turn = at + len(part), turn + 1
                # The last sentence is filled with words that have had their turn.
                again = torch.randint(len(order), (-len(part) % free,), generator=draw).to(words.device)
                pick = torch.cat([part, again]).view(-1, free)
                residual = _residuals(energy, frame, words[pick], ridge)[1]
                least.scatter_reduce_(0, pick.flatten(), residual.flatten(), "amin")
        words = words[least.argsort()][: max(keep, len(words) // share)]
    return words[:keep]


@torch.no_grad()
def _residuals(energy: Deflated, frame: Frame, body: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    value, residual = energy(energy.table[framed(body, frame)], ridge)
    return value, residual[:, len(frame.first) :][:, : body.shape[1]]


class Words:
    """Words in play, and the least share outside the space that each has shown at each position."""

    def __init__(
        self, energy: Deflated, frame: Frame, tokens: Tensor, longest: int, ridge: float, draw: torch.Generator
    ):
        self.energy, self.frame, self.tokens, self.ridge, self.draw = energy, frame, tokens, ridge, draw
        self.least = energy.table.new_full((longest - frame.size, len(tokens)), UNMET)
        self.trust = 0
        self.barred = torch.zeros_like(self.least, dtype=torch.bool)

    @classmethod
    def admitted(cls, energy: Deflated, frame: Frame, places: Places, ridge: float, draw: torch.Generator) -> Words:
        """Those that layer 0 shows, where it admits them."""
        words = cls(energy, frame, places.words, len(places.allowed) + frame.size, ridge, draw)
        words.barred = ~places.allowed
        return words

    @property
    def longest(self) -> int:
        """Longest sentence that there are positions for."""
        return len(self.least) + self.frame.size

    def choices(self, place: int, count: int | None = None) -> list[int]:
        """The likeliest words of a position, counted from the first free one."""
        rows = self.least[place] + UNMET * self.barred[place]
        order = rows.argsort()[: int((~self.barred[place]).sum())][:count]
        return self.tokens[order].tolist()

    def add(self, token: int) -> None:
        """A word not met before."""
        if token in self.tokens.tolist():
            return
        self.tokens = torch.cat([self.tokens, self.tokens.new_tensor([token])])
        self.least = torch.nn.functional.pad(self.least, (0, 1), value=UNMET)
        self.barred = torch.nn.functional.pad(self.barred, (0, 1), value=False)

    def sample(
        self, lengths: Sequence[int], width: int, found: Iterable[tuple[int, ...]]
    ) -> list[tuple[float, tuple[int, ...]]]:
        """Draws `width` sentences of every length from the better pairs; energy a token and sentence of each.

        Pairs remember the least share that they have shown, and the next are drawn from the better ones. One query
        matrix of layer 1, 4 CoLA sentences: the true words of the first 3 positions are the first 4 after 3 calls.
        """
        best = self.least.min(1, keepdim=True).values.clamp_min(LEAST)
        prior = -(1 + 0.3 * min(self.trust, 12)) * (self.least.clamp_min(LEAST) / best).log() * min(1, self.trust)
        column = {token: i for i, token in enumerate(self.tokens.tolist())}
        for tokens in found:
            for place, token in enumerate(tokens[len(self.frame.first) : len(tokens) - len(self.frame.last)]):
                if place < len(prior) and token in column:
                    prior[place, column[token]] -= EXPLAINED
        prior = prior.masked_fill(self.barred, -math.inf)
        self.trust += 1
        out: list[tuple[float, tuple[int, ...]]] = []
        for length in lengths:
            free = length - self.frame.size
            if not 0 < free <= len(prior):
                continue
            draw = torch.rand(width, free, len(self.tokens), generator=self.draw).clamp_min(1e-9).to(prior)
            pick = (prior[:free] - (-draw.log()).log()).argmax(-1)
            body = self.tokens[pick]
            values, residual = _residuals(self.energy, self.frame, body, self.ridge)
            for place in range(free):
                self.least[place].scatter_reduce_(0, pick[:, place], residual[:, place], "amin")
            rows = framed(body, self.frame).tolist()
            out += [(value / length, tuple(row)) for value, row in zip(values.tolist(), rows, strict=True)]
        return out
