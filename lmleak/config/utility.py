"""The recipe's `utility` block: what the models that the defenses are judged by are trained and tested on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from lmleak.config.schema import Problem, Select, block, check, short


class Utility(BaseModel):
    """The budget that every defense gets alike."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: int = Field(2, ge=1)
    batch_size: int = Field(64, ge=1, description="expected: each step draws every record with equal probability")
    lr: float = Field(5e-4, gt=0, description="of AdamW, falling linearly to 0")
    micro_batch: int = Field(32, ge=1, description="samples of one pass; bounds memory, changes nothing else")
    holdout: int = Field(1000, ge=1, description="records kept for the test where no `test` block is given")
    seeds: list[int] = Field([0, 1, 2], min_length=1, description="each draws a head, the batches and the noise anew")


def read_utility(raw: Any) -> tuple[dict[str, Any] | None, list[Problem]]:
    """The block with its data blocks resolved and defaults filled in; None where the recipe has none."""
    if raw is None:
        return None, []
    if not isinstance(raw, Mapping):
        return None, [Problem(("utility",), f"should be a mapping, not {short(raw)}")]
    rest = {name: value for name, value in raw.items() if name not in ("train", "test", "select")}
    made, problems = check(Utility, rest, ("utility",))
    out: dict[str, Any] = dict(made)
    if "train" not in raw:
        problems.append(Problem(("utility", "train"), "is missing: a data block with labels"))
    for name in ("train", "test"):
        out[name] = None
        if raw.get(name) is not None:
            given = {"kind": raw[name]} if isinstance(raw[name], str) else raw[name]
            out[name], found = block("data", given, ("utility", name))
            problems += found
    chosen = raw.get("select") or {}
    if not isinstance(chosen, Mapping):
        problems.append(Problem(("utility", "select"), f"should be a mapping, not {short(chosen)}"))
        chosen = {}
    out["select"], found = check(Select, chosen, ("utility", "select"))
    return out, problems + found
