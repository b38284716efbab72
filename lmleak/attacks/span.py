"""Exact recovery at the input side: layer 0's weight gradient spans its inputs (after Petrov et al. 2024, 2405.15586).

The input of layer 0's query, key and value is known for every (token, position), so one linear test over the vocabulary
reads the sentence. Key needs differences: softmax is shift-invariant, its output gradients sum to zero over a sentence,
and its row space holds x_i - x_0 only. No length, label, threshold or optimisation is needed. For images the same
space gives the patches by small linear systems: `_span_patches.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from lmleak.attacks._applicability import ATTENTION, Reading, read
from lmleak.attacks._replay import replay
from lmleak.attacks._rowspace import RowSpace, describe, known_input, weights
from lmleak.attacks._span_patches import attack_patches, reads_patches
from lmleak.attacks._text import Frame, refuse, sentence, special_frame
from lmleak.models._input import InputLayer
from lmleak.records import Knowledge, Observation, Reconstruction, Victim

__all__ = ["EXAMPLE", "Config", "attack", "reads", "replay", "screen"]

IMAGES = True  #: reads pictures too, see `_span_patches`
# Random directions outside the row space used to screen the vocabulary. A wrong token has at least 0.09 of its norm
# outside; the chance that 8 Gaussian directions all miss it by 100 times is 1e-16 a token.
DIRECTIONS = 8
SHORTLIST = 8  #: screened tokens a position, beside those expected there, that are tested exactly, in float64
CHUNK = 8192  #: tokens screened at once: memory does not grow with the vocabulary
#: An easy case, for the contract tests.
EXAMPLE = {"fields": {}, "select": {"components": ["attn_query"], "layers": [0]}, "knowledge": {}, "batch_size": 1}


class Config(BaseModel):
    """Nothing to set: rank and tolerance come from the gradient's own spectrum."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def attack(
    config: Config,
    observation: Observation,
    knowledge: Knowledge,
    victim: Victim,
    generator: torch.Generator,
    progress: Callable[[str], None],
) -> Reconstruction:
    """Reads the tokens of layer 0's inputs off the row space of its query, key or value gradient.

    Works on encoders and decoders whose layer 0 reads norm(word + position). With one sample the sentence comes with
    its order. With more, which sentence a token belongs to is not decided here; and where words repeat at different
    positions of different sentences, mixtures of words and positions lie in the space too, more pairs than its rank,
    so that nothing stands out and the answer is no_signal (Rotten Tomatoes, 8 sentences: 6,020 pairs at rank 181).
    """
    if victim.task == "image-classification":
        return attack_patches(observation, victim)
    layer = known_input(victim)
    if layer is None:
        return refuse("not_applicable", f"the input of layer 0 is not known in closed form for family '{victim.kind}'")
    entries = [e for e in weights(observation, layer=0) if e.component in ATTENTION]
    if not entries:
        return refuse("not_applicable", "needs the weight gradient of layer 0's query, key or value")
    # Rotary positions turn every key by its own angle: the sum over a sentence no longer vanishes, nor do differences.
    keys_only = layer.position is not None and all(e.component == "attn_key" for e in entries)
    used = [e for e in entries if keys_only or layer.position is None or e.component != "attn_key"]
    reading = read(victim, observation, used)
    space = reading.space
    if reading.reason is not None:
        return refuse(reading.status, reading.reason, describe(space))
    frame = special_frame(victim, knowledge)
    offset = 0
    origin = None
    if keys_only:
        if not frame.first:
            return refuse(
                "not_applicable",
                "attn_key alone shows differences between inputs, and no token's input is known to anchor them",
            )
        offset = len(frame.first)
        origin = layer.rows(torch.tensor(frame.first[0]), torch.tensor(0), dtype=torch.float64)
    # One place more than the rank: a causal model's first query sees only itself and has no gradient.
    places = 1 if layer.position is None else min(space.rank + offset + 1, len(layer.position))
    expected = observation.batch_size if layer.position is not None else space.rank
    found = _read(layer, space, places, expected + SHORTLIST, origin, generator)
    return _assemble(victim, observation, frame, found, space, ordered=layer.position is not None)


def reads(reading: Reading, victim: Victim, observation: Observation) -> bool:
    """Whether one observed module is enough: layer 0's query or value, or its key where a first token is known."""
    entry, layer = reading.entries[0], known_input(victim)
    if victim.task == "image-classification":
        return reads_patches(victim, observation, entry)
    if reading.status != "ok" or entry.layer != 0 or entry.component not in ATTENTION or layer is None:
        return False
    return reading.rows == "inputs" or bool(special_frame(victim, Knowledge()).first)


