"""A vision transformer's picture from its position embedding's gradient, in closed form (APRIL, Lu et al., 2112.14087).

Where the first attention reads the embedding z itself, with no norm before it and no skip around it, the gradient of
the position embedding is A = dL/dz, [n, d], and block 0's query, key and value give A^T z = Wq^T dWq + Wk^T dWk +
Wv^T dWv: one linear system, unique for n <= d and A of full rank. Elsewhere the picture is sought by gradient matching
plus WEIGHT (1 - cosine of A) (the cosine for the matching part too: the published squared distance has another scale in
every model).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from lmleak.attacks._applicability import Reading
from lmleak.attacks._labels import recover_labels
from lmleak.attacks._pixels import Matcher, confidence
from lmleak.attacks._pixels_terms import Box, total_variation
from lmleak.attacks._text import refuse
from lmleak.models._patches import PatchLayer
from lmleak.records import Knowledge, Observation, Reconstruction, Victim

__all__ = ["EXAMPLE", "IMAGES", "Config", "attack", "reads"]

IMAGES = True  #: reads pictures
READERS = ("attn_query", "attn_key", "attn_value")
EXACT = 1e-2  #: of the right side that an exact solution may leave; any matrix but the right one leaves 0.3 or more
EXAMPLE = {
    "fields": {"form": "closed"},
    "select": {"components": ["position_embedding", "attn_query", "attn_key", "attn_value"]},
    "knowledge": {},
    "batch_size": 1,
    "model": {
        "kind": "vit",
        "first_attention": "direct",
        "config": {
            "image_size": 8,
            "patch_size": 4,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "initializer_range": 0.1,
        },
    },
    "answer": "images",
}


class Config(BaseModel):
    """Which form, and the effort of the second."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    form: Literal["auto", "closed", "matching"] = Field(
        "auto", description="auto: closed where its assumptions hold, matching elsewhere"
    )
    steps: Annotated[int, Field(gt=0)] = Field(1000, description="of signed Adam, in the second form")
    lr: Annotated[float, Field(gt=0)] = 0.1
    weight: Annotated[float, Field(ge=0)] = Field(0.1, description="of the position embedding's cosine")
    tv: Annotated[float, Field(ge=0)] = Field(1e-2, description="weight of the total variation")


def attack(
    config: Config,
    observation: Observation,
    knowledge: Knowledge,
    victim: Victim,
    generator: torch.Generator,
    progress: Callable[[str], None],
) -> Reconstruction:
    """Solves for the embedding where the architecture allows it; else matches gradients with the position's term."""
    if victim.task != "image-classification":
        return refuse("not_applicable", "seeks pictures, and this model reads text")
    if not hasattr(victim.family, "patch_layer"):
        return refuse("not_applicable", f"'{victim.kind}' has no position embedding that is known here")
    position = [e for e in observation.entries if e.component == "position_embedding"]
    if not position:
        return refuse("not_applicable", "needs the gradient of the position embedding")
    if not bool(observation.gradients[position[0].name].any()):
        return refuse("no_signal", "the position embedding's gradient is zero")
    layer = victim.family.patch_layer(victim.module)
    why = _closed_not(observation, layer)
    if why is None and config.form != "matching":
        return _closed(observation, victim, layer, position[0].name)
    if config.form == "closed":
        return refuse("not_applicable", why or "")
    return _matching(config, observation, knowledge, victim, position[0].name, generator, progress, why)


def reads(one: Reading, victim: Victim, observation: Observation) -> bool:
    """No: the closed form needs four tensors together."""
    return False


def _closed_not(observation: Observation, layer: PatchLayer) -> str | None:
    """Why the closed form does not hold, or None."""
    if layer.weight is not None:
        return "a norm stands before the first attention: what it reads is not the embedding (see span)"
    if observation.batch_size != 1:
        return f"{observation.batch_size} pictures: their embeddings' gradients are summed"
    missing = [c for c in READERS if not _weights(observation, c)]
    if missing:
        return f"needs block 0's query, key and value weights; missing: {', '.join(missing)}"
    n, (d, p) = len(layer.offset) + len(layer.first), layer.projection.shape
    if n > d:
        return f"{n} inputs outnumber the width {d}"
    if p > d:
        return f"a patch's {p} pixels outnumber the width {d}: its embedding does not tell them"
    return None


def _weights(observation: Observation, component: str) -> list[Any]:
    return [e for e in observation.entries if (e.component, e.layer, len(e.shape)) == (component, 0, 2)]


