"""Which observed module of a decoder to test prefixes at, what its row space holds, and why some hold too little."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

from lmleak.attacks._rowspace import weights
from lmleak.gradients._tree import Tree
from lmleak.records import Entry, Observation, Victim

READS = {
    "attn_query": "attention", "attn_key": "attention", "attn_value": "attention", "attn_qkv": "attention",
    "attn_output": "attn_output", "ffn_in": "ffn_in", "ffn_out": "ffn_out",
}  # fmt: skip
#: From the cheapest forward to the dearest within a block.
STAGES = ("attention", "attn_output", "ffn_in", "ffn_out")


@dataclass(frozen=True)
class Site:
    """Weight gradients of modules that read the same input."""

    module: str  #: dotted name of the one where the forward stops
    entries: tuple[Entry, ...]
    layer: int
    kind: Literal["all", "but_first", "differences"]


def site(victim: Victim, observation: Observation) -> Site | str:
    """The observed site that shows most at the least cost, or why there is none."""
    groups: dict[tuple[int, str], list[Entry]] = defaultdict(list)
    for entry in weights(observation):
        if entry.layer is not None and entry.component in READS:
            groups[entry.layer, READS[entry.component]].append(entry)
    if not groups:
        return "needs the weight gradient of a linear module inside a block"
    depth = Tree(victim.module, victim.family).depth
    rotary = any("rotary" in name for name, _ in victim.module.named_modules())
    usable = []
    for (layer, reads), entries in groups.items():
        if observation.task != "causal-lm" and layer == depth - 1:
            # The loss reads the last token only: behind the last attention the others carry no gradient.
            entries = [e for e in entries if e.component in ("attn_key", "attn_value", "attn_qkv")]
        if not entries:
            continue
        usable.append((_kind(entries, rotary), layer, STAGES.index(reads), entries))
    if not usable:
        return (
            "in a classifier's last block only the pooled token carries loss behind the attention: the gradient has "
            "one row a sentence, and no prefix of it can be tested"
        )
    ranking = {"all": 0, "but_first": 1, "differences": 1}
    # Layer 0's query, key and value read single tokens, so with several sentences they cannot tell whose a token is.
    single = observation.batch_size == 1 and not rotary
    usable.sort(key=lambda u: (ranking[u[0]], u[1] == u[2] == 0 and not single, u[1], u[2]))
    kind, layer, stage, entries = usable[0]
    if rotary and layer == 0 and stage == 0:
        return "layer 0 of this family reads no position: its row space holds the words, not their order (see span)"
    if layer == 0 and stage == 0 and not single:
        return (
            "layer 0's query, key and value read single tokens: with several sentences see span for each position's set"
        )
    lead = sorted(entries, key=lambda e: ("attn_value", "attn_qkv").count(e.component or "") == 0)
    return Site(lead[0].module, tuple(lead), layer, kind)


def _kind(entries: list[Entry], rotary: bool) -> Literal["all", "but_first", "differences"]:
    """Query: position 0 attends to itself alone, its gradient is zero. Key: softmax does not see a common shift, so its
    output gradients sum to zero over a sentence (not where each position turns its own before the product)."""
    components = {e.component for e in entries}
    if components == {"attn_query"}:
        return "but_first"
    if components == {"attn_key"} and not rotary:
        return "differences"
    return "all"
