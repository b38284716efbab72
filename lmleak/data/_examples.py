"""What every data source returns: plain texts and integer labels, before any model is known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Examples:
    """A data source, read."""

    texts: tuple[str, ...]
    labels: tuple[int, ...] = ()  #: empty where the source has none (language modelling needs none)
    source: Mapping[str, Any] = field(default_factory=dict)  #: where it came from, for provenance and error messages
