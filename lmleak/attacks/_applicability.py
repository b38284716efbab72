"""What an observed module's gradient can show, and why not: one record, for attacks and for `lmleak modules --observe`.

The weight gradient of a linear module is a sum of (output gradient, input) products, one a token, so its rank counts
the inputs that carry gradient. Which those are follows from the architecture, the loss and the module's place alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lmleak import registry
from lmleak.attacks._batch_energy import batch_space
from lmleak.attacks._rowspace import GAP, RowSpace, dropped_out, matrix, row_space
from lmleak.gradients._tree import Tree
from lmleak.records import Entry, Observation, Status, Victim

ATTENTION = ("attn_query", "attn_key", "attn_value", "attn_qkv")
COMPONENTS = (*ATTENTION, "attn_output", "ffn_in", "ffn_out")  #: linear modules of a block
LEADING = 64  #: values of the spectrum that are kept for show

Rows = Literal["inputs", "differences", "table", "none"]


@dataclass(frozen=True)
class Reading:
    """One observed module (or several that read the same input): what its gradient shows, or why it shows nothing."""

    entries: tuple[Entry, ...]
    space: RowSpace
    rows: Rows  #: inputs of the module, their differences within a sentence, rows of a table, or nothing
    tokens: int | None  #: of the whole batch, special ones included, that the rank speaks for; None: it cannot be told
    shows: str  #: in words
    status: Status  #: ok, not_applicable or no_signal
    reason: str | None  #: why not; None where status is ok

    @property
    def spectrum(self) -> tuple[float, ...]:
        """Leading singular values, one behind the rank at least."""
        return tuple(self.space.spectrum[: max(LEADING, self.space.rank + 1)].tolist())

    @property
    def rank(self) -> int:
        """Independent rows that carry gradient; 0 where the spectrum has no edge."""
        return self.space.rank


def read(victim: Victim, observation: Observation, entries: Entry | Sequence[Entry]) -> Reading:
    """Reads one observed module, or several that share their input.

    Args:
        victim: the public model.
        observation: what was released; only its public facts and the entries' own gradients are used.
        entries: of one module, or of modules that read the same input (query, key and value of a block).
    """
    own = (entries,) if isinstance(entries, Entry) else tuple(entries)
    owner = victim.module.get_submodule(own[0].module)
    if any(len(e.shape) < 2 for e in own):
        what = "a bias shows the sum of the output gradients" if own[0].name.endswith("bias") else "element-wise"
        return _nothing(own, f"{what}: no inputs", "not_applicable")
    if isinstance(owner, nn.Embedding):
        return _table(own, observation.gradients[own[0].name])
    space = _space([matrix(victim.module, e, observation.gradients[e.name]) for e in own], observation.batch_size)
    if dropped_out(victim, observation):
        why = "dropout is on in the client: the row space is that of dropped-out inputs"
        return Reading(own, space, "none", None, "", "not_applicable", why)
    if not space.rank:
        return Reading(own, space, "none", None, "", "no_signal", _blank(space, own, observation))
    return _place(victim, observation, own, space)


def read_all(victim: Victim, observation: Observation) -> list[Reading]:
    """One reading for every observed tensor, in the observation's order."""
    return [read(victim, observation, entry) for entry in observation.entries]


def readers(one: Reading, victim: Victim, observation: Observation) -> tuple[str, ...]:
    """Kinds of attacks that can read it exactly. Gradient matching can be tried on any gradient and is not listed.

    A kind says so itself by a function `reads(reading, victim, observation) -> bool`, which is asked about readings of
    every status.
    """
    found = []
    for kind in registry.kinds("attacks"):
        module = registry.load("attacks", kind)
        if observation.task == "image-classification" and not hasattr(module, "IMAGES"):
            continue
        rule = getattr(module, "reads", None)
        if rule is not None and rule(one, victim, observation):
            found.append(kind)
    return tuple(found)


def _space(gradients: list[Tensor], batch_size: int) -> RowSpace:
    space = row_space(gradients)
    half = max((torch.finfo(g.dtype).eps for g in gradients), default=0.0)
    values = space.spectrum
    if space.rank and values[space.rank - 1] < half**2 * values[0]:
        # An edge far below the rounding of half precision: where products underflow, not where the inputs end.
        steps = values[:-1] / values[1:].clamp_min(values[0] * 1e-13)
        steps = steps[values[:-1] >= half**2 * values[0]]
        edges = (steps >= GAP).nonzero().flatten()
        rank = int(edges[-1]) + 1 if len(edges) else 0
        space = RowSpace(space.basis[:rank], values, float(steps[rank - 1] if rank else steps.max()))
    if space.rank or space.zero or batch_size == 1:
        return space
    # Sentences of very different gradients leave a smaller step at the edge.
    return batch_space(gradients)


