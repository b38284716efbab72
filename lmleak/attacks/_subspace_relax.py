"""The continuous half of the subspace attack: mirror descent on every position's distribution over the vocabulary.

Free embeddings fit any row space by mixing tokens with signs (MiniLM layer 3, 15 tokens, best of 4 restarts after 100
steps: 5 of 15 tokens in place). Mixtures with weights that are positive and sum to one do not: 15 of 15 after 60 steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from lmleak.attacks._energy import Scorer, slope
from lmleak.attacks._text import Frame

BLOCK = 4096  #: words whose probabilities are held at once
#: What log-probabilities vary by when a restart begins; by much more, they begin far from the words' mean. MiniLM,
#: layer 4, 30 tokens: key not found in 30,000 candidates with 1, in 11,100 with 0.3; query 24,500 and 10,100. With 20,
#: sentences of 10 and 15 tokens take three times the candidates.
START = 0.3
HELD = 8  #: words of every place that outlive a relaxation


@dataclass(frozen=True)
class Schedule:
    """Of one descent."""

    steps: int
    restarts: int
    rate: float  #: step of the log-probabilities, in standard deviations of the gradient over the vocabulary
    ridge: float  #: of the boldest restart's first step; falls to `floor` over the first 5/6 of them
    floor: float  #: what the most cautious restart keeps throughout; the others lie between, in equal ratios


class Distributions:
    """Log-probabilities linear in the words' embeddings: prior - pull @ embedding, `pull` [k, free, d].

    A sum of slopes is linear in them, and with noise that is, too, nothing of the size of the vocabulary is held: the
    words pass in blocks.
    """

    def __init__(
        self,
        table: Tensor,
        words: Tensor,
        prior: Tensor | None = None,
        hint: Tensor | None = None,
        bonus: Tensor | None = None,
    ):
        self.table, self.words = table, words
        self.prior = None if prior is None else prior.clamp_min(-1e4)  #: [free or 1, v], finite
        self.hint, self.bonus = hint, bonus  #: [free] words that gain [k, free]
        parts = words.split(BLOCK)
        self.centre = torch.stack([table[part].sum(0) for part in parts]).sum(0) / len(words)
        power = table.new_zeros(table.shape[1], table.shape[1])
        for part in parts:
            rows = table[part] - self.centre
            power += rows.T @ rows
        self.covariance = power / max(1, len(words) - 1)

    def drawn(self, noise: Tensor) -> Tensor:
        """Pulls whose log-probabilities vary by 1 over the words, from noise [k, free, d]."""
        values, turn = torch.linalg.eigh(self.covariance.double())
        told = values > 1e-6 * values[-1]
        scale = torch.where(told, values, torch.inf).rsqrt() / told.sum().clamp_min(1).sqrt()
        return noise @ (turn * scale).T.to(noise)

    def spread(self, slopes: Tensor) -> Tensor:
        """Standard deviation over the words of slopes [..., d], [..., 1]."""
        return ((slopes @ self.covariance) * slopes).sum(-1, keepdim=True).clamp_min(1e-30).sqrt()

    def mean(self, pull: Tensor) -> Tensor:
        """The words' mean embedding by probability, [k, free, d]."""
        top = pull.new_full((*pull.shape[:2], 1), -torch.inf)
        weight, total = torch.zeros_like(top), torch.zeros_like(pull)
        for _, rows, logits in self._blocks(pull):
            new = torch.maximum(top, logits.amax(-1, keepdim=True))
            shares = (logits - new).exp()
            weight = weight * (top - new).exp() + shares.sum(-1, keepdim=True)
            total = total * (top - new).exp() + shares @ rows
            top = new
        return total / weight

    def likeliest(self, pull: Tensor, count: int) -> Tensor:
        """Tokens, the likeliest first, [k, free, count]."""
        return self.words[self._likeliest(pull, count)]

    def pruned(self, pull: Tensor, count: int) -> Distributions:
        """Without the words that are nowhere among the `count` likeliest."""
        keep = self._likeliest(pull, count).unique()
        prior = None if self.prior is None else self.prior[:, keep]
        return Distributions(self.table, self.words[keep], prior, self.hint, self.bonus)

    def told(self, prior: Tensor) -> Distributions:
        """The same words with another prior [free, v]."""
        out = copy(self)
        out.prior = prior.clamp_min(-1e4)
        return out

    def _likeliest(self, pull: Tensor, count: int) -> Tensor:
        count = min(count, len(self.words))
        best = pull.new_zeros(*pull.shape[:2], 0)
        index = torch.zeros_like(best, dtype=torch.long)
        for first, _, logits in self._blocks(pull):
            places = torch.arange(first, first + logits.shape[-1], device=index.device).expand_as(logits)
            both = torch.cat([best, logits], -1)
            best, order = both.topk(min(count, both.shape[-1]), -1)
            index = torch.cat([index, places], -1).gather(-1, order)
        return index

    def _blocks(self, pull: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Place of a block's first word, embeddings [m, d] and log-probabilities [k, free, m], up to a constant."""
        for first in range(0, len(self.words), BLOCK):
            part = self.words[first : first + BLOCK]
            rows = self.table[part]
            logits = -(pull @ rows.T)
            if self.prior is not None:
                logits += self.prior[:, first : first + BLOCK]
            if self.hint is not None and self.bonus is not None:
                logits += self.bonus[..., None] * (part == self.hint[:, None])
            yield first, rows, logits


@dataclass(frozen=True)
class Pool:
    """Every restart's likeliest tokens at the free positions."""

    tokens: Tensor  #: [k, free, m], the likeliest first

    def sentences(self, frame: Frame) -> Tensor:
        """Every restart's likeliest tokens, framed, [k, n]."""
        return framed(self.tokens[..., 0], frame)

    def best(self, count: int) -> Tensor:
        """Likeliest tokens by position over all restarts, [free, count], with repeats; at most `HELD` a restart."""
        each = max(1, count // len(self.tokens))
        return self.tokens[..., :each].transpose(0, 1).flatten(1)


def favoured(kept: Tensor, words: Tensor) -> Tensor:
    """What hints gain where they are kept: as likely as all other words together, twice over."""
    return kept * (math.log(len(words)) + 1.5)


def descent(
    held: Distributions, pull: Tensor, steep: Callable[[int, Tensor], Tensor], steps: int, rate: float
) -> Iterator[tuple[Distributions, Tensor]]:
    """Mirror descent, step by step: what is held, and the pulls.

    Args:
        steep: gradient by the mean embeddings [k, free, d] at a step.
        rate: step of the log-probabilities, in standard deviations of the gradient over the vocabulary.
    """
    for step in range(steps):
        # Tokens of no weight anywhere leave: the products with the table then cost nothing beside the model.
        if step in (steps * 3 // 10, steps * 6 // 10):
            held = held.pruned(pull, 2000 if step < steps // 2 else 200)
        slopes = steep(step, held.mean(pull))
        pull = pull + rate * slopes / held.spread(slopes)
        yield held, pull


def framed(body: Tensor, frame: Frame) -> Tensor:
    """Special tokens around token sequences [k, free]."""
    first = torch.tensor(frame.first, dtype=torch.long, device=body.device).expand(len(body), -1)
    last = torch.tensor(frame.last, dtype=torch.long, device=body.device).expand(len(body), -1)
    return torch.cat([first, body, last], 1)


def relax(
    energy: Scorer,
    frame: Frame,
    free: int,
    words: Tensor,
    schedule: Schedule,
    generator: torch.Generator,
    done: Callable[[Tensor], bool],
    hint: Tensor | None = None,
    trust: Tensor | None = None,
    prior: Tensor | None = None,
) -> Pool:
    """Descends from random distributions over `words` [v].

    Args:
        done: told every fifth step of the second half which sentences [k, n] the restarts stand at; true ends it.
        hint: [free] tokens that half of the restarts begin with, where drawn below
        trust: [free] probabilities of keeping each.
        prior: [free, v] log-probabilities to begin with, where something is known; -inf keeps a word out.
    """
    table, k = energy.table, schedule.restarts
    fixed = table[framed(words.new_zeros(k, free), frame)]
    start, stop = len(frame.first), len(frame.first) + free
    noise, bonus = torch.randn(k, free, table.shape[1], generator=generator).to(table), None
    if hint is not None and trust is not None:
        kept = torch.rand(k, free, generator=generator).to(table) < trust
        kept[: k // 2] = False
        bonus = favoured(kept, words)
    held = Distributions(table, words, prior, hint, bonus)
    pull = START * held.drawn(noise)
    # Easy modules (queries) are slowed by a ridge, hard ones (attention outputs, deep) never found without.
    ridges = schedule.floor * (schedule.ridge / schedule.floor) ** torch.linspace(1, 0, k).to(table)

    def steep(step: int, mean: Tensor) -> Tensor:
        embeds = torch.cat([fixed[:, :start], mean, fixed[:, stop:]], 1)
        ridge = (ridges * (1 - 1.2 * step / schedule.steps)).clamp_min(schedule.floor)
        return slope(energy, embeds, ridge)[:, start:stop]

    for step, (held, pull) in enumerate(descent(held, pull, steep, schedule.steps, schedule.rate)):  # noqa: B020
        if step % 5 == 4 and 2 * step > schedule.steps and done(Pool(held.likeliest(pull, 1)).sentences(frame)):
            break
    return Pool(held.likeliest(pull, HELD))
