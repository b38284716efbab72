"""Fields of a published data set: which copy of it, and how it is cut into batches."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Published(BaseModel):
    """A data set with known columns, from the hub or from a local copy."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str | None = Field(None, description="a local tsv, csv, jsonl or parquet copy; default: the hub's")
    split: str = Field("train", description="with an optional slice: train[:100]")
    batch_size: int = Field(1, ge=1)
    limit: int | None = Field(None, ge=1, description="sentences, counted before batching")
    shuffle: bool = True
    max_length: int | None = Field(None, ge=1, description="tokens a sentence is cut to, special tokens included")
    min_tokens: int | None = Field(None, ge=1, description="leaves out sentences with fewer tokens")
    max_tokens: int | None = Field(None, ge=1, description="leaves out sentences with more tokens")
