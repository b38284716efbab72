"""The recipe's `train` block: what the model is trained on before its gradients are taken."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from lmleak.config.schema import Problem, block, check, short


class Train(BaseModel):
    """Plain training of every weight, without any defense; its state is part of what the attacker knows."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: int = Field(1, ge=0, description="0: the model as its block says")
    batch_size: int = Field(32, ge=1)
    lr: float = Field(5e-5, gt=0, description="of AdamW, falling linearly to 0")


def read_train(raw: Any) -> tuple[dict[str, Any], list[Problem]]:
    """The block with its data resolved and defaults filled in."""
    if not isinstance(raw, Mapping):
        return {}, [Problem(("train",), f"should be a mapping, not {short(raw)}")]
    made, problems = check(Train, {name: value for name, value in raw.items() if name != "data"}, ("train",))
    if "data" not in raw:
        return {}, [*problems, Problem(("train", "data"), "is missing: a data block to train on")]
    given = {"kind": raw["data"]} if isinstance(raw["data"], str) else raw["data"]
    data, found = block("data", given, ("train", "data"))
    return {**made, "data": data}, problems + found
