"""GradInversion: batches of pictures by per-layer distances, priors and a group of seeds (Yin et al., 2104.07586).

Every seed seeks the whole batch; what they agree on pulls each of them: their plain mean (lazy), or their mean after
each has been shifted (or bent) onto it. A seed goes one by one through the model, so that it takes the same steps
whatever the number of processes. Published with 20,000 steps of 8 seeds; `steps` scales the schedule down, and the
number of steps between exchanges, `group_every`, should follow. Confidence as in `inverting_gradients`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from lmleak.attacks._labels import Strategy, recover_labels
from lmleak.attacks._pixels import Matcher
from lmleak.attacks._pixels_group import Consensus, Registration, exchanged, share
from lmleak.attacks._pixels_terms import Box, norm, off_statistics, rough
from lmleak.attacks._text import refuse
from lmleak.attacks.inverting_gradients import answer, hopeless, reads
from lmleak.errors import LmleakError
from lmleak.gradients import batchnorm
from lmleak.records import Knowledge, Observation, Reconstruction, Victim
from lmleak.seeds import derive

__all__ = ["EXAMPLE", "IMAGES", "Config", "attack", "reads"]

IMAGES = True  #: reads pictures

Count = Annotated[int, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]
#: An easy case, for the contract tests.
EXAMPLE = {
    "fields": {"steps": 100, "seeds": 2, "group_every": 10, "warmup": 5, "gradient": 1.0, "noise": 0.01},
    "select": {"components": ["all"]},
    "knowledge": {"labels": True},
    "batch_size": 1,
    "model": {"kind": "mlp", "config": {"image_size": 8, "hidden": [64]}},
    "answer": "images",
}


class Config(BaseModel):
    """Defaults: the published weights, for a ResNet-50 of ImageNet. A weight of 0 turns its term off."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: Count = 20000
    seeds: Count = Field(8, description="batches sought from different noise; the least objective is the answer")
    lr: Annotated[float, Field(gt=0)] = 0.1
    warmup: Annotated[int, Field(ge=0)] = Field(50, description="steps of a rising learning rate; a cosine follows")
    gradient: Annotated[float, Field(gt=0)] = 1e-3
    tv: Weight = 1e-4
    l2: Weight = 1e-6
    bn: Weight = 0.1
    group: Weight = 0.01
    noise: Weight = Field(0.2, description="added to the pixels behind every step, in units of the learning rate")
    bn_statistics: Literal["off", "running", "exact"] = Field(
        "running", description="what BatchNorm layers should see; exact: the batch's own (knowledge.bn_statistics)"
    )
    consensus: Literal["lazy", "registered"] = "registered"
    registration: Registration = Field("shift", description="one shift a picture, or optical flow")
    group_from: Annotated[float, Field(ge=0, le=1)] = Field(0.25, description="share of the steps before the first")
    group_every: Count = 100
    across_processes: bool = Field(
        False, description="from Python: processes share one batch's seeds; a run shares out its batches instead"
    )
    labels: Strategy = Field("best", description="how labels that are not granted are read, see `labels`")


def attack(
    config: Config,
    observation: Observation,
    knowledge: Knowledge,
    victim: Victim,
    generator: torch.Generator,
    progress: Callable[[str], None],
) -> Reconstruction:
    """Seeks a batch of pictures with a group of seeds. BatchNorm replays the client's mode."""
    refused = hopeless(observation, victim)
    if refused:
        return refused
    known: Mapping[str, tuple[Tensor, Tensor]] = {}
    if config.bn and config.bn_statistics == "running":
        known = batchnorm.running(victim.module)
    elif config.bn and config.bn_statistics == "exact":
        if knowledge.bn_statistics is None:
            why = (
                "the batch's own BatchNorm statistics are not granted: knowledge.bn_statistics, or use the running ones"
            )
            return refuse("not_applicable", why)
        known = knowledge.bn_statistics
    found = recover_labels(observation, victim, config.labels, knowledge)
    if isinstance(found, Reconstruction):
        return refuse("not_applicable", f"labels unknown ({found.reason}); grant knowledge.labels")
    matcher = Matcher(victim, observation)
    if matcher.zero:
        return refuse("no_signal", "the observed gradient is zero")
    with matcher.ready():
        return _Group(config, matcher, victim, found, known, generator).run(progress)


class _Seed:
    """One batch being sought: its pixels, its optimiser, its own random numbers."""

    def __init__(self, number: int, shape: tuple[int, ...], like: Tensor):
        self.draw = torch.Generator().manual_seed(number)
        self.shape = shape
        self.pixels = self.drawn().to(like).requires_grad_()
        self.optimizer = torch.optim.Adam([self.pixels])

    def drawn(self) -> Tensor:
        return torch.randn(1, *self.shape, generator=self.draw)


