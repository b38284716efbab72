"""Exact sentences from any single linear module of an encoder, by search in its row space (after 2405.15586).

The weight gradient of any linear module spans the inputs of that module, and in an encoder these follow from the whole
sentence. A relaxation over the vocabulary proposes sentences, discrete descent finishes them, and the gradient's own
spectrum says whether the sentence found is the one. Inputs of a feed-forward block are solved for one by one off its
second matrix, and words read off them. Petrov et al. 2024 (2405.15586) test this row space at layers 0 and
1; one matrix is enough here. The rank shows the length; no label is needed. Pictures: `_subspace_pixels.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field

from lmleak.attacks import span
from lmleak.attacks._applicability import ATTENTION, Reading
from lmleak.attacks._energy import Energy, Site, site
from lmleak.attacks._energy_heads import Heads, heads
from lmleak.attacks._energy_likelihood import Noised, lengths, noised
from lmleak.attacks._energy_marginal import GRAIN, Marginal
from lmleak.attacks._replay import replay
from lmleak.attacks._rowspace import dropped_out, known_input, weights
from lmleak.attacks._subspace_batch import batch
from lmleak.attacks._subspace_first import first_layer
from lmleak.attacks._subspace_pixels import attack_pixels, reads_pixels
from lmleak.attacks._subspace_rows import hidden
from lmleak.attacks._subspace_sentence import DOUBTED, Landscape, SentenceSearch, landscape
from lmleak.attacks._subspace_words import guess
from lmleak.attacks._text import Frame, refuse, sentence, special_frame
from lmleak.attacks._vocabulary import vocabulary
from lmleak.records import Entry, Knowledge, Observation, Reconstruction, Victim

Positive = Annotated[int, Field(gt=0)]
Number = Annotated[float, Field(gt=0)]

__all__ = ["COMPONENTS", "EXAMPLE", "Config", "attack", "reads", "replay"]

SHALLOW = 2  #: observed layers that are read under noise: deeper ones cost more and say the same
FIRST = 0.75  #: of the budget for the first of them
IMAGES = True  #: reads pictures too, see `_subspace_pixels`
COMPONENTS = ("attn_query", "attn_key", "attn_value", "attn_output", "ffn_in", "ffn_out")
EXAMPLE = {
    "fields": {"budget": 3000},
    "select": {"components": ["attn_query"], "layers": [0]},
    "knowledge": {},
    "batch_size": 1,
}


class Config(BaseModel):
    """Effort; nothing here decides what counts as found."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: Positive = 30  #: of mirror descent a round
    restarts: Positive = 4  #: a round, as one batch
    rate: Number = 0.8  #: step of the log-probabilities, in standard deviations of the slope over the vocabulary
    ridge: Number = 0.1  #: what the boldest restart begins with; each further one with less
    shortlist: Positive = 8  #: changes tried for every position and kind
    budget: Positive = 30_000  #: sentences sent through the model, a backward pass counted as two


