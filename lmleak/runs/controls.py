"""Controls: what an attack scores where it cannot have read this batch, and what it would see at the truth.

`wrong_update`: everything is this batch's but the gradient, which is the next batch's. `no_gradient`: each observed
tensor is Gaussian noise of its norm, so that only the attack's prior and what it is granted can score. `replay`: no
attack runs; its own measure of a candidate is taken at the true input, which tells a search that failed from a
gradient that does not show the sentence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lmleak import registry
from lmleak.records import Reconstruction

if TYPE_CHECKING:
    from lmleak.records import Batch, Knowledge, Observation, Victim


def other(index: int, count: int) -> int:
    """The batch whose gradient takes this one's place."""
    return (index + 1) % count


def without_gradient(observation: Observation, seed: int) -> Observation:
    """Noise in place of every observed tensor. Its norm stays, or an attack would notice by the scale alone."""
    import torch

    draw = torch.Generator().manual_seed(seed)
    made = {}
    for name, gradient in observation.gradients.items():
        noise = torch.randn(gradient.shape, generator=draw, dtype=torch.float64)
        norm = gradient.double().norm()
        made[name] = (noise.to(gradient.device) * (norm / noise.norm())).to(gradient.dtype)
    return replace(observation, gradients=made)


def replay(
    attack: Mapping[str, Any], observation: Observation, knowledge: Knowledge, victim: Victim, batch: Batch
) -> Reconstruction:
    """The attack's measure at the true input, in `details`; not applicable where the attack offers none.

    An attack offers it by `replay(config, observation, knowledge, victim, tokens) -> dict[str, float]`; `tokens` are
    the true ids of every sentence, special ones included. It runs on the client's side: no attack gets its result.
    """
    fields = dict(attack)
    kind = fields.pop("kind")
    module = registry.load("attacks", kind)
    if "input_ids" not in batch.inputs:
        return Reconstruction(status="not_applicable", reason="attacks on images have no measure at the true input yet")
    if not hasattr(module, "replay"):
        why = f"'{kind}' has no measure of its own to take at the true input"
        return Reconstruction(status="not_applicable", reason=why)
    ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"].bool()
    tokens = tuple(tuple(row[kept].tolist()) for row, kept in zip(ids, mask, strict=True))
    measured = module.replay(module.Config(**fields), observation, knowledge, victim, tokens)
    if not measured:
        why = "no observed module has a measure at the true input"
        return Reconstruction(status="not_applicable", reason=why)
    return Reconstruction(details={"replay": measured})
