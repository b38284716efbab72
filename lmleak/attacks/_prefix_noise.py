"""`prefix` on a gradient that noise or rounding has touched: one sentence, every module's evidence together."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lmleak.attacks._evidence import Evidence
from lmleak.attacks._prefix_beam import Beam, Path, Witness
from lmleak.attacks._prefix_forward import Prefix, Reader
from lmleak.attacks._prefix_last import last_token
from lmleak.attacks._prefix_sites import Site, rotary
from lmleak.attacks._prefix_words import Words
from lmleak.attacks._rowspace import known_input, matrix
from lmleak.attacks._text import refuse, sentence
from lmleak.records import Observation, Reconstruction, Victim

#: Deeper modules hold fewer directions above the noise (a trained 4-layer GPT-2, noise 1e-4, 40 tokens: 32, 13, 12 of
#: layers 0, 1, 2's c_attn) and cost more to reach.
LAYERS = 4


def noised(
    victim: Victim,
    observation: Observation,
    sites: list[Site],
    words: Words,
    surprise: Tensor,
    width: int,
    budget: int,
    generator: torch.Generator,
    progress: Callable[[tuple[int, ...]], None],
) -> Reconstruction:
    """The most likely sentence. Parameters frozen, no gradients.

    Args:
        sites: observed modules, cheapest first.
        words: unit embeddings.
        surprise: [v] -2 log probability of each token before anything is seen.
        width: paths kept.
        budget: tokens run before it stops.
    """
    if observation.batch_size > 1:
        return refuse("no_signal", "the gradient is noised: only single sentences are read under noise")
    near = sorted({where.layer for where in sites})[:LAYERS]
    pairs = []
    for where in sites:
        if where.layer in near and not (where.first and rotary(victim)):
            stacked = torch.cat([matrix(victim.module, e, observation.gradients[e.name]) for e in where.entries])
            pairs.append((where, Witness(Evidence(stacked), where.kind)))
    pairs = [(where, w) for where, w in pairs if w.evidence.rank]
    if not any(w.kind == "all" for _, w in pairs):
        return refuse("no_signal", "no direction of a module that holds the first token rises above the noise")
    pairs.sort(key=lambda pair: pair[1].kind != "all")
    first = pairs[0][0]
    layer = known_input(victim) if first.first else None
    reader = Reader(victim.module, *(where.module for where, _ in pairs))
    beam = Beam(reader, [w for _, w in pairs], words, surprise, layer, width, budget, generator, progress)
    path = beam.run()
    tokens, end = list(path.prefix.tokens), None
    if victim.task == "causal-lm" and not path.left:
        end = _end(victim, observation, sites[-1], tokens)
    return _answer(victim, path, end, pairs, reader.evaluated)


def _end(victim: Victim, observation: Observation, where: Site, tokens: list[int]) -> tuple[int, float]:
    """The last token of a language model's sentence (see `_prefix_last`), and how far the next one is behind, 0..1."""
    reader, prefix, rows = Reader(victim.module, where.module), Prefix(), []
    for token in tokens:
        rows.append(reader.read([prefix], torch.tensor([[token]], device=reader.device))[0, 0].double())
        prefix = reader.extend(prefix, token)
    entry = where.entries[0]
    gradient = matrix(victim.module, entry, observation.gradients[entry.name]).double()
    delta = (gradient @ torch.linalg.pinv(torch.stack(rows)))[:, -1]
    part = None if entry.part is None else entry.part[1:]
    token, best, second = last_token(victim.module, where.module, part, tokens, delta, len(tokens), batches=2)
    return token, 1 - best / max(second, 1e-300)


def _answer(
    victim: Victim, path: Path, end: tuple[int, float] | None, pairs: list[tuple[Site, Witness]], evaluated: int
) -> Reconstruction:
    details = {
        "modules": len(pairs),
        "module": pairs[0][0].module,
        "rank": max(w.evidence.rank for _, w in pairs),
        "noise": max(w.evidence.noise for _, w in pairs) ** 0.5,
        "unexplained": path.left,
        "fits": sum(path.fits),
        "candidates": evaluated,
    }
    if not any(path.fits):
        return refuse("no_signal", "no token's input fits what rises above the noise", details)
    # Directions that stay unexplained, or tokens that no module takes for true, say that the sentence is not whole.
    share = sum(path.fits) / (len(path.fits) + path.left)
    if any(w.evidence.rounding is not None for _, w in pairs):
        # The number format says what rounding leaves: nothing else explains so much of the gradient.
        share = 0.0 if path.left else 1.0
    certain = 1.0
    for margin in path.margins:
        certain *= margin
    tokens = list(path.prefix.tokens)
    if end is not None:
        tokens.append(end[0])
        certain *= end[1]
    return sentence(victim, [tokens], [share * certain], details)
