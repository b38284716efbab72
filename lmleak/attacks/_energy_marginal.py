"""How well a sentence explains gradients that noise has touched: likelihood with the output gradients averaged out.

Assuming the best output gradients gives a row as many free numbers as its module has outputs, and noise fills them: a
row too weak to be seen gains some hundred nats, give or take a dozen, whatever its word. Here a row's output gradient
is Gaussian of a strength of its own, which is fitted: one number a row (automatic relevance determination, Tipping
2001; Faul and Tipping 2003), and weak rows are worth next to nothing. Sentences of several lengths may be compared, and
a difference in nats is what it says. MiniLM, layer 0 alone, 30 tokens, noise 5e-4, truth against 199 words at every
third place: first at 10 of 10 places; with the best output gradients at 7.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lmleak.attacks._energy import Energy
from lmleak.attacks._energy_likelihood import Noised
from lmleak.attacks._evidence import edge

SURE = 5.0  #: standard deviations of the noise's energy: beyond it, a sentence has left something unexplained
GRAIN = 1e-6  #: ridge on X X^T: above float32's rounding, below what separates sentences at the least noise
ENOUGH = 0.05  #: nats: less is no further step worth
STEPS = 4  #: of Fisher scoring: 0.1 nats above the end at noise 5e-4 after 4, 1 at 1e-5
DAMPING = 1e-3  #: of its curvature: rows that nearly repeat each other


class Marginal:
    """-log p of the gradients, up to a constant, lowest for the true sentence; for use while `energy` is attached."""

    def __init__(self, energy: Energy, parts: Sequence[Noised]):
        self.inner, self.parts = energy, tuple(parts)
        self.table, self.tally = energy.table, energy.tally
        self._factors = [_factor(one) for one in self.parts]

    def __call__(self, embeds: Tensor, ridge: float | Tensor) -> tuple[Tensor, Tensor]:
        """Nats [k] above those of no rows at all; and by position [k, n] what its absence would add, negative."""
        total = embeds.new_zeros(len(embeds), dtype=torch.float64)
        worth = embeds.new_zeros(embeds.shape[:2], dtype=torch.float64)
        ridge = ridge.reshape(-1, 1, 1).double() if isinstance(ridge, Tensor) else ridge
        for one, factor, x in zip(self.parts, self._factors, self.inner.inputs(embeds), strict=True):
            x = torch.nn.functional.normalize(one.site.rows(x), dim=-1)
            # All directions count: with the 128 largest below the noise's edge, gaps of 18 to 1,500 nats are off by 11.
            seen = (x @ factor).double()
            x = x.double()
            inner = x @ x.mT + ridge * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
            nats, part = evidence(inner, seen @ seen.mT, len(one.gradient))
            total, worth = total + nats, worth + part
        return total, worth

    @torch.no_grad()
    def verdict(self, tokens: Tensor) -> float:
        """Below 1 the gradients may be a sentence's [n]; whether others fit better is for its neighbours to say.

        The larger of what it leaves above the expected noise, in `SURE` standard deviations of it, and of the strongest
        direction left over the strongest that noise has. The first alone cannot tell a few words at large noise.
        """
        above, spread, strongest = 0.0, 0.0, 0.0
        for one, x in zip(self.parts, self.inner.inputs(self.table[tokens][None]), strict=True):
            rows = one.site.rows(x[0].double())
            _, values, right = torch.linalg.svd(rows, full_matrices=False)
            span = right[values > float(values[0]) * torch.finfo(torch.float32).eps]
            rest = one.gradient - one.gradient @ span.T @ span
            expected = float((one.columns * (1 - span.square().sum(0)).clamp_min(0)).sum())
            above += (float(rest.square().sum()) - expected) / one.variance
            spread += (one.spread / one.variance) ** 2
            if bool((one.columns == one.columns[0]).all()):  # not rounded: that noise is uneven, and small
                top = float(torch.linalg.eigvalsh(rest @ rest.T if len(rest) < rest.shape[1] else rest.T @ rest)[-1])
                # The attacker's own forward pass rounds.
                rounding = 4 * torch.finfo(torch.float32).eps * float(one.site.space.spectrum[0])
                strongest = max(strongest, top / max(edge(*rest.shape) * one.variance, rounding**2 * rest.shape[1]))
        return max(above / (SURE * spread**0.5), strongest)


def evidence(inner: Tensor, shared: Tensor, outputs: int) -> tuple[Tensor, Tensor]:
    """-log p(G | X) + log p(G | no rows), [k], with the strengths that make it least; and by row what lacking it adds.

    G [o, d] has independent rows of covariance 1 + X^T diag(w) X, in units of the noise. Fisher scoring finds w >= 0.

    Args:
        inner: [k, n, n] products X X^T of rows.
        shared: [k, n, n] products X G^T G X^T, in units of the noise variance.
        outputs: o.
    """
    eye = torch.eye(inner.shape[-1], dtype=inner.dtype, device=inner.device)

    def state(w: Tensor) -> tuple[Tensor, Tensor]:
        grown = eye + inner * w[..., None, :]
        turned = torch.linalg.inv(grown)
        fit = (w * _diagonal(turned @ shared)).sum(-1)
        return turned, 0.5 * (outputs * torch.linalg.slogdet(grown)[1] - fit)

    with torch.no_grad():
        inverse = torch.linalg.inv(inner)
        w = _diagonal(inverse @ shared @ inverse) / outputs
        turned, best = state(w)
        for _ in range(STEPS):
            before = best
            step = _scored(turned, inner, shared, outputs, w)
            for share in (1.0, 0.25):
                other = (w - share * step).clamp_min(0)
                there, value = state(other)
                better = value < best
                w = torch.where(better[:, None], other, w)
                turned = torch.where(better[:, None, None], there, turned)
                best = torch.where(better, value, best)
                if bool(better.all()):
                    break
            if bool((before - best < ENOUGH).all()):
                break
    turned, value = state(w)
    own, fit = _diagonal(turned @ inner), _diagonal(turned @ shared @ turned.mT)
    # The row's own part taken out of what all rows together say of it.
    rest = (1 - w * own).clamp_min(1e-12)
    part = 0.5 * (-outputs * rest.log() - w * fit / rest)
    return value, part


def _scored(turned: Tensor, inner: Tensor, shared: Tensor, outputs: int, w: Tensor) -> Tensor:
    """One step of Fisher scoring; strengths of zero that want to fall stay."""
    own = turned @ inner
    slope = 0.5 * (outputs * _diagonal(own) - _diagonal(turned @ shared @ turned.mT))
    free = (w > 0) | (slope < 0)
    curve = 0.5 * outputs * own.square() * (free[:, :, None] & free[:, None, :])
    curve = curve + torch.diag_embed(torch.where(free, DAMPING * _diagonal(curve), 1.0))
    return torch.linalg.solve(curve, (slope * free)[..., None])[..., 0]


def _factor(one: Noised) -> Tensor:
    """[d, m] float32 F with F F^T = G^T G over the noise variance, m as small as the shape allows."""
    g = one.gradient / max(one.variance, 1e-300) ** 0.5
    if len(g) <= g.shape[1]:
        return g.T.float()
    energy, vectors = torch.linalg.eigh(g.T @ g)
    return (vectors * energy.clamp_min(0).sqrt()).float()


def _diagonal(x: Tensor) -> Tensor:
    return x.diagonal(dim1=-2, dim2=-1)
