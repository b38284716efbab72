"""Defenses: what of a client's gradients leaves the machine. A kind is a file; see CONTRIBUTING.md."""

from __future__ import annotations

from lmleak.defenses._accounting import gaussian_delta, gaussian_epsilon, prv_epsilon, rdp_epsilon, training_epsilon
from lmleak.defenses._calibration import gdp_mu, noise_for_epsilon
from lmleak.defenses._mechanism import Gaussian, gaussian

__all__ = [
    "Gaussian",
    "gaussian",
    "gaussian_delta",
    "gaussian_epsilon",
    "gdp_mu",
    "noise_for_epsilon",
    "prv_epsilon",
    "rdp_epsilon",
    "training_epsilon",
]
