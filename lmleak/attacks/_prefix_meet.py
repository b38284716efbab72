"""The first two tokens of a sentence at depth, met in the middle: what each does to the second input is nearly added.

A query's gradient does not hold the first position's input, a key's only differences to it, so the first two tokens
are tested as a pair, and there are v^2 of them. But the input at position 1 is nearly a sum b(second) + c(first): on a
trained 4-layer GPT-2 a sum leaves 4 to 15 % of its variance unexplained, in directions that a sample tells. All words
are run once behind a few first tokens and once before a few second ones; in the directions outside the observed space,
weighed by what the sum misses there, b and -c of the true pair are neighbours. Pairs are then run, best ones first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lmleak.attacks._prefix_forward import Prefix, Reader
from lmleak.attacks._rowspace import RowSpace

SAMPLE = (24, 384)  #: first and second tokens that the directions are learned from
FIXED = (2, 1)  #: first tokens a turn behind which all words are run, second ones before which they are
TURNS = 3
WIDE = 768  #: directions outside the space that are looked at
MEET = 32  #: of them kept
ASIDE = 24  #: random directions outside the space that layer 0's pairs are matched in
SCAN = 4096  #: words run at once
CHUNK = 1024  #: second tokens compared with four times as many first ones at once
#: Second tokens that stay, and pairs run for each of them: halving by what the run pairs' residuals say.
ROUNDS = ((1024, 4), (64, 64), (8, 1024))

Test = Callable[[Tensor], tuple[Tensor, Tensor]]  #: pairs [k, 2] -> features [k, d], residuals [k]; keeps the hits


class Meeting:
    """Finds pairs; one call of `next` at a time, so that the caller can stop."""

    def __init__(self, reader: Reader, space: RowSpace, kind: str, order: Tensor, generator: torch.Generator):
        """Args: kind: `differences`, or the second input alone; order: [v] tokens, likely ones first."""
        self.reader, self.space, self.kind, self.order, self.generator = reader, space, kind, order, generator
        self.steps: Iterator[None] | None = None

    def next(self, test: Test) -> bool:
        """Does one step; False when there are none left."""
        if self.steps is None:
            self.steps = self._run(test)
        return next(self.steps, self) is not self

    def _run(self, test: Test) -> Iterator[None]:
        v, device = len(self.order), self.order.device
        firsts, seconds = (self._some(count) for count in SAMPLE)
        onto = self._directions(firsts, seconds)
        words = torch.arange(v, device=device).split(SCAN)
        b, c = (torch.zeros(v, MEET, device=device) for _ in range(2))
        for turn in range(1, TURNS + 1):
            for first in firsts[(turn - 1) * FIXED[0] : turn * FIXED[0]]:
                b += torch.cat([self._feature(first.expand_as(part), part) @ onto for part in words])
                yield
            for second in seconds[(turn - 1) * FIXED[1] : turn * FIXED[1]]:
                c += torch.cat([self._feature(part, second.expand_as(part)) @ onto for part in words])
                yield
            shift = c / (turn * FIXED[1])
            shift -= shift[firsts[: turn * FIXED[0]]].mean(0)
            yield from self._halving(b / (turn * FIXED[0]), shift, test)

    def _halving(self, b: Tensor, c: Tensor, test: Test) -> Iterator[None]:
        """Runs pairs whose sums b + c [v, MEET] are short, then ever more of those second tokens that came closest."""
        v = len(b)
        score = torch.cat([_nearest(part, c) for part in b.split(CHUNK)])
        for many, each in ROUNDS:
            best = score.topk(min(many, v), largest=False).indices
            rows = [_distances(b[part], c).topk(min(each, v), largest=False).indices for part in best.split(CHUNK)]
            short = torch.cat(rows)
            _, residual = test(torch.stack([short.flatten(), best.repeat_interleave(short.shape[1])], 1))
            score = torch.full_like(score, torch.inf)
            score[best] = residual.view(short.shape).min(1).values.to(score)
            yield

    def _some(self, count: int) -> Tensor:
        """[count] tokens, likely ones more often (the first eighth of the order as often as the rest): what common
        words do to each other is what a sum misses most. Behind rare ones alone, a true pair was the 8,000th."""
        drawn = torch.rand(count, generator=self.generator).pow(3) * len(self.order)
        return self.order[drawn.long().to(self.order.device)]

    def _feature(self, first: Tensor, second: Tensor) -> Tensor:
        """[k, d] what the space would hold of pairs; one of the two tokens is the same in all."""
        if bool((first == first[0]).all()):
            prefix = self.reader.extend(Prefix(), int(first[0]))
            x = self.reader.read([prefix], second[None])[0]
            return x - self.reader.read([Prefix()], first[None, :1])[0] if self.kind == "differences" else x
        x = self.reader.pairs(torch.stack([first, second], 1))
        return x[:, 1] - x[:, 0] if self.kind == "differences" else x[:, 1]

    def _directions(self, firsts: Tensor, seconds: Tensor) -> Tensor:
        """[d, MEET] directions outside the space in which features differ most for what a sum misses of them."""
        x = torch.stack([self._feature(first.expand_as(seconds), seconds) for first in firsts]).double()
        d = x.shape[2]
        raw = torch.randn(d, min(d, WIDE), generator=self.generator, dtype=torch.float64).to(x.device)
        outside = torch.linalg.svd(raw - self.space.basis.T @ (self.space.basis @ raw), full_matrices=False).U
        outside = outside[:, : min(d - self.space.rank, WIDE)]
        z = x @ outside
        missed = z - z.mean(0) - z.mean(1, keepdim=True) + z.mean((0, 1))
        around = (z - z.mean((0, 1))).flatten(0, 1)
        noise = missed.flatten(0, 1).T @ missed.flatten(0, 1) / len(around)
        noise.diagonal().add_(1e-3 * noise.diagonal().mean() + 1e-300)
        values, vectors = torch.linalg.eigh(noise)
        white = vectors / values.sqrt()
        _, turned = torch.linalg.eigh(white.T @ (around.T @ around) @ white)
        return (outside @ (white @ turned[:, -MEET:])).to(self.reader.body.dtype)


def _distances(b: Tensor, c: Tensor) -> Tensor:
    """[k, v] squared lengths of b + c."""
    return b.square().sum(1)[:, None] + c.square().sum(1) + 2 * b @ c.T


def _nearest(b: Tensor, c: Tensor) -> Tensor:
    """[k] the least of them."""
    least = b.new_full((len(b),), torch.inf)
    for part in c.split(4 * CHUNK):
        least = torch.minimum(least, (part.square().sum(1) + 2 * b @ part.T).amin(1))
    return b.square().sum(1) + least


def matched(reader: Reader, space: RowSpace, v: int, count: int, generator: torch.Generator) -> Tensor:
    """[count, 2] pairs whose inputs, each of its own token alone (layer 0), have the same part outside the space."""
    raw = torch.randn(ASIDE, space.basis.shape[1], generator=generator, dtype=torch.float64).to(reader.device)
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
