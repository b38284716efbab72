"""Rank and norm of every observed gradient: how many inputs it holds, and how much of the model's gradient it is.

A linear module's gradient sum_i delta_i^T x_i has one direction an input that carries gradient (Petrov et al., 2024,
arXiv 2405.15586, read tokens off it): rank 1 shows one mixture, rank n shows the space of n inputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from lmleak.records import Measurement

if TYPE_CHECKING:
    import torch

    from lmleak.records import Batch, Selection, Victim

EXAMPLE: dict[str, Any] = {}
UNITS = {
    "norm_share": "share of the model's squared gradient norm, 0..1, before any defense",
    "norm": "gradient norm of the batch, before any defense",
    "rank": "directions above rounding or noise in what is released, the largest of the module's weights; "
    "0 where no edge stands out; None without a weight matrix",
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
    """Norms of the client's gradient and ranks of what is released, by observed module."""
    from lmleak.attacks._rowspace import matrix, row_space
    from lmleak.gradients import observe
    from lmleak.gradients.observe import ClientGradients, whole_model
    from lmleak.measures._release import ALL, modules
    from lmleak.seeds import drawn

    seed = drawn(generator)
    every = whole_model(victim.module)
    dense = ClientGradients(victim, batch, (*every, *selection.entries), seed).mean()
    squares = {name: float(gradient.double().square().sum()) for name, gradient in dense.items()}
    total = sum(squares[entry.name] for entry in every)
    released = observe(victim, batch, selection, defense, seed).gradients
    ranks = {
        entry.name: float(row_space([matrix(victim.module, entry, released[entry.name])]).rank)
        for entry in selection.entries
        if len(entry.shape) > 1 and entry.component != "embedding"
    }
    rows: dict[str, dict[str, float | None]] = {}
    for name, entries in modules(selection.entries).items():
        square = sum(squares[entry.name] for entry in entries)
        found = [ranks[entry.name] for entry in entries if entry.name in ranks]
        rows[name] = {
            "norm_share": square / total if total else None,
            "norm": math.sqrt(square),
            "rank": max(found) if (found and name != ALL) or len(found) == 1 else None,
        }
    return Measurement(rows)
