"""Which words to try where, before any sentence is guessed and around one: what the release itself says of words.

It names them where their inputs are known: rows of the token table, and the matrices of layer 0, whose inputs hang on
little but word and place. A strong word hides the others until it is taken for true, so these are asked again around
what was found, and cheaply: a place costs as much as 25 sentences. How common words are: `_vocabulary.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lmleak.attacks._applicability import ATTENTION
from lmleak.attacks._likelihood_block import block
from lmleak.attacks._likelihood_deltas import SIZES, Guess, Part, Read, Words
from lmleak.attacks._likelihood_score import Candidate, Scorer
from lmleak.attacks._rowspace import known_input
from lmleak.records import Entry, Victim

TEMPER = 2.0  #: places share rows of the tables, so their evidence is taken for half of what it says
LARGE = 12.0  #: standard deviations at which a row of a tied table is as likely as a row can be
MOST = 40.0  #: nats that evidence may count for
SURE, SUREST = 7.0, 3  #: nats beyond chance from which a word is taken for true; how many are at first
KEPT = 1000  #: words of a place whose order is kept
#: of looking at a word at a place once, in sentences: MiniLM's 30,522 words as much as 13 sentences
PRICE = 4.2e-4


class Evidence:
    """What a release says of words at places, whatever else is in the sentence or around a sentence guessed.

    Args:
        victim: its input layer, layer 0 and tables.
        scorer: of the release; inside `frozen`.
        drawn: sentences drawn without the gradient, all of the length that is asked about first.
        fixed: places of special tokens in them.
        inputs: whether layer 0's matrices are asked too, or the token table alone.
    """

    def __init__(
        self, victim: Victim, scorer: Scorer, drawn: Sequence[Candidate], fixed: tuple[int, ...], inputs: bool = True
    ):
        self.fixed, self.drawn = fixed, drawn[0].tokens
        self.parts = _parts(victim, scorer, drawn) if inputs else []
        self.rows = _of_rows(victim, scorer, drawn)
        self.loud = False  #: whether a word stood out at first; where none did, asking again is not worth its price
        self.price = len(self.parts) * len(scorer.table) * PRICE  #: of one place, in sentences

    def first(self, scorer: Scorer) -> Tensor | None:
        """Nats for each word at each place, [t, v], given nothing else; None where no module speaks of words alone.

        The gradient of a strong word hides that of others until it is taken for true: the surest goes first.
        """
        tokens, believed = list(self.drawn), list(self.fixed)
        out: Tensor | None = None
        told: dict[int, Tensor] = {}
        while self.parts:
            raw = self._of_parts(scorer, Guess(tuple(tokens), tuple(sorted(believed))))
            # One word seldom stands at two places, and its gradient shows at all of them.
            out = 2 * raw - raw.logsumexp(0)
            for place, row in told.items():
                out[place] = row
            raw[believed] = -torch.inf
            place, word = divmod(int(raw.argmax()), raw.shape[1])
            if float(raw[place, word]) < math.log(raw.numel()) + SURE or len(told) == SUREST:
                break
            tokens[place], told[place] = word, out[place].clone()
            believed.append(place)
        self.loud = bool(told)
        known = [part for part in (self.rows, out) if part is not None]
        return _bounded(torch.stack(known).sum(0)) if known else None

    def around(self, scorer: Scorer, one: Candidate) -> Tensor | None:
        """The same given that sentence's other words, by its own length."""
        if not self.loud:
            return None
        out = self._of_parts(scorer, Guess(one.tokens, tuple(range(len(one.tokens)))))
        return _bounded(out if self.rows is None else out + self.rows[: len(out)])

    def _of_parts(self, scorer: Scorer, guess: Guess) -> Tensor:
        out = torch.zeros(len(guess.tokens), len(scorer.table), dtype=scorer.table.dtype, device=scorer.table.device)
        ends = [i if i < len(self.drawn) // 2 else i + len(out) - len(self.drawn) for i in self.fixed]
        for place in range(len(out)):
            if place not in ends:
                scorer.evaluations += self.price
                for part in self.parts:
                    out[place] += part.nats(scorer.targets, scorer.noise**2, guess, place)
        return out


def _parts(victim: Victim, scorer: Scorer, drawn: Sequence[Candidate]) -> list[Part]:
    """What of layer 0 is observed and understood."""
    out: list[Part] = []
    layer = known_input(victim)
    first = {e.component: e for e in scorer.entries if e.layer == 0 and len(e.shape) == 2}
    read = [e for name, e in first.items() if name in ATTENTION] if layer is not None else []
    pair = (first["ffn_in"], first["ffn_out"]) if {"ffn_in", "ffn_out"} <= set(first) else ()
    if not read and not pair:
        return out
    vocabulary, deltas = Words(scorer.table), scorer.deltas(drawn, [*read, *pair[1:]])
    if layer is not None and read:
        out.append(Read(victim, vocabulary, layer, read, torch.cat([deltas[e.name] for e in read], -1)))
    forward = block(scorer, vocabulary, pair, drawn, deltas[pair[1].name]) if pair else None
    return out if forward is None else [*out, forward]


def _bounded(nats: Tensor) -> Tensor:
    """At most 0 and at least -MOST, squeezed so that the best thousand words of a place keep their order.

    Layer 0's inputs are known up to what attention adds, so far above the noise the ratios are too sure of themselves.
    """
    top = nats.topk(min(KEPT, nats.shape[1]), 1).values
    scale = (MOST / (top[:, :1] - top[:, -1:]).clamp_min(1e-9)).clamp_max(1.0)
    return ((nats - top[:, :1]) * scale).clamp_min(-MOST)


def _of_rows(victim: Victim, scorer: Scorer, drawn: Sequence[Candidate]) -> Tensor | None:
    """What the token table's rows say of words at places, [t, v]."""
    rows, length = scorer.rows(), len(drawn[0].tokens)
    if rows is None:
        return None
    tied = victim.module.get_output_embeddings()
    if tied is not None and tied.weight is victim.module.get_input_embeddings().weight:
        # Each row is a word's own gradient as an input and as a target: only that it is large says something.
        energy = scorer.targets[rows.name].square().sum(1)
        spread = 1.4826 * (energy - energy.median()).abs().median() + 1e-12 * energy.max()
        return ((energy - energy.median()) / spread).clamp(0, LARGE).expand(length, -1)
    out = _by_rows(victim, scorer, rows, scorer.deltas(drawn, [rows])[rows.name], length)
    return 2 * out - out.logsumexp(0)


def _by_rows(victim: Victim, scorer: Scorer, rows: Entry, deltas: Tensor, length: int) -> Tensor:
    """From the token table's rows, and from the position table's, which hold the same gradient of the same place."""
    mean, spread = _moments(deltas)
    variance, places = scorer.noise**2, _positions(victim, scorer)
    y = scorer.targets[rows.name]
    energy, out = y.square().sum(1), []
    for place in range(length):
        parts = []
        for size in SIZES:
            middle, left, known = size * mean[place], size**2 * spread, 0.0
            if places is not None:
                seen = places[place + scorer.offset]
                known = float(_log(seen.square().sum(), seen @ middle, middle, variance + left))
                middle = (variance * middle + left * seen) / (variance + left)
                left = variance * left / (variance + left)
            parts.append(known + _log(energy, y @ middle, middle, variance + left))
        out.append(torch.stack(parts).logsumexp(0) + 0.5 * energy / variance)
    return torch.stack(out) / TEMPER


def _positions(victim: Victim, scorer: Scorer) -> Tensor | None:
    table = victim.module.get_input_embeddings().weight
    for entry in scorer.entries:
        owner = victim.module.get_submodule(entry.module)
        # Two rows are the types of segments.
        places = isinstance(owner, torch.nn.Embedding) and owner.weight is not table and len(owner.weight) > 2
        if places and entry.component == "embedding" and entry.part is None:
            return scorer.targets[entry.name]
    return None


def _moments(deltas: Tensor) -> tuple[Tensor, float]:
    """Mean by place [t, o] and the variance of one coordinate around it."""
    mean = deltas.mean(0)
    return mean, float((deltas - mean).square().mean()) * len(deltas) / max(1, len(deltas) - 1)


def _log(energy: Tensor, product: Tensor, mean: Tensor, variance: float) -> Tensor:
    """log N(y; mean, variance) up to what never changes, from |y|^2 and y . mean."""
    return -0.5 * (energy - 2 * product + mean @ mean) / variance - 0.5 * len(mean) * math.log(variance)
