"""`span` on images: the picture behind one query, key or value gradient of a vision transformer's first block.

Differences of the module's inputs lie in that gradient's row space, and the input of [CLS] is known, x_0. For the patch
p at a place with offset e, scale gamma and shift beta of the norm, C the centring and t the norm's own divisor, the
unknowns p and t then obey linear equations:

    outside [gamma * C(W p + e) + t (beta - x_0)] = 0,     d - rank equations, pixels of a patch + 1 unknowns

without a label, a position's gradient, or any optimisation (a query or value needs no x_0; a key's gradient shows
nothing but differences). How they are weighed and completed where they are fewer than the unknowns: `_span_prior.py`.

*Measured* (benchmarks/vit.py), untrained 4-layer ViTs, 20 CIFAR-10 test images, float32 gradients, least / median PSNR
in dB, a fiftieth of a second each (init: the standard deviation of the weights; the usual 0.02 leaves attention all but
uniform, so that the rows of a value's gradient are nearly one). Before the weighing and the prior, value at 0.02 and
d = 128 had 15 / 28.

    init, d, patch      query         value
    0.1, 192, 4 x 4     85 / 102      86 / 100
    0.1, 128, 4 x 4     74 / 89       71 / 84
    0.1, 256, 8 x 8     115 / 129     123 / 130
    0.02, 192, 4 x 4    54 / 74       42 / 55
    0.02, 128, 4 x 4    44 / 61       34 / 44
    0.02, 256, 8 x 8    91 / 112      85 / 102
    trained, 192, 4 x 4 58 / 69       46 / 54      200 steps of 16 pictures at 1e-4, 6 blocks
    the same at 5e-4    31 / 42       21 / 26      inputs nearly alike at all places

What is missing is lost in float32's sum over places, not here. At 0.02, d = 192, query, two pictures: 71 and 60 dB; the
same gradient computed in float64 and rounded once 90 and 80; float32 factors multiplied in float64 140 and 135. The
posterior foretells its own error (55.0 dB of 55.1). Only a picture's whole gradient knows more: Gauss-Newton through
the model from here took one hard picture each from 55 to 66 dB (query), 44 to 52 (query, d = 128) and 42 to 50 (value)
in 2 to 4 CPU s; the value fell back with more steps, as the linear model outran the noise's. Not kept.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from lmleak.attacks._applicability import ATTENTION
from lmleak.attacks._rowspace import dropped_out, matrix, weights
from lmleak.attacks._span_prior import equations, proportional, solve
from lmleak.attacks._text import refuse
from lmleak.models._patches import PatchLayer
from lmleak.records import Entry, Observation, Reconstruction, Victim

#: Least share of what the equations can tell that noise leaves; pure noise is taken for 0.25 to 0.37 of it.
READ = 0.42


def attack_patches(observation: Observation, victim: Victim) -> Reconstruction:
    """Reads one picture off the first block's query, key or value gradient; refuses what cannot be read so."""
    if not hasattr(victim.family, "patch_layer"):
        return refuse("not_applicable", f"the input of block 0 is not known in closed form for family '{victim.kind}'")
    entries = [e for e in weights(observation, layer=0) if e.component in ATTENTION]
    if not entries:
        return refuse("not_applicable", "needs the weight gradient of block 0's query, key or value")
    if observation.batch_size > 1:
        # x_1 - x_2 of one place lies in the space up to scale: where the norm shifts nothing, n places' differences of
        # patches, so with n >= pixels of a patch every patch fits every place (d = 192, 4 x 4: rank 113, not 129).
        why = f"{observation.batch_size} pictures: differences of their patches lie in the space, and fit every place"
        return refuse("not_applicable", why)
    if dropped_out(victim, observation):
        return refuse("not_applicable", "dropout is on in the client: the row space is that of dropped-out inputs")
    layer: PatchLayer = victim.family.patch_layer(victim.module)
    keys = all(e.component == "attn_key" for e in entries)
    used = [e for e in entries if keys or e.component != "attn_key"]
    gradients = [matrix(victim.module, e, observation.gradients[e.name]).double() for e in used]
    if not any(bool(g.any()) for g in gradients):
        return refuse("no_signal", "the observed gradient is zero")
    stacked = torch.cat([g / g.norm().clamp_min(1e-300) for g in gradients])
    unknowns, rank, d = math.prod(layer.patch) + 1, len(layer.offset) + len(layer.first) - keys, stacked.shape[1]
    details: dict[str, Any] = {"rank": rank, "equations": max(0, d - rank), "unknowns": unknowns}
    if rank >= min(stacked.shape):
        why = f"{rank} inputs fill the width {d}: nothing lies outside their space"
        return refuse("not_applicable", why, details)
    known = equations(layer, victim.processor, stacked, differences=keys, relative=proportional(observation))
    values = known.spectrum
    details["gap"] = round(float(values[-2] / values[-1].clamp_min(values[0] * 1e-13)), 3)
    images, share = solve(layer, victim.processor, known)
    read = share * unknowns / min(unknowns, d - rank)
    details |= {"read": share}
    if not read > READ:
        why = f"{read:.2g} of what the equations could tell is above the noise: no more than of noise alone"
        return refuse("no_signal", why, details)
    return Reconstruction(images=images.float(), confidence=(share,), details=details)


def reads_patches(victim: Victim, observation: Observation, entry: Entry) -> bool:
    """Whether this one module is enough; asked and answered by solving it, a twentieth of a second."""
    one = replace(observation, entries=(entry,), gradients={entry.name: observation.gradients[entry.name]})
    return attack_patches(one, victim).status == "ok"
