"""The Gaussian mechanism that a defense is, where it is one: what is public about its noise and its clipping."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lmleak import registry

if TYPE_CHECKING:
    from lmleak.gradients.observe import ClipScope


@dataclass(frozen=True)
class Gaussian:
    """Independent noise on every released value; per-sample clipping, or none."""

    std: float  #: of the noise, in the released gradient's units
    max_grad_norm: float | None  #: clipping norm of a sample's gradient; None: not clipped, and the mean is released
    scope: ClipScope | None  #: whose norm is clipped


def gaussian(defense: Mapping[str, Any]) -> Gaussian | None:
    """The mechanism of a recipe's defense block; None where the defense is no Gaussian mechanism.

    A defense file that is one has a function `gaussian(config) -> Gaussian`.

    Raises:
        LmleakError: no such defense.
        pydantic.ValidationError: a field out of range.
    """
    fields = dict(defense)
    module = registry.load("defenses", fields.pop("kind"))
    return module.gaussian(module.Config(**fields)) if hasattr(module, "gaussian") else None
