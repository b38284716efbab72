"""Changes of a sentence, priced with layer 0's output gradients held: each stays with its word while inputs change.

A matrix's gradient is sum_i delta_i x_i^T. The score's slope takes both for linear in a word's embedding, and words lie
too far from each other for that. Here what enters the layer is exact, only its output gradients are those of the
sentence changed, and only one layer runs. MiniLM, layer 0, nearly right sentences: of 384 common words the true one is
ranked 0 to 5 (by the slope 18 to 340), of 265 orders of the words the true one first or second (by the slope 190th).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lmleak.attacks._applicability import ATTENTION
from lmleak.attacks._energy import Reached
from lmleak.attacks._likelihood_moves import Moves, Space
from lmleak.attacks._likelihood_parts import beyond_noise
from lmleak.attacks._likelihood_score import TOKENS, Candidate, Scorer
from lmleak.attacks._rowspace import known_input, matrix
from lmleak.attacks._text import put
from lmleak.gradients.factors import Factors, capture, inner, squared_norms
from lmleak.gradients.losses import model_losses
from lmleak.models._input import InputLayer
from lmleak.records import Entry

PRICE = 0.2  #: of a sentence sent through layer 0 alone, in sentences: MiniLM 2.1 of 11 ms
AROUND = 3  #: of looking at a sentence whose changes are asked for
FEW, MANY = 24, 320  #: words priced at every place, at first and where no change of those helps
LIKELY, DRAWN = 6, 12  #: words priced beside: likeliest ones at a place, and other sentences'
WORDS, OTHERS = 32, 12  #: changes of one word that are scored; orders, and exchanges of a word for one elsewhere
EACH = 4  #: words of one place among them


@dataclass(frozen=True)
class Around:
    """One sentence."""

    at: Candidate
    deltas: Tensor  #: [t, d] gradient of the loss by layer 0's output
    words: Tensor  #: [t, words] nats of every word at every place, by the attention's inputs alone


def held(scorer: Scorer, space: Space) -> Held | None:
    """For one release; None where nothing of layer 0 is seen, or where the rest says more.

    MiniLM, all gradients, noise multiplier 0.003: layer 0 is 0.4 % of the energy, and led by it one of two sentences
    ended two words short.
    """
    entries = tuple(e for e in scorer.entries if e.layer == 0 and len(e.shape) == 2)
    found = re.match(scorer.victim.family.BLOCK, entries[0].module) if entries else None
    if found is None:
        return None
    rest = [e for e in scorer.entries if e.layer != 0]
    told = sum(beyond_noise(scorer, e) for e in scorer.entries if e.layer == 0)
    if rest and sum(beyond_noise(scorer, e) for e in rest) >= told:
        return None
    return Held(scorer, space, entries, found.group())


class Held:
    """The matrices of layer 0 in one release.

    Args:
        scorer: of it; evaluations are counted there.
        space: what the sentence may be.
        entries: of layer 0.
        block: name of the layer.
    """

    def __init__(self, scorer: Scorer, space: Space, entries: Sequence[Entry], block: str):
        self.scorer, self.words, self.entries = scorer, space.words, entries
        common = space.weights if space.common is None else space.common
        self.prior = common.clamp_min(1e-12).log().to(scorer.table)
        self.block = scorer.victim.module.get_submodule(block)
        layer = known_input(scorer.victim)
        self.read = [e for e in entries if e.component in ATTENTION] if layer is not None else []
        self.inputs = Inputs(layer, space.words) if layer is not None and self.read else None

    def around(self, at: Candidate) -> Around:
        """Looks at a sentence through the whole model."""
        scorer, module = self.scorer, self.scorer.victim.module
        ids = torch.tensor([at.tokens], device=scorer.table.device)
        labels = ids if scorer.victim.task == "causal-lm" else torch.tensor([at.label], device=ids.device)
        with capture(module, self.entries) as tape, self._seen() as seen:
            losses = model_losses(module, scorer.inputs(ids), labels, scorer.victim.task, "sum")
            (deltas,) = torch.autograd.grad(losses.sum(), seen, retain_graph=True)
            factors = tape.factors(losses)
        scorer.evaluations += AROUND
        with torch.no_grad():
            return Around(at, deltas[0], self._words(at, factors))

    def nats(self, around: Around, others: Sequence[Candidate]) -> Tensor:
        """Nats [k] of changes of a sentence that keep its length, each scaled as suits it."""
        module, out = self.scorer.victim.module, []
        size = max(1, TOKENS[self.scorer.table.is_cuda] // len(around.at.tokens))
        for first in range(0, len(others), size):
            rows = [one.tokens for one in others[first : first + size]]
            places = torch.tensor([stood(around.at.tokens, row) for row in rows], device=around.deltas.device)
            with capture(module, self.entries) as tape:
                with self._seen(last=True) as seen, suppress(Reached):
                    module(**self.scorer.inputs(torch.tensor(rows, device=around.deltas.device)))
                factors = tape.factors((seen[0] * around.deltas[places]).sum((1, 2)))
            with torch.no_grad():
                out.append(self._scaled(*self._measured(factors)))
        self.scorer.evaluations += PRICE * len(others)
        return torch.cat(out)

    def changes(self, around: Around, moves: Moves, pool: Sequence[int]) -> list[Candidate]:
        """Changes worth scoring: a few words in every place, orders, and a word out and another in elsewhere."""
        at, free = around.at, moves.free(around.at.tokens)
        ranked = {i: self._ranked(around, i, FEW) for i in free}
        pairs = [(i, word) for i in free for word in (*ranked[i], *moves.usual(i)[:LIKELY], *pool[:DRAWN])]
        exchanged = []
        for i in free:  # a word left out, and one in elsewhere
            rest = (*at.tokens[:i], *at.tokens[i + 1 :])
            for j in free:
                words = (*ranked[j][1:2], *moves.usual(j)[:1]) if j != i else ()
                exchanged += [replace(at, tokens=(*rest[:j], word, *rest[j:])) for word in words]
        orders = [*moves.reordered(at), *moves.carried(at)]
        return [
            *self._words_put(around, pairs, WORDS, EACH),
            *self._best(around, orders, OTHERS),
            *self._best(around, exchanged, OTHERS),
        ]

    def more(self, around: Around, moves: Moves) -> list[Candidate]:
        """Many words in every place."""
        free = moves.free(around.at.tokens)
        pairs = [(i, word) for i in free for word in (*self._ranked(around, i, MANY), *moves.usual(i))]
        return self._words_put(around, pairs, 2 * WORDS, 2 * EACH)

    def _ranked(self, around: Around, place: int, count: int) -> list[int]:
        """Words for a place by what is held there, and by that and how common they are, in turn."""
        gain = around.words[place]
        both = (gain, gain + self.prior) if self.inputs is not None else (self.prior, self.prior)
        each = [
            self.words[kind.topk(min(count // 2, len(kind))).indices.to(self.words.device)].tolist() for kind in both
        ]
        return list(dict.fromkeys(word for pair in zip(*each, strict=True) for word in pair))

    def _words_put(self, around: Around, pairs: Iterable[tuple[int, int]], count: int, each: int) -> list[Candidate]:
        """The best words, at most so many of one place."""
        at = around.at
        where = {replace(at, tokens=put(at.tokens, i, word)): i for i, word in pairs if at.tokens[i] != word}
        left, out = dict.fromkeys(where.values(), each), list[Candidate]()
        for one in self._best(around, list(where), len(where)):
            if left[where[one]]:
                left[where[one]] -= 1
                out.append(one)
        return out[:count]

    def _best(self, around: Around, others: Sequence[Candidate], count: int) -> list[Candidate]:
        others = [one for one in dict.fromkeys(others) if one != around.at]
        if not others:
            return []
        return [others[i] for i in self.nats(around, others).topk(min(count, len(others))).indices.tolist()]

    def _words(self, at: Candidate, factors: Factors) -> Tensor:
        """Nats [t, words] of words in place of one, as query, key and value show them."""
        if self.inputs is None:
            return self.scorer.table.new_zeros(len(at.tokens), len(self.words))
        module = self.scorer.victim.module
        sides = [self.scorer.sides(e, factors) for e in self.read]
        deltas, x = torch.cat([own[0] for own, _ in sides], 1), sides[0][1][0]
        seen = torch.cat([matrix(module, e, self.scorer.targets[e.name]) for e in self.read])
        product, square = self._measured(factors)
        more, along, apart = self.inputs.beside(deltas @ seen, deltas @ (deltas.T @ x), x)
        return self._scaled(product + more, square + 2 * along + deltas.square().sum(1)[:, None] * apart)

    def _measured(self, factors: Factors) -> tuple[Tensor, Tensor]:
        product = torch.stack([inner(factors[e.name], self.scorer.targets[e.name]) for e in self.entries])
        return product.sum(0), torch.stack([squared_norms(factors[e.name]) for e in self.entries]).sum(0)

    def _scaled(self, product: Tensor, square: Tensor) -> Tensor:
        """Nats where the factor of the clipping is whatever suits best."""
        return self.scorer.nats(0.5 * product.clamp_min(0).square() / square.clamp_min(1e-24))

    @contextmanager
    def _seen(self, last: bool = False) -> Iterator[list[Tensor]]:
        """What the layer gives; with `last` nothing behind it is computed."""
        seen: list[Tensor] = []

        def hook(module: torch.nn.Module, args: tuple, output: Tensor | tuple[Tensor, ...]) -> None:
            seen.append(output[0] if isinstance(output, tuple) else output)
            if last:
                raise Reached

        handle = self.block.register_forward_hook(hook)
        try:
            yield seen
        finally:
            handle.remove()


def stood(at: Sequence[int], other: Sequence[int]) -> list[int]:
    """Where in one sentence each word of another stood; words that are new take the places left, in order."""
    out = [i if a == b else -1 for i, (a, b) in enumerate(zip(at, other, strict=True))]
    left = [i for i, place in enumerate(out) if place < 0]
    new = []
    for i in [*left]:
        found = next((j for j in left if at[j] == other[i]), None)
        if found is None:
            new.append(i)
        else:
            out[i] = found
            left.remove(found)
    for i, place in zip(new, left, strict=True):
        out[i] = place
    return out


class Inputs:
    """What layer 0 reads for every word in every place, in products: its rows are never formed.

    They would be t times the table. MiniLM, 13 places: 50 ms for 2.9 s.
    """

    def __init__(self, layer: InputLayer, words: Tensor):
        table = layer.word[words.to(layer.word.device)]
        self.layer, self.table = layer, table
        self.bias = layer.bias if layer.bias is not None else torch.zeros_like(layer.weight)
        self.mean, self.energy = self._mean(table), table.square().mean(1)
        scale = layer.weight.square()
        self.linear, self.square = table @ scale, table.square() @ scale

    def beside(self, a: Tensor, b: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """a . (X - x), b . (X - x) and |X - x|^2 of the inputs X of all words, [t, words] each.

        Args:
            a: [t, d]
            b: [t, d]
            x: [t, d] input in each place now.
        """
        layer, t = self.layer, len(x)
        scale, shift = layer.weight.square(), self.bias - x
        place = layer.position[:t] if layer.position is not None else torch.zeros_like(x)
        column = lambda v: v[:, None]  # noqa: E731
        asked = torch.stack([layer.weight * a, layer.weight * b, layer.weight * shift, scale * place, place])
        by_word = (asked.flatten(0, 1) @ self.table.T).view(len(asked), t, -1)
        mean = self.mean + column(self._mean(place))
        energy = self.energy + (2 * by_word[4] + column(place.square().sum(1))) / self.table.shape[1]
        size = (energy - mean.square() + layer.eps).sqrt()
        normed = (by_word[:3] + (asked[:3] * place).sum(-1)[..., None] - mean * asked[:3].sum(-1)[..., None]) / size
        square = self.square + 2 * by_word[3] + column(place.square() @ scale)
        spread = square - 2 * mean * (self.linear + column(place @ scale)) + mean.square() * scale.sum()
        constant = [column((row * shift).sum(1)) for row in (a, b, shift)]
        return normed[0] + constant[0], normed[1] + constant[1], spread / size.square() + 2 * normed[2] + constant[2]

    def _mean(self, x: Tensor) -> Tensor:
        """What the norm takes off rows [n, d]."""
        return x.mean(1) if self.layer.norm == "layer" else x.new_zeros(len(x))
