"""Exact sentences from any single linear module of an encoder, by search in its row space (after 2405.15586).

The weight gradient of any linear module spans the inputs of that module, and in an encoder these follow from the whole
sentence. A relaxation over the vocabulary proposes sentences, discrete descent finishes them, and the gradient's own
spectrum says whether the sentence found is the one. Petrov et al. 2024 (2405.15586) test this row space at layers 0 and
1; one matrix is enough here. The rank shows the length; no label is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field

from lmleak.attacks import span
from lmleak.attacks._energy import Energy, Site, site
from lmleak.attacks._energy_heads import Heads, heads
from lmleak.attacks._rowspace import describe, dropped_out, known_input, matrix, weights
from lmleak.attacks._subspace_batch import BatchSearch, Deflated, admitted, batch_site, batch_space
from lmleak.attacks._subspace_relax import Schedule
from lmleak.attacks._subspace_sentence import RIDGE, SentenceSearch
from lmleak.attacks._text import Frame, refuse, sentence, special_frame
from lmleak.records import Entry, Knowledge, Observation, Reconstruction, Victim

Positive = Annotated[int, Field(gt=0)]
Number = Annotated[float, Field(gt=0)]

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
    rate: Number = 0.5  #: step of the log-probabilities, in standard deviations of the slope over the vocabulary
    ridge: Number = 0.1  #: what the boldest restart begins with; each further one with less
    shortlist: Positive = 8  #: changes tried for every position and kind
    budget: Positive = 20_000  #: sentences sent through the model, a backward pass counted as two


def attack(
    config: Config,
    observation: Observation,
    knowledge: Knowledge,
    victim: Victim,
    generator: torch.Generator,
    progress: Callable[[str], None],
) -> Reconstruction:
    """Finds the sentences whose inputs at the observed modules fill the spaces that their gradients show.

    One from any module; several from layer 0's query, key or value together with a deeper module.
    """
    if getattr(victim.family, "CAUSAL", True):
        return refuse("not_applicable", "the model is causal: prefix reads it token by token, and faster")
    if dropped_out(victim, observation):
        return refuse("not_applicable", "dropout is on in the client: the row space is that of dropped-out inputs")
    entries = weights(observation, component=COMPONENTS)
    if not entries:
        return refuse("not_applicable", f"needs the weight gradient of one of {', '.join(COMPONENTS)}")
    if observation.batch_size != 1:
        return _batch(config, observation, knowledge, victim, entries, generator, progress)
    sites = [site(victim, observation, e) for e in entries]
    if all(s.space.zero for s in sites):
        return refuse("no_signal", "every observed gradient is zero")
    clear = [s for s in sites if s.space.rank]
    if not clear:
        gap = max(s.space.gap for s in sites)
        why = f"no spectrum has an edge (largest step {gap:.1f}): noise, or as many tokens as dimensions"
        return refuse("no_signal", why, {"gap": gap})
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
        return SentenceSearch(config, energy, known, victim, frame, length, generator, progress).run(details)


def _batch(
    config: Config,
    observation: Observation,
    knowledge: Knowledge,
    victim: Victim,
    entries: tuple[Entry, ...],
    generator: torch.Generator,
    progress: Callable[[str], None],
) -> Reconstruction:
    """Several sentences: the words from layer 0, the sentences from the deeper modules."""
    readers = [e for e in entries if e.layer == 0 and e.component in span.READERS]
    layers = victim.module.config.num_hidden_layers
    deeper = [e for e in entries if e not in readers and e.layer != layers - 1]
    layer = known_input(victim)
    frame = special_frame(victim, knowledge)
    if not readers or not deeper or layer is None or layer.position is None or not frame.first:
        why = (
            "several sentences need layer 0's query, key or value, and a module behind it that is not in the last layer"
        )
        return refuse("not_applicable", why)
    sites = [batch_site(victim, observation, e) for e in deeper]
    clear = [s for s in sites if s.space.rank]
    space = batch_space([matrix(victim.module, e, observation.gradients[e.name]) for e in readers])
    if not clear or not space.rank:
        gap = min([s.space.gap for s in sites] + [space.gap])
        return refuse("no_signal", f"no spectrum falls to rounding (largest step {gap:.1f}): noise", {"gap": gap})
    total = max(s.space.rank for s in clear)
    places = admitted(victim, readers, space, frame, generator)
    if not places.lengths:
        return refuse(
            "no_signal", "layer 0's row space admits no word: the gradient is of another model", describe(space)
        )
    energy = Deflated(victim, [s for s in clear if s.space.rank == total])
    schedule = Schedule(config.steps, config.restarts, config.rate, config.ridge, 0.1 * config.ridge)
    show = lambda tokens: progress(victim.processor.decode(list(tokens), skip_special_tokens=True))  # noqa: E731
    with energy.attached():
        effort = (schedule, RIDGE, config.shortlist, config.budget * observation.batch_size)
        search = BatchSearch(energy, frame, places, observation.batch_size, *effort, generator, show)
        search.run()
    details = {
        "rank": total,
        "gap": round(min(s.space.gap for s in clear), 3),
        "rank_layer_0": space.rank,
        "words": len(places.words),
        "found": len(search.found),
        "left": energy.left,
        "rounds": search.rounds,
        "evaluations": energy.evaluations,
    }
    confidence = [1.0 - 0.5 * verdict for verdict in search.found.values()]
    if not search.missing:
        return sentence(victim, list(search.found), confidence, details)
    why = f"found {len(search.found)} of {observation.batch_size} sentences; {energy.left} inputs are left unexplained"
    doubtful = search.doubtful()
    confidence += [0.1] * len(doubtful)
    answers = [*search.found, *doubtful]
    return sentence(victim, answers, confidence, details, status="budget_exhausted", reason=why)


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
    readers = weights(observation, component=span.READERS, layer=0)
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
