"""Several sentences from layer 0's query: its row space shows single tokens, its output gradients whose they are.

Layer 0's attention reads norm(word + position): every (token, position) is tested by itself, and the gradient, solved
for the rows that pass, gives each one's output gradient. In every head that of a query at position p is a mixture of
k_j - k_p over the tokens j before it in its own sentence: p directions of the head's width. So each token finds the
prefix it belongs to; one that two sentences share at a place, both. Where a word stands at two places, and another at
one of them, the norm being affine, that other word at the second place lies in the space as well (see `span`): then
more pairs pass than the rank counts. Which of them are too many shows as well: with the right ones gone, every output
gradient fits a prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import combinations, islice

import torch
from torch import Tensor, nn

from lmleak.attacks._objective import frozen
from lmleak.attacks._prefix_first import first_token
from lmleak.attacks._prefix_last import last_token
from lmleak.attacks._prefix_sites import Site
from lmleak.attacks._rowspace import RowSpace, describe, known_input, matrix, row_space, weights
from lmleak.attacks._text import refuse, sentence
from lmleak.attacks.span import DIRECTIONS, screen
from lmleak.models._input import InputLayer
from lmleak.records import Observation, Reconstruction, Victim

CHUNK = 8192  #: tokens tested at once
#: Share of an output gradient off its own prefix's directions: 1e-6 to 1e-4 measured; off another's, 0.1 or more.
OFF = 0.01
EXTRA = 2  #: pairs too many that are told apart: with more, the ways to leave them out are thousands
TRIES = 128  #: ways to leave pairs out


@dataclass
class Chain:
    """A prefix whose tokens are known to belong together."""

    tokens: list[int]
    keys: Tensor  #: [n, h, d_h] float64
    margin: float = 1.0
    delta: Tensor | None = None  #: [d_out] output gradient at the last token
    children: list[Chain] = field(default_factory=list)


def singles(
    layer: InputLayer, space: RowSpace, start: int, many: int, *, whole: bool = False
) -> list[list[tuple[int, float]]]:
    """Per position from `start`, the tokens whose input lies in the space, with residuals; up to `many` a position.

    Ends where as many are found as the rank counts; with `whole`, at the first position where there is none.
    """
    assert layer.position is not None
    v, device = len(layer.word), layer.word.device
    raw = torch.randn(DIRECTIONS, space.basis.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    raw = raw.to(device)
    aside = (raw - (raw @ space.basis.T) @ space.basis).float()
    positions = torch.arange(start, min(len(layer.position), space.rank + 2), device=device)
    kept, which = [], []
    for tokens in torch.arange(v, device=device).split(CHUNK):
        scores = screen(layer, tokens, positions, aside, 0.0).topk(min(many + 4, len(tokens)), largest=False)
        kept.append(scores.values)
        which.append(tokens[scores.indices])
    best = torch.cat(kept, 1).topk(min(many + 4, v), largest=False).indices
    candidates = torch.cat(which, 1).gather(1, best)
    residual = space.residual(layer.rows(candidates, positions[:, None], dtype=torch.float64))
    rounding = torch.finfo(layer.word.dtype).eps * space.basis.shape[1] ** 0.5
    limit = max(2 / max(space.gap, 1.0), (rounding * float(residual.median())) ** 0.5)
    out: list[list[tuple[int, float]]] = [[] for _ in range(start)]
    for tokens, values in zip(candidates.tolist(), residual.tolist(), strict=True):
        hits = [(t, r) for t, r in zip(tokens, values, strict=True) if r <= limit]
        out.append(sorted(hits, key=lambda hit: hit[1]))
        if (whole and not hits) or (not whole and sum(map(len, out)) >= space.rank):
            break
    return out


def pools(victim: Victim, observation: Observation) -> Callable[[int], Tensor | None]:
    """Position -> the tokens that can stand there: those of the embedding's rows that changed, and those whose input
    layer 0's query or value holds. None where nothing is known."""
    words, present, layer = victim.module.get_input_embeddings(), None, known_input(victim)
    for entry in weights(observation):
        if victim.module.get_submodule(entry.module) is words:
            used = observation.gradients[entry.name].norm(dim=1) > 0
            # A table tied to the output layer has no zero rows, noise leaves none.
            present = used.nonzero().flatten() if 2 * int(used.sum()) < len(used) else None
    places: list[Tensor | None] = []
    entries = [e for e in weights(observation, layer=0) if e.component in ("attn_query", "attn_value", "attn_qkv")]
    if entries and layer is not None and layer.position is not None:
        space = row_space([matrix(victim.module, e, observation.gradients[e.name]) for e in entries])
        start = int(all(e.component == "attn_query" for e in entries))
        if not space.unreadable:
            found = singles(layer, space, start, 16 * observation.batch_size, whole=True)
            places = [
                torch.tensor([t for t, _ in place], device=layer.word.device) if place else None for place in found
            ]

    def pool(place: int) -> Tensor | None:
        here = places[place] if place < len(places) else None
        return present if here is None else here

    return pool


