"""The attack that usable information predicts: an attribute guessed from a gradient (Mo et al., arXiv 2105.13929).

Property inference from updates is Melis et al.'s (2019, arXiv 1805.04049): the attacker has data of the same kind,
computes gradients of it, and fits a classifier.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lmleak.errors import LmleakError
from lmleak.measures._attributes import Attributed
from lmleak.records import Measurement

if TYPE_CHECKING:
    import torch

    from lmleak.records import Batch, Selection, Victim

EXAMPLE = {"samples": 24, "folds": 2, "width": 16}
OVER_DATA = True
UNITS = {
    "accuracy": "share of held-out samples whose attribute is guessed, 0..1",
    "low": "accuracy: lower end of the 95 % interval over samples",
    "high": "accuracy: upper end of the 95 % interval over samples",
    "auc": "chance that a sample with the attribute is ranked above one without, 0..1; classes one against the rest",
    "majority": "accuracy of always guessing the largest class",
}


class Config(Attributed):
    """Which attribute, and by which family."""

    family: Literal["logistic", "mlp", "forest"] = "logistic"


def measure(
    config: Config,
    victim: Victim,
    batches: Sequence[Batch],
    selection: Selection,
    defense: Mapping[str, Any],
    generator: torch.Generator,
) -> Measurement:
    """Accuracy and AUC by observed module; None where a module's gradients are all the same."""
    from lmleak.measures import _attributes, _probe, _sketch
    from lmleak.seeds import drawn

    seed = drawn(generator)
    rows: dict[str, dict[str, float | None]]
    try:
        y, found = _sketch.labelled(config, victim, batches, selection, defense, seed)
        rows = {
            row: dict.fromkeys(UNITS) if _probe.constant(features) else _guessed(features, y, config, seed)
            for row, features in found.items()
        }
    except LmleakError as error:
        return Measurement({}, str(error))
    return Measurement(rows, details=_attributes.facts(config, batches, y))


def _guessed(features: np.ndarray, y: np.ndarray, config: Config, seed: int) -> dict[str, float | None]:
    from sklearn.metrics import roc_auc_score

    from lmleak.measures import _probe

    chances = _probe.crossfit(features, y, config.family, config.folds, seed).probabilities
    right = chances.argmax(1) == y
    low, high = _probe.interval(lambda rows: float(right[rows].mean()), len(y), seed)
    binary = chances.shape[1] == 2
    return {
        "accuracy": float(right.mean()),
        "low": low,
        "high": high,
        "auc": float(roc_auc_score(y, chances[:, 1] if binary else chances, multi_class="ovr")),
        "majority": float(np.bincount(y).max() / len(y)),
    }
