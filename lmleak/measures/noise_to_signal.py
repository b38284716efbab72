"""Noise over signal in what is released, by module, and the share of samples clipped (DP-SGD, arXiv 1607.00133).

Abadi et al. (2016, arXiv 1607.00133) clip and noise; how much of a module's gradient is left after that is seen here.
A large ratio alone hides nothing: a test knows where to look, and `dp_distinguishability` says how well.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from lmleak.records import Measurement

if TYPE_CHECKING:
    import torch

    from lmleak.records import Batch, Selection, Victim

EXAMPLE: dict[str, Any] = {}
UNITS = {
    "noise_to_signal": "expected norm of the noise over the norm of what it is added to; 1 is as much noise as signal",
    "signal": "norm of the clipped, summed (unclipped: mean) gradient, in the gradient's units",
    "clipped": "share of the batch's samples whose gradient was made shorter, 0..1; None where nothing is clipped",
    "norm": "norm of a sample's gradient before clipping, median over the batch, in the gradient's units",
}


class Config(BaseModel):
    """Nothing to set."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def measure(
    config: Config,
    victim: Victim,
    batch: Batch,
    selection: Selection,
    defense: Mapping[str, Any],
    generator: torch.Generator,
) -> Measurement:
    """Ratios by observed module. No rows where the defense is no Gaussian mechanism."""
    from lmleak.defenses import gaussian
    from lmleak.gradients.observe import ClientGradients
    from lmleak.measures import _release

    mechanism = gaussian(defense)
    if mechanism is None:
        return Measurement({}, f"'{defense['kind']}' adds no Gaussian noise")
    # With dropout on, the masks are a draw of their own: the ratio is that of one draw.
    client = ClientGradients(victim, batch, selection.entries, int(_draw(generator)))
    norms = client.per_sample_norms("per_layer")  # [entries, b]
    bound, scope = mechanism.max_grad_norm, mechanism.scope
    cut: dict[str, torch.Tensor] = {}
    if bound is None or scope is None:
        released = client.mean()
    else:
        released = client.clipped_sum(bound, scope)
        if scope == "per_layer":
            limit = bound / math.sqrt(len(selection.entries))
            cut = {entry.name: norms[i] > limit for i, entry in enumerate(selection.entries)}
        else:
            cut = dict.fromkeys(released, client.per_sample_norms(scope) > bound)
    place = {entry.name: i for i, entry in enumerate(selection.entries)}
    rows = {}
    for name, entries in _release.modules(selection.entries).items():
        signal = math.sqrt(sum(float(released[e.name].double().square().sum()) for e in entries))
        noise = mechanism.std * math.sqrt(sum(entry.numel for entry in entries))
        own = norms[[place[entry.name] for entry in entries]].double().square().sum(0).sqrt()
        rows[name] = {
            "noise_to_signal": noise / signal if signal else None,
            "signal": signal,
            "clipped": statistics.fmean(float(cut[e.name].double().mean()) for e in entries) if cut else None,
            "norm": float(own.median()),
        }
    return Measurement(rows)


def _draw(generator: torch.Generator) -> torch.Tensor:
    import torch

    return torch.randint(2**31, (1,), generator=generator)
