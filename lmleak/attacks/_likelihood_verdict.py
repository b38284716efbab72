"""What may be said of the likeliest sentence found: whether it beats chance, by how much, and how sure it is.

Were the release another sentence's that was drawn without seeing it, then any given candidate would lead by more than
log(1 / p) nats with probability p at most (Markov), and some candidate of M by more than log(M / p). M counts all
sentences that the search could have ended in, not those it scored: it chose them by looking at the noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from lmleak.attacks._likelihood_moves import Space
from lmleak.attacks._likelihood_score import Candidate, Scorer
from lmleak.attacks._likelihood_search import Search
from lmleak.attacks._text import put

BLIND = 16  #: sentences drawn without the gradient; the best of them is what has to be beaten
OTHERS = 3  #: drawn words that each word found is compared with
UNUSUAL = 0.05  #: probability under which a misfit takes from the confidence
#: How much longer than the longest of the drawn sentences' gradients the true one is taken to be at most: MiniLM, query
#: of layer 0, 24 sentences, 0.5 to 1.3 times the longest of 48.
LONGER = 1.5
LUCK = 4.0  #: standard deviations of its noise by which the truth may lead more than it is expected to
ROUNDING = 1e-6  #: of the gradient's energy: what float32 leaves of a sentence that is exactly right


@dataclass(frozen=True)
class Verdict:
    """One sentence's."""

    gap: float  #: nats to the best rival scored
    gain: float  #: nats over the best sentence drawn without the gradient
    bound: float  #: that the gain has to exceed
    worth: tuple[float, ...]  #: nats of every word over drawn ones, the others given
    bound_one: float  #: that one of these has to exceed, if the gain does not
    fit: float | None  #: standard deviations between what the truth would score and this; None: noise unknown
    explained: float  #: share of the gradient's energy
    confidence: float

    @property
    def signal(self) -> bool:
        """Whether the sentence, or one word of it, is more than noise."""
        return self.gain > self.bound or any(one > self.bound_one for one in self.worth)

    def reason(self) -> str:
        """Why there is no answer."""
        return (
            f"the best sentence leads a blind one by {self.gain:.3g} nats (noise alone may by {self.bound:.3g}), "
            f"its best word by {max(self.worth, default=0.0):.3g} of {self.bound_one:.3g}"
        )

    def details(self) -> dict[str, Any]:
        """JSON-serialisable."""
        out: dict[str, Any] = {"gap": self.gap, "gain": self.gain, "bound": self.bound, "fit": self.fit}
        out |= {"explained": self.explained, "bound_one": self.bound_one, "worth": list(self.worth)}
        rounded = lambda v: None if v is None or not math.isfinite(v) else round(v, 4)  # noqa: E731
        return {k: [rounded(v) for v in x] if isinstance(x, list) else rounded(x) for k, x in out.items()}


def hopeless(scorer: Scorer, space: Space, drawn: Sequence[Candidate], risk: float) -> str | None:
    """Why no search can end in an answer: not even the truth would lead by what noise alone may lead by.

    A sentence whose clipped gradient is mu noise deviations long leads no sentence by mu^2 / 2 nats, give or take mu
    (Gaussian likelihood ratio). The observer knows mu's size from sentences drawn without the gradient, and that it is
    at most the clipping norm's.
    """
    if not scorer.noise or not drawn:
        return None
    _, squares = scorer.measures(drawn)
    length = LONGER * float(squares.max()) ** 0.5
    if scorer.mechanism is not None and scorer.mechanism.max_grad_norm is not None:
        length = min(length, scorer.mechanism.max_grad_norm)
    mu = length / scorer.noise
    lead, needed = mu * mu / 2 + LUCK * mu, _least(space, max(space.lengths) - space.frame.size, risk)
    if lead >= needed:
        return None
    return f"the truth itself would lead by {lead:.3g} nats at most, and noise alone may by {needed:.3g}"


def _least(space: Space, free: int, risk: float) -> float:
    """Nats that one word has to exceed where it is the best of all words in all places."""
    choices = math.log(len(space.labels)) + math.log(len(space.lengths))
    return math.log(len(space.words)) + math.log(max(free, 1)) + choices + math.log(1 / risk)


def judge(scorer: Scorer, search: Search, space: Space, risk: float, generator: torch.Generator) -> Verdict:
    """Judges the best sentence of a search."""
    best = search.best
    free = range(len(space.frame.first), len(best.tokens) - len(space.frame.last))

    def drawn(count: int) -> list[int]:
        places = torch.randint(len(space.words), (count,), generator=generator)
        return space.words[places.to(space.words.device)].tolist()

    blind = [replace(best, tokens=(*space.frame.first, *drawn(len(free)), *space.frame.last)) for _ in range(BLIND)]
    exchanged = [Candidate(put(best.tokens, i, word), best.label) for i in free for word in drawn(OTHERS)]
    products, squares = scorer.measures([best, *blind, *exchanged])
    energy = scorer.energy()
    missed = max(energy - 2 * float(products[0]) + float(squares[0]), 0.0)
    explained = 1 - missed / energy if energy else 0.0
    # Noise that nobody states is no larger than what is left unexplained.
    variance = scorer.noise**2 or max(missed, ROUNDING * energy) / scorer.numel
    nats = ((products - 0.5 * squares) / variance).tolist()
    gain = nats[0] - max(nats[1 : 1 + BLIND])
    ones = nats[1 + BLIND :]
    worth = tuple(nats[0] - max(ones[OTHERS * i : OTHERS * (i + 1)]) for i in range(len(free)))
    vocabulary = math.log(len(space.words))
    choices = math.log(len(space.labels)) + math.log(len(space.lengths))
    rivals = torch.tensor([v for c, v in search.known.items() if c != best], dtype=torch.float64)
    scale = 1.0 if scorer.noise else 1 / variance
    apart = (search.known[best] - rivals) * scale
    posterior = 1 / (1 + float((-apart).exp().sum()))
    fit = None
    if scorer.noise:
        fit = float((products[0] - squares[0]) / (scorer.noise * squares[0].clamp_min(1e-300).sqrt()))
        # The truth is beyond 2 once in 20 times, beyond 3 once in 400: a sentence that is, is a local optimum, or
        # stands in for another one of the batch.
        # A word that is wrong elsewhere, in another sentence of the batch say, leaves more than noise.
        worst = max(abs(fit), scorer.excess(missed))
        sure = posterior * min(1.0, math.erfc(worst / math.sqrt(2)) / UNUSUAL)
    else:
        sure = posterior * (explained if explained > 1 - 1e-3 else 0.5 * max(explained, 0.0))
    found = Verdict(
        gap=float(apart.min()) if len(apart) else math.inf,
        gain=gain,
        bound=len(free) * vocabulary + choices + math.log(1 / risk),
        worth=worth,
        bound_one=_least(space, len(free), risk),
        fit=fit,
        explained=explained,
        confidence=0.0,
    )
    return replace(found, confidence=min(1.0, max(0.0, sure)) if found.signal else 0.0)
