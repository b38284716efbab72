"""How well a sentence explains gradients that noise or rounding has touched: profile likelihood, no rank, no threshold.

The output gradients are unknown, so the best of them are assumed: what inputs X leave of a gradient G is then
|G|^2 - |G Q|^2, Q an orthonormal basis of X's rows. For the true sentence that is the noise outside X, whose size is
known: from the spectrum's tail (Gaussian noise), or from the number format (rounding). No label, no backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmleak.attacks._energy import Energy, Site, of_tokens
from lmleak.attacks._evidence import noise_level
from lmleak.attacks._rowspace import RowSpace, matrix
from lmleak.models._input import InputLayer
from lmleak.records import Entry, Observation, Victim

SURE = 5.0  #: standard deviations of the noise's energy: beyond it, a sentence has left something unexplained
LEAN = 32  #: directions below the noise that are kept: weak rows lean towards its largest
DRAWS = 3  #: of rounding noise; the largest singular value of them is where directions begin to speak


@dataclass(frozen=True)
class Noised:
    """One observed weight gradient [o, d] and what is known of its noise."""

    site: Site  #: the directions that rise above the noise, for descents
    gradient: Tensor  #: [o, d] float64
    strong: Tensor  #: [r + LEAN, d] float32, leading right vectors times singular values over the noise's deviation
    rest: float  #: what every other direction holds of the gradient's energy, over the noise variance
    total: float  #: |G|^2 over the noise variance
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
    if observed.dtype in (torch.float16, torch.bfloat16):
        step = _step(observed)
        rounding = step.square() / 12
        draw = torch.Generator().manual_seed(0)
        errors = [
            (torch.rand(g.shape, generator=draw, dtype=torch.float64).to(g.device) - 0.5) * step for _ in range(DRAWS)
        ]
        top = max(float(torch.linalg.matrix_norm(e, 2)) for e in errors)
        above = int((energy > top**2).sum())
        # The tail of rounded numbers is no plain noise: it speaks only where it is larger than rounding explains.
        if float(energy[above:].sum()) < 2 * float(rounding.sum()):
            columns, rank = rounding.sum(0), above
            spread = float((2 * rounding.square().sum()).sqrt())
    basis = right[:rank]
    gap = float((energy[rank - 1] / energy[rank].clamp_min(1e-300)).sqrt()) if 0 < rank < len(energy) else 1.0
    space = RowSpace(basis, energy.sqrt(), gap)
    site = Site(entry, space, basis.float(), entry.component == "attn_key")
    scale = max(float(columns.mean()) / len(g), 1e-300)
    kept = min(rank + LEAN, len(energy))
    rest = float(energy[kept:].mean()) / scale if kept < len(energy) else 0.0
    strong = right[:kept] * ((energy[:kept] / scale - rest).clamp_min(0).sqrt())[:, None]
    return Noised(site, g, strong.float(), rest, float(energy.sum()) / scale, columns, spread)


def _step(values: Tensor) -> Tensor:
    """Distance to the next number of the format, float64."""
    kind = torch.finfo(values.dtype)
    exponent = torch.frexp(values.double().abs().clamp_min(kind.tiny)).exponent - 1
    return torch.ldexp(torch.full_like(values, kind.eps, dtype=torch.float64), exponent)


class Likelihood:
    """Drop-in for `Energy`: half of -2 log p of the gradients, up to a constant, lowest for the true sentence.

    To be used while `energy` is attached, which also gives the landscape that descents of embeddings need.
    """

    def __init__(self, energy: Energy, parts: Sequence[Noised]):
        self.inner, self.parts = energy, tuple(parts)
        self.table, self.tally = energy.table, energy.tally

    def __call__(self, embeds: Tensor, ridge: float | Tensor) -> tuple[Tensor, Tensor]:
        """Nats [k] that the sentences leave, over those of noise; and by position [k, n] what its absence would add."""
        total, worth = embeds.new_zeros(len(embeds)), embeds.new_zeros(embeds.shape[:2])
        for one, x in zip(self.parts, self.inner.inputs(embeds), strict=True):
            x = torch.nn.functional.normalize(one.site.rows(x), dim=-1)
            n = x.shape[1]
            eye = torch.eye(n, device=x.device)
            inverse = torch.linalg.inv(
                x @ x.mT + (ridge.reshape(-1, 1, 1) if isinstance(ridge, Tensor) else ridge) * eye
            )
            seen = x @ one.strong.T
            # X G^T G X^T; all but the leading directions are taken for equally strong.
            shared = seen @ seen.mT + one.rest * x @ x.mT
            explained = (inverse * shared).sum((1, 2))
            total = total + 0.5 * (one.total - explained)
            # Removing row i gives back (inverse shared inverse)_ii / inverse_ii of what is explained.
            part = (inverse @ shared @ inverse).diagonal(dim1=1, dim2=2) / inverse.diagonal(dim1=1, dim2=2)
            worth = worth - 0.5 * part
        return total, worth

    @torch.no_grad()
    def verdict(self, tokens: Tensor) -> float:
        """How far a sentence [n] is from being the one: below 1 it explains the gradients and its neighbours do not.

        The larger of two: what it leaves above the expected noise, in units of `SURE` standard deviations; and the
        odds that a search among all single words may win by chance, over those against the closest neighbour tried,
        in nats. A neighbour has one word exchanged for its nearest in the table, or for the one in the middle.
        """
        above, spread = 0.0, 0.0
        for one, x in zip(self.parts, self.inner.inputs(self.table[tokens][None]), strict=True):
            rows = one.site.rows(x[0].double())
            _, values, right = torch.linalg.svd(rows, full_matrices=False)
            span = right[values > float(values[0]) * torch.finfo(torch.float32).eps]
            left = float((one.gradient - one.gradient @ span.T @ span).square().sum())
            expected = float((one.columns * (1 - span.square().sum(0)).clamp_min(0)).sum())
            above += (left - expected) / one.variance
            spread += (one.spread / one.variance) ** 2
        limit = SURE * spread**0.5
        if above >= limit:
            return above / limit
        here, *others = of_tokens(self, torch.cat([tokens[None], self._neighbours(tokens)]), 1e-4).tolist()
        chance = math.log(len(tokens) * len(self.table)) + SURE
        return max(above / limit, chance / max(min(others) - here, 1e-9))

    def _neighbours(self, tokens: Tensor) -> Tensor:
        """The sentence with each word in turn exchanged for its nearest, and for the one in the middle, [2 n, n]."""
        table = torch.nn.functional.normalize(self.table, dim=-1)
        ranked = (table[tokens] @ table.T).argsort(-1, descending=True)
        out = tokens.repeat(2 * len(tokens), 1)
        for i in range(len(tokens)):
            out[2 * i, i], out[2 * i + 1, i] = ranked[i, 1], ranked[i, ranked.shape[1] // 2]
        return out


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
