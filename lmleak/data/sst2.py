"""SST-2: phrases of film reviews, positive (1) or negative (0) (Socher et al., 2013, ACL anthology D13-1170)."""

from __future__ import annotations

from lmleak.data._config import Published
from lmleak.data._examples import Examples
from lmleak.data._tables import from_hub, from_path


class Config(Published):
    """Which copy of SST-2, and how it is cut into batches."""


def load(config: Config) -> Examples:
    """Reads the local copy where one is named, else the hub's."""
    if config.path is not None:
        return from_path(config.path, config.split, "sentence", "label")
    return from_hub("nyu-mll/glue", "sst2", config.split, "sentence", "label")
