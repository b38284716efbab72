"""Measures: what a release says about one batch, computed on the client's side, without any attack.

A kind is a file with `Config`, `UNITS` (value -> what it is and in which unit) and

    measure(config, victim, batch, selection, defense, generator) -> Measurement

whose rows are the observed modules and `*`, all that is observed together. `defense` is a recipe's resolved block;
all randomness comes from `generator`. A measure that does not apply returns no rows and the reason. A kind with
`OVER_DATA = True` compares many batches: it gets a sequence of `Config.samples` of them in place of one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lmleak import registry

if TYPE_CHECKING:
    from lmleak.records import Batch, Measurement, Selection, Victim

__all__ = ["measure", "over_data", "units"]


def measure(
    victim: Victim,
    batch: Batch | Sequence[Batch],
    selection: Selection,
    kind: str = "dp_distinguishability",
    *,
    defense: Mapping[str, Any] | None = None,
    seed: int = 0,
    **fields: Any,
) -> Measurement:
    """Measures one batch's release, or with a kind that compares batches, those of many.

    Args:
        victim: the model; left as it was found.
        batch: the private data; a sequence where `over_data(kind)`.
        selection: what is observed, from `select`.
        kind: file of `lmleak.measures`.
        defense: `{"kind": ..., **fields}`; none by default.
        seed: of whatever the measure draws.
        fields: the measure's own.

    Raises:
        LmleakError: no such measure, a field it does not have, or one batch where it compares many.
    """
    from lmleak.errors import LmleakError
    from lmleak.models._fields import validated
    from lmleak.records import Batch
    from lmleak.seeds import generator

    module = registry.load("measures", kind)
    config = validated(module.Config, fields, f"measures.{kind}", LmleakError)
    block = dict(defense or {"kind": "none"})
    if over_data(kind) == isinstance(batch, Batch):
        raise LmleakError(f"measures.{kind}: takes {'a sequence of batches' if over_data(kind) else 'one batch'}")
    return module.measure(config, victim, batch, selection, block, generator(seed, "measure", kind))


def units(kind: str) -> Mapping[str, str]:
    """Value -> what it is and in which unit.

    Raises:
        LmleakError: no such measure.
    """
    return registry.load("measures", kind).UNITS


def over_data(kind: str) -> bool:
    """Whether a measure compares many batches.

    Raises:
        LmleakError: no such measure.
    """
    return getattr(registry.load("measures", kind), "OVER_DATA", False)
