"""Measures: what a release says about one batch, computed on the client's side, without any attack.

A kind is a file with `Config`, `UNITS` (value -> what it is and in which unit) and

    measure(config, victim, batch, selection, defense, generator) -> Measurement

whose rows are the observed modules and `*`, all that is observed together. `defense` is a recipe's resolved block;
all randomness comes from `generator`. A measure that does not apply returns no rows and the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lmleak import registry

if TYPE_CHECKING:
    from lmleak.records import Batch, Measurement, Selection, Victim

__all__ = ["measure", "units"]


def measure(
    victim: Victim,
    batch: Batch,
    selection: Selection,
    kind: str = "dp_distinguishability",
    *,
    defense: Mapping[str, Any] | None = None,
    seed: int = 0,
    **fields: Any,
) -> Measurement:
    """Measures one batch's release.

    Args:
        victim: the model; left as it was found.
        batch: the private data.
        selection: what is observed, from `select`.
        kind: file of `lmleak.measures`.
        defense: `{"kind": ..., **fields}`; none by default.
        seed: of whatever the measure draws.
        fields: the measure's own.

    Raises:
        LmleakError: no such measure, or a field it does not have.
    """
    from lmleak.errors import LmleakError
    from lmleak.models._fields import validated
    from lmleak.seeds import generator

    module = registry.load("measures", kind)
    config = validated(module.Config, fields, f"measures.{kind}", LmleakError)
    block = dict(defense or {"kind": "none"})
    return module.measure(config, victim, batch, selection, block, generator(seed, "measure", kind))


def units(kind: str) -> Mapping[str, str]:
    """Value -> what it is and in which unit.

    Raises:
        LmleakError: no such measure.
    """
    return registry.load("measures", kind).UNITS
