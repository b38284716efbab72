"""What layer 0's query, key and value gradients say of a batch beyond their row space: whose output gradient is whose.

An input is (word + position) / s, centred and scaled, plus the norm's bias, so the gradient is a sum over words, over
positions and of the bias, and these vectors are linearly independent however many sentences share them. Solving for
them gives every word the sum of its tokens' output gradients and every position the sum of those that stand there. A
word that occurs once shows its token's own output gradient, which says where it stands (it is a summand of one
position's sum) and with whom (output gradients of a sentence's values point alike: all flow from one [CLS]).
MiniLM, Rotten Tomatoes, 8 sentences: of 98 and 118 such words, all at their position and all with their sentence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmleak.attacks._rowspace import known_input, matrix
from lmleak.models._input import InputLayer
from lmleak.records import Entry, Victim

RIDGE = 1e-2  #: of the regression of positions on words: single tokens keep 0.8 to 1 of themselves, others 0 to 0.6
PRESENT = 1e-3  #: share of the largest word's norm below which a word's gradients are rounding


class Basis:
    """Words, positions and bias of layer 0, as the directions that its gradients are written in."""

    def __init__(self, victim: Victim, readers: Sequence[Entry], tokens: Tensor, places: int):
        layer = known_input(victim)
        assert layer is not None
        self.victim, self.readers, self.tokens, self.places = victim, tuple(readers), tokens, places
        directions = _directions(layer, tokens, places)
        self.directions = directions  # [m + p (+ 1), d]
        self._inverse = torch.linalg.pinv(directions)
        self._scale: list[float] | None = None

    def solve(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """Sums of output gradients by word, then by position, [m + p, k]; each module scaled as at the first call."""
        parts = [matrix(self.victim.module, e, gradients[e.name]).double() @ self._inverse for e in self.readers]
        if self._scale is None:
            self._scale = [float(part.norm().clamp_min(1e-300)) for part in parts]
        count = len(self.tokens) + self.places
        return torch.cat([part.T[:count] / scale for part, scale in zip(parts, self._scale, strict=True)], 1)

    def misfit(self, gradients: Mapping[str, Tensor]) -> float:
        """Largest share of a gradient outside the directions; rounding where all words and positions are there."""
        shares = []
        for e in self.readers:
            g = matrix(self.victim.module, e, gradients[e.name]).double()
            shares.append(float((g - g @ self._inverse @ self.directions).norm() / g.norm().clamp_min(1e-300)))
        return max(shares)

    @property
    def value(self) -> slice | None:
        """Columns of the value's output gradients among those of `solve`, if it is observed."""
        start = 0
        for e in self.readers:
            width = matrix(self.victim.module, e, torch.empty(e.shape, device="meta")).shape[0]
            if e.component == "attn_value":
                return slice(start, start + width)
            start += width
        return None


def _directions(layer: InputLayer, tokens: Tensor, places: int) -> Tensor:
    assert layer.position is not None
    middle = (lambda x: x - x.mean(-1, keepdim=True)) if layer.norm == "layer" else (lambda x: x)
    weight = layer.weight.double()
    rows = [middle(layer.word[tokens].double()) * weight, middle(layer.position[:places].double()) * weight]
    if layer.bias is not None:
        rows.append(layer.bias.double()[None])
    return torch.cat(rows)


@dataclass(frozen=True)
class Pairs:
    """Where the words of a batch stand, as far as sums over tokens say."""

    weight: Tensor  #: [p, m] share of every position's sum that a word's own sum explains; once-only words near 1
    once: dict[int, int]  #: word index -> position, of words that occur once
    sums: Tensor  #: [m, k]


def pairs(sums: Tensor, words: int, least: float, most: float) -> Pairs:
    """Regresses the positions' sums on the words'; then again without the words that occur once.

    Args:
        sums: [m + p, k] of words and positions.
        words: m.
        least: share of itself that a word leaves at its position if it occurs once.
        most: share that it leaves at any other.
    """
    of_words, of_places = sums[:words], sums[words:]
    norms = of_words.norm(dim=1)
    here = norms > PRESENT * norms.max()
    weight = _regress(of_places, of_words, here)
    once: dict[int, int] = {}
    top = weight.topk(min(2, len(weight)), 0)
    for i in here.nonzero().flatten().tolist():
        second = float(top.values[1, i]) if len(top.values) > 1 else 0.0
        if top.values[0, i] > least and second < most:
            once[i] = int(top.indices[0, i])
    if once:
        index = torch.tensor(list(once), device=sums.device)
        place = torch.tensor(list(once.values()), device=sums.device)
        rest = of_places.index_add(0, place, of_words[index], alpha=-1)
        others = here.clone()
        others[index] = False
        again = _regress(rest, of_words, others)
        weight = torch.where(others, again, weight)
    return Pairs(weight, once, of_words)


def _regress(targets: Tensor, sources: Tensor, used: Tensor) -> Tensor:
    """Ridge coefficients [p, m] of targets [p, k] on the used sources [m, k]; zero for the others."""
    out = targets.new_zeros(len(targets), len(sources))
    part = sources[used]
    if len(part):
        gram = part @ part.T
        gram = gram + RIDGE * torch.diag(gram.diagonal())
        out[:, used] = torch.linalg.solve(gram, part @ targets.T).T
    return out


def clusters(values: Tensor, places: Sequence[int], count: int, heads: int) -> list[list[int]]:
    """Groups tokens into sentences by the directions of their values' output gradients, head by head.

    Average linkage; two tokens of one position never join. Without the scaling by head the strongest head decides, and
    2 of 118 words go astray.

    Args:
        values: [n, d] output gradients of the value of tokens that occur once.
        places: their positions.
        count: sentences.
        heads: of attention.
    """
    split = torch.nn.functional.normalize(values.unflatten(1, (heads, -1)), dim=2).flatten(1)
    alike = split @ split.T / heads
    where = torch.tensor(places)
    apart = (where[:, None] == where[None]).to(alike.device)
    groups = [[i] for i in range(len(values))]
    linked = alike.masked_fill(apart, -torch.inf)
    while len(groups) > count:
        best = int(linked.argmax())
        i, j = sorted(divmod(best, len(groups)))
        if linked[i, j] == -torch.inf:
            break
        n, m = len(groups[i]), len(groups[j])
        row = (n * linked[i] + m * linked[j]) / (n + m)
        linked[i], linked[:, i] = row, row
        linked[i, i] = -torch.inf
        groups[i] += groups.pop(j)
        kept = [k for k in range(len(linked)) if k != j]
        linked = linked[kept][:, kept]
    return groups


def counts(values: Tensor, groups: Sequence[Sequence[int]], heads: int) -> Tensor:
    """Estimates how often every word stands in every sentence, [m, groups]: its output gradients in units of the means.

    Rotten Tomatoes, 4 and 8 sentences, words that occur several times: half of the estimates within 0.1 of 0 where the
    word is absent, at 0.4 to 1.1 where it stands once.

    Args:
        values: [m, d] sums of the value's output gradients by word.
        groups: words of each sentence that occur once.
        heads: of attention; each is scaled alike.
    """
    means = torch.stack([values[list(group)].mean(0) for group in groups])
    scale = means.unflatten(1, (heads, -1)).norm(dim=2).mean(0).clamp_min(1e-300)
    even = lambda x: (x.unflatten(1, (heads, -1)) / scale[:, None]).flatten(1)  # noqa: E731
    return torch.linalg.lstsq(even(means).T, even(values).T).solution.T
