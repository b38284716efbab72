"""The frozen records that cross rooms. Nothing here computes; torch is imported for type checkers only.

Shapes: `b` batch, `s` sequence, `d` hidden, `v` vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

Status = Literal["ok", "not_applicable", "no_signal", "budget_exhausted", "failed"]


@dataclass(frozen=True)
class Victim:
    """A model whose gradients leave the machine. The attacker knows all of it: weights, tokenizer, mode."""

    module: Any  #: torch.nn.Module; Any, because its submodules and config are reached by attribute
    processor: Any  #: tokenizer (text) or image processor
    family: ModuleType  #: the file of `lmleak.models` that knows this architecture's names
    kind: str
    task: str  #: sequence-classification, causal-lm, masked-lm, image-classification
    weights: str  #: what the recipe asked for, with the digest of what was loaded
    mode: Literal["eval", "train"] = "eval"  #: the client's mode; train means dropout is on


@dataclass(frozen=True)
class Batch:
    """One client batch: the private data. No attack may reach it."""

    inputs: Mapping[str, torch.Tensor]  #: keyword arguments of the model's forward, e.g. input_ids [b, s]
    labels: torch.Tensor  #: [b] classes, or [b, s] token labels with -100 where there is no loss
    reference: Reference
    index: int = 0  #: position of this batch in the data source's order
    texts: tuple[str, ...] = ()  #: as the source has them; a tokenizer may drop their case


@dataclass(frozen=True)
class Reference:
    """The truth a metric compares with: special tokens and padding removed."""

    tokens: tuple[tuple[int, ...], ...] = ()
    texts: tuple[str, ...] = ()
    images: Any = None  #: [b, c, y, x] in [0, 1]
    labels: tuple[int, ...] = ()


@dataclass(frozen=True)
class Entry:
    """One observed tensor: a parameter, or the slice of a fused parameter that one component owns."""

    name: str  #: key in an Observation: the parameter's name, with `[attn_query]` behind it for a slice
    parameter: str  #: dotted parameter name
    module: str  #: dotted module name
    shape: tuple[int, ...]  #: of the slice, in the parameter's own layout
    layer: int | None = None  #: block index
    component: str | None = None
    part: tuple[int, int, int] | None = None  #: (dimension of the parameter, start, stop), None for the whole

    @property
    def numel(self) -> int:
        """Number of observed values."""
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True)
class Selection:
    """Resolved names: what leaves the machine."""

    entries: tuple[Entry, ...]
    total: int  #: parameters of the whole model, tied ones once

    @property
    def numel(self) -> int:
        """Number of observed values."""
        return sum(entry.numel for entry in self.entries)

    @property
    def share(self) -> float:
        """Observed share of the model's parameters, 0..1."""
        return self.numel / self.total


@dataclass(frozen=True)
class Observation:
    """What the attacker sees: released gradients and the public facts about the release. See `gradients.files`."""

    gradients: Mapping[str, torch.Tensor]  #: entry name -> tensor of the entry's shape
    entries: tuple[Entry, ...]
    batch_size: int
    task: str
    reduction: Literal["mean", "sum"]  #: how per-sample gradients were combined
    mode: Literal["eval", "train"] = "eval"
    defense: Mapping[str, Any] = field(default_factory=lambda: {"kind": "none"})  #: public: mechanism and parameters
    privacy: Mapping[str, Any] | None = None  #: epsilon, delta, ... of this release; None where no guarantee exists


@dataclass(frozen=True)
class Knowledge:
    """What the threat model grants beyond weights, tokenizer and batch size. None means not granted."""

    labels: tuple[int, ...] | None = None
    lengths: tuple[int, ...] | None = None  #: tokens a sample, special tokens included
    special_tokens: bool = True  #: the attacker knows how the tokenizer wraps a sentence
    #: mean and variance of the batch in front of each BatchNorm layer, by its dotted name
    bn_statistics: Mapping[str, tuple[torch.Tensor, torch.Tensor]] | None = None


@dataclass(frozen=True)
class Reconstruction:
    """What an attack returns. `status` other than ok comes with a reason and is never scored as an answer."""

    tokens: tuple[tuple[int, ...], ...] = ()  #: special tokens removed
    texts: tuple[str, ...] = ()
    images: Any = None  #: [b, c, y, x] in [0, 1]
    labels: tuple[int, ...] = ()
    confidence: tuple[float, ...] = ()  #: the attack's own, 0..1, one a sequence; 1 = certain
    status: Status = "ok"
    reason: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)  #: JSON-serialisable: rank, residual, objective, steps


@dataclass(frozen=True)
class Measurement:
    """What one measure says about one batch's release, without any attack. Known to the client's side alone."""

    rows: Mapping[str, Mapping[str, float | None]]  #: observed module -> value -> number; `*` is all that is observed
    reason: str | None = None  #: why there are no rows
    details: Mapping[str, Any] = field(default_factory=dict)  #: JSON-serialisable: one number a token, ...


@dataclass(frozen=True)
class Score:
    """A metric over batches: mean with a 95 % bootstrap interval (None below two batches)."""

    mean: float
    low: float | None
    high: float | None
    n: int
