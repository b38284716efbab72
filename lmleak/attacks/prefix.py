"""Exact tokens of a decoder from one linear module at any depth, by prefixes (beyond Petrov et al. 2024, 2405.15586).

The input of every module at position i of a causal model depends on tokens 0..i only, so prefixes are extended token by
token and those kept whose input lies in the row space of the module's weight gradient. The rank says how many there
are: no length, label or threshold is needed. See `_prefix_search` for its order, `_prefix_meet` for the first two
tokens where a query or a key does not hold the first, `_prefix_last` for the last token under a language model's loss,
which no module ever reads, `_prefix_bags` for batches at layer 0's query. A rounded gradient's rank is told from its
format's steps; a noised one is read by likelihood, a single sentence from all observed modules (`_prefix_noise`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from lmleak.attacks._applicability import ATTENTION, Reading
from lmleak.attacks._evidence import SURE, Rounding, rounded_space, rounding
from lmleak.attacks._objective import frozen
from lmleak.attacks._prefix_bags import pools, several
from lmleak.attacks._prefix_first import first_token
from lmleak.attacks._prefix_forward import Reader
from lmleak.attacks._prefix_last import last_token
from lmleak.attacks._prefix_noise import noised
from lmleak.attacks._prefix_search import Exhausted, Node, Search
from lmleak.attacks._prefix_sites import Site, site, sites
from lmleak.attacks._prefix_words import Words
from lmleak.attacks._replay import replay
from lmleak.attacks._rowspace import RowSpace, describe, dropped_out, known_input, matrix, row_space
from lmleak.attacks._text import refuse, sentence, special_frame
from lmleak.records import Knowledge, Observation, Reconstruction, Status, Victim

__all__ = ["EXAMPLE", "Config", "attack", "reads", "replay"]


class Config(BaseModel):
    """How long to look, and where first. Rank and acceptance come from the gradient's own spectrum."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_candidates: int = Field(3_000_000, ge=1, description="tokens run up to the module before the attack gives up")
    beam: int = Field(4, ge=1, description="prefixes kept where the gradient is noised")
    prior: str | None = Field(
        None, description="a text file whose words are tried first; default: the vocabulary's own order"
    )


#: The easy case of the contract test.
EXAMPLE = {
    "fields": {},
    "model": {
        "kind": "gpt2",
        "config": {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64, "initializer_range": 0.1},
    },
    "select": {"components": ["ffn_in"], "layers": [1]},
    "knowledge": {},
    "batch_size": 1,
}


def attack(
    config: Config,
    observation: Observation,
    knowledge: Knowledge,
    victim: Victim,
    generator: torch.Generator,
    progress: Callable[[str], None],
) -> Reconstruction:
    """Extends prefixes by the span test at the observed module that shows most (of several, the cheapest).

    Works on causal models whose observed module keeps a row for every token: all but a classifier's last block.
    Sentences of different lengths are found one by one; which tokens end a sentence follows from the rank.
    """
    if not getattr(victim.family, "CAUSAL", False):
        return refuse("not_applicable", f"'{victim.kind}' reads both ways: no prefix can be tested without the rest")
    if dropped_out(victim, observation):
        return refuse("not_applicable", "dropout is on in the client: the row space is that of dropped-out inputs")
    where = site(victim, observation)
    if isinstance(where, str):
        return refuse("not_applicable", where)
    matrices = [matrix(victim.module, e, observation.gradients[e.name]) for e in where.entries]
    space = row_space(matrices)
    if space.zero:
        return refuse("no_signal", str(space.unreadable), describe(space))
    told = None
    if not space.rank or _noised(space):
        stacked = torch.cat(matrices)
        told = rounding(stacked)
        if told is None or not told.rank:
            return _likeliest(config, observation, victim, generator, progress)
        space = rounded_space(stacked, told)
    if where.first and observation.batch_size > 1 and where.query is not None:
        return several(victim, observation, where, space)
    frame = special_frame(victim, knowledge)
    reader = Reader(victim.module, where.module)
    with frozen(victim.module), torch.no_grad():
        search = Search(
            reader,
            space,
            where.kind,
            Words(victim.module.get_input_embeddings().weight),
            _order(victim, config.prior),
            observation.batch_size,
            config.max_candidates,
            generator,
            pools(victim, observation),
            # Layer 0 reads the others whatever the first token is; `_first` finds that one in the end.
            frame.first[0] if frame.first else (0 if where.first and where.kind == "but_first" else None),
            lambda tokens: progress(victim.processor.decode(list(tokens))),
            separate=where.first,
        )
        spent = False
        try:
            search.run()
        except Exhausted:
            spent = True
        found = _answer(victim, observation, where, space, search, spent, bool(frame.first))
    if told is None or (found.status == "ok" and _explains(search, stacked, told)):
        return found
    if observation.batch_size > 1:
        return refuse("no_signal", "no sentences explain the gradient up to its rounding", found.details)
    return _likeliest(config, observation, victim, generator, progress)


