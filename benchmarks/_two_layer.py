"""The published exact attack, written plainly from its description: layers 0 and 1, thresholds (DAGER, 2405.15586).

A slow twin to compare with, not part of the package. Layer 0's weight gradient is tested for every token of the
vocabulary at every position; encoders then try all combinations of the tokens that pass, decoders extend sentences
greedily, and layer 1's gradient decides. Thresholds and rank are the published ones: numpy's rank of the gradient, at
most d - 20; 1e-3 at layer 1; at layer 0 1e-4 instead of 1e-5, which loses tokens to float32's rounding (2e-5).

Under noise (`noisy=True`) the published decoder attack drops the thresholds: at position 0 it takes tokens more than 5
standard deviations below the mean (of the log-odds of the distances at both layers), at every other the best 5 % of the
vocabulary at layer 0, and layer 1 keeps the best B. The rank stays d - 20 and the length is granted. For encoders
nothing is published; here each position takes its best token at layer 0, then whichever of its `WIDTH` best lowers the
mean distance at layer 1, round and round.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from lmleak.attacks._rowspace import matrix, weights
from lmleak.attacks._text import special_frame
from lmleak.records import Knowledge, Observation, Victim

LAYER_0, LAYER_1 = 1e-4, 1e-3  #: largest share of an input's norm outside the row space
CUTOFF = 20  #: directions that are never counted to the rank
DISTINCT = 0.7  #: sentences that share more of their tokens are taken for one
WIDTH = 20
CHUNK = 2048  #: sentences in one forward pass


class Stop(Exception):
    """Carries a module's input out of a forward pass that need not go on."""


class TwoLayer:
    """One model, its observed gradients at layers 0 and 1, and their row spaces."""

    def __init__(self, observation: Observation, victim: Victim):
        self.victim, self.size = victim, observation.batch_size
        self.modules, self.spaces = [], []
        for layer in (0, 1):
            entry = weights(observation, layer=layer, component=("attn_query", "attn_qkv"))[0]
            gradient = matrix(victim.module, entry, observation.gradients[entry.name])
            rank = min(int(torch.linalg.matrix_rank(gradient)), gradient.shape[1] - CUTOFF)
            self.modules.append(victim.module.get_submodule(entry.module))
            self.spaces.append(torch.linalg.svd(gradient, full_matrices=False).Vh[:rank])
        self.vocabulary = torch.arange(victim.module.get_input_embeddings().weight.shape[0])

    @torch.no_grad()
    def distances(self, layer: int, ids: Tensor, first: int = 0) -> Tensor:
        """Share of every input [n, s] outside the layer's row space, for sentences that begin at position `first`."""
        out = []
        for part in ids.split(CHUNK):
            x = reached(self.victim.module, self.modules[layer], part, first)
            x = x / x.norm(dim=-1, keepdim=True)
            space = self.spaces[layer]
            out.append((x - (x @ space.T) @ space).norm(dim=-1))
        return torch.cat(out)

    @torch.no_grad()
    def continued(self, prefix: list[int], tokens: Tensor) -> Tensor:
        """Distance at layer 1 of every token [n] as a decoder's prefix's next, [n]; the prefix is run once."""
        module, out = self.victim.module, []
        for part in tokens.split(CHUNK):
            cache = DynamicCache(config=module.config)
            reached(module, self.modules[1], torch.tensor([prefix]), 0, cache)
            cache.batch_repeat_interleave(len(part))
            x = reached(module, self.modules[1], part[:, None], len(prefix), cache)[:, 0]
            x = x / x.norm(dim=-1, keepdim=True)
            out.append((x - (x @ self.spaces[1].T) @ self.spaces[1]).norm(dim=-1))
        return torch.cat(out)

    def tokens(self, place: int) -> Tensor:
        """Distance of every token of the vocabulary at a position, from layer 0, [v]."""
        return self.distances(0, self.vocabulary[:, None], place)[:, 0]


def reached(module: nn.Module, until: nn.Module, ids: Tensor, first: int, cache: DynamicCache | None = None) -> Tensor:
    """The input [n, s, d] of `until` when sentences `ids` [n, s], behind what `cache` holds, are run that far."""

    def stop(_: nn.Module, args: tuple) -> None:
        raise Stop(args[0])

    handle = until.register_forward_pre_hook(stop)
    places = torch.arange(first, first + ids.shape[1]).expand(len(ids), -1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones(len(ids), first + ids.shape[1], dtype=torch.long)}
    if cache is None:  # a single token at its place, or a whole sentence: nothing before it
        inputs["attention_mask"] = torch.ones_like(ids)
    else:
        inputs |= {"past_key_values": cache, "use_cache": True}
    try:
        module(**inputs, position_ids=places)
    except Stop as reached_it:
        return reached_it.args[0]
    finally:
        handle.remove()
    raise AssertionError("the module takes no part in the forward pass")


