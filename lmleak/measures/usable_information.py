"""Usable information of a module's gradient about an attribute or the input, in bits (adapted from arXiv 2105.13929).

Mo et al. (2021, arXiv 2105.13929) measure, layer by layer, what a family of predictors can read off a gradient: V-
information (Xu et al., 2020, arXiv 2002.10689). Only their abstract was at hand: families, projections and the null
here are our own. A classifier, or for the input a ridge regression, is fitted to the gradients of other batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from lmleak.errors import LmleakError
from lmleak.measures._attributes import Attributed
from lmleak.records import Measurement

if TYPE_CHECKING:
    import torch

    from lmleak.records import Batch, Selection, Victim

EXAMPLE = {"samples": 24, "folds": 2, "null": 0, "width": 16}
OVER_DATA = True
UNITS = {
    "usable_information": "bits that the family reads off the gradient, held out",
    "low": "bits: lower end of the 95 % interval over samples",
    "high": "bits: upper end of the 95 % interval over samples",
    "share": "of the attribute's entropy, 0..1; None for the input, whose entropy is not known",
    "null": "bits read when labels are shuffled, mean over shuffles",
    "null_high": "bits: highest upper end of a shuffle's own 95 % interval",
}
Read = tuple[float, float, float]  #: bits, and their interval


class Config(Attributed):
    """About what, and by which family.

    The input is a sentence's mean word embedding in 16 principal components, or an image in 4 x 4 blocks a channel.
    """

    about: Literal["attribute", "input"] = "attribute"
    family: Literal["logistic", "mlp", "forest"] = "logistic"
    null: int = Field(3, ge=0, description="shuffles of the labels")


def measure(
    config: Config,
    victim: Victim,
    batches: Sequence[Batch],
    selection: Selection,
    defense: Mapping[str, Any],
    generator: torch.Generator,
) -> Measurement:
    """Bits by observed module; the details say how far the attribute is the task label by another name (Cramer's V).

    Rows have None where a module's gradients are all the same. No rows where the data lacks the attribute, or has too
    few of one class for the folds.
    """
    from lmleak.measures import _attributes, _probe, _sketch
    from lmleak.seeds import drawn

    seed = drawn(generator)
    draw = np.random.default_rng(seed)
    try:
        if config.about == "input":
            classes, target = None, _inputs(victim, batches)
            found = _sketch.sketches(config, victim, batches, selection, defense, seed)
            entropy = None
        else:
            target, found = _sketch.labelled(config, victim, batches, selection, defense, seed)
            classes, shares = target, np.bincount(target) / len(target)
            entropy = -float((shares * np.log2(shares)).sum())
        read = _of_input if classes is None else _of_class
        shuffled = [draw.permutation(target) for _ in range(config.null)]
        rows: dict[str, dict[str, float | None]] = {}
        for row, features in found.items():
            if _probe.constant(features):
                rows[row] = dict.fromkeys(UNITS)
                continue
            bits, low, high = read(features, target, config, seed)
            nulls = [read(features, other, config, seed) for other in shuffled]
            rows[row] = {
                "usable_information": bits,
                "low": low,
                "high": high,
                "share": bits / entropy if entropy else None,
                "null": float(np.mean([bits for bits, _, _ in nulls])) if nulls else None,
                "null_high": max(high for _, _, high in nulls) if nulls else None,
            }
    except LmleakError as error:
        return Measurement({}, str(error))
    return Measurement(rows, details=_attributes.facts(config, batches, classes))


def _of_class(features: np.ndarray, y: np.ndarray, config: Config, seed: int) -> Read:
    from lmleak.measures import _probe

    bits = _probe.crossfit(features, y, config.family, config.folds, seed).bits(y)
    return float(bits.mean()), *_probe.interval(lambda rows: float(bits[rows].mean()), len(bits), seed)


def _of_input(features: np.ndarray, target: np.ndarray, config: Config, seed: int) -> Read:
    """D/2 log2(error of the mean / error of the decoder): the information of a Gaussian decoder of equal error."""
    from lmleak.measures import _probe

    error, spread = _probe.decoded(features, target, config.folds, seed)

    def bits(rows: np.ndarray) -> float:
        # A constant decoder is in the family: what reads nothing scores 0, not below.
        return max(0.0, target.shape[1] / 2 * float(np.log2(spread[rows].mean() / error[rows].mean())))

    return bits(np.arange(len(target))), *_probe.interval(bits, len(target), seed)


def _inputs(victim: Victim, batches: Sequence[Batch]) -> np.ndarray:
    """What is to be decoded, [n, dims], of each batch's first sample; every dimension at the same scale."""
    import torch
    import torch.nn.functional as F

    if batches[0].reference.images is not None:
        images = torch.stack([batch.reference.images[0] for batch in batches])
        rows = F.adaptive_avg_pool2d(images.float(), 4).flatten(1)
    else:
        words = victim.module.get_input_embeddings().weight.detach().float().cpu()
        rows = torch.stack([words[list(batch.reference.tokens[0])].mean(0) for batch in batches])
        rows = rows - rows.mean(0)
        _, _, right = torch.linalg.svd(rows, full_matrices=False)
        rows = rows @ right[:16].T
    rows = rows - rows.mean(0)
    scale = rows.std(0)
    return (rows[:, scale > 0] / scale[scale > 0]).double().numpy()
