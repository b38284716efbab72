"""The continuous half of the likelihood search: mirror descent on every place's distribution over words.

A sentence that is wrong in most places says little of the right words: the score's slope there ranks them 900th to
10,000th. A mixture of all words does: MiniLM, layer 0, noise multiplier 0.003, 20 steps of 8 restarts end with 9 and 10
of 10 words among their likeliest, mostly one place off. Begun again over these words, with half of the best sentence
kept, they find some of the places too. What is descended on is `Distributions`, see `_subspace_relax`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lmleak.attacks._blanks import OPEN
from lmleak.attacks._likelihood_blanks import Likelihood
from lmleak.attacks._likelihood_moves import Space
from lmleak.attacks._likelihood_score import Candidate, Scorer
from lmleak.attacks._subspace_relax import Distributions, descent, favoured

ROUNDS, RESTARTS, STEPS = 2, 8, 20
PRICE = (3 * STEPS + 1) * RESTARTS  #: evaluations of a round
RATE = 0.6  #: step of the log-probabilities, in standard deviations of the gradient over the vocabulary
START = 1.0  #: what they vary by at first
DRAWN = 8  #: drawn sentences of every label that say which it is
AGAIN = 4  #: words of every place and restart that the next round is over
TRUST = 0.6  #: share of the best sentence's words that half of its restarts begin with


def relaxed(scorer: Scorer, space: Space, limit: float, generator: torch.Generator) -> list[Candidate]:
    """The restarts' likeliest sentences, the last round's first and of each round the best.

    Args:
        scorer: of layers that rise above the noise.
        space: of one length.
        limit: evaluations; no round begins that would exceed them.
    """
    first, last, label = space.frame.first, space.frame.last, _label(scorer, space, generator)
    places = torch.arange(len(first), space.lengths[0] - len(last))
    rows = torch.tensor([*first, *[OPEN] * len(places), *last]).expand(RESTARTS, -1)
    table = scorer.table
    # Mixtures have shorter gradients than words: how long they are is not held against them.
    asked = Likelihood(scorer.profile(), Distributions(table, space.words.to(table.device)), space, label)
    held, out = asked.held.told(_usual(space, places).to(table)), list[Candidate]()
    best: tuple[float, Candidate] | None = None

    def steep(step: int, mean: Tensor) -> Tensor:
        return asked.slopes(rows, mean.flatten(0, 1)).view_as(mean)

    for _ in range(min(ROUNDS, int(limit / PRICE))):
        noise = torch.randn(RESTARTS, len(places), table.shape[1], generator=generator).to(table)
        *_, (held, pull) = descent(held, START * held.drawn(noise), steep, STEPS, RATE)
        words = held.likeliest(pull, AGAIN)
        ends = [Candidate((*first, *row, *last), label) for row in words[..., 0].tolist()]
        ranked = sorted(zip(scorer.scores(ends), ends, strict=True), key=lambda pair: pair[0], reverse=True)
        best = max([ranked[0], *([best] if best else [])], key=lambda pair: pair[0])
        out = [*(one for _, one in ranked), *out]
        among = words.unique()
        kept = torch.rand(RESTARTS, len(places), generator=generator).to(table) < TRUST
        kept[: RESTARTS // 2] = False
        own = torch.tensor(best[1].tokens, device=table.device)[places.to(table.device)]
        held = Distributions(table, among, hint=own, bonus=favoured(kept, among))
    scorer.evaluations += asked.scorer.evaluations
    return list(dict.fromkeys(out))


def _usual(space: Space, places: Tensor) -> Tensor:
    """Log-probabilities [p, words]: half by how common words are, half by what the release itself says of places."""
    kinds = [space.common] if space.common is not None else []
    each = [torch.stack([w / w.sum() for w in (*kinds, space.at(place))]).mean(0) for place in places.tolist()]
    return torch.stack(each).log()


def _label(scorer: Scorer, space: Space, generator: torch.Generator) -> int:
    """The label under which drawn sentences suit the release best."""
    if len(space.labels) == 1:
        return space.labels[0]
    drawn = space.drawn(DRAWN * len(space.labels), generator)
    suits = dict.fromkeys(space.labels, 0.0)
    for one, value in zip(drawn, scorer.scores(drawn), strict=True):
        suits[one.label] += value
    return max(suits, key=suits.__getitem__)
