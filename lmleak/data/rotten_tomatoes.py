"""Rotten Tomatoes: sentences of film reviews, positive (1) or not (0) (Pang and Lee, 2005, arXiv cs/0506075)."""

from __future__ import annotations

from lmleak.data._config import Published
from lmleak.data._examples import Examples
from lmleak.data._tables import from_hub, from_path


class Config(Published):
    """Which copy of Rotten Tomatoes, and how it is cut into batches."""


def load(config: Config) -> Examples:
    """Reads the local copy where one is named, else the hub's.

    Sorted by label in most copies, so leave `shuffle` on.
    """
    if config.path is not None:
        return from_path(config.path, config.split, None, "label")
    return from_hub("cornell-movie-review-data/rotten_tomatoes", None, config.split, "text", "label")
