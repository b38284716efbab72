"""What a weight gradient reveals outright: its rank, and the space its module's inputs lie in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lmleak.errors import ModelError
from lmleak.models._input import InputLayer
from lmleak.records import Entry, Observation, Victim

# The rank ends where the spectrum falls by at least this factor. MiniLM, 30 sentences, 6 components, 6 layers, float32
# gradients: the true edge falls by 3e4 to 2e8, no step inside the spectrum by more than 6.6, none of the rounding tail
# by more than 6.3. Pure noise has no step above 2.
GAP = 100.0


@dataclass(frozen=True)
class RowSpace:
    """Span of a module's inputs, from the float64 spectrum of its weight gradient."""

    basis: Tensor  #: [r, d] float64, orthonormal
    spectrum: Tensor  #: leading singular values, float64, at least r + 1 of them unless the rank is full
    gap: float  #: factor by which the spectrum falls behind the r-th value; 1 where it never falls

    @property
    def rank(self) -> int:
        """Number of independent inputs that carry gradient; 0 if the spectrum has no edge."""
        return self.basis.shape[0]

    @property
    def zero(self) -> bool:
        """Whether the gradient is zero."""
        return not len(self.spectrum) or float(self.spectrum[0]) == 0

    @property
    def unreadable(self) -> str | None:
        """Why nothing can be read here, or None."""
        if self.zero:
            return "the observed gradient is zero"
        if not self.rank:
            return f"its spectrum has no edge (largest step {self.gap:.1f}): noise, or as many tokens as dimensions"
        return None

    def residual(self, x: Tensor) -> Tensor:
        """Share of |x| outside the space, 0..1, [...]; x [..., d] is taken in float64 (1 - |Bx|^2 would lose half)."""
        x = x.double()
        outside = x - (x @ self.basis.T) @ self.basis
        length = x.norm(dim=-1)
        # The zero vector lies in every space and shows nothing: a padding row where no position is added to it.
        return torch.where(length > 0, outside.norm(dim=-1) / length.clamp_min(1e-300), 1.0)


def matrix(module: nn.Module, entry: Entry, gradient: Tensor) -> Tensor:
    """The entry's gradient as [d_out, d_in] whatever the layer's layout: Conv1D transposed, kernels flattened."""
    owner = module.get_submodule(entry.module)
    return gradient.T if isinstance(owner, Conv1D) else gradient.flatten(1)


def row_space(gradients: Sequence[Tensor]) -> RowSpace:
    """Row space of one or more weight gradients [*, d] of modules that read the same input.

    Each gradient is scaled to norm 1 first: a value gradient can be a hundred times its query's, and would hide it.
    """
    stacked = torch.cat([g.double() / g.double().norm().clamp_min(1e-300) for g in gradients])
    values, basis = _spectrum(stacked)
    if not len(values) or values[0] == 0:
        return RowSpace(basis[:0], values, 1.0)
    # Square noise matrices end in a few arbitrarily small values, so the last tenth cannot be an edge.
    steps = _steps(values)[: max(1, int(0.9 * min(stacked.shape)))]
    edges = (steps >= GAP).nonzero().flatten()
    # The last edge: a random BERT's first value stands up to 200 times above its second, far from the rank.
    rank = int(edges[-1]) + 1 if len(edges) else 0
    return RowSpace(basis[:rank], values, float(steps[rank - 1] if rank else steps.max()))


def _steps(values: Tensor) -> Tensor:
    # Float64 rounding ends near 1e-16; a fall from there to an exact 0 is no edge.
    return values[:-1] / values[1:].clamp_min(values[0] * 1e-13)


def _spectrum(stacked: Tensor) -> tuple[Tensor, Tensor]:
    """Leading singular values and right vectors. A range finder (Halko et al. 2011, 0909.4061) that doubles until the
    spectrum's edge lies inside it: 20 times cheaper than the full decomposition for a 16-token sentence at d = 384."""
    rows, d = stacked.shape
    width = 64
    # A generator of its own, at a fixed seed: the sketch's directions do not matter, only that they are generic.
    draw = torch.Generator().manual_seed(0)
    while 2 * width < min(rows, d):
        sketch = torch.randn(width, rows, generator=draw, dtype=torch.float64).to(stacked.device) @ stacked
        frame = torch.linalg.qr(sketch.T).Q  # [d, width]
        _, values, right = torch.linalg.svd(stacked @ frame, full_matrices=False)
        # A fall to float32's rounding, in the sketch's first half, is the last: nothing of the gradient lies behind it.
        edges = (_steps(values[: width // 2]) >= GAP).nonzero().flatten()
        if values[0] == 0 or (len(edges) and values[int(edges[-1]) + 1] < 1e-5 * values[0]):
            return values, right @ frame.T
        width *= 2
    _, values, right = torch.linalg.svd(stacked, full_matrices=False)
    return values, right


def dropped_out(victim: Victim, observation: Observation) -> bool:
    """Whether the client trained with dropout on: the row space is then that of inputs nobody can compute."""
    return observation.mode == "train" and any(isinstance(m, nn.Dropout) and m.p > 0 for m in victim.module.modules())


def known_input(victim: Victim) -> InputLayer | None:
    """What layer 0's query, key and value read, where the family's file knows it in closed form."""
    try:
        return victim.family.input_layer(victim.module)
    except (AttributeError, ModelError):
        return None


def weights(observation: Observation, **where: object) -> tuple[Entry, ...]:
    """Observed weight matrices whose entry fields equal `where`; a tuple means any of its values."""
    matches = lambda entry, key, wanted: getattr(entry, key) in (wanted if isinstance(wanted, tuple) else (wanted,))  # noqa: E731
    return tuple(
        entry
        for entry in observation.entries
        if len(entry.shape) >= 2 and all(matches(entry, key, wanted) for key, wanted in where.items())
    )


def describe(space: RowSpace) -> dict[str, float | int]:
    """For Reconstruction.details."""
    return {"rank": space.rank, "gap": round(space.gap, 3)}
