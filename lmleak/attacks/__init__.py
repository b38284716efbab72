"""(Observation, Knowledge, public model) -> Reconstruction. No batch comes in here."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lmleak import registry
from lmleak.records import Knowledge, Observation, Reconstruction, Victim

if TYPE_CHECKING:
    Progress = Callable[[str], None]

__all__ = ["attack"]


def attack(
    observation: Observation,
    victim: Victim,
    kind: str = "span",
    *,
    knowledge: Knowledge | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    **fields: Any,
) -> Reconstruction:
    """Runs one attack on released gradients.

    Args:
        observation: what the attacker sees; not altered.
        victim: the public model; left as it was found.
        kind: file of `lmleak.attacks`; `lmleak ls attacks` lists them.
        knowledge: what the threat model grants; nothing but the tokenizer's special tokens by default.
        seed: of everything random in the attack.
        progress: called with the best text so far.
        fields: the attack's own settings, e.g. `steps=400`.

    Raises:
        LmleakError: no such kind.
        pydantic.ValidationError: a field that the kind does not have, or out of range.
    """
    from lmleak.seeds import generator

    module = registry.load("attacks", kind)
    config = module.Config(**fields)
    if victim.task == "image-classification" and not hasattr(module, "IMAGES"):
        return Reconstruction(status="not_applicable", reason=f"'{kind}' reads text, and this model reads images")
    return module.attack(
        config,
        observation,
        knowledge or Knowledge(),
        victim,
        generator(seed, "attack"),
        progress or (lambda text: None),
    )