def two_layer(
    observation: Observation,
    victim: Victim,
    *,
    layer_0: float = LAYER_0,
    layer_1: float = LAYER_1,
    noisy: bool = False,
    length: int | None = None,
    max_candidates: int = 10_000,
    seed: int = 0,
) -> list[list[int]]:
    """Token ids of the sentences found, special tokens included; fewer than the batch has where it finds fewer.

    Args:
        observation: gradients of the queries (or the packed matrix) of layers 0 and 1, at least.
        victim: the public model.
        layer_0: threshold of the distance at layer 0; not used under noise.
        layer_1: the same at layer 1.
        noisy: use the published rules for noised gradients instead of thresholds.
        length: tokens of a sentence; needed under noise, where no position runs out of candidates.
        max_candidates: combinations tried for one length of an encoder's sentence; more are sampled.
        seed: of the sampling.
    """
    attack = TwoLayer(observation, victim)
    frame = special_frame(victim, Knowledge())
    if noisy:
        assert length is not None
        return _noisy_decoder(attack, length) if victim.family.CAUSAL else _noisy_encoder(attack, length, frame)
    places: list[list[int]] = []
    limit = victim.module.config.max_position_embeddings
    while len(places) < limit:
        distance = attack.tokens(len(places))
        near = (distance < layer_0).nonzero().flatten()
        near = near[distance[near].argsort()]
        if not len(near):
            break
        places.append(near.tolist())
    if victim.family.CAUSAL:
        return _decoder(attack, places, layer_1)
    return _encoder(attack, places, layer_1, frame.last[0], max_candidates, seed)


def _encoder(
    attack: TwoLayer, places: list[list[int]], layer_1: float, end: int, max_candidates: int, seed: int
) -> list[list[int]]:
    """All combinations of every length at which a sentence may end, the best of them that are not alike."""
    scored: list[tuple[float, list[int]]] = []
    draw = torch.Generator().manual_seed(seed)
    for last, near in enumerate(places):
        if end not in near or last == 0:
            continue
        choices = [[t for t in place[: attack.size] if t != end] for place in places[:last]]
        if not all(choices):
            continue
        total = 1
        for choice in choices:
            total *= len(choice)
        if total <= max_candidates:
            rows = [[*row, end] for row in itertools.product(*choices)]
        else:
            picked = [torch.randint(len(c), (max_candidates,), generator=draw).tolist() for c in choices]
            rows = [[*(c[i] for c, i in zip(choices, row, strict=True)), end] for row in zip(*picked, strict=True)]
        scores = attack.distances(1, torch.tensor(rows)).mean(1).tolist()
        scored += zip(scores, rows, strict=True)
    return _distinct(sorted(scored), attack.size, layer_1)


def _distinct(scored: Sequence[tuple[float, list[int]]], size: int, layer_1: float) -> list[list[int]]:
    """Sentences under the threshold first, then the best that do not repeat one of them."""
    found: list[list[int]] = []
    for sure in (True, False):
        for score, row in scored:
            if len(found) == size:
                return found
            alike = any(
                sum(a == b for a, b in zip(row, other, strict=False)) >= DISTINCT * min(len(row), len(other))
                for other in found
            )
            if (score < layer_1) == sure and not (row in found if sure else alike):
                found.append(row)
    return found


def _decoder(attack: TwoLayer, places: list[list[int]], layer_1: float) -> list[list[int]]:
    """Sentences grown token by token: kept is what layer 1 does not refuse; a sentence ends where nothing is kept."""
    live: list[tuple[float, list[int]]] = [(0.0, [])]
    ended: list[tuple[float, list[int]]] = []
    for place in places:
        grown = []
        for score, row in live:
            rows = [[*row, token] for token in place]
            distance = attack.distances(1, torch.tensor(rows))[:, -1].tolist()
            kept = [(max(score, d), r) for d, r in zip(distance, rows, strict=True) if d < layer_1]
            if not kept and row:
                ended.append((score, row))
            grown += kept
        live = grown
    return [row for _, row in sorted(ended + live)[: attack.size]]


def _noisy_decoder(attack: TwoLayer, length: int) -> list[list[int]]:
    """The published rules for noised gradients."""
    odds = lambda d: d.clamp(1e-12, 1 - 1e-6).logit()  # noqa: E731
    most = max(50 * attack.size, len(attack.vocabulary) // 20)
    both = torch.stack([attack.distances(layer, attack.vocabulary[:, None])[:, 0] for layer in (0, 1)])
    score = odds(both).mean(0)
    best = score.argsort()[:most]
    best = best[(score[best] - score.mean()) / score.std() < -5]
    if not len(best):
        return []
    live = [[token] for token in best[: attack.size].tolist()]
    for place in range(1, length):
        near = attack.tokens(place).argsort()[:most].tolist()
        rows = torch.tensor([[*row, token] for row in live for token in near])
        distance = torch.cat([attack.continued(row, torch.tensor(near)) for row in live])
        live = rows[distance.argsort()[: attack.size]].tolist()
    return live


def _noisy_encoder(attack: TwoLayer, length: int, frame) -> list[list[int]]:
    """One sentence: the best token of every position, then what lowers layer 1's mean distance."""
    first, last = len(frame.first), length - len(frame.last)
    near = {place: attack.tokens(place).argsort()[:WIDTH] for place in range(first, last)}
    row = torch.tensor([*frame.first, *(int(near[p][0]) for p in range(first, last)), *frame.last])
    best = float(attack.distances(1, row[None]).mean())
    better = True
    while better:
        better = False
        for place in range(first, last):
            rows = row.repeat(len(near[place]), 1)
            rows[:, place] = near[place]
            scores = attack.distances(1, rows).mean(1)
            if float(scores.min()) < best - 1e-7:
                best, row, better = float(scores.min()), rows[int(scores.argmin())], True
    return [row.tolist()]
