"""Distances and norms of clipped gradients under a defense's mechanism, over the noise, by observed module."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmleak.defenses import Gaussian, gaussian
from lmleak.gradients.observe import clip_weights, whole_model
from lmleak.measures._changes import Change
from lmleak.records import Batch, Entry, Victim

ALL = "*"  #: the row of everything that is observed together


def modules(entries: Sequence[Entry]) -> dict[str, tuple[Entry, ...]]:
    """Row name -> its entries: one row a module (or component's slice of one), and `*` for all of them together."""
    rows: dict[str, list[Entry]] = {ALL: list(entries)}
    for entry in entries:
        part = f"[{entry.component}]" if entry.part is not None else ""
        rows.setdefault(f"{entry.module}{part}", []).append(entry)
    return {name: tuple(found) for name, found in rows.items()}


def noised(defense: Mapping[str, Any]) -> tuple[Gaussian | None, str | None]:
    """The defense's mechanism; where it adds no Gaussian noise, None and the reason."""
    mechanism = gaussian(defense)
    if mechanism is None:
        return None, f"'{defense['kind']}' adds no Gaussian noise: any difference is seen"
    if mechanism.std == 0:
        return None, "no noise: any difference is seen"
    return mechanism, None


@dataclass(frozen=True)
class Release:
    """A mechanism over a selection of a model: how far an exchange moves what is released, over the noise."""

    mechanism: Gaussian
    entries: tuple[Entry, ...]
    whole: tuple[str, ...]  #: parameters of the whole model
    shares: tuple[float, ...]  #: of each sample in the released mean, where that is what is released

    @classmethod
    def of(cls, mechanism: Gaussian, victim: Victim, batch: Batch, entries: Sequence[Entry]) -> Release:
        """The release of one batch."""
        whole = tuple(e.name for e in whole_model(victim.module))
        return cls(mechanism, tuple(entries), whole, shares(victim, batch))

    def moved(self, change: Change) -> dict[str, Tensor]:
        """d' of every candidate: |change of the release| / noise, by row of `modules`; [k], infinite without noise."""
        own_weights = self._weights(_alone(change), change)
        other_weights = self._weights({name: square.double() for name, square in change.other.items()}, change)
        squares = {}
        for entry in self.entries:
            a, b = own_weights[entry.name], other_weights[entry.name]
            own, other, apart = (
                change.own[entry.name],
                change.other[entry.name].double(),
                change.apart[entry.name].double(),
            )
            # |a g - b g'|^2, written so that nothing cancels where g' is close to g.
            squares[entry.name] = (a - b) * (a * own - b * other) + a * b * apart
        return self._over_noise(squares)

    def presence(self, change: Change) -> dict[str, float]:
        """d' of the sample's presence: |its clipped gradient| / noise, by row."""
        weights = self._weights(_alone(change), change)
        squares = {e.name: weights[e.name].square() * change.own[e.name] for e in self.entries}
        return {name: float(value) for name, value in self._over_noise(squares).items()}

    def _weights(self, squares: Mapping[str, Tensor], change: Change) -> dict[str, Tensor]:
        """What each entry of a sample's gradient is multiplied by before the samples are summed, [k]."""
        names = [entry.name for entry in self.entries]
        bound, scope = self.mechanism.max_grad_norm, self.mechanism.scope
        if bound is None:
            return dict.fromkeys(names, torch.full_like(squares[names[0]], self.shares[change.sample]))
        if scope == "per_layer":
            return {name: clip_weights(squares[name].sqrt(), bound / math.sqrt(len(names))) for name in names}
        clipped = self.whole if scope == "model" else names
        norms = torch.stack([squares[name] for name in clipped]).sum(0).sqrt()
        return dict.fromkeys(names, clip_weights(norms, bound))

    def _over_noise(self, squares: Mapping[str, Tensor]) -> dict[str, Tensor]:
        rows = {name: sum(squares[e.name] for e in found) for name, found in modules(self.entries).items()}
        return {name: torch.as_tensor(square).clamp_min(0).sqrt() / self.mechanism.std for name, square in rows.items()}


def shares(victim: Victim, batch: Batch) -> tuple[float, ...]:
    """Weight of every sample's own mean loss in the batch's."""
    labels = batch.labels
    if labels.dim() == 1:
        return (1 / len(labels),) * len(labels)
    counts = ((labels[:, 1:] if victim.task == "causal-lm" else labels) != -100).sum(1)
    return tuple((counts / counts.sum().clamp_min(1)).tolist())


def _alone(change: Change) -> dict[str, Tensor]:
    return {name: torch.tensor([square], dtype=torch.float64) for name, square in change.own.items()}