class _Group:
    """The seeds of this process, and what those of all processes agree on."""

    def __init__(
        self,
        config: Config,
        matcher: Matcher,
        victim: Victim,
        labels: tuple[int, ...],
        known: Mapping[str, tuple[Tensor, Tensor]],
        generator: torch.Generator,
    ):
        self.config, self.matcher, self.victim, self.known = config, matcher, victim, known
        form, weight = victim.processor, next(victim.module.parameters())
        self.labels = torch.tensor(labels, device=weight.device)
        self.box = Box(form, weight)
        shape = (len(labels), form.channels, form.height, form.width)
        base = int(torch.randint(2**62, (), generator=generator))
        self.own = {
            i: _Seed(derive(base, i), shape, weight) for i in share(config.seeds, apart=config.across_processes)
        }
        self.consensus = Consensus(labels, config.registration if config.consensus == "registered" else None)
        self.centres: dict[int, Tensor] = {}

    def run(self, progress: Callable[[str], None]) -> Reconstruction:
        config, step = self.config, 0
        # Seeds meet at these steps only; in between each runs on by itself.
        begin = round(config.group_from * config.steps)
        grouped = config.group > 0 and config.seeds > 1
        meetings = range(begin, config.steps, config.group_every) if grouped else range(0)
        for until in [*meetings, config.steps]:
            for i, seed in self.own.items():
                for t in range(step, until):
                    self._step(seed, t, self.centres.get(i))
            step = until
            if step < config.steps:
                self.centres = self.consensus(self._everyone())
                progress(f"step {step}: seeds agree to {self.consensus.spread:.3g} of a pixel's range")
        return self._best()

    def objective(self, pixels: Tensor, centre: Tensor | None = None, create_graph: bool = True) -> Tensor:
        """The weighted sum of all terms of one candidate batch [1, b, c, y, x], 0-d."""
        config = self.config
        with batchnorm.recorded(self.victim.module) as statistics:
            gradients = self.matcher(pixels, self.labels, create_graph=create_graph)
        value = config.gradient * gradients.norms().sum()
        if self.known:
            value = value + config.bn * off_statistics(statistics, self.known)
        if config.tv:
            value = value + config.tv * rough(pixels).sum()
        if config.l2:
            value = value + config.l2 * norm(pixels).sum()
        if centre is not None:
            value = value + config.group * norm(pixels - centre).sum()
        return value

    def _step(self, seed: _Seed, t: int, centre: Tensor | None) -> None:
        config = self.config
        warm = min(config.warmup, config.steps)
        lr = config.lr * (
            (t + 1) / warm if t < warm else (1 + math.cos(math.pi * (t - warm) / (config.steps - warm))) / 2
        )
        value = self.objective(seed.pixels, centre)
        (seed.pixels.grad,) = torch.autograd.grad(value, seed.pixels)
        for group in seed.optimizer.param_groups:
            group["lr"] = lr
        seed.optimizer.step()
        with torch.no_grad():
            if config.noise:
                seed.pixels += (lr * config.noise) * seed.drawn().to(seed.pixels)
            self.box.clamp_(seed.pixels)

    def _everyone(self) -> dict[int, Tensor]:
        own = {i: seed.pixels.detach()[0] for i, seed in self.own.items()}
        return exchanged(own) if self.config.across_processes else own

    def _best(self) -> Reconstruction:
        values = {}
        for i, seed in self.own.items():
            value = float(self.objective(seed.pixels, create_graph=False).detach())
            values[i] = torch.tensor(value if math.isfinite(value) else math.inf)
        images = self._everyone()
        values = exchanged(values) if self.config.across_processes else values
        scores = [float(values[i]) for i in sorted(values)]
        best = min(values, key=lambda i: (float(values[i]), i))
        if math.isinf(scores[best]):
            raise LmleakError("every seed's objective is not finite: the search diverged; lower attack.lr")
        pixels = images[best].to(self.labels.device)
        gradients = self.matcher(pixels[None], self.labels, create_graph=False)
        details: dict[str, Any] = {
            "objective": scores[best],
            "distance": float(gradients.norms().detach()),
            "seed": best,
            "objectives": [value if math.isfinite(value) else None for value in scores],
            "steps": self.config.steps,
            "batchnorm_layers": len(self.known),
            "shifts": self.consensus.shifts,
        }
        cosine = 1 - float(gradients.cosine().detach())
        return answer(self.victim, self.matcher, pixels, self.labels.tolist(), cosine, details)
