"""Tokens, and for one sample their order, from the embedding's gradient rows (after Melis et al. 2019, 1805.04049).

A word's row of the embedding gradient is the sum of the output gradients at the places where it stands, a position's
row is that at one place. Where both tables are observed for one sample, the rows are equal: the order is exact.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from lmleak.attacks._applicability import Reading
from lmleak.attacks._text import refuse, sentence
from lmleak.records import Knowledge, Observation, Reconstruction, Victim

# Rows of absent words are exactly zero where the table is not tied; where it is tied to the output layer the step
# between present and absent words is searched. No step of 3 means no answer.
STEP = 3.0
REPEATS = 5  #: a word may stand at up to this many places and still be ordered
#: An easy case, for the contract tests.
EXAMPLE = {"fields": {}, "select": {"components": ["embedding"]}, "knowledge": {}, "batch_size": 1}


class Config(BaseModel):
    """Nothing to set."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def attack(
    config: Config,
    observation: Observation,
    knowledge: Knowledge,
    victim: Victim,
    generator: torch.Generator,
    progress: Callable[[str], None],
) -> Reconstruction:
    """Reads which words occurred, and where, off the rows of the embedding gradients."""
    words = places = None
    table = victim.module.get_input_embeddings()
    for entry in observation.entries:
        owner = victim.module.get_submodule(entry.module)
        if owner is table:
            words = observation.gradients[entry.name].double()
        elif isinstance(owner, nn.Embedding) and "position" in entry.module.lower().replace("wpe", "position"):
            places = observation.gradients[entry.name].double()
    if words is None:
        return refuse("not_applicable", "needs the gradient of the token embedding")
    norms = words.norm(dim=1)
    if not float(norms.max()) > 0:
        return refuse("no_signal", "the embedding's gradient is zero")
    present, step = _present(norms)
    if step < STEP:
        return refuse(
            "no_signal", f"present and absent words do not part (largest step {step:.2f}): noise, or tied weights"
        )
    details: dict[str, Any] = {"words": len(present), "step": min(step, 1e18)}
    confidence = 1.0 - 1.0 / step
    # A table tied to the output layer has no zero rows, and its rows hold more than the sums of positions' rows.
    if places is not None and observation.batch_size == 1 and step == float("inf"):
        order = _order(words, places, present)
        if order is not None:
            return sentence(victim, [order], [confidence], details | {"order": "from the position embedding's rows"})
    details["order"] = "unknown: rows of the token embedding show words, not places"
    # A bag of words belongs to no sentence in particular; each is given all of it.
    return sentence(victim, [present] * observation.batch_size, [confidence / 2] * observation.batch_size, details)


def reads(reading: Reading, victim: Victim, observation: Observation) -> bool:
    """Whether it is the token embedding, and present and absent words part."""
    entry = reading.entries[0]
    if victim.module.get_submodule(entry.module) is not victim.module.get_input_embeddings():
        return False
    norms = observation.gradients[entry.name].double().norm(dim=1)
    return float(norms.max()) > 0 and _present(norms)[1] >= STEP


def _present(norms: Tensor) -> tuple[list[int], float]:
    """Words above the largest relative step of the sorted row norms, and the step."""
    values, order = norms.sort(descending=True)
    nonzero = int((values > 0).sum())
    if nonzero < len(values):
        return order[:nonzero].tolist(), float("inf")
    # Fewer than half of the vocabulary occurs in a batch; the smallest norms may differ by any factor.
    steps = values[: len(values) // 2] / values[1 : len(values) // 2 + 1]
    count = int(steps.argmax()) + 1
    return order[:count].tolist(), float(steps[count - 1])


def _order(words: Tensor, places: Tensor, present: list[int]) -> list[int] | None:
    """The sentence, if every present word's row is the sum of some positions' rows, each position used once."""
    length = int((places.norm(dim=1) > 0).nonzero().max()) + 1 if float(places.abs().max()) > 0 else 0
    free = [p for p in range(length) if float(places[p].norm()) > 0]
    scale = places[free].norm(dim=1).max() if free else 0.0
    out: dict[int, int] = {}
    waiting = list(present)
    for repeats in range(1, REPEATS + 1):
        for word in list(waiting):
            for group in combinations(free, repeats):
                if float((words[word] - places[list(group)].sum(0)).norm()) < 1e-4 * float(scale):
                    out.update(dict.fromkeys(group, word))
                    free = [p for p in free if p not in group]
                    waiting.remove(word)
                    break
    return [out[p] for p in sorted(out)] if not waiting and not free else None