def _read(
    layer: InputLayer,
    space: RowSpace,
    places: int,
    shortlist: int,
    origin: Tensor | None,
    generator: torch.Generator,
) -> list[list[tuple[int, float]]]:
    """Per position, the shortlisted (token, residual) pairs, best first. Residuals are exact, in float64."""
    device = layer.word.device
    positions = torch.arange(places, device=device)
    # Random directions, pushed out of the row space.
    raw = torch.randn(DIRECTIONS, space.basis.shape[1], generator=generator, dtype=torch.float64).to(device)
    outside = (raw - (raw @ space.basis.T) @ space.basis).to(torch.float32)
    shift = 0.0 if origin is None else (outside.double() @ origin).float()
    best = None
    for tokens in torch.arange(len(layer.word), device=device).split(CHUNK):
        scores = screen(layer, tokens, positions, outside, shift)  # [p, chunk]
        kept = scores.topk(min(shortlist, len(tokens)), largest=False)
        pair = (kept.values, tokens[kept.indices])
        if best is not None:
            values, which = torch.cat([best[0], pair[0]], 1), torch.cat([best[1], pair[1]], 1)
            lowest = values.topk(min(shortlist, values.shape[1]), largest=False)
            pair = (lowest.values, which.gather(1, lowest.indices))
        best = pair
    assert best is not None
    rows = layer.rows(best[1], positions[:, None], dtype=torch.float64)  # [p, shortlist, d]
    residuals = space.residual(rows if origin is None else rows - origin)
    if origin is not None:
        # The anchor itself is the zero difference: a known token, not a finding.
        residuals = torch.where((rows - origin).norm(dim=-1) < 1e-6 * origin.norm(), 1.0, residuals)
    order = residuals.sort(1)
    return [
        list(zip(tokens, values, strict=True))
        for tokens, values in zip(best[1].gather(1, order.indices).tolist(), order.values.tolist(), strict=True)
    ]


def _assemble(
    victim: Victim,
    observation: Observation,
    frame: Frame,
    found: list[list[tuple[int, float]]],
    space: RowSpace,
    *,
    ordered: bool,
) -> Reconstruction:
    """Accepted tokens per position -> sentences. Anchored positions hold no finding and are filled from the frame."""
    # Every distinct input adds one to the rank, so the rank says how many of the best candidates are true.
    ranked = sorted(residual for place in found for _, residual in place)
    count = min(space.rank, len(ranked) - 1)
    if ranked[count - 1] > 0.5 * ranked[count]:
        why = f"tokens in the observed space do not stand out ({ranked[count - 1]:.2g} against {ranked[count]:.2g})"
        return refuse("no_signal", why, describe(space))
    accepted = [[pair for pair in place if pair[1] <= ranked[count - 1]] for place in found]
    details: dict[str, Any] = describe(space) | {"residual": max(pair[1] for place in accepted for pair in place)}
    if not ordered:
        tokens = [token for token, _ in accepted[0]]
        details["order"] = "unknown: layer 0 of this family reads no position"
        return sentence(victim, [tokens], [_margin(found[0], len(tokens))], details)
    b = observation.batch_size
    anchored = len(frame.first) if not accepted[0] else 0
    unread = [place for place, pairs in enumerate(accepted[: _last(accepted)]) if not pairs and place >= anchored]
    if unread:
        details["unread"] = unread  # positions whose inputs carry no gradient here
    if b > 1:
        details["assignment"] = "arbitrary: layer 0 shows which tokens stand at a position, not in which sentence"
    sentences: list[list[int]] = []
    confidence = []
    for i in range(b):
        tokens = list(frame.first) if not accepted[0] else []
        margins = []
        for place, whole in zip(accepted, found, strict=True):
            if not place:
                continue
            tokens.append(place[i % len(place)][0])
            margins.append(_margin(whole, len(place)) / len(place))
            if frame.last and tokens[-1] == frame.last[0]:
                break
        sentences.append(tokens)
        confidence.append(min(margins, default=0.0))
    made = sentence(victim, sentences, confidence, details)
    if not any(made.tokens):
        return refuse("no_signal", f"only special tokens carry gradient here (rank {space.rank})", details)
    return made


def _last(accepted: list[list[tuple[int, float]]]) -> int:
    return max(place for place, pairs in enumerate(accepted) if pairs)


def _margin(place: list[tuple[int, float]], count: int) -> float:
    """1 - (worst accepted residual / best rejected one): how clearly the accepted tokens stand out."""
    if not count or count >= len(place):
        return 0.0
    return 1.0 - place[count - 1][1] / max(place[count][1], 1e-300)


def screen(layer: InputLayer, tokens: Tensor, positions: Tensor, outside: Tensor, shift: Tensor | float) -> Tensor:
    """Sum of squared products of every input norm(word + position) with the directions `outside` [m, d], [p, tokens].

    Never forms an input: with C the centring, x.n = (C(w * n).e + C(w * n).p) / std + b.n, and the variance of e + p
    needs one product e.p. Cost v (m + p) d instead of v p d for the rows and v p d m for their products.
    """
    centre = layer.norm == "layer"
    middle = lambda t: t - t.mean(-1, keepdim=True) if centre else t  # noqa: E731
    words = middle(layer.word[tokens].float())  # [v, d]
    directions = middle(outside * layer.weight.float())  # [m, d]
    product = (words @ directions.T).T[:, None]  # [m, 1, v]
    variance = words.pow(2).mean(-1)  # [v]
    if layer.position is not None:
        places = middle(layer.position[positions].float())  # [p, d]
        product = product + (places @ directions.T).T[..., None]  # [m, p, v]
        variance = variance + places.pow(2).mean(-1)[:, None] + 2 / words.shape[1] * (places @ words.T)  # [p, v]
    scale = torch.rsqrt(variance.clamp_min(0) + layer.eps)
    constant = (outside @ layer.bias.float() if layer.bias is not None else 0.0) - shift
    constant = constant[:, None, None] if isinstance(constant, Tensor) and constant.dim() else constant
    return (product * scale + constant).pow(2).sum(0).reshape(-1, len(tokens))
