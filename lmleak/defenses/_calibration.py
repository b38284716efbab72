"""From an epsilon to the noise that gives it, what a training run spends as Gaussian DP, and both in plain words."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from lmleak.defenses._accounting import gaussian_epsilon, rdp_epsilon, training_epsilon

#: Above it, exp(epsilon) lets an observer's odds move by more than a factor of 10^21: said in words, not refused.
_VACUOUS = 50.0


def gdp_mu(noise_multiplier: float, sample_rate: float = 1.0, steps: int = 1) -> tuple[float | None, str]:
    """mu of Gaussian differential privacy of a training run (Dong, Roth & Su, 2019, arXiv 1905.02383).

    Full batches compose exactly, mu = sqrt(steps) / sigma. Under Poisson sampling only the limit of many steps is
    known, mu = rate sqrt(steps (e^(1 / sigma^2) - 1)) (Bu et al., 2019, arXiv 1911.11607): no bound, hence the label.

    Returns:
        mu and what it is; None and the reason where there is none.

    Raises:
        ValueError: an argument out of range.
    """
    check(noise_multiplier=noise_multiplier, sample_rate=sample_rate, steps=steps)
    if noise_multiplier == 0:
        return None, "no noise"
    if sample_rate == 1:
        return math.sqrt(steps) / noise_multiplier, "exact"
    if noise_multiplier < 0.2:  # e^25: the limit needs rate sqrt(steps) near e^-12
        return None, "too little noise for the limit of many sampled steps to mean anything"
    return sample_rate * math.sqrt(steps * math.expm1(noise_multiplier**-2)), "limit of many steps, no bound"


@lru_cache(maxsize=256)
def noise_for_epsilon(epsilon: float, delta: float, sample_rate: float = 1.0, steps: int = 1) -> float:
    """The smallest noise multiplier at which a run of `steps` releases is (epsilon, delta)-differentially private.

    Full batches by the closed form; sampled ones by `training_epsilon`, to 0.1 % and on the private side.

    Args:
        epsilon: what the whole run may spend, above 0.
        delta: in (0, 1).
        sample_rate: Poisson sampling rate, in (0, 1].
        steps: number of releases.

    Raises:
        ValueError: an argument out of range, or an epsilon that no noise multiplier in 1e-4..1e6 gives.
    """
    check(epsilon=epsilon, delta=delta, sample_rate=sample_rate, steps=steps)

    from scipy.optimize import brentq

    def root(spent: Callable[[float], float], low: float, high: float, tolerance: float) -> float:
        if not spent(high) <= epsilon < spent(low):
            raise ValueError(
                f"no noise multiplier from {low:.3g} to {high:.3g} spends epsilon {epsilon:g} at delta {delta:g}"
            )
        excess = lambda log: math.log(max(spent(math.exp(log)), 1e-300) / epsilon)  # noqa: E731
        found = math.exp(brentq(excess, math.log(low), math.log(high), xtol=tolerance))
        # A root may lie on either side of the true one by the tolerance.
        return next(sigma for sigma in (found, found * math.exp(2 * tolerance), high) if spent(sigma) <= epsilon)

    if sample_rate == 1:
        return root(lambda sigma: gaussian_epsilon(sigma / math.sqrt(steps), delta), 1e-4, 1e6, 1e-10)
    # RDP is never below and takes milliseconds, PRV half a second: it is asked near the answer alone.
    high = root(lambda sigma: rdp_epsilon(sigma, delta, sample_rate, steps), 0.05, 1e4, 1e-3)
    run = lambda sigma: float(training_epsilon(sigma, sample_rate, steps, delta)["epsilon"])  # noqa: E731
    low = 0.9 * high
    while run(low) <= epsilon and low > 0.02:
        low, high = 0.9 * low, low
    return root(run, low, high, 5e-4) if low > 0.02 else high


def check(
    noise_multiplier: float = 1.0, epsilon: float = 1.0, delta: float = 0.5, sample_rate: float = 1.0, steps: int = 1
) -> None:
    """Raises ValueError, in plain words, where a setting means nothing."""
    if not 0 <= noise_multiplier < math.inf:
        raise ValueError(f"the noise multiplier must be 0 (clipping only) or more, not {noise_multiplier}")
    if not 0 < epsilon < math.inf:
        raise ValueError(f"epsilon must be above 0, not {epsilon}")
    if not 0 < delta < 1:
        raise ValueError(f"delta is a probability strictly between 0 and 1, not {delta}")
    if not 0 < sample_rate <= 1:
        raise ValueError(f"a Poisson sampling rate is a probability above 0 and at most 1, not {sample_rate}")
    if steps < 1:
        raise ValueError(f"a training run has at least 1 step, not {steps}")


def training(noise_multiplier: float, sample_rate: float, steps: int, delta: float, records: float) -> dict[str, Any]:
    """What a whole training run spends: `training_epsilon`, mu, and a `statement` of it in words.

    Args:
        noise_multiplier: sigma of every step.
        sample_rate: Poisson sampling rate.
        steps: number of releases.
        delta: in (0, 1).
        records: size of the data set, as far as it is known: a delta of 1 / records may give one record away.
    """
    spent = training_epsilon(noise_multiplier, sample_rate, steps, delta)
    mu, label = gdp_mu(noise_multiplier, sample_rate, steps)
    return {
        **spent,
        "mu": mu,
        "mu_is": label,
        "sampling": "Poisson" if sample_rate < 1 else "none: full batches",
        "statement": _statement(spent, records),
    }


def _statement(spent: dict[str, Any], records: float) -> str:
    steps, rate = spent["steps"], spent["sample_rate"]
    if spent["epsilon"] is None:
        return f"A training run of {steps:,} such steps has no differential privacy: nothing is noised."
    drawn = (
        "each on the full batch"
        if rate == 1
        else f"each on a batch that every record joins independently with probability {rate:g} (Poisson sampling)"
    )
    assumed = ["only the noised sums leave", "nobody sees the noise's seed"]
    if rate < 1:
        assumed += ["nobody knows who was in which batch", "batches are not padded, cut or shuffled to a fixed size"]
    assumed += ["settings were not tuned on the same records"]
    return (
        f"A training run of {steps:,} {'step' if steps == 1 else 'steps'} at this noise, {drawn}, is "
        f"({spent['epsilon']:.3g}, {spent['delta']:g})-differentially private for adding or removing one record "
        f"(accountant: {spent['accountant']}). Assumed: {', '.join(assumed)}."
        + meaning(spent["epsilon"], spent["delta"], records)
    )


def meaning(epsilon: float, delta: float, records: float) -> str:
    """What makes a pair of numbers mean little, as sentences with a space before them; nothing where they mean much."""
    said = ""
    if epsilon > _VACUOUS:
        said += " An epsilon above 50 rules nothing out in practice: read it as no guarantee."
    if delta * records >= 1:
        said += f" A delta of {delta:g} is not below one over the number of records ({records:,.0f}): it alone allows "
        said += "giving one record away."
    return said
