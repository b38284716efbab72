"""Pictures whose gradient points the observed way: cosine, total variation, signed Adam (Geiping et al., 2003.14053).

`{distance: l2, optimizer: lbfgs, tv: 0}` is DLG (Zhu et al. 2019, 1906.08935), which seeks labels too where they are
neither granted nor readable. All restarts are one batch; see `_pixels`. An answer's confidence is the share of the
observed gradient that it explains beyond what as many pixels could explain of noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from lmleak.attacks._applicability import Reading
from lmleak.attacks._codes import codes, given
from lmleak.attacks._labels import Strategy, recover_labels
from lmleak.attacks._pixels import Matcher, confidence
from lmleak.attacks._pixels_terms import Box, total_variation
from lmleak.attacks._text import refuse
from lmleak.errors import LmleakError
from lmleak.records import Knowledge, Observation, Reconstruction, Victim

IMAGES = True  #: reads pictures
MILESTONES = (3 / 8, 5 / 8, 7 / 8)  #: of the steps; the learning rate falls to a tenth at each
SAID = 20  #: reports of progress

Count = Annotated[int, Field(gt=0)]
#: An easy case, for the contract tests.
EXAMPLE = {
    "fields": {"steps": 60},
    "select": {"components": ["all"]},
    "knowledge": {"labels": True},
    "batch_size": 1,
    "model": {"kind": "mlp", "config": {"image_size": 8, "hidden": [64]}},
    "answer": "images",
}


class Config(BaseModel):
    """Defaults: the published settings for CIFAR-10."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    distance: Literal["cosine", "l2"] = "cosine"
    optimizer: Literal["adam", "lbfgs"] = Field(
        "adam", description="adam: on the gradient's signs, in the box of valid pixels; lbfgs: as DLG, without either"
    )
    steps: Count = Field(4000, description="of Adam, or iterations of L-BFGS")
    restarts: Count = Field(1, description="from different noise; the one of the lowest objective is the answer")
    lr: Annotated[float, Field(gt=0)] = 0.1
    tv: Annotated[float, Field(ge=0)] = Field(1e-6, description="weight of the total variation")
    labels: Strategy = Field("best", description="how labels that are not granted are read, see `labels`")
    noise: Literal["own", "solved"] = Field(
        "own", description="of a bottleneck (precode): drawn by the attacker, or read off its decoder's gradient"
    )


@dataclass(frozen=True)
class _Problem:
    """What every restart has in common."""

    config: Config
    matcher: Matcher
    box: Box
    shape: tuple[int, int, int, int]  #: of one candidate, [b, c, y, x]

    def values(self, pixels: Tensor, labels: Tensor, create_graph: bool = True) -> Tensor:
        """The objective of each of k candidates."""
        gradients = self.matcher(pixels, labels, create_graph=create_graph)
        out = gradients.cosine() if self.config.distance == "cosine" else gradients.squared()
        return out + self.config.tv * total_variation(pixels) if self.config.tv else out


def attack(
    config: Config,
    observation: Observation,
    knowledge: Knowledge,
    victim: Victim,
    generator: torch.Generator,
    progress: Callable[[str], None],
) -> Reconstruction:
    """Moves noise until its gradient at the observed modules points the way of the observed one.

    BatchNorm replays the client's mode. Labels are granted, or read from the head's gradient; DLG seeks those that
    cannot be read. See `Config`.
    """
    refused = hopeless(observation, victim)
    if refused:
        return refused
    found = recover_labels(observation, victim, config.labels, knowledge)
    if isinstance(found, Reconstruction) and config.optimizer != "lbfgs":
        why = f"labels unknown ({found.reason}); grant knowledge.labels, or seek them too (optimizer: lbfgs)"
        return refuse("not_applicable", why)
    drawn_codes = codes(observation, victim) if config.noise == "solved" else {}
    if isinstance(drawn_codes, str):
        return refuse("not_applicable", drawn_codes)
    matcher = Matcher(victim, observation, 1 if config.optimizer == "lbfgs" else config.restarts)
    if matcher.zero:
        return refuse("no_signal", "the observed gradient is zero")
    form = victim.processor
    shape = (observation.batch_size, form.channels, form.height, form.width)
    weight = next(victim.module.parameters())
    start = torch.randn(config.restarts, *shape, generator=generator).to(weight)
    problem = _Problem(config, matcher, Box(form, weight), shape)
    with matcher.ready(), given(victim, drawn_codes):
        if isinstance(found, Reconstruction):
            drawn = torch.randn(config.restarts, len(start[0]), form.classes, generator=generator).to(weight)
            pixels, labels = _lbfgs(problem, start, drawn, progress)
        else:
            labels = torch.tensor(found, device=weight.device)
            descend = _adam if config.optimizer == "adam" else _lbfgs
            pixels, labels = descend(problem, start, labels, progress)
        return _best(problem, pixels, labels, victim)


