"""How often any attack can name a sample among M candidates with prior kappa at this noise (arXiv 2302.07225).

Hayes, Mahloujifar & Balle (2023, arXiv 2302.07225) bound reconstruction under DP-SGD; the Gaussian form is that of
Kaissis et al. (2023, arXiv 2307.03928). `_bound.py` derives it, and the tests simulate it.

A success above `guaranteed` (beyond its interval) is a bug in the bound, the noise or the attack. `here` is as strict
for attacks that name this sample with probability at most kappa when it is not in the batch.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lmleak.errors import LmleakError
from lmleak.measures._bound import check_prior, equidistant_success, success_bound
from lmleak.records import Measurement

if TYPE_CHECKING:
    import torch

    from lmleak.records import Batch, Selection, Victim

EXAMPLE = {"candidates": 40, "kappa": 0.1}
UNITS = {
    "guaranteed": "probability: no attack names a sample more often, whatever the data (mu = 1 / noise_multiplier)",
    "here": "probability: the same with the norm that this batch's own gradients have in this module, mean over them",
    "equidistant": "probability: the best attack's, were all candidates' gradients this long and at right angles",
    "mu": "noise standard deviations: the longest of the batch's clipped gradients in this module",
}


class Config(BaseModel):
    """The attacker's prior: what could have been there, and how likely the likeliest is."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    candidates: int = Field(30_000, ge=2, description="M: how many samples (or tokens, in one place) could be there")
    kappa: float | None = Field(None, description="prior probability of the likeliest candidate; 1 / M by default")

    @model_validator(mode="after")
    def _prior(self) -> Config:
        if self.kappa is not None:
            check_prior(self.candidates, self.kappa)
        return self


def measure(
    config: Config,
    victim: Victim,
    batch: Batch,
    selection: Selection,
    defense: Mapping[str, Any],
    generator: torch.Generator,
) -> Measurement:
    """Bounds by observed module; without noise, no rows: nothing is bounded."""
    from lmleak.gradients.observe import ClientGradients, clip_weights
    from lmleak.measures import _changes, _release

    mechanism, reason = _release.noised(defense)
    if mechanism is None:
        return Measurement({}, reason)
    try:
        _changes.scope_of(victim, selection.entries)
    except LmleakError as error:
        return Measurement({}, str(error))
    kappa = config.kappa if config.kappa is not None else 1 / config.candidates
    client = ClientGradients(victim, batch, selection.entries)
    norms = client.per_sample_norms("per_layer").double()
    bound, scope = mechanism.max_grad_norm, mechanism.scope
    if bound is None or scope is None:
        release = _release.Release.of(mechanism, victim, batch, selection.entries)
        norms = norms * norms.new_tensor(release.shares)
        guaranteed = 1.0
    else:
        per_layer = scope == "per_layer"
        limit = bound / math.sqrt(len(selection.entries)) if per_layer else bound
        norms = norms * clip_weights(norms if per_layer else client.per_sample_norms(scope).double(), limit)
        guaranteed = success_bound(bound / mechanism.std, kappa)
    place = {entry.name: i for i, entry in enumerate(selection.entries)}
    rows = {}
    for name, entries in _release.modules(selection.entries).items():
        squares = norms[[place[entry.name] for entry in entries]].square().sum(0)
        mus = (squares.sqrt() / mechanism.std).tolist()
        rows[name] = {
            "guaranteed": guaranteed,
            "here": statistics.fmean(success_bound(mu, kappa) for mu in mus),
            "equidistant": statistics.fmean(
                equidistant_success(math.sqrt(2) * mu, config.candidates, kappa) for mu in mus
            ),
            "mu": max(mus),
        }
    return Measurement(rows)