def _closed(observation: Observation, victim: Victim, layer: PatchLayer, position: str) -> Reconstruction:
    left = observation.gradients[position].double().flatten(0, -2)  # A, [n, d]
    right = torch.zeros(left.shape[1], left.shape[1]).to(left)
    for component in READERS:
        for e in _weights(observation, component):
            weight = victim.module.get_parameter(e.parameter).detach().double()
            right = right + weight.T @ observation.gradients[e.name].double()
    values = torch.linalg.svdvals(left)
    details: dict[str, Any] = {"condition": _said(values[0] / values[-1].clamp_min(1e-300)), "form": "closed"}
    if values[-1] < 1e-12 * values[0]:
        why = f"the position embedding's gradient has not full rank (condition {details['condition']:.2g})"
        return refuse("no_signal", why, details)
    embedding = torch.linalg.lstsq(left.T, right).solution  # [n, d]
    # As many equations again as unknowns, or more: what they leave tells whether the assumptions hold.
    details["residual"] = _said((left.T @ embedding - right).norm() / right.norm())
    known = layer.first.double()
    details["known"] = _said((embedding[: len(known)] - known).norm() / known.norm())
    if details["residual"] > EXACT or details["known"] > 0.5:
        why = f"the system leaves {details['residual']:.2g} of its right side, and misses the known rows: noise"
        return refuse("no_signal", why, details)
    patches = (embedding[len(known) :] - layer.offset.double()) @ torch.linalg.pinv(layer.projection.double()).T
    form = victim.processor
    images = form.plain(layer.join(patches[None], form.height, form.width)).float()
    return Reconstruction(images=images, confidence=(1 - details["residual"],), details=details)


def _matching(
    config: Config,
    observation: Observation,
    knowledge: Knowledge,
    victim: Victim,
    position: str,
    generator: torch.Generator,
    progress: Callable[[str], None],
    why: str | None,
) -> Reconstruction:
    labels = recover_labels(observation, victim, "best", knowledge)
    if isinstance(labels, Reconstruction):
        reason = f"no closed form ({why}), and for matching labels are unknown ({labels.reason})"
        return refuse("not_applicable", reason)
    matcher = Matcher(victim, observation)
    place = [e.name for e in observation.entries].index(position)
    form, weight = victim.processor, next(victim.module.parameters())
    shape = (1, observation.batch_size, form.channels, form.height, form.width)
    pixels = torch.randn(shape, generator=generator).to(weight).requires_grad_()
    classes = torch.tensor(labels, device=weight.device)
    box, optimizer = Box(form, weight), torch.optim.Adam([pixels], lr=config.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
    cosine = torch.ones(1)
    with matcher.ready():
        for step in range(1, config.steps + 1):
            # A position embedding has no factors, so every gradient is formed, in the order of the entries.
            gradients = matcher(pixels, classes)
            cosine, own, wanted = gradients.cosine(), gradients.formed[place], gradients.wanted[place]
            value = cosine + config.tv * total_variation(pixels)
            value = value + config.weight * (1 - torch.nn.functional.cosine_similarity(own, wanted[None]))
            (slope,) = torch.autograd.grad(value.sum(), pixels)
            pixels.grad = slope.sign_()
            optimizer.step()
            schedule.step()
            box.clamp_(pixels)
            if step % -(-config.steps // 20) == 0:
                progress(f"step {step}: distance {float(cosine.detach()):.3g}")
    return _answer(pixels.detach()[0], labels, 1 - float(cosine.detach()), matcher, victim, why)


def _answer(
    pixels: Tensor,
    labels: tuple[int, ...] | list[int],
    cosine: float,
    matcher: Matcher,
    victim: Victim,
    why: str | None,
) -> Reconstruction:
    sure = confidence(cosine, matcher.values, pixels.numel())
    details = {"form": "matching", "because": why, "cosine": cosine}
    if sure == 0 and matcher.values > pixels.numel():
        reason = f"the best candidate explains {max(cosine, 0) ** 2:.2g} of the gradient, as much as of noise"
        return refuse("no_signal", reason, details)
    images = victim.processor.plain(pixels).float()
    return Reconstruction(images=images, labels=tuple(labels), confidence=(sure,) * len(pixels), details=details)


def _said(number: Tensor) -> float:
    """Three digits: the last ones of a residual differ from call to call with where memory happens to lie."""
    return float(f"{float(number):.3g}")
