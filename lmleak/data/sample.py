"""Built-in sample: short English sentences, private (1) or everyday (0), written for lmleak; no network, no file.

Names, numbers and places are invented. They are there so that a leak is visible to the eye.
"""

from __future__ import annotations

import csv
from importlib import resources
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from lmleak.data._examples import Examples


class Config(BaseModel):
    """Which part of the sample, and how it is cut into batches."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    split: Literal["train"] = Field("train", description="the sample has one split")
    batch_size: int = Field(1, ge=1)
    limit: int | None = Field(None, ge=1, description="sentences, counted before batching")
    shuffle: bool = True
    max_length: int | None = Field(None, ge=1, description="tokens a sentence is cut to, special tokens included")
    min_tokens: int | None = Field(None, ge=1, description="leaves out sentences with fewer tokens")
    max_tokens: int | None = Field(None, ge=1, description="leaves out sentences with more tokens")


def load(config: Config) -> Examples:
    """The sample in the order of its file."""
    text = resources.files("lmleak.data").joinpath("sample.tsv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE))
    return Examples(
        texts=tuple(row["sentence"] for row in rows),
        labels=tuple(int(row["label"]) for row in rows),
        source={"kind": "sample", "rows": len(rows)},
    )
