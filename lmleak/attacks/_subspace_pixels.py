"""`subspace` on images: the picture whose inputs at any block of a vision transformer fill the space of its gradient.

One forward pass to the module and one plain backward pass a step: no label, no double backward. Three things make it
work, *measured* on an untrained 6-layer ViT (d = 192, patches of 4 x 4), a CIFAR-10 picture, one query of block 2:

    rows in the space, Adam on pixels, 1,000 steps                        24 dB
    the same in the coordinates in which photos have equal spread,
    by L-BFGS (coarse shapes come first by themselves)                    25 dB in 6 CPU s, then a wrong minimum
    and the space filled by the rows, each direction alike                44 dB in 4 CPU s

A start may end in a wrong minimum, a few patches of the picture being wrong (`_subspace_mending`); what it still misses
then are nats (`_subspace_newton`), which also say where the minimum stayed a wrong one, so that another start has its
turn. Of 40 pictures (blocks 2 and 4, untrained and trained) none needed a second: 36 to 95 dB.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lmleak.attacks._subspace_descent import PRIOR, RIDGE, Descent, view
from lmleak.attacks._subspace_mending import mended
from lmleak.attacks._subspace_newton import CAPS, price, refined
from lmleak.attacks._text import refuse
from lmleak.gradients._tree import Tree
from lmleak.records import Entry, Observation, Reconstruction, Victim

#: Ridge on the rows, and weight of the prior, one descent after another: strong directions first.
STAGES = ((1e-3, 1e-3), (1e-4, 1e-3), (RIDGE, PRIOR))
#: The same from farther away: leads elsewhere, so that starts take turns. Block 2 of a trained ViT, a picture at 18 dB
#: after the first and 19 after the third has 42 after the second; untrained, one at 18 has 43 after the third.
FARTHER = ((1e-1, 1e-2), (1e-2, 1e-2), *STAGES)
SLOWLY = ((1e-2, 1e-3), (1e-3, 1e-3), (1e-3, 1e-4), (1e-4, 1e-4), (RIDGE, PRIOR))
STARTS = (STAGES, FARTHER, SLOWLY)
#: Cap of the weights at which a descent's end is judged, and its nats over what is expected of the true picture from
#: which on it is a wrong minimum: d = 192, trained, 0.9 to 1.4 at 23 to 37 dB, 4.8 to 29 at 12 to 20 dB.
JUDGED, FAR = 1e2, 3.0
LONG = 700  #: steps of one descent at most: a wrong minimum is left the sooner, Gauss-Newton finishes a right one
START = 1e-2  #: spread of the first picture around grey, where photos have 1
ENOUGH = 0.3  #: equations a pixel; what is missing has to come from the prior
SURE = 0.5  #: least confidence of an answer where it can be told


def attack_pixels(
    observation: Observation,
    victim: Victim,
    components: Sequence[str],
    budget: int,
    restarts: int,
    generator: torch.Generator,
    progress: Callable[[str], None],
) -> Reconstruction:
    """Seeks the one picture behind weight gradients of a vision transformer's blocks."""
    found = _entries(observation, victim, components)
    if isinstance(found, Reconstruction):
        return found
    layer = victim.family.patch_layer(victim.module)
    inputs = len(layer.offset) + len(layer.first)
    views = [view(victim, observation, e, inputs) for e in found]
    if not views or not any(len(one.basis) for one in views):
        return refuse("no_signal", "every observed gradient is zero")
    views = [one for one in views if len(one.basis)]
    tight = [one for one in views if one.basis.shape[1] > len(one.basis)]
    if not tight:
        why = f"{inputs} inputs fill the width {views[0].basis.shape[1]}: nothing lies outside their space"
        return refuse("not_applicable", why)
    told, pixels = sum(one.equations for one in tight), layer.projection.shape[1] * len(layer.offset)
    if told < ENOUGH * pixels:
        seen = max(float(one.clear.sum()) for one in tight)
        why = f"{seen:.1f} of {inputs} directions are above the noise: {told:.0f} equations for {pixels} pixels"
        return refuse("no_signal", why)
    descent = Descent(victim, tight)
    free = layer.projection.shape[1] / max(one.basis.shape[1] - len(one.basis) for one in tight)
    expected = descent.expected(JUDGED)
    best: tuple[float, int, Tensor] | None = None
    details: dict[str, Any] = {"rank": max(len(one.basis) for one in tight)}
    with descent.attached():
        with torch.no_grad():
            grey = float(descent(torch.zeros(descent.shape).to(descent.spread), 1.0)[0])
        spare = len(CAPS) * price(descent)
        spare = spare if 2 * spare <= budget else 0  # most of a small budget is the descents'
        for turn in range(restarts):
            z = START * torch.randn(descent.shape, generator=generator).to(descent.spread)
            for ridge, prior in STARTS[turn % len(STARTS)]:
                left = (budget - spare) // 3 - descent.evaluations  # a backward pass costs as much as two forward ones
                if left > 0:
                    z = descent.down_to(z, ridge, prior, min(left, LONG))
            z = mended(descent, layer, z, JUDGED, (budget - spare) // 3)
            nats = descent.nats(z, JUDGED)
            progress(f"start {turn + 1}: {nats:.4g} nats, {expected:.4g} at the true picture")
            best = min(best, (nats, turn, z)) if best is not None else (nats, turn, z)
            if nats < FAR * expected or 3 * descent.evaluations >= budget - spare:
                break
        assert best is not None
        z = best[2]
        details["refined"] = bool(spare)
        for cap in CAPS if spare else ():
            z = refined(descent, z, cap)
            progress(f"weights to {cap:.0e}: {descent.nats(z, cap):.4g} nats, {descent.expected(cap):.4g} expected")
        with torch.no_grad():
            outside, open_ = (float(part) for part in descent(z, RIDGE))
        explained = 1 - outside / max(grey, 1e-30)
        filled = 1 - open_ / max(1e-30, sum(float(one.clear.sum()) for one in tight))
        nats = descent.nats(z, JUDGED)
        details |= {"outside": outside, "open": open_, "explained": explained, "nats": nats, "expected": expected}
        picture = descent.picture(z).clamp(0, 1).float()
    details["evaluations"] = descent.evaluations
    sure = filled * max(0.0, (explained - free) / (1 - free)) if free < 1 else 0.0
    if free < 1 and sure < SURE:
        why = f"the best picture explains {explained:.2g} of the space, pixels explain {free:.2g} of noise's"
        return refuse("no_signal", why, details)
    sure *= min(1.0, FAR * expected / nats)  # a wrong minimum says so
    return Reconstruction(images=picture, confidence=(sure,), details=details)


def reads_pixels(victim: Victim, observation: Observation, entry: Entry, components: Sequence[str]) -> bool:
    """Whether one module may be enough: any matrix of a block but the last, of one picture."""
    return entry.component in components and not isinstance(_entries(observation, victim, components), Reconstruction)


def _entries(observation: Observation, victim: Victim, components: Sequence[str]) -> list[Entry] | Reconstruction:
    if not hasattr(victim.family, "patch_layer"):
        return refuse("not_applicable", f"'{victim.kind}' is no vision transformer: its inputs' number is not known")
    if observation.batch_size > 1:
        return refuse("not_applicable", f"{observation.batch_size} pictures: their inputs share one space")
    modules = victim.module.modules()
    if observation.mode == "train" and any(isinstance(m, nn.Dropout) and m.p > 0 for m in modules):
        return refuse("not_applicable", "dropout is on in the client: the row space is that of dropped-out inputs")
    entries = [e for e in observation.entries if len(e.shape) > 1 and e.component in components]
    if not entries:
        return refuse("not_applicable", f"needs the weight gradient of one of {', '.join(components)}")
    last = Tree(victim.module, victim.family).depth - 1
    whole = [e for e in entries if e.layer != last]
    if not whole:
        return refuse("not_applicable", "the last block: behind its attention only [CLS] carries loss")
    return whole
