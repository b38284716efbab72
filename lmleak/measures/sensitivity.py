"""Sensitivity of a module's gradient to the input: the Frobenius norm of its Jacobian (adapted from arXiv 2105.13929).

Mo et al. (2021, arXiv 2105.13929) rank layers by |d g / d x|. The Jacobian is never formed: for random signs v,
E |grad_x <g, v>|^2 = |J|_F^2 (Hutchinson, 1990), so one double backward of K copies of a sample gives K estimates.
x are the word embeddings of a text, or the normalised pixels of an image. A defense changes none of these numbers
but `over_noise`: they are of the gradient it is given.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from lmleak.errors import LmleakError
from lmleak.records import Measurement

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from torch import Tensor, nn

    from lmleak.gradients.factors import Factor
    from lmleak.records import Batch, Entry, Selection, Victim

EXAMPLE = {"draws": 4}
UNITS = {
    "sensitivity": "|J|_F, gradient units a unit of input, of the batch's mean gradient",
    "stderr": "its standard error over the draws",
    "per_parameter": "|J|_F over the root of the number of parameters",
    "per_entry": "|J|_F over the root of parameters times inputs: the typical entry of J",
    "over_noise": "|J|_F over the noise's standard deviation; None without Gaussian noise",
}


class Config(BaseModel):
    """How many estimates."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    draws: int = Field(16, ge=2, description="random sign vectors, all in one pass")


def measure(
    config: Config,
    victim: Victim,
    batch: Batch,
    selection: Selection,
    defense: Mapping[str, Any],
    generator: torch.Generator,
) -> Measurement:
    """Norms by observed module; of all together the root of the sum of squares.

    No rows where samples interact (BatchNorm in train mode) or the attention has no double backward.
    """
    import torch

    from lmleak.defenses import gaussian
    from lmleak.gradients import factors
    from lmleak.gradients.losses import model_losses
    from lmleak.gradients.observe import client_mode
    from lmleak.measures._release import ALL, modules, shares
    from lmleak.seeds import drawn

    reason = _hindrance(victim, selection.entries)
    if reason:
        return Measurement({}, reason)
    rows = {name: found for name, found in modules(selection.entries).items() if name != ALL}
    squares = {name: torch.zeros(config.draws, dtype=torch.float64) for name in rows}
    width = 0
    for row, share in enumerate(shares(victim, batch)):
        inputs = {k: x[row : row + 1].expand(config.draws, *x.shape[1:]).contiguous() for k, x in batch.inputs.items()}
        labels = batch.labels[row : row + 1].expand(config.draws, *batch.labels.shape[1:])
        with (
            client_mode(victim, drawn(generator)) as module,
            _leaf(victim, inputs) as leaf,
            factors.capture(module, selection.entries) as tape,
        ):
            losses = model_losses(module, inputs, labels, victim.task, "sum") * share
            uses = tape.factors(losses, create_graph=True)
            x = leaf()
            width += x[0].numel()
            for name, entries in rows.items():
                dots = sum(_signed(use, generator) for entry in entries for use in uses[entry.name])
                squares[name] += _squared(dots, x)
    mechanism = gaussian(defense)
    std = mechanism.std if mechanism else 0.0
    sums = {**squares, ALL: torch.stack(list(squares.values())).sum(0)}
    counts = {name: sum(entry.numel for entry in found) for name, found in modules(selection.entries).items()}
    return Measurement({name: _values(sums[name], counts[name], width, std) for name in counts})


def _values(squares: Tensor, parameters: int, width: int, std: float) -> dict[str, float | None]:
    norm = math.sqrt(float(squares.mean()))
    # Of the root, by the derivative of the root.
    error = float(squares.std()) / math.sqrt(len(squares)) / (2 * norm) if norm else 0.0
    return {
        "sensitivity": norm,
        "stderr": error,
        "per_parameter": norm / math.sqrt(parameters),
        "per_entry": norm / math.sqrt(parameters * width),
        "over_noise": norm / std if std else None,
    }


def _squared(dots: Tensor | int, x: Tensor) -> Tensor:
    """|grad_x|^2 of each of k sums, [k]; zero where a gradient does not depend on the input."""
    import torch

    if not isinstance(dots, torch.Tensor) or not dots.requires_grad:
        return torch.zeros(len(x), dtype=torch.float64)
    (slope,) = torch.autograd.grad(dots.sum(), x, retain_graph=True, allow_unused=True)
    return torch.zeros(len(x), dtype=torch.float64) if slope is None else slope.flatten(1).double().pow(2).sum(1).cpu()


def _signed(use: Factor, generator: torch.Generator) -> Tensor:
    """<gradient, random signs> of each of k copies, each with its own signs, [k]."""
    import torch

    def signs(*shape: int) -> Tensor:
        drawn = torch.randint(2, shape, generator=generator)
        return (drawn * 2 - 1).to(use.right)

    k = len(use.right)
    if use.one_hot:
        # Rows that no token touches have no gradient: signs are drawn for the others alone.
        own, place = use.left.unique(return_inverse=True)
        rows = signs(k, len(own), use.right.shape[2])
        return (rows.gather(1, place[..., None].expand_as(use.right)) * use.right).sum((1, 2))
    return ((use.left @ signs(k, use.left.shape[2], use.right.shape[2])) * use.right).sum((1, 2))


@contextmanager
def _leaf(victim: Victim, inputs: dict[str, Tensor]) -> Iterator[Any]:
    """The input as a leaf of the graph: pixels, or what the word embedding gives out; read after the forward pass."""
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].clone().requires_grad_(True)
        yield lambda: inputs["pixel_values"]
        return
    seen: list[Tensor] = []

    def hook(_: nn.Module, __: tuple, output: Tensor) -> Tensor:
        seen.append(output.detach().requires_grad_(True))
        return seen[-1]

    handle = victim.module.get_input_embeddings().register_forward_hook(hook)
    try:
        yield lambda: seen[0]
    finally:
        handle.remove()


def _hindrance(victim: Victim, entries: Sequence[Entry]) -> str | None:
    import torch

    from lmleak.gradients import factors

    if victim.mode == "train" and any(
        isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in victim.module.modules()
    ):
        return "BatchNorm in train mode: a sample's gradient depends on the others"
    attention = getattr(getattr(victim.module, "config", None), "_attn_implementation", "eager")
    if attention not in ("eager", None):
        return f"attn_implementation '{attention}' has no double backward; set model.attn_implementation: eager"
    try:
        missing = factors.unfactored(victim.module, entries)
    except LmleakError as error:
        return str(error)
    if missing:
        return f"'{missing[0].name}' has no factored gradient; leave it out of the selection"
    return None
