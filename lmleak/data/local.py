"""Local file: tsv, csv, jsonl or parquet, read through Hugging Face datasets without a network."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from lmleak.data._examples import Examples
from lmleak.data._tables import from_path


class Config(BaseModel):
    """Which file and columns, and how they are cut into batches."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str = Field(description="a file, or a folder with one file named after the split")
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
    """Reads `config.path`; a tsv is taken as unquoted, a csv as quoted."""
    return from_path(config.path, config.split, config.text_column, config.label_column)