def _explains(search: Search, gradient: Tensor, told: Rounding) -> bool:
    """Whether the rows found leave no more of a rounded gradient than rounding does."""
    frame = torch.linalg.qr(torch.stack(search.rows).T).Q.T
    return told.above(gradient.double(), frame) < SURE * told.spread


def _likeliest(
    config: Config,
    observation: Observation,
    victim: Victim,
    generator: torch.Generator,
    progress: Callable[[str], None],
) -> Reconstruction:
    """The answer under noise."""
    usable = sites(victim, observation)
    assert not isinstance(usable, str)  # `site` found one
    words = Words(victim.module.get_input_embeddings().weight)
    surprise = torch.empty(len(words), device=words.device)
    surprise[_order(victim, config.prior)] = 2 * torch.arange(len(words), device=words.device).add(10.0).log()
    with frozen(victim.module), torch.no_grad():
        return noised(
            victim,
            observation,
            usable,
            words,
            surprise,
            config.beam,
            config.max_candidates,
            generator,
            lambda tokens: progress(victim.processor.decode(list(tokens))),
        )


def reads(reading: Reading, victim: Victim, observation: Observation) -> bool:
    """Whether one observed module is enough; layer 0's query, key and value only where positions are added."""
    if reading.status != "ok" or reading.rows == "table" or not getattr(victim.family, "CAUSAL", False):
        return False
    first = reading.entries[0].layer == 0 and reading.entries[0].component in ATTENTION
    position = getattr(known_input(victim), "position", None)
    return not first or (observation.batch_size == 1 and position is not None)


def _answer(
    victim: Victim, observation: Observation, where: Site, space: RowSpace, search: Search, spent: bool, framed: bool
) -> Reconstruction:
    details = describe(space) | {
        "module": where.module,
        "features": search.found,
        "candidates": search.reader.evaluated,
    }
    leaves = [node for node in search.leaves() if any(n.misfit is not None for n in _path(search.root, node))]
    if not leaves:
        if spent:
            return refuse("budget_exhausted", f"no token found in {search.reader.evaluated} candidates", details)
        return refuse("no_signal", "no token's input lies in the observed space", details)
    complete = search.found >= space.rank
    details["residual"] = max(n.misfit for n in _all(search.root) if n.misfit is not None)
    sentences, confidence = [], []
    why = f"{search.found} of {space.rank} rows explained after {search.reader.evaluated} candidates"
    texts, firsts = [list(leaf.prefix.tokens) for leaf in leaves], {}
    if where.first and where.kind == "but_first" and not framed:
        for i, leaf in enumerate(leaves):
            texts[i][0], mismatch, second = _first(victim, observation, where, search, leaf)
            firsts[i] = 1 - mismatch / max(second, 1e-300)
    ends = None
    if victim.task == "causal-lm" and complete:
        ends = _ends(victim, observation, where, search, leaves, texts)
    for i, leaf in enumerate(leaves):
        tokens = list(texts[i])
        margin = min(search.margin(n) for n in _path(search.root, leaf) if n.misfit is not None)
        margin = min(margin, firsts.get(i, 1.0))
        end = None if ends is None else ends[i]
        if end is not None:
            token, mismatch, second = end
            # A label that fits no better than the next one is not an answer.
            margin = min(margin, 1 - mismatch / max(second, 1e-300))
            if margin > 0.5:
                tokens.append(token)
            else:
                complete = False
                why = f"no label explains the last output gradient (best mismatch {mismatch:.2g}, next {second:.2g})"
        sentences.append(tokens)
        confidence.append(max(0.0, margin) if complete else 0.0)
    if len(leaves) < observation.batch_size:
        details["missing"] = "sentences that repeat, or are the beginning of, another one leave no row of their own"
    if complete:
        return sentence(victim, sentences, confidence, details)
    status: Status = "budget_exhausted" if spent else "no_signal"
    return sentence(victim, sentences, confidence, details, status=status, reason=why)