def attack(
    config: Config,
    observation: Observation,
    knowledge: Knowledge,
    victim: Victim,
    generator: torch.Generator,
    progress: Callable[[str], None],
) -> Reconstruction:
    """Finds the sentences whose inputs at the observed modules fill the spaces that their gradients show.

    One from any module; several from any module too, and fastest from layer 0. Gradients that noise or rounding has
    touched are read one sentence at a time, by what the sentence leaves unexplained.
    """
    if victim.task == "image-classification":
        effort = config.budget, config.restarts
        return attack_pixels(observation, victim, COMPONENTS, *effort, generator, progress)
    if getattr(victim.family, "CAUSAL", True):
        return refuse("not_applicable", "the model is causal: prefix reads it token by token, and faster")
    if dropped_out(victim, observation):
        return refuse("not_applicable", "dropout is on in the client: the row space is that of dropped-out inputs")
    entries = weights(observation, component=COMPONENTS)
    if not entries:
        return refuse("not_applicable", f"needs the weight gradient of one of {', '.join(COMPONENTS)}")
    if observation.batch_size != 1:
        return batch(config, observation, knowledge, victim, entries, generator, progress)
    sites = [site(victim, observation, e) for e in entries]
    if all(s.space.zero for s in sites):
        return refuse("no_signal", "every observed gradient is zero")
    clear = [s for s in sites if s.exact]
    if not clear:
        return _noised(config, observation, knowledge, victim, entries, generator, progress)
    length, whole, why = _length(victim, clear, knowledge)
    details = {"rank": max(s.space.rank for s in clear), "gap": round(min(s.space.gap for s in clear), 3)}
    if not whole:
        return refuse("not_applicable", why, details)
    frame = special_frame(victim, knowledge)
    if length <= frame.size:
        return refuse("no_signal", f"the gradient shows {length} token(s), fewer than a sentence has", details)
    energy = Energy(victim, whole)
    with energy.attached():
        read = _read(observation, knowledge, victim, generator, energy, frame, length)
        if read is not None:
            return read
        found = [heads(victim, observation, one.entry, length) for one in whole]
        known = [one for one in found if one is not None]
        first = [one for one, where in zip(found, whole, strict=True) if one is not None and where.entry.layer == 0]
        read = _by_heads(victim, energy, first, frame, length, details)
        if read is not None:
            return read
        search = SentenceSearch(config, landscape(energy, known), victim, frame, length, generator, progress)
        top = whole[0].entry
        # At layers 0 and 1 the search alone takes 1 to 3 s.
        block = hidden(victim, energy) if top.component == "ffn_out" and (top.layer or 0) >= 2 else None
        if block is None:
            return search.run(details)
        told = guess(block, energy, frame, length - frame.size, search.words, generator, config.budget)
        details["rows"] = told.rows
        if told.verdict < 1:
            details |= {"verdict": told.verdict, "evaluations": energy.evaluations, "length": length}
            return sentence(victim, [told.tokens], [1.0 - 0.5 * max(0.0, told.verdict)], details)
        return search.run(details, told.tokens, told.pool)


def reads(reading: Reading, victim: Victim, observation: Observation) -> bool:
    """Whether one observed module of an encoder is enough: one that shows its inputs, or rises above its noise."""
    if victim.task == "image-classification":
        return reading.status == "ok" and reads_pixels(victim, observation, reading.entries[0], COMPONENTS)
    return reading.status == "ok" and reading.rows != "table" and not getattr(victim.family, "CAUSAL", True)


def _noised(
    config: Config,
    observation: Observation,
    knowledge: Knowledge,
    victim: Victim,
    entries: tuple[Entry, ...],
    generator: torch.Generator,
    progress: Callable[[str], None],
) -> Reconstruction:
    """One sentence under noise or rounding: from the shallowest layer observed, from the next too where that is open.

    MiniLM, 30 tokens, noise 1e-4: layer 0 alone is as clear, 60 CPU seconds, as both layers are, 192.
    """
    last = victim.module.config.num_hidden_layers - 1
    layers = sorted({e.layer for e in entries if e.layer is not None and e.layer != last})[:SHALLOW]
    if not layers:
        return refuse("not_applicable", "under noise the last layer's few directions are not read")
    parts = [noised(victim, observation, e) for e in entries if e.layer in layers]
    noise = max(p.variance for p in parts) ** 0.5
    details: dict = {"rank": max(one.site.space.rank for one in parts), "noise": noise}
    if not details["rank"]:
        gap = max(one.site.space.gap for one in parts)
        why = f"no spectrum has an edge or a direction above its noise (largest step {gap:.1f})"
        return refuse("no_signal", why, details)
    frame, best, spent = special_frame(victim, knowledge), None, 0
    for depth in range(1, len(layers) + 1):
        some = [one for one in parts if one.site.entry.layer in layers[:depth]]
        if not any(one.site.space.rank for one in some):
            continue
        share = config.budget * (1.0 if depth == len(layers) else FIRST) - spent
        effort = config.model_copy(update={"budget": max(1, int(share))})
        start = (*frame.first, *best.tokens[0], *frame.last) if best is not None and best.tokens else None
        best = _likeliest(effort, some, start, knowledge, victim, frame, generator, progress, details)
        spent += best.details.get("evaluations", 0)
        if best.status == "ok" and best.confidence[0] >= DOUBTED:
            break
    assert best is not None  # some rank is not 0, and the last turn asks all
    return replace(best, details=dict(best.details) | {"evaluations": spent})


