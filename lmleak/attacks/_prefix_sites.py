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

    @property
    def first(self) -> bool:
        """Whether it reads layer 0's attention input: single tokens, no prefixes."""
        return self.layer == 0 and READS[self.entries[0].component or ""] == "attention"

    @property
    def query(self) -> Entry | None:
        """The entry that holds the query's gradient."""
        return next((e for e in self.entries if e.component in ("attn_query", "attn_qkv")), None)


def sites(victim: Victim, observation: Observation) -> list[Site] | str:
    """Every observed site whose inputs carry gradient, the cheapest forward first, or why there is none."""
    groups: dict[tuple[int, str], list[Entry]] = defaultdict(list)
    for entry in weights(observation):
        if entry.layer is not None and entry.component in READS:
            groups[entry.layer, READS[entry.component]].append(entry)
    if not groups:
        return "needs the weight gradient of a linear module inside a block"
    depth = Tree(victim.module, victim.family).depth
    out = []
    for layer, reads in sorted(groups, key=lambda place: (place[0], STAGES.index(place[1]))):
        entries = groups[layer, reads]
        if observation.task != "causal-lm" and layer == depth - 1:
            # The loss reads the last token only: behind the last attention the others carry no gradient.
            entries = [e for e in entries if e.component in ("attn_key", "attn_value", "attn_qkv")]
        if entries:
            lead = sorted(entries, key=lambda e: ("attn_value", "attn_qkv").count(e.component or "") == 0)
            out.append(Site(lead[0].module, tuple(lead), layer, _kind(entries, rotary(victim))))
    if not out:
        return (
            "in a classifier's last block only the pooled token carries loss behind the attention: the gradient has "
            "one row a sentence, and no prefix of it can be tested"
        )
    return out


def rotary(victim: Victim) -> bool:
    """Whether positions enter inside the attention."""
    return any("rotary" in name for name, _ in victim.module.named_modules())


def site(victim: Victim, observation: Observation) -> Site | str:
    """The observed site that shows most at the least cost, or why there is none."""
    usable = sites(victim, observation)
    if isinstance(usable, str):
        return usable
    ranking = {"all": 0, "but_first": 1, "differences": 1}
    # Layer 0's query, key and value read single tokens: with several sentences prefixes are better tested elsewhere.
    turned = rotary(victim)
    single = observation.batch_size == 1 and not turned
    best = min(usable, key=lambda u: (ranking[u.kind], u.first and not single))
    if turned and best.first:
        return "layer 0 of this family reads no position: its row space holds the words, not their order (see span)"
    if best.first and not single and best.query is None and best.kind != "differences":
        return (
            "layer 0's value reads single tokens, and nothing in its gradient says which sentence they belong to: see "
            "span for each position's set"
        )
    return best


def _kind(entries: list[Entry], rotary: bool) -> Literal["all", "but_first", "differences"]:
    """Query: position 0 attends to itself alone, its gradient is zero. Key: softmax does not see a common shift, so its
    output gradients sum to zero over a sentence (not where each position turns its own before the product)."""
    components = {e.component for e in entries}
    if components == {"attn_query"}:
        return "but_first"
    if components == {"attn_key"} and not rotary:
        return "differences"
    return "all"