def hopeless(observation: Observation, victim: Victim) -> Reconstruction | None:
    """The refusal of what no matching of pictures can read."""
    if victim.task != "image-classification":
        return refuse("not_applicable", "seeks pictures, and this model reads text")
    if not observation.entries:
        return refuse("no_signal", "no gradient was observed")
    return None


def reads(one: Reading, victim: Victim, observation: Observation) -> bool:
    """Any observed tensor that is not zero can be tried; how far it leads is another question."""
    return victim.task == "image-classification" and any(bool(observation.gradients[e.name].any()) for e in one.entries)


def _adam(problem: _Problem, pixels: Tensor, labels: Tensor, progress: Callable[[str], None]) -> tuple[Tensor, Tensor]:
    config = problem.config
    pixels = pixels.clone().requires_grad_()
    optimizer = torch.optim.Adam([pixels], lr=config.lr)
    milestones = [int(share * config.steps) for share in MILESTONES]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones)
    for step in range(1, config.steps + 1):
        values = problem.values(pixels, labels)
        (slope,) = torch.autograd.grad(values.sum(), pixels)
        pixels.grad = slope.sign_()
        optimizer.step()
        schedule.step()
        problem.box.clamp_(pixels)
        if step % -(-config.steps // SAID) == 0:
            progress(f"step {step}: distance {float(values.detach().min()):.3g}")
    return pixels.detach(), labels


def _lbfgs(problem: _Problem, pixels: Tensor, labels: Tensor, progress: Callable[[str], None]) -> tuple[Tensor, Tensor]:
    """One restart after another: a line search belongs to one of them. `labels` are classes, or logits to be sought."""
    config, soft = problem.config, labels.is_floating_point()
    rows, guesses = [], []
    for i, start in enumerate(pixels):
        own = start[None].clone().requires_grad_()
        logits = labels[i : i + 1].clone().requires_grad_() if soft else labels
        wanted = [own, logits] if soft else [own]
        optimizer = torch.optim.LBFGS(
            wanted, lr=1.0, max_iter=config.steps, tolerance_grad=0, history_size=100, line_search_fn="strong_wolfe"
        )

        def closure(own=own, logits=logits, wanted=wanted):  # type: ignore[no-untyped-def]
            value = problem.values(own, logits.softmax(-1) if soft else logits).sum()
            for part, slope in zip(wanted, torch.autograd.grad(value, wanted), strict=True):
                part.grad = slope
            return value.detach()

        value = optimizer.step(closure)
        progress(f"restart {i + 1}: began at {float(value):.3g}")  # type: ignore[arg-type]
        rows.append(own.detach()[0])
        guesses.append(logits.detach()[0] if soft else logits)
    return torch.stack(rows), torch.stack(guesses).softmax(-1) if soft else labels


def _best(problem: _Problem, pixels: Tensor, labels: Tensor, victim: Victim) -> Reconstruction:
    config, matcher = problem.config, problem.matcher
    scores = problem.values(pixels, labels, create_graph=False).detach()
    if not bool(scores.isfinite().any()):
        raise LmleakError("every restart's objective is not finite: the search diverged; lower attack.lr")
    best = int(torch.nan_to_num(scores, nan=float("inf")).argmin())
    soft = labels.dim() > 1
    own = pixels[best : best + 1]
    gradients = matcher(own, labels[best : best + 1] if soft else labels, create_graph=False)
    details: dict[str, Any] = {
        "objective": float(scores[best]),
        "steps": config.steps,
        "restart": best,
        "restarts": len(scores),
    }
    classes = (labels[best].argmax(-1) if soft else labels).tolist()
    return answer(victim, matcher, own[0], classes, 1 - float(gradients.cosine().detach()), details)


def answer(
    victim: Victim, matcher: Matcher, pixels: Tensor, labels: list[int], cosine: float, details: dict[str, Any]
) -> Reconstruction:
    """The found batch [b, c, y, x], or no_signal where it explains no more than pixels explain of noise."""
    unknowns = pixels.numel()
    sure = confidence(cosine, matcher.values, unknowns)
    details |= {"cosine": cosine, "values": matcher.values, "unknowns": unknowns}
    images = victim.processor.plain(pixels).float()
    if sure == 0 and matcher.values > unknowns:
        why = f"the best candidate found explains {max(cosine, 0) ** 2:.2g} of the gradient, as much as of noise"
        return Reconstruction(images=images, status="no_signal", reason=why, details=details)
    return Reconstruction(images=images, labels=tuple(labels), confidence=(sure,) * len(pixels), details=details)