def _likeliest(
    config: Config,
    parts: list[Noised],
    begun: tuple[int, ...] | None,
    knowledge: Knowledge,
    victim: Victim,
    frame: Frame,
    generator: torch.Generator,
    progress: Callable[[str], None],
    details: dict,
) -> Reconstruction:
    """The likeliest sentence of some modules: lengths by what these say of them, or that of the sentence begun with."""
    energy = Energy(victim, [one.site for one in parts])
    judge = Marginal(energy, parts)
    most = victim.module.config.max_position_embeddings - 2
    tried = knowledge.lengths or lengths(parts, known_input(victim), frame.last[0] if frame.last else None, most)
    tried = [len(begun)] if begun else [n for n in tried if n > frame.size]
    best: Reconstruction | None = None
    words = vocabulary(victim).to(energy.table.device)
    with energy.attached():
        for turn, n in enumerate(tried):
            # The likeliest length has half of the budget, the next a quarter.
            spent = 1.0 if turn + 1 == len(tried) else 1 - 0.5 ** (turn + 1)
            share = config.model_copy(update={"budget": int(config.budget * spent)})
            if best is not None and energy.evaluations + 3 * config.steps * config.restarts > share.budget:
                continue  # no room for a round
            exact = n == max(one.site.tokens for one in parts)
            coarse, open_length = energy if exact else judge, knowledge.lengths is None
            ground = Landscape(coarse, judge, judge, grain=GRAIN, noised=True, resized=open_length)
            start = begun or first_layer(parts, known_input(victim), frame, n, words)
            found = SentenceSearch(share, ground, victim, frame, n, generator, progress).run(details, start)
            if best is None or found.status == "ok" or found.details["energy"] < best.details["energy"]:
                best = found
            if best.status == "ok":
                break
    if best is None:
        return refuse("no_signal", "what rises above the noise is less than a sentence", details)
    return replace(best, details=dict(best.details) | {"evaluations": energy.evaluations})  # of all lengths


def _read(
    observation: Observation,
    knowledge: Knowledge,
    victim: Victim,
    generator: torch.Generator,
    energy: Energy,
    frame: Frame,
    length: int,
) -> Reconstruction | None:
    """Layer 0's query, key and value need no search; what `span` reads there must explain every observed module."""
    readers = weights(observation, component=ATTENTION, layer=0)
    if not readers:
        return None
    part = {e.name: observation.gradients[e.name] for e in readers}
    known = replace(observation, entries=readers, gradients=part)
    answer = span.attack(span.Config(), known, knowledge, victim, generator, lambda text: None)
    if answer.status != "ok" or len(answer.tokens[0]) + frame.size != length:
        return None
    tokens = (*frame.first, *answer.tokens[0], *frame.last)
    verdict = energy.verdict(torch.tensor(tokens, device=energy.table.device))
    if verdict >= 1:
        return None
    details = dict(answer.details) | {"verdict": verdict, "length": length, "by": "span"}
    return replace(answer, confidence=(1.0 - 0.5 * verdict,), details=details)


def _by_heads(
    victim: Victim, energy: Energy, first: list[Heads], frame: Frame, length: int, details: dict
) -> Reconstruction | None:
    """Layer 0's attention output needs no search either: its values are known for every word and position."""
    layer = known_input(victim)
    if not first or layer is None or layer.position is None:
        return None
    tokens = first[0].read(layer, length)
    verdict = energy.verdict(torch.tensor(tokens, device=energy.table.device))
    if verdict >= 1:
        return None
    return sentence(victim, [tokens], [1.0 - 0.5 * verdict], details | {"verdict": verdict, "length": length})


def _length(victim: Victim, sites: list[Site], knowledge: Knowledge) -> tuple[int, list[Site], str]:
    """Tokens of the sentence, and the modules in which every one of them carries gradient; else why there is none."""
    layers = victim.module.config.num_hidden_layers
    heads = victim.module.config.num_attention_heads
    granted = knowledge.lengths[0] if knowledge.lengths else None
    whole, why = [], ""
    for one in sites:
        e = one.entry
        if e.layer == layers - 1 and one.space.rank == 1:
            why = f"{e.component} of the last layer shows one direction (rank 1): only the pooled position carries loss"
        elif e.layer == layers - 1 and e.component in ("attn_key", "attn_value") and one.space.rank >= heads:
            # The pooled position attends once a head, so delta has one direction a head.
            why = f"{e.component} of the last layer shows one direction a head ({heads}) of a longer sentence"
        elif e.layer == layers - 1 and victim.task != "sequence-classification":
            why = f"{e.component} of the last layer shows only the positions that carry loss"
        else:
            whole.append(one)
    length = max((one.tokens for one in whole), default=0)
    whole = [one for one in whole if one.tokens == length]
    if granted is not None and whole and granted != length:
        return 0, [], f"the rank shows {length} tokens, but {granted} are granted: the gradient is of another sentence"
    return length, whole, why
