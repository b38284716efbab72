"""Hugging Face data set by id; honours HF_HOME and HF_HUB_OFFLINE."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from lmleak.data._examples import Examples
from lmleak.data._tables import from_hub


class Config(BaseModel):
    """Which data set and columns, and how they are cut into batches."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str = Field(description="hub id, e.g. cornell-movie-review-data/rotten_tomatoes")
    name: str | None = Field(None, description="configuration, e.g. cola of nyu-mll/glue")
    split: str = Field("train", description="with an optional slice: train[:100]")
    text_column: str | None = Field(None, description="default: the only plausible one, else an error that lists all")
    label_column: str | None = Field(None, description="default: the column named label, if there is one")
    batch_size: int = Field(1, ge=1)
    limit: int | None = Field(None, ge=1, description="sentences, counted before batching")
    shuffle: bool = True
    max_length: int | None = Field(None, ge=1, description="tokens a sentence is cut to, special tokens included")
    min_tokens: int | None = Field(None, ge=1, description="leaves out sentences with fewer tokens")
    max_tokens: int | None = Field(None, ge=1, description="leaves out sentences with more tokens")


def load(config: Config) -> Examples:
    """Reads the hub's copy, or the cached one where there is no network."""
    return from_hub(config.id, config.name, config.split, config.text_column, config.label_column)
