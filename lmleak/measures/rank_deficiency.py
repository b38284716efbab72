"""Equations that a stack's layers lack to give their inputs away: the index c(M) (Chen et al., 2021, arXiv 2111.10178).

Chen and Campbell (2021, arXiv 2111.10178): from behind, each layer's input solves `U x = v`, see `attacks.layerwise`.
Where U has less than full rank for some layer, its input is not determined by the recursion alone, and the nearer
that layer is to the pixels, the more it counts: `c(M) = sum_i round((d - i) / d (rank(U_i) - n_i))` over the d layers
before the last. 0: every system can be solved. It is a count: of noise and rounding it knows nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from lmleak.records import Measurement

if TYPE_CHECKING:
    import torch

    from lmleak.records import Batch, Selection, Victim

IMAGES = True  #: says something of image models only
EXAMPLE: dict[str, Any] = {}
UNITS = {
    "rank": "independent equations for the layer's input, its own weights' and the observed gradient's; all: the sum",
    "unknowns": "values of the layer's input; all: the sum",
    "index": "equations that are missing, with the layer's weight, 0 or less; all: the security index c(M)",
}


class Config(BaseModel):
    """Nothing to set."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def measure(
    config: Config,
    victim: Victim,
    batch: Batch,
    selection: Selection,
    defense: Mapping[str, Any],
    generator: torch.Generator,
) -> Measurement:
    """Rank by layer, for one picture. Layers whose weight is not observed have their own rows only."""
    from lmleak.measures import _ranks

    if victim.task != "image-classification":
        return Measurement({}, "it is defined for pictures, and this model reads text")
    if len(batch.labels) > 1:
        return Measurement({}, f"it is defined for one picture; this batch has {len(batch.labels)}")
    found = _ranks.layers(victim, batch, selection)
    if isinstance(found, str):
        return Measurement({}, found)
    return Measurement(_ranks.rows(found, selection))
