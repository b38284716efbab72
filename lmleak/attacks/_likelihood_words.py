"""Which words to try where, before any sentence is guessed: by their rank in the tokenizer and by their own evidence.

Tokenizers number their tokens from frequent to rare (WordPiece's vocabularies are sorted so, byte pairs are merged in
that order), which is as public as the tokenizer is, and words of a text follow Zipf's law. The gradient itself names
words where their inputs are known in closed form: rows of the token table, and layer 0's query, key and value. Nobody
knows the output gradients; drawn sentences tell their mean and spread, and a Gaussian with these is integrated out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lmleak.attacks._applicability import ATTENTION
from lmleak.attacks._likelihood_score import Candidate, Scorer
from lmleak.attacks._rowspace import known_input, matrix
from lmleak.models._input import InputLayer
from lmleak.records import Entry, Victim

FIRST = 10  #: added to ranks: the commonest word has 6 % of an English text, not 50
MARKS, LETTERS = 10, 200  #: ranks of single marks and of single letters and digits, which come before all words
#: A word's output gradient is one of these times what drawn sentences have: MiniLM's for "hall" is six times that for
#: "the". With one size alone, a word of little gradient is ranked by its noise.
SIZES = (0.0, 0.2, 0.5, 1.0, 2.0)
TEMPER = 2.0  #: places share words and gradients, so evidence is taken for half of what it says
LARGE = 12.0  #: standard deviations at which a row of a tied table is as likely as a row can be
MOST = 40.0  #: nats that evidence may count for


def frequency(victim: Victim) -> Tensor:
    """How common each token is, [v], up to a constant."""
    processor = victim.processor
    texts = processor.convert_ids_to_tokens(list(range(len(processor))))
    out = torch.zeros(len(processor))
    rank = 0
    for i, text in enumerate(texts):
        plain = str(text).lstrip("#Ġ▁") or str(text)
        if plain.startswith("[") and plain.endswith("]"):
            out[i] = 1 / (len(texts) + FIRST)  # BERT's special tokens, and a thousand that no text uses
        elif len(plain) > 1:
            rank += 1
            out[i] = 1 / (rank + FIRST)
        elif plain.isascii():
            out[i] = 1 / (LETTERS if plain.isalnum() else MARKS + FIRST)
        else:
            out[i] = 1 / (len(texts) + FIRST)
    # A vocabulary of characters is in no order.
    return out if 2 * rank > len(texts) else torch.ones(len(texts))


def evidence(victim: Victim, scorer: Scorer, drawn: Sequence[Candidate], length: int) -> Tensor | None:
    """Nats for each word at each place, [t, v], given nothing else; None where no module speaks of words alone.

    Args:
        victim: its input layer and tables.
        scorer: of the release; inside `frozen`.
        drawn: sentences drawn without the gradient, `length` tokens each.
        length: tokens of the sentence.
    """
    rows, layer = scorer.rows(), known_input(victim)
    read = [e for e in scorer.entries if e.layer == 0 and e.component in ATTENTION and len(e.shape) == 2]
    read = read if layer is not None else []
    if not scorer.noise or not drawn or (rows is None and not read):
        return None
    deltas = scorer.deltas(drawn, [e for e in (rows, *read) if e is not None])
    total = torch.zeros(length, len(scorer.table), dtype=scorer.table.dtype, device=scorer.table.device)
    tied = victim.module.get_output_embeddings()
    if rows is not None and tied is not None and tied.weight is victim.module.get_input_embeddings().weight:
        # Each row is a word's own gradient as an input and as a target: only that it is large says something.
        energy = scorer.targets[rows.name].square().sum(1)
        spread = 1.4826 * (energy - energy.median()).abs().median() + 1e-12 * energy.max()
        total += ((energy - energy.median()) / spread).clamp(0, LARGE)
    elif rows is not None:
        total += _by_rows(victim, scorer, rows, deltas[rows.name], length)
    for entry in read:
        assert layer is not None
        gradient = matrix(victim.module, entry, scorer.targets[entry.name])
        total += _by_inputs(layer, gradient, deltas[entry.name], length)
    if read or not tied:
        # One word seldom stands at two places, and its gradient shows at all of them.
        total = 2 * total - total.logsumexp(0)
    return (total - total.amax(1, keepdim=True)).clamp_min(-MOST)


def _by_inputs(layer: InputLayer, gradient: Tensor, deltas: Tensor, length: int) -> Tensor:
    """From what a gradient [o, d] holds along each word's input at each place, less what all words share."""
    mean, spread = _moments(deltas)
    mapped = gradient * layer.weight
    words, ones = layer.word @ mapped.T, mapped.sum(1)
    own = words.square().sum(1)
    middle = layer.word if layer.position is None else layer.word + layer.position[:length].mean(0)
    shift, scale = _norm(layer, middle)
    x = (middle - shift[:, None]) * scale[:, None] * layer.weight
    reach = (x - x.mean(0)).norm(dim=1)
    out = []
    for place in range(length):
        row = layer.word.new_zeros(layer.word.shape[1]) if layer.position is None else layer.position[place]
        shift, scale = _norm(layer, layer.word + row)
        more = mapped @ row
        # z = words + more - shift ones, y = scale z - its mean; only inner products of it are needed.
        along = words @ torch.stack([more, ones], 1)
        square = own + more @ more + shift.square() * (ones @ ones) + 2 * along[:, 0]
        square = square - 2 * shift * (along[:, 1] + more @ ones)
        shared = (scale @ words + scale.sum() * more - (scale @ shift) * ones) / len(scale)
        two = torch.stack([shared, mean[place]], 1)
        z = words @ two + more @ two - shift[:, None] * (ones @ two)
        energy = scale.square() * square - 2 * scale * z[:, 0] + shared @ shared
        product = scale * z[:, 1] - shared @ mean[place]
        energy, product = energy / reach.square(), product / reach
        variance = float(energy.median()) / len(gradient)  # other words' gradients are in it too
        scales = [size * float(reach.median()) for size in SIZES]
        parts = [_log(energy, a * product, a * mean[place], variance + a**2 * spread) for a in scales]
        out.append(torch.stack(parts).logsumexp(0) + 0.5 * energy / variance)
    return torch.stack(out) / TEMPER


def _norm(layer: InputLayer, x: Tensor) -> tuple[Tensor, Tensor]:
    """What the layer's norm takes off each row [v, d], and what it multiplies by, [v]."""
    shift = x.mean(1) if layer.norm == "layer" else x.new_zeros(len(x))
    return shift, torch.rsqrt(x.square().mean(1) - shift.square() + layer.eps)


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
