"""What a noise multiplier means as (epsilon, delta): exact for one release, by two accountants for a training run.

The Gaussian mechanism with L2 sensitivity C and noise of standard deviation sigma C is mu-Gaussian-DP, mu = 1 / sigma
(Dong, Roth & Su, 2019, arXiv 1905.02383); its exact epsilon is Balle & Wang's (2018, arXiv 1805.06530, theorem 8).
Adjacency throughout: one sample added or removed.
"""

from __future__ import annotations

import math
import warnings
from functools import lru_cache
from typing import Any

#: Error asked of PRV, relative to epsilon: its absolute default of 0.01 is 3 % at epsilon 0.3.
_PRV_ERROR = 0.002
#: Opacus' PRV takes exp(loss) in float64, which overflows at 709: past it, it returns 721 for the true 5,425 (sigma
#: 0.01) and says nothing. So it is not asked where one step's loss can come near, nor believed where the sum does.
_PRV_LOSS = 700.0


@lru_cache(maxsize=256)
def gaussian_epsilon(noise_multiplier: float, delta: float) -> float:
    """Epsilon of one Gaussian release, exact (analytic Gaussian mechanism; Balle & Wang, 2018, arXiv 1805.06530).

    delta(eps) = Phi(t) - e^eps Phi(-s) with t = mu/2 - eps/mu and s = mu/2 + eps/mu. Because e^eps phi(s) = phi(t), the
    second term is phi(t) Mills(s): no large exponentials. Solved for t instead of eps, the equation is well conditioned
    at every sigma (1e-6 as well as 1e3).

    Args:
        noise_multiplier: standard deviation of the noise in units of the sensitivity, sigma.
        delta: in (0, 1).

    Returns:
        Epsilon >= 0; infinity without noise.

    Raises:
        ValueError: negative noise, or delta outside (0, 1).
    """
    from scipy.optimize import brentq
    from scipy.special import ndtri

    _check(noise_multiplier, delta)
    if noise_multiplier == 0:
        return math.inf
    mu = 1 / noise_multiplier
    if math.isinf(mu):
        return math.inf
    if _delta_at(mu / 2, mu) <= delta:
        return 0.0
    # Phi(t) alone already exceeds delta(t), so the root lies above ndtri(delta); above 40, Phi is 1 in float64.
    low, high = float(ndtri(delta)), min(mu / 2, 40.0)
    root = brentq(lambda t: _delta_at(t, mu) - delta, min(low, high), high, xtol=1e-14, rtol=1e-14)
    return mu * (mu / 2 - root)


def gaussian_delta(noise_multiplier: float, epsilon: float) -> float:
    """Delta of one Gaussian release at a given epsilon: the function that `gaussian_epsilon` inverts.

    Raises:
        ValueError: noise that is not positive, or negative epsilon.
    """
    if noise_multiplier <= 0 or epsilon < 0:
        raise ValueError(f"need noise_multiplier > 0 and epsilon >= 0, not {noise_multiplier} and {epsilon}")
    mu = 1 / noise_multiplier
    return _delta_at(mu / 2 - epsilon / mu, mu)


def _delta_at(t: float, mu: float) -> float:
    from scipy.special import erfcx, ndtr

    density = math.exp(-t * t / 2) / math.sqrt(2 * math.pi)
    tail = math.sqrt(math.pi / 2) * float(erfcx((mu - t) / math.sqrt(2)))  # Mills ratio at s = mu - t
    if t > -5:
        return float(ndtr(t)) - density * tail
    return density * (math.sqrt(math.pi / 2) * float(erfcx(-t / math.sqrt(2))) - tail)


def rdp_epsilon(noise_multiplier: float, delta: float, sample_rate: float = 1.0, steps: int = 1) -> float:
    """Epsilon by Renyi differential privacy (Mironov, 2017, arXiv 1702.07476; Opacus' accountant): an upper bound.

    Args:
        noise_multiplier: sigma.
        delta: in (0, 1).
        sample_rate: Poisson sampling rate, in (0, 1]; 1 is a full batch.
        steps: number of releases.

    Raises:
        ValueError: an argument out of range.
    """
    _check(noise_multiplier, delta, sample_rate, steps)
    return math.inf if noise_multiplier == 0 else _rdp(noise_multiplier, delta, sample_rate, steps)


@lru_cache(maxsize=256)
def _rdp(noise_multiplier: float, delta: float, sample_rate: float, steps: int) -> float:
    import numpy as np
    from opacus.accountants import RDPAccountant

    alphas = list(RDPAccountant.DEFAULT_ALPHAS)
    if sample_rate == 1:
        # Little noise puts the best order close to 1 (1.005 at sigma 0.001), much noise far above Opacus' 63.
        alphas = [*(1 + np.geomspace(1e-6, 0.1, 60)), *alphas, *np.geomspace(64, 1e5, 60)]
    accountant = RDPAccountant()
    accountant.history = [(noise_multiplier, sample_rate, steps)]
    with warnings.catch_warnings():
        # "Optimal order is the smallest/largest alpha": the bound is then loose, not wrong, and only a cross-check.
        warnings.simplefilter("ignore")
        return float(accountant.get_epsilon(delta=delta, alphas=alphas))


