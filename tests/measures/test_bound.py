"""The bound and the exact case against simulations of the Gaussian M-ary test, and against each other."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.special import ndtr

from lmleak.measures._bound import equidistant_success, success_bound

TRIALS = 20_000
NOISE = (0.1, 0.3, 0.5, 1.0, 3.0)
#: 5 x 3 x 3 comparisons at 4 standard errors: by chance one in 350 draws of all of them fails, and the seed is fixed.
ERRORS = 4


def priors(candidates: int):
    return (1 / candidates, min(0.8, 3 / candidates), 0.9)


def simulated(d: float, candidates: int, kappa: float) -> tuple[float, float]:
    """Success of the largest posterior, release by release: nothing of the formula is used."""
    rng = np.random.default_rng([candidates, int(1000 * kappa), int(1000 * d)])
    prior = np.full(candidates, (1 - kappa) / (candidates - 1))
    prior[0] = kappa
    right = 0
    for _ in range(TRIALS // 2000):
        truth = rng.choice(candidates, 2000, p=prior)
        release = rng.standard_normal((2000, candidates))  # candidate z moves coordinate z by d / sqrt(2)
        release[np.arange(2000), truth] += d / math.sqrt(2)
        score = release * d / math.sqrt(2) + np.log(prior)
        right += int((score.argmax(1) == truth).sum())
    rate = right / TRIALS
    return rate, math.sqrt(max(rate * (1 - rate), 1 / TRIALS) / TRIALS)


@pytest.mark.parametrize("candidates", [2, 10, 100])
@pytest.mark.parametrize("sigma", NOISE)
def test_exact_case_is_what_is_simulated(sigma, candidates):
    # Gradients of the full clipping norm at right angles: any two are sqrt(2) C apart.
    for kappa in priors(candidates):
        rate, error = simulated(math.sqrt(2) / sigma, candidates, kappa)
        assert abs(rate - equidistant_success(math.sqrt(2) / sigma, candidates, kappa)) < ERRORS * error


@pytest.mark.parametrize("candidates", [2, 10, 100, 30_000])
@pytest.mark.parametrize("sigma", NOISE)
def test_no_attack_in_the_exact_case_beats_the_bound(sigma, candidates):
    for kappa in priors(candidates):
        best = equidistant_success(math.sqrt(2) / sigma, candidates, kappa)
        assert kappa - 1e-9 <= best <= success_bound(1 / sigma, kappa) + 1e-9


@pytest.mark.parametrize("sigma", NOISE)
def test_two_opposite_candidates_attain_the_bound(sigma):
    # Gradients +C and -C: the sign of the release is the best attack, and the bound is what it reaches.
    rng = np.random.default_rng(int(100 * sigma))
    truth = rng.choice([-1.0, 1.0], TRIALS)
    rate = float((np.sign(truth + sigma * rng.standard_normal(TRIALS)) == truth).mean())
    error = math.sqrt(max(rate * (1 - rate), 1 / TRIALS) / TRIALS)
    assert abs(rate - success_bound(1 / sigma, 0.5)) < ERRORS * error


@pytest.mark.parametrize("candidates", [3, 20])
@pytest.mark.parametrize("sigma", [0.3, 1.0])
def test_no_placing_of_candidates_beats_the_bound(sigma, candidates):
    # Random signals in the ball of the clipping norm, in few dimensions, under a lopsided prior.
    rng = np.random.default_rng([candidates, int(10 * sigma)])
    signals = rng.standard_normal((candidates, 3))
    signals /= np.linalg.norm(signals, axis=1, keepdims=True)
    prior = rng.dirichlet(np.ones(candidates))
    truth = rng.choice(candidates, TRIALS, p=prior)
    release = signals[truth] + sigma * rng.standard_normal((TRIALS, 3))
    score = release @ signals.T / sigma**2 + np.log(prior)  # equal energies
    rate = float((score.argmax(1) == truth).mean())
    assert rate <= success_bound(1 / sigma, float(prior.max())) + ERRORS * math.sqrt(0.25 / TRIALS)


def test_textbook_values():
    assert success_bound(0, 0.2) == pytest.approx(0.2)
    assert success_bound(2, 0.5) == pytest.approx(ndtr(2))
    # Two candidates at even odds: half the distance decides.
    assert equidistant_success(3, 2, 0.5) == pytest.approx(ndtr(1.5))
    assert equidistant_success(0, 10, 0.1) == pytest.approx(0.1)
    assert equidistant_success(math.inf, 10, 0.1) == 1
    # The figures by which d' is read: where one of 30,000 tokens is told from the others.
    assert equidistant_success(4.5, 30_000, 1 / 30_000) == pytest.approx(0.19, abs=0.01)
    assert equidistant_success(7, 30_000, 1 / 30_000) == pytest.approx(0.79, abs=0.01)


@pytest.mark.parametrize(
    ("function", "arguments", "says"),
    [
        (success_bound, (-1, 0.5), "mu must be 0 or more"),
        (success_bound, (math.nan, 0.5), "mu must be 0 or more"),
        (success_bound, (1, 0), "above 0"),
        (success_bound, (1, 1.5), "above 0"),
        (equidistant_success, (1, 1, 1.0), "at least 2"),
        (equidistant_success, (1, 10, 0.05), "from 1 / 10"),
        (equidistant_success, (-1, 10, 0.5), "d must be"),
    ],
)
def test_nonsense_is_refused(function, arguments, says):
    with pytest.raises(ValueError, match=says):
        function(*arguments)