def _ends(
    victim: Victim, observation: Observation, where: Site, search: Search, leaves: list[Node], texts: list[list[int]]
) -> list[tuple[int, float, float] | None]:
    """Last tokens by `_prefix_last`, one a leaf."""
    nodes, deltas = _deltas(victim, observation, where, search)
    entry = where.entries[0]
    part = None if entry.part is None else entry.part[1:]
    predicted = sum(len(leaf.prefix.tokens) for leaf in leaves)
    out: list[tuple[int, float, float] | None] = []
    for leaf, tokens in zip(leaves, texts, strict=True):
        at = next((i for i, n in enumerate(nodes) if n is leaf), None)
        if at is None:
            out.append(None)
            continue
        out.append(last_token(victim.module, where.module, part, tokens, deltas[at], predicted))
    return out


def _deltas(victim: Victim, observation: Observation, where: Site, search: Search) -> tuple[list[Node], Tensor]:
    """Nodes with a row, and their output gradients [rows, d_out]: the gradient is their deltas^T rows."""
    found = [(n, n.row) for n in _all(search.root) if n.row is not None]
    rows = torch.stack([row for _, row in found])
    entry = where.entries[0]
    gradient = matrix(victim.module, entry, observation.gradients[entry.name]).double()
    return [n for n, _ in found], (gradient @ torch.linalg.pinv(rows)).T


def _first(
    victim: Victim, observation: Observation, where: Site, search: Search, leaf: Node
) -> tuple[int, float, float]:
    """The first token by `_prefix_first`."""
    nodes, deltas = _deltas(victim, observation, where, search)
    at = next(i for i, n in enumerate(nodes) if n.prefix.tokens == leaf.prefix.tokens[:2])
    packed = victim.module.get_submodule(where.module)
    layer, heads = victim.family.input_layer(victim.module), victim.module.config.num_attention_heads
    return first_token(layer, packed, heads, leaf.prefix.tokens[1], deltas[at])


def _all(node: Node) -> Iterator[Node]:
    yield node
    for child in node.children:
        yield from _all(child)


def _path(root: Node, leaf: Node) -> Iterator[Node]:
    node = root
    while node is not leaf:
        depth = len(node.prefix.tokens)
        node = next(c for c in node.children if c.prefix.tokens == leaf.prefix.tokens[: depth + 1])
        yield node


def _noised(space: RowSpace) -> bool:
    """Whether what lies behind the spectrum's edge is more than float32's rounding (1e-8 to 4e-7 of the first value,
    measured): weak rows may hide in it."""
    return len(space.spectrum) > space.rank and float(space.spectrum[space.rank]) > 1e-5 * float(space.spectrum[0])


def _order(victim: Victim, prior: str | None) -> Tensor:
    """[v] tokens, most frequent in the prior's text first, the rest as numbered (byte pairs rank themselves)."""
    words = victim.module.get_input_embeddings().weight
    count = torch.zeros(len(words))
    if prior is not None:
        text = Path(prior).expanduser().read_text(encoding="utf-8", errors="replace")
        for start in range(0, len(text), 1 << 16):
            ids = victim.processor(text[start : start + (1 << 16)], add_special_tokens=False)["input_ids"]
            count += torch.bincount(torch.tensor(ids, dtype=torch.long), minlength=len(words))[: len(words)]
    return count.argsort(descending=True, stable=True).to(words.device)
