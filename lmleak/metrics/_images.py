"""Recovered images beside their references, and numbers over pairs of them: always float64 in [0, 1]."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lmleak.metrics._align import align, answers

if TYPE_CHECKING:
    import numpy as np

    from lmleak.records import Reconstruction, Reference


def pairs(reconstruction: Reconstruction, reference: Reference) -> list[tuple[np.ndarray, np.ndarray | None]]:
    """Each reference [c, y, x] with its answer, assigned by the smallest total squared error; None: no answer.

    Empty where the reference is no image. An answer of another shape is none.
    """
    truth = _arrays(reference.images)
    if not truth:
        return []
    found = [image for image in _arrays(reconstruction.images) if image.shape == truth[0].shape]
    recovered = align(truth, answers(reconstruction, found, len(truth), None), _closeness)
    return list(zip(truth, recovered, strict=True))


def over(
    reconstruction: Reconstruction,
    reference: Reference,
    value: Callable[[Any, Any], float],
    *,
    missing: float,
) -> float | None:
    """Mean of `value` over the references; `missing` where one has no answer; None where there is no image."""
    rows = [missing if y is None else float(value(x, y)) for x, y in pairs(reconstruction, reference)]
    return sum(rows) / len(rows) if rows else None


def squared_error(x: np.ndarray, y: np.ndarray) -> float:
    """Mean squared difference."""
    return float(((x - y) ** 2).mean())


def _closeness(x: Any, y: Any) -> float:
    return -1.0 if y is None else -squared_error(x, y)


def _arrays(images: Any) -> list[np.ndarray]:
    import numpy as np

    if images is None:
        return []
    values = images.detach().cpu().numpy() if hasattr(images, "detach") else np.asarray(images)
    values = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=1.0, neginf=0.0)
    return list(values.clip(0, 1))
