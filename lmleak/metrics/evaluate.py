"""Any metric of Hugging Face `evaluate`, by hub id or local script (von Werra et al. 2022, arXiv:2210.01970).

    metrics: [{kind: evaluate, path: chrf, options: {word_order: 2}, keep: [score]}]

Loading a metric runs its script: name only what you trust. `path` of a hub id needs the network on first use.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict

from lmleak.errors import LmleakError
from lmleak.metrics._align import align, answers
from lmleak.metrics.rouge import _similarity

if TYPE_CHECKING:
    from lmleak.records import Reconstruction, Reference


class Config(BaseModel):
    """Which metric, and how to call it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str  #: hub id, or a local folder or .py file with the metric's script
    name: str | None = None  #: configuration of the metric, e.g. a GLUE task
    field: Literal["texts", "tokens"] = "texts"  #: what the metric compares
    nested: bool = False  #: pass each reference as a list of one, for metrics that take several references
    options: dict[str, Any] = {}  #: keyword arguments of the metric's compute()
    keep: list[str] | None = None  #: result names to keep; None keeps every number


def keys(config: Config) -> tuple[str, ...]:
    """Names of the values that `score` returns, where they are known without calling the metric."""
    return tuple(_key(config, name) for name in config.keep or ())


def prepare(config: Config) -> None:
    """Loads the metric.

    Raises:
        LmleakError: it cannot be loaded; the message says what works without a network.
    """
    _load(config.path, config.name)


def score(config: Config, reconstruction: Reconstruction, reference: Reference) -> dict[str, float | None]:
    """The metric over the batch's references and the answers assigned to them by ROUGE, each value as it came.

    Keys are `<metric>.<result>`, or the metric's name alone where the result bears the same name.

    Raises:
        LmleakError: the metric fails, or does not return what `keep` names.
    """
    texts = list(reference.texts)
    if not texts:
        return dict.fromkeys(keys(config))
    found = answers(reconstruction, reconstruction.texts, len(texts), "")
    tokens = answers(reconstruction, reconstruction.tokens, len(texts), ())
    order = align(list(enumerate(texts)), list(enumerate(found)), lambda a, b: _similarity(a[1], b[1]))
    predictions: list[Any] = [found[i] for i, _ in order]
    references: list[Any] = texts
    if config.field == "tokens":
        predictions, references = [list(tokens[i]) for i, _ in order], [list(each) for each in reference.tokens]
    if config.nested:
        references = [[each] for each in references]
    try:
        result = _load(config.path, config.name).compute(
            predictions=predictions, references=references, **config.options
        )
    except Exception as error:
        raise LmleakError(f"metric 'evaluate' with path '{config.path}': {type(error).__name__}: {error}") from error
    missing = set(config.keep or ()) - set(result)
    if missing:
        raise LmleakError(f"metric '{config.path}' returns {sorted(result)}, not {sorted(missing)}")
    return {
        _key(config, name): float(value)
        for name, value in result.items()
        if (name in config.keep if config.keep else _is_number(value))
    }


def _key(config: Config, name: str) -> str:
    metric = Path(config.path).stem
    return name if name == metric else f"{metric}.{name}"


def _is_number(value: Any) -> bool:
    import numpy as np

    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


@lru_cache(maxsize=8)
def _load(path: str, name: str | None) -> Any:
    import os

    import evaluate

    try:
        # The process number keeps the cache files of parallel processes apart.
        return evaluate.load(path, name, keep_in_memory=True, experiment_id=f"lmleak-{os.getpid()}")
    except Exception as error:
        local = Path(path).exists()
        way = "" if local else "; without a network give path: the folder or .py file of the metric's script"
        raise LmleakError(f"metric 'evaluate' cannot load path '{path}': {_first_line(error)}{way}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
