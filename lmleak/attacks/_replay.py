"""What a row-space attack would see at the true sentences: `replay` of its kinds, for the control of the same name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lmleak.attacks._applicability import COMPONENTS, Reading, read
from lmleak.attacks._rowspace import matrix, weights
from lmleak.gradients.losses import forward
from lmleak.records import Knowledge, Observation, Victim


def replay(
    config: Any, observation: Observation, knowledge: Knowledge, victim: Victim, tokens: tuple[tuple[int, ...], ...]
) -> dict[str, float]:
    """Misfits between the true inputs and what the observed gradients show; the worst of the observed modules.

    Args:
        config: of the attack; not used.
        observation: what was released.
        knowledge: not used.
        victim: the model; left as it was found.
        tokens: the true ids of every sentence, special ones included, without padding.

    Returns:
        `unexplained`: 1 - |G Q|^2 / |G|^2 with Q a basis of the true inputs, the share of the gradient that no output
        gradients could make of them: rounding where the release is exact, the noise's share where it is not. Where
        the spectrum has an edge also `outside`, the largest share of a true input outside the observed space, and
        `missed`, that of an observed direction outside the true inputs' span. Nothing where no linear module of a
        block is observed.
    """
    entries = weights(observation, component=COMPONENTS)
    if not entries:
        return {}
    inputs = _inputs(victim, [e.module for e in entries], tokens)
    worst: dict[str, float] = {}
    for entry in entries:
        one = read(victim, observation, entry)
        rows = [_rows(one, observation, x) for x in inputs[entry.module]]
        for name, value in _misfits(
            one, torch.cat(rows), matrix(victim.module, entry, observation.gradients[entry.name])
        ):
            worst[name] = max(value, worst.get(name, 0.0))
    return worst


def _misfits(one: Reading, rows: Tensor, gradient: Tensor) -> list[tuple[str, float]]:
    _, values, right = torch.linalg.svd(rows, full_matrices=False)
    span = right[values > values[0] * torch.finfo(torch.float32).eps]
    g = gradient.double()
    # |G - G Q Q^T|^2 and not 1 - |G Q|^2: the difference of two numbers near 1 would stop at 1e-16 of them.
    out = [("unexplained", float((g - g @ span.T @ span).square().sum() / g.square().sum().clamp_min(1e-300)))]
    if one.status == "ok":
        missed = one.space.basis - one.space.basis @ span.T @ span
        out += [("outside", float(one.space.residual(rows).max())), ("missed", float(missed.norm(dim=-1).max()))]
    return out


def _rows(one: Reading, observation: Observation, x: Tensor) -> Tensor:
    """What of a sentence's inputs [n, d] should lie in the space."""
    if observation.task == "causal-lm":
        x = x[:-1]
    if "the first" in one.shows:
        x = x[1:]
    return x - x.mean(0) if one.rows == "differences" else x


@torch.no_grad()
def _inputs(victim: Victim, names: list[str], tokens: tuple[tuple[int, ...], ...]) -> dict[str, list[Tensor]]:
    """Inputs [n, d] of the modules in float64, one a sentence, in evaluation mode."""
    module, seen = victim.module, {name: [] for name in names}  # type: ignore[var-annotated]
    modes = {m: m.training for m in module.modules()}
    device = module.get_input_embeddings().weight.device
    handles = [
        module.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0][0]))
        for name in seen
    ]
    first = getattr(victim.family, "first_position", None)
    try:
        module.eval()
        for row in tokens:
            ids = torch.tensor([row], device=device)
            places = torch.arange(len(row), device=device)[None] + (first(module) if first else 0)
            given = {} if victim.kind == "distilbert" else {"position_ids": places}
            forward(module, {"input_ids": ids, "attention_mask": torch.ones_like(ids), **given})
    finally:
        for handle in handles:
            handle.remove()
        for m, training in modes.items():
            m.training = training
    return {name: [x.double() for x in rows] for name, rows in seen.items()}
