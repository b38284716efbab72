"""The schema that every text family shares: a `model:` block means the same whatever its kind."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Config(BaseModel):
    """Which weights, under which task, in which numerical setting."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    weights: str = Field(
        description="hub id, local folder, `package:NAME/PATH` (a folder inside an installed package), or `random`"
    )
    task: Literal["sequence-classification", "causal-lm", "masked-lm"] = "sequence-classification"
    num_labels: int = Field(2, ge=1, description="classes; used by sequence-classification only")
    config: dict[str, Any] = Field(
        default_factory=dict, description="fields of the Hugging Face config, e.g. hidden_size; for `weights: random`"
    )
    tokenizer: str | None = Field(
        None, description="hub id, folder, `package:NAME/PATH` or `bytes` (built in); default: the weights' own"
    )
    mode: Literal["eval", "train"] = Field("eval", description="the client's mode; train means dropout is on")
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2"] = Field(
        "eager", description="only eager has the double backward that gradient matching needs"
    )
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32"
    device: str | None = Field(None, description="default: accelerate's choice for this process")
