"""`span` on images: the picture behind one query, key or value gradient of a vision transformer's first block.

Differences of the module's inputs lie in that gradient's row space, and the input of [CLS] is known, x_0. For the patch
p at a place with offset e, scale gamma and shift beta of the norm, C the centring and std the norm's own divisor, the
unknowns u = p / std and s = 1 / std then obey linear equations:

    outside [gamma * C(W u + s e) + beta - x_0] = 0,     d - rank equations, pixels of a patch + 1 unknowns

so each patch is one small system and p = u / s, without a label, a position's gradient, or any optimisation; a key's
gradient shows nothing but such differences. Total least squares, because it is the equations that carry rounding.
*Measured*, untrained 4-layer ViTs, 20 CIFAR-10 test images, float32 gradients, least / median PSNR in dB (init: the
standard deviation of the weights; the usual 0.02 leaves attention all but uniform, so that the rows are nearly one):

    init, d, patch      query         key           value
    0.1, 192, 4 x 4     79 / 101      90 / 105      84 / 103
    0.1, 128, 4 x 4     64 / 85       75 / 85       63 / 79
    0.1, 256, 8 x 8     113 / 125     115 / 128     113 / 125
    0.02, 192, 4 x 4    52 / 69       63 / 82       32 / 50
    0.02, 128, 4 x 4    31 / 51       45 / 63       15 / 28 (17 answered)
    0.02, 256, 8 x 8    84 / 102      97 / 111      74 / 84

One photo at 0.1, d = 128, its gradient rounded to float16: 27 / 28 / refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lmleak.attacks._rowspace import RowSpace, describe, dropped_out, matrix, row_space, weights
from lmleak.attacks._text import refuse
from lmleak.models._patches import PatchLayer
from lmleak.records import Entry, Observation, Reconstruction, Victim

#: A known input lies this far outside an exact gradient's space at most; outside that of noise about sqrt((d - n) / d).
OUTSIDE = 0.1
#: Least fall from the second smallest singular value of a patch's system to the smallest, median over patches. Noise
#: has 1.0 to 1.5; exact gradients 1e3 (float32) and more.
EDGE = 3.0


def attack_patches(observation: Observation, victim: Victim, readers: Sequence[str]) -> Reconstruction:
    """Reads one picture off the first block's query, key or value gradient; refuses what cannot be read so."""
    if not hasattr(victim.family, "patch_layer"):
        return refuse("not_applicable", f"the input of block 0 is not known in closed form for family '{victim.kind}'")
    entries = [e for e in weights(observation, layer=0) if e.component in readers]
    if not entries:
        return refuse("not_applicable", "needs the weight gradient of block 0's query, key or value")
    if observation.batch_size > 1:
        why = f"{observation.batch_size} pictures: each place's patches form a family that this does not tell apart"
        return refuse("not_applicable", why)
    if dropped_out(victim, observation):
        return refuse("not_applicable", "dropout is on in the client: the row space is that of dropped-out inputs")
    layer: PatchLayer = victim.family.patch_layer(victim.module)
    keys = all(e.component == "attn_key" for e in entries)
    space = _space(victim, observation, [e for e in entries if keys or e.component != "attn_key"], layer, keys)
    if space.zero:
        return refuse("no_signal", "the observed gradient is zero", describe(space))
    return _solve(victim, layer, space, keys)


def reads_patches(victim: Victim, observation: Observation, entry: Entry) -> bool:
    """Whether this one module is enough; asked and answered by solving it, a twentieth of a second."""
    one = replace(observation, entries=(entry,), gradients={entry.name: observation.gradients[entry.name]})
    readers = ("attn_query", "attn_key", "attn_value", "attn_qkv")
    return attack_patches(one, victim, readers).status == "ok"


def _space(victim: Victim, observation: Observation, used: Sequence[Entry], layer: PatchLayer, keys: bool) -> RowSpace:
    """The row space at the rank that the number of patches says: rounding or noise may hide the spectrum's edge."""
    stacked = [matrix(victim.module, e, observation.gradients[e.name]) for e in used]
    space = row_space(stacked)
    rank = len(layer.offset) + len(layer.first) - keys
    if space.rank == rank or space.zero:
        return space
    whole = torch.cat([g.double() / g.double().norm().clamp_min(1e-300) for g in stacked])
    _, values, right = torch.linalg.svd(whole, full_matrices=False)
    rank = min(rank, len(values) - 1)
    return RowSpace(right[:rank], values, float(values[rank - 1] / values[rank].clamp_min(values[0] * 1e-13)))


def _solve(victim: Victim, layer: PatchLayer, space: RowSpace, keys: bool) -> Reconstruction:
    d, p = layer.projection.shape
    rank, form = space.rank, victim.processor
    details: dict[str, Any] = describe(space) | {"equations": d - rank, "unknowns": p + 1}
    if d - rank < p + 2:  # one more than is needed to solve it, or noise would have a solution too
        why = f"a patch has {p + 1} unknowns, and {rank} inputs leave {max(0, d - rank)} equations at width {d}"
        return refuse("not_applicable", why, details)
    known = layer.known()
    if not keys:
        details["outside"] = float(space.residual(known).max())
        if details["outside"] > OUTSIDE:
            why = f"a known input lies {details['outside']:.2g} outside the observed space: noise"
            return refuse("no_signal", why, details)
    patches, falls = _patches(layer, space, known[0])
    details["edge"] = float(falls.median())
    if details["edge"] < EDGE:
        return refuse("no_signal", f"no patch stands out (falls by {details['edge']:.2g} in the median)", details)
    images = form.plain(layer.join(patches[None], form.height, form.width)).float()
    return Reconstruction(images=images, confidence=(1.0 - 1.0 / details["edge"],), details=details)


def _patches(layer: PatchLayer, space: RowSpace, origin: Tensor) -> tuple[Tensor, Tensor]:
    """Patches [n, p] in the model's normalisation, float64, and how clearly each solution stands out [n]."""
    outside = torch.linalg.svd(space.basis, full_matrices=True).Vh[space.rank :]  # [m, d]
    scaled = outside * layer.weight.double()
    scaled = scaled - scaled.mean(-1, keepdim=True)  # the centring, moved to the other side
    pixels = scaled @ layer.projection.double()  # [m, p]
    places = (scaled @ layer.offset.double().T).T[..., None]  # [n, m, 1]
    shift = (outside @ (layer.bias.double() - origin))[:, None]  # [m, 1]
    n, p = len(places), pixels.shape[1]
    system = torch.cat([pixels.expand(n, -1, -1), places, shift.expand(n, -1, -1)], -1)  # [n, m, p + 2]
    # Columns of length 1: rounding is alike in all of them.
    lengths = system.norm(dim=1, keepdim=True).clamp_min(1e-300)
    _, values, right = torch.linalg.svd(system / lengths, full_matrices=False)
    answer = right[:, -1] / lengths[:, 0]
    falls = values[:, -2] / values[:, -1].clamp_min(values[:, 0] * 1e-16)
    scale = answer[:, p : p + 1]
    return answer[:, :p] / torch.where(scale.abs() > 1e-300, scale, 1.0), falls
