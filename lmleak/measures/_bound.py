"""How often any attack can be right about one sample under Gaussian noise: an upper bound, and one exact case.

Everything is in units of the noise's standard deviation: `mu` and `d` are distances of clipped gradients over it.

The bound. Let P_z be the release when the sample is z, and Q the release when it is not there. All P_z lie within mu
of Q. For every event E, P_z(E) <= f(Q(E)) with f(q) = Phi(Phi^-1(q) + mu) (Neyman-Pearson). An attack names z on an
event E_z, the E_z are disjoint, and f is concave, so

    success = sum_z pi_z P_z(E_z) <= sum_z pi_z f(Q(E_z)) <= f(sum_z pi_z Q(E_z)) <= f(kappa),  kappa = max_z pi_z.

That is reconstruction robustness with a blow-up function (Hayes, Mahloujifar & Balle, 2023, arXiv 2302.07225), in its
Gaussian form (Kaissis, Hayes, Ziller & Rueckert, 2023, arXiv 2307.03928). Two antipodal candidates attain it.
"""

from __future__ import annotations

import math


def success_bound(mu: float, kappa: float) -> float:
    """The most often that any attack can name the true candidate, Phi(Phi^-1(kappa) + mu).

    Args:
        mu: how far the release moves, at most, when the sample is taken out, over the noise's standard deviation; one
            release with clipping norm C and noise sigma C has mu <= 1 / sigma, T full-batch ones sqrt(T) / sigma.
        kappa: prior probability of the likeliest candidate: the success of guessing without the gradient.

    Raises:
        ValueError: negative mu, or kappa outside (0, 1].
    """
    from scipy.special import ndtr, ndtri

    if not mu >= 0:
        raise ValueError(f"mu must be 0 or more, not {mu}")
    if not 0 < kappa <= 1:
        raise ValueError(f"kappa is a probability above 0, not {kappa}")
    return float(ndtr(ndtri(kappa) + mu))


def equidistant_success(d: float, candidates: int, kappa: float) -> float:
    """The success of the best possible attack where all candidates are equally far from each other: exact.

    The Gaussian M-ary test of signals of equal energy at right angles. One candidate has prior mass kappa, the others
    share the rest evenly, and the attack picks the largest posterior. With y_z = <release, g_z> / (|g_z| noise), a
    lead t = log(kappa / other prior) / a of the likeliest, and a = d / sqrt(2),

        kappa E[Phi(u + a + t)^(M-1)] + (1 - kappa) E[Phi(u + a - t) Phi(u + a)^(M-2)],  u ~ N(0, 1).

    Args:
        d: distance of any two candidates over the noise's standard deviation (the d' of `dp_distinguishability`).
        candidates: M, at least 2.
        kappa: prior probability of the likeliest, from 1 / M.

    Raises:
        ValueError: negative d, fewer than 2 candidates, or kappa outside [1 / M, 1].
    """
    import numpy as np
    from scipy.special import log_ndtr

    check_prior(candidates, kappa)
    if not d >= 0:
        raise ValueError(f"d must be 0 or more, not {d}")
    a = d / math.sqrt(2)
    if a == 0 or kappa == 1:
        return kappa
    if math.isinf(a):
        return 1.0
    m = candidates
    other = (1 - kappa) / (m - 1)
    lead = math.log(kappa / other) / a if kappa * m > 1 else 0.0

    # The integrands are smooth and end like a normal density, so the trapezoid rule is exact to 1e-12 at this step.
    u = np.linspace(-12, 12, 2401)
    density = np.exp(-u * u / 2) / math.sqrt(2 * math.pi) * (u[1] - u[0])
    first = density @ np.exp((m - 1) * log_ndtr(u + a + lead))
    second = density @ np.exp(log_ndtr(u + a - lead) + (m - 2) * log_ndtr(u + a))
    return min(1.0, float(kappa * first + (1 - kappa) * second))


def check_prior(candidates: int, kappa: float) -> None:
    """Raises ValueError where no prior over so many candidates has kappa as its largest mass."""
    if candidates < 2:
        raise ValueError(f"a choice needs at least 2 candidates, not {candidates}")
    # One part in a billion of slack: kappa is often typed as a rounded 1 / M.
    if not (1 - 1e-9) / candidates <= kappa <= 1:
        raise ValueError(
            f"the likeliest of {candidates} candidates has a prior from 1 / {candidates} to 1, not {kappa}"
        )
