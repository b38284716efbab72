"""The first two tokens of a sentence at depth, one after the other: the second is nearly right with the wrong first.

A query's gradient does not hold the first position's input, a key's only differences to it, so the first two tokens
are tested as a pair, and there are v^2 of them. But an input at position 1 depends on its own token far more than on
the one before. Measured on a trained 4-layer GPT-2, layers 1 and 2, three CoLA sentences: with a wrong first token the
true second one is among the first 100 of 50,257 (query, two of three) or 1,000 (key); by the mean over six wrong ones
among the first 28 (key). With the true second token, the first is found as any other continuation is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lmleak.attacks._prefix_forward import Prefix, Reader
from lmleak.attacks._prefix_guess import Guess, outside
from lmleak.attacks._prefix_words import Words
from lmleak.attacks._rowspace import RowSpace

STARTS = 4  #: first tokens that second ones are ranked with
SAMPLE = 512  #: pairs before the first fit
ROUNDS = 3  #: fits, each followed by twice as many of its best candidates
TRIED = 48  #: second tokens that first ones are sought for

MEET = 24  #: random directions outside the space that layer 0's pairs are matched in
CHUNK = 1024  #: second tokens compared with four times as many first ones at once

Test = Callable[[Tensor], tuple[Tensor, Tensor]]  #: pairs [k, 2] -> features [k, d], residuals [k]; keeps the hits


class Alternation:
    """Ranks second tokens, then goes through them; one call of `next` at a time, so that the caller can stop."""

    def __init__(self, words: Words, order: Tensor, generator: torch.Generator):
        self.words, self.order, self.generator = words, order, generator
        self.steps: Iterator[None] | None = None

    def next(self, test: Test, space: RowSpace) -> bool:
        """Does one step; False when there are none left."""
        if self.steps is None:
            self.steps = self._run(test, space)
        return next(self.steps, self) is not self

    def _run(self, test: Test, space: RowSpace) -> Iterator[None]:
        v, device = len(self.words), self.words.device
        draw = torch.randint(v, (STARTS // 2,), generator=self.generator).to(device)
        score = torch.zeros(v, device=device)
        guess = None
        for first in torch.cat([self.order[: STARTS - STARTS // 2], draw]).tolist():
            residual, guess = self._scan(test, space, first, 0, guess)
            # Those not run are worse than the worst that were, or so the fit has it.
            ran = residual < torch.inf
            score += residual.masked_fill(~ran, float(residual[ran].max())).log()
            yield
        guess = None
        for second in score.argsort()[:TRIED].tolist():
            _, guess = self._scan(test, space, second, 1, guess)
            yield

    def _scan(self, test: Test, space: RowSpace, fixed: int, slot: int, before: Guess | None) -> tuple[Tensor, Guess]:
        """Residuals [v] of pairs with `fixed` in `slot`, infinite where not run: a fit's best, in growing steps."""
        v, device = len(self.words), self.words.device
        residual = torch.full((v,), torch.inf, device=device)
        likely = self.order[: SAMPLE // 2]
        batch = torch.cat([likely, torch.randperm(v, generator=self.generator)[: SAMPLE // 2].to(device)]).unique()
        guess, step = None, SAMPLE
        for _ in range(ROUNDS + 1):
            other = torch.full_like(batch, fixed)
            x, found = test(torch.stack([other, batch] if slot == 0 else [batch, other], 1))
            residual[batch] = found.float()
            guess = guess or Guess(self.words, 1, x.shape[1], before)
            guess.add(batch[:, None], x)
            order = guess.project(space.basis).scores(0, outside).masked_fill(residual < torch.inf, torch.inf)
            batch = order.topk(min(step, int((residual == torch.inf).sum())), largest=False).indices
            step *= 2
            if not len(batch):
                break
        assert guess is not None
        return residual, guess


def meeting(reader: Reader, space: RowSpace, v: int, count: int, generator: torch.Generator) -> Tensor:
    """[count, 2] pairs whose inputs, each of its own token alone (layer 0), have the same part outside the space."""
    raw = torch.randn(MEET, space.basis.shape[1], generator=generator, dtype=torch.float64).to(reader.device)
    aside = ((raw - (raw @ space.basis.T) @ space.basis).T).float()
    tokens = torch.arange(v, device=reader.device)

    def seen(prefix: Prefix) -> Tensor:
        return torch.cat([reader.read([prefix], part[None])[0].float() @ aside for part in tokens.split(8 * CHUNK)])

    first, second = seen(Prefix()), seen(reader.extend(Prefix(), 0))
    distance, which = first.new_full((v,), torch.inf), torch.zeros(v, dtype=torch.long, device=reader.device)
    for here in tokens.split(CHUNK):
        for there in tokens.split(4 * CHUNK):
            near = torch.cdist(second[here], first[there]).min(1)
            better = near.values < distance[here]
            distance[here] = torch.where(better, near.values, distance[here])
            which[here] = torch.where(better, there[near.indices], which[here])
    best = distance.topk(min(count, v), largest=False).indices
    return torch.stack([which[best], best], 1)


def draw(order: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """[count] tokens with repetition, half of them from the likely ones, which `order` [v] begins with, shuffled."""
    likely = torch.randint(min(len(order), count), (count // 2,), generator=generator)
    drawn = torch.randint(len(order), (count - count // 2,), generator=generator).to(order.device)
    mixed = torch.cat([order[likely.to(order.device)], drawn])
    return mixed[torch.randperm(count, generator=generator).to(mixed.device)]