def chains(
    layer: InputLayer,
    packed: nn.Module,
    heads: int,
    found: list[list[tuple[int, float]]],
    query: Tensor,
    strict: bool = False,
) -> list[Chain]:
    """The sentences (leaves of the tree that they share beginnings in); with `strict`, none unless all tokens fit one.

    Args:
        layer: what layer 0 reads.
        packed: the linear map to query, key and value, side by side.
        heads: attention heads.
        found: per position, tokens; nothing at position 0 where the space does not hold it.
        query: [d, d_in] query part of the gradient.
    """
    device = layer.word.device
    places = [(p, t) for p, place in enumerate(found) for t, _ in place]
    tokens, positions = (torch.tensor(c, device=device) for c in zip(*((t, p) for p, t in places), strict=True))
    rows = layer.rows(tokens, positions, dtype=torch.float64)
    deltas = (query.double() @ torch.linalg.pinv(rows)).T
    keys = _keys(layer, packed, heads, tokens, positions)
    live: list[Chain] = []
    roots: list[Chain] = []
    for p in range(len(found)):
        here = [i for i, place in enumerate(places) if place[0] == p]
        grown = []
        for i in here:
            token, key, delta = places[i][1], keys[i], deltas[i]
            if p == 0:
                roots.append(Chain([token], key[None]))
                continue
            if p == 1 and not found[0]:
                first, off, second = first_token(layer, packed, heads, token, delta)
                one = _keys(
                    layer, packed, heads, torch.tensor([first], device=device), torch.tensor([0], device=device)
                )
                parent = next((c for c in roots if c.tokens == [first]), None)
                if parent is None:
                    parent = Chain([first], one)
                    roots.append(parent)
                grown.append(_extend(parent, token, key, delta, 1 - off / max(second, 1e-300)))
                continue
            parents, margin = _parents(live, key, delta)
            if strict and margin <= 0:
                return []
            grown += [_extend(parent, token, key, delta, margin) for parent in parents]
        live = roots if p == 0 else grown
    return _leaves(roots)


def _extend(parent: Chain, token: int, key: Tensor, delta: Tensor, margin: float) -> Chain:
    child = Chain([*parent.tokens, token], torch.cat([parent.keys, key[None]]), min(parent.margin, margin), delta)
    parent.children.append(child)
    return child


def _parents(live: list[Chain], key: Tensor, delta: Tensor) -> tuple[list[Chain], float]:
    """The prefixes that a token belongs to, and how clearly."""
    off = sorted(((_off([c], key, delta), i) for i, c in enumerate(live)))
    if not off:
        return [], 0.0
    best, i = off[0]
    if best > OFF and len(live) > 1:
        both, pair = min((_off([live[a], live[b]], key, delta), (a, b)) for a, b in combinations(range(len(live)), 2))
        if both <= OFF:
            return [live[at] for at in pair], 1 - both / best
    return [live[i]], (1 - best / off[1][0] if len(off) > 1 else 1.0) if best <= OFF else 0.0


def _off(parents: list[Chain], key: Tensor, delta: Tensor) -> float:
    """Share of an output gradient off the directions that its prefixes' keys span, over heads, 0..1."""
    wanted = delta.view(len(key), -1)
    ways = torch.cat([c.keys for c in parents]) - key  # [n, h, d_h]
    frame = torch.linalg.qr(ways.permute(1, 2, 0)).Q  # [h, d_h, n]
    inside = torch.einsum("hd,hdn->hn", wanted, frame)
    return float((1 - inside.square().sum() / wanted.square().sum().clamp_min(1e-300)).clamp_min(0).sqrt())