def _blank(space: RowSpace, own: tuple[Entry, ...], observation: Observation) -> str:
    """Why a spectrum has no edge, as far as what is public says."""
    if space.zero:
        return "the observed gradient is zero"
    values = space.spectrum
    floor = float(values[len(values) // 2] / values[0])
    step = f"its spectrum has no edge (largest step {space.gap:.1f})"
    bits = {observation.gradients[e.name].dtype for e in own}
    if observation.defense.get("kind", "none") != "none":
        return f"{step}: what {observation.defense['kind']} left fills it from {floor:.1g} of its first value down"
    if bits & {torch.bfloat16, torch.float16}:
        kind = " and ".join(sorted(str(b).removeprefix("torch.") for b in bits))
        return f"{step}: rounding to {kind} fills it from {floor:.1g} of its first value down"
    width = min(sum(e.numel for e in own) // values.shape[0], values.shape[0])
    return f"{step}: noise, or as many tokens as dimensions ({width})"


def _place(victim: Victim, observation: Observation, own: tuple[Entry, ...], space: RowSpace) -> Reading:
    """What the rank counts at this place of the model."""
    components = {e.component for e in own}
    layer, size = own[0].layer, observation.batch_size
    rank, causal = space.rank, bool(getattr(victim.family, "CAUSAL", False))
    if layer is None or not components <= set(COMPONENTS):
        why = f"behind the blocks: rows for {_carrier(observation)} only (rank {rank}), and no attack reads them"
        return Reading(own, space, "inputs", None, _carrier(observation), "not_applicable", why)
    # Softmax does not see a common shift, so a sentence's output gradients sum to zero. Rotation breaks that.
    rotary = any("rotary" in name for name, _ in victim.module.named_modules())
    differences = components == {"attn_key"} and not rotary
    depth = Tree(victim.module, victim.family).depth
    if layer == depth - 1 and observation.task != "causal-lm":
        cut = _last(victim, observation, components, rank)
        if cut:
            return Reading(own, space, "differences" if differences else "inputs", None, *cut)
    without = []  # positions of each sentence that leave no row
    if causal and components == {"attn_query"}:
        without.append("the first")  # it attends to itself alone, whatever its query is
    if observation.task == "causal-lm":
        without.append("the last")  # nothing is predicted from it
    shows = "every token" + (f" but {' and '.join(without)}" if without else "")
    if differences:
        shows += ", as differences"
    tokens = rank + size * (len(without) + differences)
    return Reading(own, space, "differences" if differences else "inputs", tokens, shows, "ok", None)


def _carrier(observation: Observation) -> str:
    return {"sequence-classification": "the pooled position", "masked-lm": "the masked positions"}.get(
        observation.task, "the positions that carry loss"
    )


def _last(
    victim: Victim, observation: Observation, components: set[str | None], rank: int
) -> tuple[str, Status, str] | None:
    """What the last block of a model shows whose loss does not read every position, and why that is too little."""
    carrier, heads = _carrier(observation), victim.module.config.num_attention_heads
    if not components & {"attn_key", "attn_value", "attn_qkv"}:
        why = f"the last layer: behind its attention only {carrier} can carry loss (rank {rank})"
        return carrier, "not_applicable", why
    # A position that carries loss attends once a head, so delta has one direction a head, for key and for value, beside
    # its own query.
    limit = 2 * heads + 1 if "attn_qkv" in components or {"attn_key", "attn_value"} <= components else heads
    if observation.task == "sequence-classification" and rank < limit:
        return None
    mixed = f"{rank} mixtures of tokens"
    why = f"the last layer: {carrier} read it once a head, so at most {limit} directions for each (rank {rank})"
    return mixed, "not_applicable", f"{why.replace('position read', 'position reads')}; what they mix cannot be told"


def _table(own: tuple[Entry, ...], gradient: Tensor) -> Reading:
    """An embedding: its rows are tokens (or positions), and those that moved are shown outright."""
    norms = gradient.double().norm(dim=1)
    values = norms[norms > 0].sort(descending=True).values
    space = RowSpace(gradient.new_zeros(0, gradient.shape[1], dtype=torch.float64), values, 1.0)
    if not len(values):
        return Reading(own, space, "table", 0, "", "no_signal", "the observed gradient is zero")
    if len(values) == len(norms) > 4:
        why = "every row of the table moved: noise, or a table tied to the output layer"
        return Reading(own, space, "table", None, "", "no_signal", why)
    return Reading(own, space, "table", len(values), f"{len(values)} of {len(norms)} rows of the table", "ok", None)


def _nothing(own: tuple[Entry, ...], why: str, status: Status) -> Reading:
    empty = torch.zeros(0, dtype=torch.float64)
    return Reading(own, RowSpace(torch.zeros(0, 1, dtype=torch.float64), empty, 1.0), "none", None, "", status, why)
