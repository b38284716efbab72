"""What is known of a weight gradient that noise or rounding has touched: how large the noise is, what rises above it.

The noise's size follows from the spectrum's tail (Gaussian noise) or from the number format (rounding). How well a
sentence explains such gradients: `_energy_marginal.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmleak.attacks._energy import Site
from lmleak.attacks._evidence import noise_level, rounding
from lmleak.attacks._rowspace import RowSpace, matrix
from lmleak.models._input import InputLayer
from lmleak.records import Entry, Observation, Victim


@dataclass(frozen=True)
class Noised:
    """One observed weight gradient [o, d] and what is known of its noise."""

    site: Site  #: the directions that rise above the noise, for descents
    gradient: Tensor  #: [o, d] float64
    columns: Tensor  #: [d] float64, expected energy of the noise in every column
    spread: float  #: standard deviation of the noise's energy

    @property
    def variance(self) -> float:
        """Of the noise, mean over the entries."""
        return float(self.columns.mean()) / len(self.gradient)


def noised(victim: Victim, observation: Observation, entry: Entry) -> Noised:
    """Reads one observed weight matrix; the number format says how it was rounded, the spectrum how it was noised."""
    observed = matrix(victim.module, entry, observation.gradients[entry.name])
    g = observed.double()
    energy, right = torch.linalg.eigh(g.T @ g)
    energy, right = energy.flip(0).clamp_min(0), right.flip(1).T
    variance, rank = noise_level(energy, *g.shape)
    columns = torch.full((g.shape[1],), variance * g.shape[0], dtype=torch.float64, device=g.device)
    spread = variance * (2.0 * g.numel()) ** 0.5
    coarse = rounding(observed)
    if coarse is not None:
        columns, spread, rank = coarse.columns, coarse.spread, coarse.rank
    basis = right[:rank]
    gap = float((energy[rank - 1] / energy[rank].clamp_min(1e-300)).sqrt()) if 0 < rank < len(energy) else 1.0
    space = RowSpace(basis, energy.sqrt(), gap)
    site = Site(entry, space, basis.float(), entry.component == "attn_key")
    return Noised(site, g, columns, spread)


def lengths(parts: Sequence[Noised], layer: InputLayer | None, last: int | None, most: int) -> list[int]:
    """Lengths worth trying, likeliest first: layer 0 tells where the last token stands, else directions are counted."""
    least = max(one.site.tokens for one in parts)
    first = [
        one for one in parts if one.site.entry.layer == 0 and one.site.entry.component in ("attn_query", "attn_value")
    ]
    if layer is None or layer.position is None or last is None or not first:
        return list(range(least, min(most, least + 4) + 1))
    places = torch.arange(most, device=layer.word.device)
    rows = layer.rows(torch.full_like(places, last), places, dtype=torch.float64)
    clearest = max(first, key=lambda one: one.site.space.rank).site.space
    ranked = (clearest.residual(rows).argsort() + 1).tolist()
    return [n for n in ranked if n >= least][:4]
