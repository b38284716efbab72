"""Model + batch + selection + defense -> Observation: everything that happens on the client's side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lmleak import registry
from lmleak.errors import LmleakError
from lmleak.gradients import batchnorm, factors
from lmleak.gradients.losses import model_losses
from lmleak.records import Batch, Entry, Knowledge, Observation, Reference, Selection, Victim
from lmleak.seeds import derive, generator

ClipScope = Literal["model", "selection", "per_layer"]


@contextmanager
def client_mode(victim: Victim, seed: int = 0) -> Iterator[nn.Module]:
    """The model in the client's mode; dropout and noisy modules draw from `seed`; modes and global RNG are put back.

    BatchNorm in training mode normalises by the batch and leaves its running statistics alone.
    """
    modes = {module: module.training for module in victim.module.modules()}
    # Modules that draw noise of their own keep the seed of it here: a bottleneck, see `defenses.precode`.
    noisy = {module: module.noise_seed for module in modes if hasattr(module, "noise_seed")}
    for place, module in enumerate(noisy):
        module.noise_seed = derive(seed, "noise", place)  # type: ignore[assignment]
    devices = {p.device.index for p in victim.module.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(i for i in devices if i is not None)):
        torch.manual_seed(derive(seed, "dropout"))
        victim.module.train(victim.mode == "train")
        try:
            with batchnorm.untracked(victim.module):
                yield victim.module
        finally:
            for module, training in modes.items():
                module.training = training
            for module, own in noisy.items():
                module.noise_seed = own


def whole_model(module: nn.Module) -> tuple[Entry, ...]:
    """An entry for every trainable parameter, tied ones once: the scope of model-wide clipping."""
    return tuple(
        Entry(name, name, name.rpartition(".")[0], tuple(parameter.shape))
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    )


class ClientGradients:
    """What a defense may ask of the client's gradients. Dense tensors are made only for the selected entries."""

    def __init__(self, victim: Victim, batch: Batch, entries: Sequence[Entry], seed: int = 0):
        self.victim, self.batch, self.entries, self.seed = victim, batch, tuple(entries), seed

    def mean(self) -> dict[str, Tensor]:
        """Gradient of the batch loss as transformers defines it: entry name -> tensor of the entry's shape."""
        parameters = {e.parameter: self.victim.module.get_parameter(e.parameter) for e in self.entries}
        with client_mode(self.victim, self.seed) as module, torch.enable_grad():
            frozen = [p for p in parameters.values() if not p.requires_grad]
            for p in frozen:
                p.requires_grad_(True)
            try:
                loss = self._losses(module, "mean").sum()
                grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
            finally:
                for p in frozen:
                    p.requires_grad_(False)
        dense = dict(zip(parameters, grads, strict=True))
        # A slice is copied out, or a view of it would keep the whole fused gradient in memory.
        return {
            e.name: dense[e.parameter] if e.part is None else cut(dense[e.parameter], e).clone() for e in self.entries
        }

    def per_sample_norms(self, scope: ClipScope = "model") -> Tensor:
        """Gradient norm of every sample over the scope, [b]; for `per_layer` over each entry, [entries, b].

        Raises:
            LmleakError: BatchNorm in training mode: every sample's gradient then depends on all of them.
        """
        if self.victim.mode == "train" and batchnorm.norms(self.victim.module):
            raise LmleakError(
                "model.mode: 'train' lets BatchNorm mix the samples of a batch, so that clipping them one by one "
                "bounds nothing and no guarantee would hold; use mode: eval, or a model without BatchNorm"
            )
        squares = self._squares(scope)
        stacked = torch.stack([squares[name] for name in squares])
        return stacked.sqrt() if scope == "per_layer" else stacked.sum(0).sqrt()

    def clipped_sum(self, max_grad_norm: float, scope: ClipScope = "model") -> dict[str, Tensor]:
        """Sum over samples of the gradients of their own losses, each clipped to `max_grad_norm`.

        `model` clips by the norm over all parameters, `selection` by the norm over what is released; `per_layer` clips
        every released tensor to max_grad_norm / sqrt(number of tensors), so that the sum's sensitivity stays
        max_grad_norm. The factors are scaled (no second backward, no per-sample gradient in memory).
        """
        norms = self.per_sample_norms(scope)
        if scope == "per_layer":
            bound = max_grad_norm / len(self.entries) ** 0.5
            weights = dict(zip((e.name for e in self.entries), clip_weights(norms, bound), strict=True))
        else:
            weights = dict.fromkeys((e.name for e in self.entries), clip_weights(norms, max_grad_norm))
        return self._weighted_sum(weights)

    def _losses(self, module: nn.Module, reduction: str) -> Tensor:
        return model_losses(module, self.batch.inputs, self.batch.labels, self.victim.task, reduction)

    @cached_property
    def _factored(self) -> bool:
        scope = {e.name: e for e in (*whole_model(self.victim.module), *self.entries)}
        return not factors.unfactored(self.victim.module, scope.values())

    @cached_property
    def _factors(self) -> dict[str, tuple[factors.Factor, ...]]:
        scope = {e.name: e for e in (*whole_model(self.victim.module), *self.entries)}
        with (
            client_mode(self.victim, self.seed) as module,
            factors.capture(module, tuple(scope.values())) as tape,
        ):
            return {
                name: tuple(_detached(use) for use in uses)
                for name, uses in tape.factors(self._losses(module, "sum")).items()
            }

    @cached_property
    def _one_by_one(self) -> dict[str, Tensor]:
        """Per-sample gradients [b, *shape] by one backward a sample: for layers that have no factored gradient."""
        scope = {e.name: e for e in (*whole_model(self.victim.module), *self.entries)}
        parameters = {e.parameter: self.victim.module.get_parameter(e.parameter) for e in scope.values()}
        rows = []
        with client_mode(self.victim, self.seed) as module, torch.enable_grad():
            # One forward for all samples: the same dropout masks (and batch statistics) as a factored pass would see.
            losses = self._losses(module, "sum")
            for loss in losses:
                grads = torch.autograd.grad(
                    loss, list(parameters.values()), retain_graph=True, allow_unused=True, materialize_grads=True
                )
                rows.append(dict(zip(parameters, grads, strict=True)))
        return {e.name: torch.stack([cut(row[e.parameter], e) for row in rows]) for e in scope.values()}

    def _squares(self, scope: ClipScope) -> dict[str, Tensor]:
        entries = whole_model(self.victim.module) if scope == "model" else self.entries
        if self._factored:
            return {e.name: factors.squared_norms(self._factors[e.name]) for e in entries}
        return {e.name: self._one_by_one[e.name].flatten(1).pow(2).sum(1) for e in entries}

    def _weighted_sum(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self._factored:
            return {
                name: torch.stack([use.scaled(w).total() for use in self._factors[name]]).sum(0)
                for name, w in weights.items()
            }
        return {name: torch.tensordot(w, self._one_by_one[name], 1) for name, w in weights.items()}


def clip_weights(norms: Tensor, bound: float) -> Tensor:
    # 1e-6 as Opacus has it: the clipped norm stays strictly below the bound, and a zero gradient divides by no zero.
    return (bound / (norms + 1e-6)).clamp(max=1.0)


def _detached(use: factors.Factor) -> factors.Factor:
    return factors.Factor(use.left.detach(), use.right.detach(), use.shape)


def cut(gradient: Tensor, entry: Entry) -> Tensor:
    """The entry's slice of its parameter's gradient."""
    if entry.part is None:
        return gradient
    dim, start, stop = entry.part
    return gradient.narrow(dim, start, stop - start)


def observe(
    victim: Victim,
    batch: Batch,
    selection: Selection,
    defense: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Observation:
    """Computes the batch's gradient at the selected modules and releases it through the defense.

    Args:
        victim: the model; left as it was found (hooks, grads, modes, RNG).
        batch: the private data.
        selection: from `select`.
        defense: `{"kind": ..., **fields}`; none by default.
        seed: of the defense's noise and of the client's dropout.

    Returns:
        What the attacker sees; gradients in the model's dtype, on the model's device.

    Raises:
        LmleakError: unknown defense, or one that changes the model and was not installed in it.
        pydantic.ValidationError: a defense field out of range.
    """
    fields = dict(defense or {"kind": "none"})
    kind = fields.pop("kind")
    module = registry.load("defenses", kind)
    config = module.Config(**fields)
    if hasattr(module, "installed") and not module.installed(victim):
        raise LmleakError(
            f"defense.kind: '{kind}' changes the model: first `victim = lmleak.defenses.install(victim, defense)`"
        )
    client = ClientGradients(victim, batch, selection.entries, seed)
    released = module.release(config, client, generator(seed, "defense"))
    return Observation(
        gradients={e.name: released[e.name] for e in selection.entries},
        entries=selection.entries,
        batch_size=len(batch.labels),
        task=victim.task,
        reduction=module.REDUCTION,
        mode=victim.mode,
        defense={"kind": kind, **config.model_dump()},
        privacy=module.privacy(config, len(batch.labels)),
    )


def grant(
    victim: Victim,
    batch: Batch,
    *,
    labels: bool = False,
    lengths: bool = False,
    special_tokens: bool = True,
    bn_statistics: bool = False,
) -> Knowledge:
    """What the threat model grants the attacker about this batch; the only other way from a Batch to an attack.

    Args:
        victim: the client's model; left as it was found.
        batch: the private data.
        labels: class labels (classification only).
        lengths: tokens of every sample, special tokens included.
        special_tokens: that the attacker knows how the tokenizer wraps a sentence.
        bn_statistics: mean and variance of this batch in front of every BatchNorm layer; the running ones are public.
    """
    found = None
    if bn_statistics:
        with client_mode(victim) as module, torch.no_grad(), batchnorm.recorded(module) as found:
            model_losses(module, batch.inputs, batch.labels, victim.task, "mean")
    mask = batch.inputs.get("attention_mask")
    return Knowledge(
        labels=batch.reference.labels if labels and batch.labels.dim() == 1 else None,
        lengths=tuple(mask.sum(1).tolist()) if lengths and mask is not None else None,
        special_tokens=special_tokens,
        bn_statistics=found,
    )


def own_gradient(victim: Victim, tokens: Tensor, label: int, entries: tuple[Entry, ...]) -> Mapping[str, Tensor]:
    """What anyone who has the model can compute: the gradient of token ids [1, n] of their own choice under a label."""
    batch = Batch(
        {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, tokens.new_tensor([label]), Reference()
    )
    return observe(victim, batch, Selection(entries, 1)).gradients