def prv_epsilon(
    noise_multiplier: float, delta: float, sample_rate: float = 1.0, steps: int = 1
) -> tuple[float | None, str]:
    """Epsilon by numerical composition of privacy loss variables (Gopi et al., 2021, arXiv 2106.02848; Opacus').

    Args:
        noise_multiplier: sigma.
        delta: in (0, 1).
        sample_rate: Poisson sampling rate, in (0, 1].
        steps: number of releases.

    Returns:
        An upper bound and `"prv"`; where the accountant does not converge, None and the reason.

    Raises:
        ValueError: an argument out of range.
    """
    _check(noise_multiplier, delta, sample_rate, steps)
    if noise_multiplier == 0:
        return None, "no noise, no guarantee"
    return _prv(noise_multiplier, delta, sample_rate, steps)


@lru_cache(maxsize=64)
def _prv(noise_multiplier: float, delta: float, sample_rate: float, steps: int) -> tuple[float | None, str]:
    from opacus.accountants import PRVAccountant

    # Sampling only lowers the loss of a step, so the full batch's bounds it.
    if gaussian_epsilon(noise_multiplier, delta / 1000) > _PRV_LOSS:
        return None, "PRV does not converge: the privacy loss of one step overflows float64"
    error = _PRV_ERROR * _rdp(noise_multiplier, delta, sample_rate, steps)
    accountant = PRVAccountant()
    accountant.history = [(noise_multiplier, sample_rate, steps)]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            epsilon = float(accountant.get_epsilon(delta=delta, eps_error=error))
    except (ValueError, RuntimeError, OverflowError, FloatingPointError) as failure:
        return None, f"PRV does not converge: {str(failure).splitlines()[0]}"
    if not 0 <= epsilon < _PRV_LOSS:
        return None, f"PRV does not converge: epsilon {epsilon}"
    # Full batches compose exactly: T releases at sigma are one at sigma / sqrt(T).
    if sample_rate == 1 and abs(epsilon / gaussian_epsilon(noise_multiplier / math.sqrt(steps), delta) - 1) > 0.02:
        return None, f"PRV does not converge: epsilon {epsilon:.3g} is not the closed form's"
    return epsilon, "prv"


def training_epsilon(noise_multiplier: float, sample_rate: float, steps: int, delta: float) -> dict[str, Any]:
    """Epsilon of a whole DP-SGD training run with Poisson sampling, by PRV and by RDP.

    Args:
        noise_multiplier: sigma of every step.
        sample_rate: expected batch size over size of the data set, in (0, 1].
        steps: number of optimiser steps.
        delta: in (0, 1).

    Returns:
        `epsilon` and the `accountant` it comes from ("prv"; where PRV does not converge, with the reason, the closed
        form for full batches and "rdp" for sampled ones),
        `prv_epsilon` (or None), `rdp_epsilon`, and the arguments. Epsilons are None without noise.

    Raises:
        ValueError: an argument out of range.
    """
    rdp = rdp_epsilon(noise_multiplier, delta, sample_rate, steps)
    prv, label = prv_epsilon(noise_multiplier, delta, sample_rate, steps)
    rdp_or_none = rdp if math.isfinite(rdp) else None
    epsilon, accountant = prv, "prv"
    if rdp_or_none is None:
        epsilon, accountant = None, "none (no noise)"
    elif prv is None and sample_rate == 1:
        epsilon = gaussian_epsilon(noise_multiplier / math.sqrt(steps), delta)
        accountant = f"analytic Gaussian mechanism ({label})"
    elif prv is None:
        epsilon, accountant = rdp, f"rdp ({label})"
    return {
        "epsilon": epsilon,
        "accountant": accountant,
        "prv_epsilon": prv,
        "rdp_epsilon": rdp_or_none,
        "noise_multiplier": noise_multiplier,
        "sample_rate": sample_rate,
        "steps": steps,
        "delta": delta,
    }


def _check(noise_multiplier: float, delta: float, sample_rate: float = 1.0, steps: int = 1) -> None:
    if not noise_multiplier >= 0:
        raise ValueError(f"noise_multiplier must be >= 0, not {noise_multiplier}")
    if not 0 < delta < 1:
        raise ValueError(f"delta must lie in (0, 1), not {delta}")
    if not 0 < sample_rate <= 1:
        raise ValueError(f"sample_rate must lie in (0, 1], not {sample_rate}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
