"""The client's training loss, per sample: one definition for the client, for clipping and for attacks that match it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call


def forward(module: nn.Module, inputs: Mapping[str, Tensor], parameters: Mapping[str, Tensor] | None = None) -> Tensor:
    """Logits of the model, [b, classes] or [b, s, v]; no key/value cache is built.

    Args:
        module: the model.
        inputs: keyword arguments of its forward.
        parameters: used in place of the model's own of these names, which stay as they are.
    """
    cache = {"use_cache": False} if "use_cache" in _defaults(module) else {}
    if parameters is None:
        return module(**inputs, **cache).logits
    return functional_call(module, dict(parameters), (), {**inputs, **cache}).logits


def model_losses(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    labels: Tensor,
    task: str,
    reduction: str,
    parameters: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """The model's losses on its inputs, with what its own modules add to each sample's.

    A module with an attribute `added` is given a list there while the model runs, and appends [b] to it: the divergence
    of a variational bottleneck, weighted. For a mean over a batch it counts as the mean over its samples.

    Args:
        module: the model.
        inputs: keyword arguments of its forward.
        labels: as in `sample_losses`, as task and reduction.
        task: as in `sample_losses`.
        reduction: as in `sample_losses`.
        parameters: as in `forward`.

    Returns:
        [b]
    """
    with additions(module) as added:
        losses = sample_losses(forward(module, inputs, parameters), labels, task, reduction)
    for own in added:
        losses = losses + (own / len(own) if reduction == "mean" else own)
    return losses


@contextmanager
def additions(module: nn.Module) -> Iterator[list[Tensor]]:
    """Inside, a list that grows by what the model's own modules add to each sample's loss, [b] a module and pass."""
    parts = [part for part in module.modules() if hasattr(part, "added")]
    found: list[Tensor] = []
    for part in parts:
        part.added = found  # type: ignore[assignment]
    try:
        yield found
    finally:
        for part in parts:
            part.added = None  # type: ignore[assignment]


def _defaults(module: nn.Module) -> dict:
    config = getattr(module, "config", None)
    return config.to_dict() if config is not None else {}


def sample_losses(logits: Tensor, labels: Tensor, task: str, reduction: str) -> Tensor:
    """One loss a sample, so that their sum is the loss whose gradient is released.

    Args:
        logits: [b, classes], or [b, s, v] for language models.
        labels: [b], or [b, s] with -100 where there is no loss. A causal model's labels are shifted here.
        task: sequence-classification, image-classification, causal-lm or masked-lm.
        reduction: `mean`: the samples' sum is the batch loss of transformers (a mean over samples, or over all tokens
            that carry loss); `sum`: each sample has its own mean loss, as per-sample clipping needs.

    Returns:
        [b]
    """
    if logits.dim() == 2:
        losses = F.cross_entropy(logits, labels, reduction="none")
        return losses / len(losses) if reduction == "mean" else losses
    if task == "causal-lm":
        logits, labels = logits[:, :-1], labels[:, 1:]
    tokens = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
    counts = (labels != -100).sum(1)
    total = counts.sum() if reduction == "mean" else counts
    return tokens.sum(1) / torch.clamp(total, min=1)
