"""Defenses: what of a client's gradients leaves the machine. A kind is a file; see CONTRIBUTING.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lmleak import registry
from lmleak.defenses._accounting import gaussian_delta, gaussian_epsilon, prv_epsilon, rdp_epsilon, training_epsilon
from lmleak.defenses._calibration import gdp_mu, noise_for_epsilon
from lmleak.defenses._mechanism import Gaussian, gaussian

if TYPE_CHECKING:
    from lmleak.records import Victim

__all__ = [
    "Gaussian",
    "gaussian",
    "gaussian_delta",
    "gaussian_epsilon",
    "gdp_mu",
    "install",
    "installs",
    "noise_for_epsilon",
    "prv_epsilon",
    "rdp_epsilon",
    "training_epsilon",
]


def install(victim: Victim, defense: Mapping[str, Any], seed: int = 0) -> Victim:
    """The model that a client under this defense trains: the same, but for a defense that changes the model itself.

    Selection, observation and attack are then all about the changed model, which everybody knows.

    Args:
        victim: left as it was found.
        defense: `{"kind": ..., **fields}`.
        seed: of the weights that the defense adds.

    Raises:
        LmleakError: no such defense, or one that does not fit this model.
        pydantic.ValidationError: a field out of range.
    """
    if not installs(defense):
        return victim
    fields = dict(defense)
    module = registry.load("defenses", fields.pop("kind"))
    return module.install(module.Config(**fields), victim, seed)


def installs(defense: Mapping[str, Any]) -> bool:
    """Whether the defense changes the model."""
    return hasattr(registry.load("defenses", defense["kind"]), "install")
