"""Distance of the subspaces of gradients with and without an attribute (adapted from Mo et al., arXiv 2105.13929).

The leading directions of the gradients of either class are compared by principal angles; the same distance under
random relabelling is what two samples of one distribution show, and is reported beside it. Ranks and counts are the
same for every module, or distances of different modules could not be compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from lmleak.errors import LmleakError
from lmleak.measures._attributes import Attributed
from lmleak.records import Measurement

if TYPE_CHECKING:
    import torch

    from lmleak.records import Batch, Selection, Victim

EXAMPLE = {"samples": 24, "rank": 2, "null": 3, "width": 16}
OVER_DATA = True
UNITS = {
    "excess": "projection distance above the mean of relabelled classes; 0 where the attribute leaves no trace",
    "projection": "|sines of the principal angles| / sqrt(rank), 0 (one subspace) to 1 (orthogonal)",
    "geodesic": "root of the mean squared principal angle, radians, 0 to pi/2",
    "null": "projection distance of relabelled classes, mean",
    "null_high": "projection distance of relabelled classes, 95 % quantile",
}


class Config(Attributed):
    """Which attribute, and how many directions of each class."""

    rank: int = Field(8, ge=1, description="leading directions of each class")
    null: int = Field(50, ge=2, description="relabellings")


def measure(
    config: Config,
    victim: Victim,
    batches: Sequence[Batch],
    selection: Selection,
    defense: Mapping[str, Any],
    generator: torch.Generator,
) -> Measurement:
    """Distances by observed module; None where a module's gradients have fewer directions than `rank`."""
    from lmleak.measures import _attributes, _sketch
    from lmleak.seeds import drawn

    seed = drawn(generator)
    try:
        y, found = _sketch.labelled(config, victim, batches, selection, defense, seed)
    except LmleakError as error:
        return Measurement({}, str(error))
    if y.max() > 1:
        return Measurement({}, f"two classes are compared, not {y.max() + 1}: set `positive`")
    count = int(np.bincount(y).min())
    if count < 2 * config.rank:
        why = f"{count} samples of one class are too few for {config.rank} directions"
        return Measurement({}, f"{why}; take more samples or a smaller rank")
    rows = {row: distances(features, y, config.rank, config.null, seed) for row, features in found.items()}
    return Measurement(rows, details=_attributes.facts(config, batches, y))


def distances(features: np.ndarray, y: np.ndarray, rank: int, null: int, seed: int) -> dict[str, float | None]:
    """The values of `UNITS` of gradients [n, k] and classes [n] of 0 and 1; None where they have too few directions."""
    draw = np.random.default_rng(seed)
    count = int(np.bincount(y).min())
    chosen = np.concatenate([draw.choice(np.flatnonzero(y == c), count, replace=False) for c in (0, 1)])
    features, y = features[chosen], y[chosen]
    # Without the mean that both classes share, or it would be the first direction of both.
    features = features - features.mean(0)
    values = np.linalg.svd(features, compute_uv=False)
    if len(values) < 2 * rank or values[2 * rank - 1] <= 1e-6 * values[0]:
        return dict.fromkeys(UNITS)
    own = _angles(features[y == 0], features[y == 1], rank)
    others = []
    for _ in range(null):
        order = draw.permutation(len(y))
        others.append(_projection(_angles(features[order[:count]], features[order[count:]], rank)))
    return {
        "excess": _projection(own) - float(np.mean(others)),
        "projection": _projection(own),
        "geodesic": float(np.sqrt((own**2).mean())),
        "null": float(np.mean(others)),
        "null_high": float(np.quantile(others, 0.95)),
    }


def _angles(a: np.ndarray, b: np.ndarray, rank: int) -> np.ndarray:
    from scipy.linalg import subspace_angles

    spans = [np.linalg.svd(one, full_matrices=False)[2][:rank].T for one in (a, b)]
    return subspace_angles(*spans)


def _projection(angles: np.ndarray) -> float:
    return float(np.sqrt((np.sin(angles) ** 2).mean()))
