"""Epsilon against published values, an independent formula, and the two accountants."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from lmleak.defenses._accounting import (
    gaussian_delta,
    gaussian_epsilon,
    prv_epsilon,
    rdp_epsilon,
    training_epsilon,
)

DELTA = 1e-5


@pytest.mark.parametrize(
    ("sigma", "epsilon"), [(2, 1.99), (1, 4.377), (0.5, 9.997), (0.3, 19.13), (0.1, 91.82), (0.01, 5425.5)]
)
def test_closed_form(sigma, epsilon):
    assert gaussian_epsilon(sigma, DELTA) == pytest.approx(epsilon, rel=2e-3)


@settings(max_examples=60, deadline=None)
@given(st.floats(0.2, 20), st.floats(1e-9, 0.2))
def test_epsilon_solves_the_textbook_equation(sigma, delta):
    # Balle & Wang's theorem as printed; safe in plain floats while e^epsilon is.
    epsilon, mu = gaussian_epsilon(sigma, delta), 1 / sigma
    spent = norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu)
    if epsilon == 0:
        assert spent <= delta * (1 + 1e-9)
    else:
        assert spent == pytest.approx(delta, rel=1e-5, abs=1e-14)


@pytest.mark.parametrize("sigma", [1e-6, 1e-3, 0.01, 0.1, 1, 10, 1000])
def test_stable_from_no_noise_to_all_noise(sigma):
    epsilon = gaussian_epsilon(sigma, DELTA)
    assert gaussian_delta(sigma, epsilon) == pytest.approx(DELTA, rel=1e-6)
    # For little noise, epsilon is mu^2 / 2 + mu Phi^-1(1 - delta) up to lower order.
    if sigma <= 0.01:
        assert epsilon == pytest.approx(0.5 / sigma**2 + norm.isf(DELTA) / sigma, rel=1e-3)


def test_limits():
    assert gaussian_epsilon(0, DELTA) == math.inf
    assert gaussian_epsilon(1e9, DELTA) == 0
    assert gaussian_delta(1, 0) == pytest.approx(2 * norm.cdf(0.5) - 1)


@settings(max_examples=40, deadline=None)
@given(st.floats(1e-4, 50), st.floats(1.001, 3))
def test_more_noise_never_costs_epsilon(sigma, factor):
    assert gaussian_epsilon(sigma * factor, DELTA) <= gaussian_epsilon(sigma, DELTA)


@pytest.mark.parametrize("sigma", [2, 1, 0.5, 0.1])
def test_prv_agrees_within_two_percent(sigma):
    epsilon, label = prv_epsilon(sigma, DELTA)
    assert label == "prv"
    assert epsilon == pytest.approx(gaussian_epsilon(sigma, DELTA), rel=0.02)


@pytest.mark.parametrize("sigma", [0.01, 0.001])
def test_prv_says_where_it_does_not_converge(sigma):
    # Opacus answers 721 here, for 5,425.
    epsilon, label = prv_epsilon(sigma, DELTA)
    assert epsilon is None
    assert "does not converge" in label


@pytest.mark.parametrize("sigma", [1e-6, 1e-3, 0.01, 0.1, 0.5, 1, 2, 10, 1000])
def test_rdp_is_never_below(sigma):
    assert rdp_epsilon(sigma, DELTA) >= gaussian_epsilon(sigma, DELTA)


def test_rdp_is_close_where_little_noise_asks_for_orders_near_one():
    assert rdp_epsilon(0.001, DELTA) == pytest.approx(gaussian_epsilon(0.001, DELTA), rel=0.01)


def test_full_batches_compose_to_one_release_of_less_noise():
    spent = training_epsilon(10, 1.0, 25, DELTA)
    assert spent["accountant"] == "prv"
    assert spent["epsilon"] == pytest.approx(gaussian_epsilon(2, DELTA), rel=0.02)
    assert spent["rdp_epsilon"] >= spent["epsilon"]


def test_training_is_amplified_by_sampling_and_falls_back_with_a_label():
    spent = training_epsilon(1.0, 0.01, 1000, DELTA)
    assert spent["prv_epsilon"] <= spent["rdp_epsilon"]
    assert spent["epsilon"] == pytest.approx(1.83, rel=0.02)
    assert spent["epsilon"] < gaussian_epsilon(1.0 / math.sqrt(1000), DELTA)
    harsh = training_epsilon(0.02, 0.5, 100, DELTA)
    assert harsh["prv_epsilon"] is None
    assert harsh["epsilon"] == harsh["rdp_epsilon"]
    assert harsh["accountant"].startswith("rdp (PRV")
    clipped_only = training_epsilon(0.0, 0.5, 100, DELTA)
    assert clipped_only["epsilon"] is clipped_only["rdp_epsilon"] is None


@pytest.mark.parametrize(
    "arguments", [(-1, DELTA), (math.nan, DELTA), (1, 0), (1, 1), (1, DELTA, 0), (1, DELTA, 1.5), (1, DELTA, 0.5, 0)]
)
def test_nonsense_is_refused_with_its_value(arguments):
    with pytest.raises(ValueError, match=r"not (-1|nan|0|1|1\.5)$"):
        rdp_epsilon(*arguments)
