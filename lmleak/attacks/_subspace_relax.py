"""The continuous half of the subspace attack: mirror descent on every position's distribution over the vocabulary.

Free embeddings fit any row space by mixing tokens with signs (MiniLM layer 3, 15 tokens, best of 4 restarts after 100
steps: 5 of 15 tokens in place). Mixtures with weights that are positive and sum to one do not: 15 of 15 after 60 steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lmleak.attacks._energy import Scorer, slope
from lmleak.attacks._text import Frame


@dataclass(frozen=True)
class Schedule:
    """Of one descent."""

    steps: int
    restarts: int
    rate: float  #: step of the log-probabilities, in standard deviations of the gradient over the vocabulary
    ridge: float  #: of the boldest restart's first step; falls to `floor` over the first 5/6 of them
    floor: float  #: what the most cautious restart keeps throughout; the others lie between, in equal ratios


@dataclass(frozen=True)
class Pool:
    """Tokens still in play, and every restart's log-probabilities of them at the free positions."""

    tokens: Tensor  #: [m]
    logits: Tensor  #: [k, free, m]

    def sentences(self, frame: Frame) -> Tensor:
        """Every restart's likeliest tokens, framed, [k, n]."""
        return framed(self.tokens[self.logits.argmax(-1)], frame)

    def best(self, count: int) -> Tensor:
        """Likeliest tokens by position over all restarts, [free, count], with repeats."""
        k = len(self.logits)
        each = max(1, count // k)
        top = self.logits.topk(min(each, len(self.tokens)), -1).indices  # [k, free, each]
        return self.tokens[top].transpose(0, 1).flatten(1)


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
        done: told every tenth step of the second half which sentences [k, n] the restarts stand at; true ends it.
        hint: [free] tokens that half of the restarts begin with, where drawn below
        trust: [free] probabilities of keeping each.
        prior: [free, v] log-probabilities to begin with, where something is known; -inf keeps a word out.
    """
    table = energy.table
    k = schedule.restarts
    ends = framed(words.new_zeros(k, free), frame)
    fixed = table[ends]
    start, stop = len(frame.first), len(frame.first) + free
    logits = torch.randn(k, free, len(words), generator=generator).to(table)
    if hint is not None and trust is not None:
        kept = torch.rand(k, free, generator=generator).to(table) < trust
        kept[: k // 2] = False
        where = (words[None] == hint[:, None]).float()  # [free, v]
        # As likely as all other words together, twice over.
        logits = logits + kept[..., None] * where * (math.log(len(words)) + 1.5)
    if prior is not None:
        logits = logits + prior.clamp_min(-1e4)  # finite: the mean slope over the words is taken
    # Easy modules (queries) are slowed by a ridge, hard ones (attention outputs, deep) never found without.
    ridges = schedule.floor * (schedule.ridge / schedule.floor) ** torch.linspace(1, 0, k).to(table)
    part = table[words]
    for step in range(schedule.steps):
        # Tokens of no weight anywhere leave: the products with the table then cost nothing beside the model.
        if step in (schedule.steps * 3 // 10, schedule.steps * 6 // 10):
            width = 2000 if step < schedule.steps // 2 else 200
            keep = logits.flatten(0, 1).topk(min(width, len(words)), -1).indices.unique()
            words, logits = words[keep], logits[..., keep]
            part = table[words]
        soft = logits.softmax(-1) @ part
        embeds = torch.cat([fixed[:, :start], soft, fixed[:, stop:]], 1)
        ridge = (ridges * (1 - 1.2 * step / schedule.steps)).clamp_min(schedule.floor)
        steep = torch.nn.functional.normalize(slope(energy, embeds, ridge)[:, start:stop], dim=-1) @ part.T
        logits = logits - schedule.rate * steep / steep.std(-1, keepdim=True).clamp_min(1e-12)
        if step % 5 == 4 and 2 * step > schedule.steps and done(Pool(words, logits).sentences(frame)):
            break
    return Pool(words, logits)
