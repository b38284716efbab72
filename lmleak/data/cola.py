"""CoLA: single sentences, acceptable (1) or not (0) (Warstadt et al., 2018, arXiv 1805.12471)."""

from __future__ import annotations

from lmleak.data._config import Published
from lmleak.data._examples import Examples
from lmleak.data._tables import from_hub, from_path


class Config(Published):
    """Which copy of CoLA, and how it is cut into batches."""


def load(config: Config) -> Examples:
    """Reads the local copy where one is named, else the hub's.

    The published tsv files come without a header line; both forms are read.
    """
    if config.path is not None:
        header = ["source", "label", "author_mark", "sentence"]
        return from_path(config.path, config.split, "sentence", "label", header=header)
    return from_hub("nyu-mll/glue", "cola", config.split, "sentence", "label")
