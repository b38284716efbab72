"""One fine-tuning run, private or not: the same batches, steps and learning rate; epochs are resumed, not redone.

Private steps are Opacus': per-sample clipping and noise happen inside its optimizer's `step()`. Ghost clipping (Li et
al., 2021, arXiv 2110.05679) finds the norms without per-sample gradients, which of MiniLM are 90 MB a sample.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lmleak.errors import LmleakError
from lmleak.gradients import select
from lmleak.gradients.losses import forward
from lmleak.records import Batch, Victim
from lmleak.seeds import derive, generator
from lmleak.utility._frozen import States, remember
from lmleak.utility._private import Ghost, trainable
from lmleak.utility._score import parts, score, together


@dataclass(frozen=True)
class Plan:
    """What is the same for every setting and seed of a comparison."""

    epochs: int
    batch_size: int  #: expected: every step draws each record with probability batch_size / records (Poisson)
    lr: float  #: of AdamW, falling linearly to 0
    parameters: Mapping[str, Any]  #: fields of `select`: what is trained; everything else is frozen
    micro_batch: int = 64  #: samples of one pass; the same result, less memory

    def steps(self, records: int) -> int:
        """Steps of an epoch."""
        return max(1, round(records / self.batch_size))


Step = Callable[[Sequence[Batch], int], None]  #: the records of one step, and the step's seed


def fine_tune(
    victim: Victim,
    train: Sequence[Batch],
    test: Sequence[Batch],
    defense: Mapping[str, Any],
    plan: Plan,
    seed: int,
    checkpoint: Path,
    said: Callable[[str], None] = lambda _: None,
    states: States | None = None,
) -> dict[str, Any]:
    """Trains a copy under one defense, or goes on from the last finished epoch.

    Args:
        victim: a classifier; left as it was found.
        train: batches of one record each.
        test: the same, never trained on.
        defense: a recipe's resolved block.
        plan: what all settings share.
        seed: of the batches, of the head's order, and of the noise.
        checkpoint: file that keeps the last epoch; removed at the end.
        said: progress, one line an epoch.
        states: what frozen blocks made of records in an earlier run of the same weights and plan; filled.

    Returns:
        `accuracy` and `mcc` on the test records, `curve` of both by epoch, `seconds` of CPU.

    Raises:
        LmleakError: not a classifier, or something that cannot be trained under this defense.
    """
    if victim.task != "sequence-classification":
        raise LmleakError(f"utility: needs labelled sentences (task sequence-classification, not {victim.task})")
    copied = trainable(victim, plan.parameters)
    trained = [p for p in copied.module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=plan.lr, weight_decay=0.0)
    if defense["kind"] in ("none", "dp_sgd"):  # other defenses are asked about parameters by name
        remember(copied, [*train, *test], states)
    take = _step(copied, optimizer, defense, plan)
    total = plan.epochs * plan.steps(len(train))
    done, curve, seconds = _resume(checkpoint, trained, optimizer)
    for epoch in range(done, plan.epochs):
        start = time.process_time()
        draw = generator(seed, "utility", epoch)
        for step in range(plan.steps(len(train))):
            at = epoch * plan.steps(len(train)) + step
            for group in optimizer.param_groups:
                group["lr"] = plan.lr * (1 - at / total)
            chosen = torch.rand(len(train), generator=draw) < plan.batch_size / len(train)
            take([train[i] for i in chosen.nonzero().flatten().tolist()], derive(seed, "utility", epoch, step))
        curve.append(score(copied, test))
        seconds += time.process_time() - start
        _keep(checkpoint, epoch + 1, trained, optimizer, curve, seconds)
        said(f"epoch {epoch + 1} of {plan.epochs}: accuracy {curve[-1]['accuracy']:.3f}, MCC {curve[-1]['mcc']:.3f}")
    checkpoint.unlink(missing_ok=True)
    return {**curve[-1], "curve": curve, "seconds": seconds, "trained": sum(p.numel() for p in trained)}


def _step(victim: Victim, optimizer: torch.optim.Optimizer, defense: Mapping[str, Any], plan: Plan) -> Step:
    from lmleak import registry
    from lmleak.gradients.observe import ClientGradients

    fields = dict(defense)
    kind = fields.pop("kind")
    module = registry.load("defenses", kind)
    config = module.Config(**fields)
    if kind == "none":
        return lambda records, seed: _plain(victim, optimizer, records, plan)
    if kind == "dp_sgd" and config.clip_scope != "per_layer":
        return _private(victim, optimizer, module.sigma(config), config.max_grad_norm, plan)
    entries = select(victim, **plan.parameters).entries

    def released(records: Sequence[Batch], seed: int) -> None:
        """Any other defense: what it releases is what the server takes its step with."""
        if not records:
            return
        client = ClientGradients(victim, together(records, victim), entries, seed)
        found = module.release(config, client, generator(seed, "defense"))
        for entry in entries:
            share = plan.batch_size if module.REDUCTION == "sum" else 1
            victim.module.get_parameter(entry.parameter).grad = found[entry.name] / share
        optimizer.step()
        optimizer.zero_grad()

    return released


def _plain(victim: Victim, optimizer: torch.optim.Optimizer, records: Sequence[Batch], plan: Plan) -> None:
    for batch in parts(records, plan.micro_batch, victim):
        (_losses(victim, batch).sum() / plan.batch_size).backward()
    optimizer.step()
    optimizer.zero_grad()


def _private(victim: Victim, optimizer: torch.optim.Optimizer, sigma: float, bound: float, plan: Plan) -> Step:
    from opacus.optimizers import DPOptimizerFastGradientClipping

    ghost = Ghost(victim.module, bound)
    private = DPOptimizerFastGradientClipping(
        optimizer, noise_multiplier=sigma, max_grad_norm=bound, expected_batch_size=plan.batch_size
    )

    def take(records: Sequence[Batch], seed: int) -> None:
        private.generator = generator(seed, "defense")
        for parameter in ghost.parameters.values():
            parameter.grad = torch.zeros_like(parameter)  # an empty draw is noised like any other
        for batch in parts(records, plan.micro_batch, victim):
            ghost.backward(_losses(victim, batch))
        private.step()
        private.zero_grad()

    return take


def _losses(victim: Victim, batch: Batch) -> Tensor:
    return F.cross_entropy(forward(victim.module, batch.inputs), batch.labels, reduction="none")


def _keep(
    path: Path,
    epoch: int,
    trained: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
    curve: list[dict[str, float]],
    seconds: float,
) -> None:
    state = {
        "epoch": epoch,
        "parameters": [p.detach() for p in trained],
        "optimizer": optimizer.state_dict(),
        "curve": curve,
        "seconds": seconds,
    }
    new = path.with_suffix(".new")
    torch.save(state, new)
    os.replace(new, path)


def _resume(
    path: Path, trained: Sequence[Tensor], optimizer: torch.optim.Optimizer
) -> tuple[int, list[dict[str, float]], float]:
    if not path.exists():
        return 0, [], 0.0
    state = torch.load(path, weights_only=True, map_location=trained[0].device)
    with torch.no_grad():
        for parameter, kept in zip(trained, state["parameters"], strict=True):
            parameter.copy_(kept)
    optimizer.load_state_dict(state["optimizer"])
    return state["epoch"], state["curve"], state["seconds"]