def _keys(layer: InputLayer, packed: nn.Module, heads: int, tokens: Tensor, positions: Tensor) -> Tensor:
    """[n, h, d_h] keys in float64."""
    rows = layer.rows(tokens, positions, dtype=torch.float64).to(layer.word.dtype)
    return packed(rows).chunk(3, -1)[1].double().view(len(tokens), heads, -1)


def _leaves(live: list[Chain]) -> list[Chain]:
    return [leaf for c in live for leaf in (_leaves(c.children) if c.children else [c])]


def several(victim: Victim, observation: Observation, where: Site, space: RowSpace) -> Reconstruction:
    """The sentences of a batch from layer 0's query, alone or packed with key and value."""
    layer, entry = known_input(victim), where.query
    if layer is None or entry is None or layer.position is None:
        return refuse("not_applicable", "the input of layer 0 is not known in closed form for this family")
    found = singles(layer, space, int(where.kind == "but_first"), observation.batch_size, whole=True)
    packed = victim.module.get_submodule(where.module)
    query = matrix(victim.module, entry, observation.gradients[entry.name])
    query = query[: query.shape[0] // 3] if entry.component == "attn_qkv" else query
    count = sum(map(len, found))
    details = describe(space) | {"module": where.module, "features": count}
    if not any(found):
        return refuse("no_signal", "no token's input lies in the observed space", details)
    if count < space.rank:
        why = f"{count} pairs of word and position lie in a space of rank {space.rank}"
        return refuse("no_signal", why, details)
    leaves: list[Chain] = []
    with torch.no_grad():
        for some in islice(readings(layer, found, space.rank, observation.batch_size), TRIES):
            leaves = chains(layer, packed, victim.module.config.num_attention_heads, some, query, count > space.rank)
            if leaves:
                break
        else:
            why = f"{count} pairs of word and position lie in a space of rank {space.rank}: words repeat"
            return refuse("no_signal", why, details)
    sentences, confidence = [], []
    predicted = sum(len(leaf.tokens) for leaf in leaves)
    for leaf in leaves:
        tokens, margin = list(leaf.tokens), leaf.margin
        if victim.task == "causal-lm" and leaf.delta is not None:
            part = (0, len(leaf.delta))
            with frozen(victim.module):
                end, best, second = last_token(victim.module, where.module, part, tokens, leaf.delta, predicted)
            margin = min(margin, 1 - best / max(second, 1e-300))
            tokens.append(end)
        sentences.append(tokens)
        confidence.append(max(0.0, margin))
    if min(confidence) > 0:
        return sentence(victim, sentences, confidence, details)
    why = f"{space.rank} tokens found, and not all fit a sentence"
    return sentence(victim, sentences, confidence, details, status="no_signal", reason=why)


def readings(
    layer: InputLayer, found: list[list[tuple[int, float]]], rank: int, many: int
) -> Iterator[list[list[tuple[int, float]]]]:
    """`found` without as many pairs as are more than the rank, in every way that leaves independent inputs, and up to
    `many` tokens a position."""
    places = [(p, i) for p, place in enumerate(found) for i in range(len(place))]
    tokens = torch.tensor([found[p][i][0] for p, i in places], device=layer.word.device)
    positions = torch.tensor([p for p, _ in places], device=layer.word.device)
    rows = torch.nn.functional.normalize(layer.rows(tokens, positions, dtype=torch.float64), dim=1)
    # [n - rank, n]: how the inputs depend on each other. One that takes no part is true.
    ways = torch.linalg.svd(rows.T).Vh[rank:]
    if len(ways) > EXTRA:
        return
    doubtful = (ways.norm(dim=0) > 1e-3).nonzero().flatten().tolist()
    for out in combinations(doubtful, len(ways)):
        if len(out) and float(torch.linalg.svdvals(ways[:, list(out)])[-1]) < 1e-3:
            continue
        gone = {places[at] for at in out}
        kept = [[hit for i, hit in enumerate(place) if (p, i) not in gone] for p, place in enumerate(found)]
        if max(map(len, kept)) <= many:
            yield kept
