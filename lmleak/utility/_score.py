"""Records in padded batches, and what a classifier makes of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F

from lmleak.gradients.losses import forward
from lmleak.records import Batch, Victim


def parts(records: Sequence[Batch], size: int, victim: Victim) -> Iterator[Batch]:
    """Records in batches of similar length: padding costs as much as text."""
    ordered = sorted(records, key=lambda record: record.inputs["input_ids"].shape[1])
    for start in range(0, len(ordered), size):
        yield together(ordered[start : start + size], victim)


def together(records: Sequence[Batch], victim: Victim) -> Batch:
    """One batch of batches of one record each: texts padded, position ids given for each; images as they are."""
    if "pixel_values" in records[0].inputs:
        inputs = {name: torch.cat([r.inputs[name] for r in records]) for name in records[0].inputs}
        return replace(records[0], inputs=inputs, labels=torch.cat([record.labels for record in records]))
    width = max(record.inputs["input_ids"].shape[1] for record in records)
    pad = {"input_ids": victim.processor.pad_token_id, "attention_mask": 0, "position_ids": 0}
    inputs = {
        name: torch.cat([F.pad(r.inputs[name], (0, width - r.inputs[name].shape[1]), value=pad[name]) for r in records])
        for name in records[0].inputs
    }
    labels = [
        r.labels if r.labels.dim() == 1 else F.pad(r.labels, (0, width - r.labels.shape[1]), value=-100)
        for r in records
    ]
    return replace(records[0], inputs=inputs, labels=torch.cat(labels))


@torch.no_grad()
def score(victim: Victim, test: Sequence[Batch]) -> dict[str, float]:
    """Accuracy and Matthews' correlation on labelled records."""
    module, was = victim.module, victim.module.training
    module.eval()
    truth, guess = [], []
    for batch in parts(test, 128, victim):
        truth += batch.labels.tolist()
        guess += forward(module, batch.inputs).argmax(-1).tolist()
    module.train(was)
    return {"accuracy": sum(a == b for a, b in zip(truth, guess, strict=True)) / len(truth), "mcc": mcc(truth, guess)}


def mcc(truth: Sequence[int], guess: Sequence[int]) -> float:
    """Matthews' correlation coefficient for any number of classes (Gorodkin, 2004); 0 where one side is constant."""
    n, classes = len(truth), set(truth) | set(guess)
    right = sum(a == b for a, b in zip(truth, guess, strict=True))
    t, g = ([sum(x == k for x in side) for k in classes] for side in (truth, guess))
    spread = (n * n - sum(x * x for x in t)) * (n * n - sum(x * x for x in g))
    return (n * right - sum(a * b for a, b in zip(t, g, strict=True))) / math.sqrt(spread) if spread else 0.0
