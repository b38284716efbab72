"""Labels alone, off the classifier's last layer (iDLG 2001.02610; Yin et al. 2021, 2104.07586; Wainakh 2105.09369)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from pydantic import BaseModel, ConfigDict, Field

from lmleak.attacks._labels import Strategy, recover_labels
from lmleak.records import Knowledge, Observation, Reconstruction, Victim

IMAGES = True  #: reads pictures' labels too
#: An easy case, for the contract tests.
EXAMPLE = {"fields": {}, "select": {"components": ["head"]}, "knowledge": {}, "batch_size": 4, "answer": "labels"}


class Config(BaseModel):
    """How."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    strategy: Strategy = Field("best", description="see `recover_labels`")


def attack(
    config: Config,
    observation: Observation,
    knowledge: Knowledge,
    victim: Victim,
    generator: torch.Generator,
    progress: Callable[[str], None],
) -> Reconstruction:
    """Reads the batch's labels; neither texts nor pictures. See `recover_labels`."""
    found = recover_labels(observation, victim, config.strategy)
    if isinstance(found, Reconstruction):
        return found
    return Reconstruction(labels=found, details={"strategy": config.strategy})
