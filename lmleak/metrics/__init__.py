"""Metrics: (Reconstruction, Reference) -> numbers, one set a batch. `summarise` turns batches into a Score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lmleak import registry
from lmleak.errors import LmleakError, did_you_mean
from lmleak.metrics._statistics import paired_difference, summarise

if TYPE_CHECKING:
    from types import ModuleType

    from lmleak.records import Reconstruction, Reference

__all__ = ["DEFAULT", "paired_difference", "prepare", "score", "summarise"]

DEFAULT = ("rouge", "token_accuracy", "exact_match")


def score(
    reconstruction: Reconstruction,
    reference: Reference,
    metrics: Sequence[str | Mapping[str, Any]] = DEFAULT,
) -> dict[str, float | None]:
    """Scores what an attack returned for one batch against the truth.

    A reconstruction whose status is not `ok` is no answer: every value is None, which is not the same as 0.

    Args:
        reconstruction: of the attack.
        reference: of the batch, special tokens and padding removed.
        metrics: kinds, or mappings of `kind` and its fields.

    Returns:
        metric key -> value in 0..1, None where it is undefined (ROUGE-2 of one word).

    Raises:
        LmleakError: an unknown metric, a field it does not have, or one that cannot be loaded.
    """
    scores: dict[str, float | None] = {}
    for asked in metrics:
        module, config = _resolve(asked)
        if reconstruction.status == "ok":
            scores |= module.score(config, reconstruction, reference)
        else:
            scores |= dict.fromkeys(module.keys(config))
    return scores


def prepare(metrics: Sequence[str | Mapping[str, Any]]) -> None:
    """Loads what the metrics need, so that what cannot be had is known before the first attack runs.

    Raises:
        LmleakError: as for `score`.
    """
    for asked in metrics:
        module, config = _resolve(asked)
        if hasattr(module, "prepare"):
            module.prepare(config)


def _resolve(asked: str | Mapping[str, Any]) -> tuple[ModuleType, Any]:
    from pydantic import ValidationError

    fields = {"kind": asked} if isinstance(asked, str) else dict(asked)
    kind = fields.pop("kind", None)
    if not isinstance(kind, str):
        raise LmleakError(f"metric {asked!r} has no 'kind' (there are: {', '.join(registry.kinds('metrics'))})")
    module = registry.load("metrics", kind)
    try:
        return module, module.Config(**fields)
    except ValidationError as error:
        wrong = error.errors()[0]
        key = ".".join(str(part) for part in wrong["loc"])
        near = did_you_mean(key, module.Config.model_fields) if wrong["type"] == "extra_forbidden" else ""
        raise LmleakError(f"metric '{kind}': {key}: {wrong['msg']}{near}") from error
