"""Latent attributes: what a sample's gradient may tell beside its task label. The client's side alone knows them."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from lmleak.errors import LmleakError, did_you_mean
from lmleak.records import Batch

_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?")


class Attributed(BaseModel):
    """Fields of every measure that asks about an attribute."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    attribute: str = Field("label", description="label; length, name (texts); brightness (images)")
    positive: tuple[int, ...] | None = Field(
        None, description="labels that count as 1, all others as 0: [2, 3, 4, 5, 6, 7] are CIFAR-10's animals"
    )
    task_label: int | None = Field(
        None, ge=0, description="class the client trains on in place of the data's labels, which are then latent"
    )
    samples: int = Field(300, ge=8, description="batches whose gradients are taken, from the recipe's data")
    width: int = Field(256, ge=4, description="features that each parameter's gradient is projected to")
    folds: int = Field(5, ge=2, le=20)
    view: Literal["gradient", "gram"] = Field(
        "gradient", description="gram: of G^T G, which shows the inputs' space whatever the sign of the loss's slope"
    )


def values(config: Attributed, batches: Sequence[Batch]) -> np.ndarray:
    """The attribute of each batch's first sample: [n] of 0, 1, ...

    In a larger batch the others are company that hides it: what aggregation does to a sample is seen that way.

    Raises:
        LmleakError: the data has no such attribute, or all samples have the same.
    """
    if config.attribute not in _KNOWN:
        raise LmleakError(f"measures: no attribute '{config.attribute}'{did_you_mean(config.attribute, list(_KNOWN))}")
    found = _KNOWN[config.attribute](batches)
    if config.attribute == "label" and config.positive is not None:
        found = np.isin(found, config.positive).astype(int)
    if len(set(found.tolist())) < 2:
        raise LmleakError(
            f"measures: every sample's attribute '{config.attribute}' is {found[0]}: nothing is to be told apart"
        )
    return found


def facts(config: Attributed, batches: Sequence[Batch], y: np.ndarray | None) -> dict[str, Any]:
    """What a reader must know of the sample: its size, the classes, and their association with the task label."""
    if y is None:
        return {"samples": len(batches)}
    labels = batches[0].reference.labels
    task = [batch.reference.labels[0] for batch in batches] if labels and config.task_label is None else [0] * len(y)
    return {
        "samples": len(batches),
        "classes": np.bincount(y).tolist(),
        "association_with_task_label": association(y.tolist(), task),
    }


def association(a: Sequence[int], b: Sequence[int]) -> float | None:
    """Cramer's V of two classes, 0..1: whether an attribute is only the task label by another name.

    None where one of them is constant.
    """
    pairs, rows, columns, n = Counter(zip(a, b, strict=True)), Counter(a), Counter(b), len(a)
    few = min(len(rows), len(columns)) - 1
    if few < 1:
        return None
    chi2 = sum(
        (pairs[i, j] - rows[i] * columns[j] / n) ** 2 / (rows[i] * columns[j] / n) for i in rows for j in columns
    )
    return math.sqrt(chi2 / n / few)


def _labels(batches: Sequence[Batch]) -> np.ndarray:
    if not batches[0].reference.labels:
        raise LmleakError("measures: the data has no labels to take as attribute (a language model's data has none)")
    return np.array([batch.reference.labels[0] for batch in batches])


def _texts(batches: Sequence[Batch]) -> list[str]:
    if not batches[0].texts:
        raise LmleakError("measures: only texts have this attribute")
    return [batch.texts[0] for batch in batches]


def _length(batches: Sequence[Batch]) -> np.ndarray:
    """1 for texts of more tokens than the median."""
    _texts(batches)
    return _upper(np.array([len(batch.reference.tokens[0]) for batch in batches]))


def _name(batches: Sequence[Batch]) -> np.ndarray:
    """1 for texts with a proper name: a word that stands capitalised inside a sentence and nowhere in lower case."""
    texts = [_WORD.findall(text) for text in _texts(batches)]
    inside = {word for words in texts for word in words[1:] if word[0].isupper() and not word.isupper()}
    lower = {word for words in texts for word in words if word.islower()}
    names = {word for word in inside if word.lower() not in lower and word.split("'")[0] != "I"}
    return np.array([int(any(word in names for word in words)) for words in texts])


def _brightness(batches: Sequence[Batch]) -> np.ndarray:
    """1 for images brighter than the median."""
    if batches[0].reference.images is None:
        raise LmleakError("measures: only images have a brightness")
    return _upper(np.array([float(batch.reference.images[0].mean()) for batch in batches]))


def _upper(numbers: np.ndarray) -> np.ndarray:
    """1 above the median; from it on where nothing lies above."""
    middle = np.median(numbers)
    return (numbers > middle if (numbers > middle).any() else numbers >= middle).astype(int)


_KNOWN: dict[str, Callable[[Sequence[Batch]], np.ndarray]] = {
    "label": _labels,
    "length": _length,
    "name": _name,
    "brightness": _brightness,
}
