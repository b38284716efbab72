"""SST-2: phrases of film reviews, positive (1) or negative (0) (Socher et al., 2013, ACL anthology D13-1170)."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from lmleak.data._examples import Examples
from lmleak.data._tables import from_hub, from_path


class Config(BaseModel):
    """Which copy of SST-2, and how it is cut into batches."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str | None = Field(None, description="a local tsv, csv, jsonl or parquet copy; default: the hub's")
    split: str = Field("train", description="with an optional slice: train[:100]")
    batch_size: int = Field(1, ge=1)
    limit: int | None = Field(None, ge=1, description="sentences, counted before batching")
    shuffle: bool = True
    max_length: int | None = Field(None, ge=1, description="tokens a sentence is cut to, special tokens included")
    min_tokens: int | None = Field(None, ge=1, description="leaves out sentences with fewer tokens")
    max_tokens: int | None = Field(None, ge=1, description="leaves out sentences with more tokens")


def load(config: Config) -> Examples:
    """Reads the local copy where one is named, else the hub's."""
    if config.path is not None:
        return from_path(config.path, config.split, "sentence", "label")
    return from_hub("nyu-mll/glue", "sst2", config.split, "sentence", "label")
