"""Gradients of many batches, each turned into a few hundred features: what probes and subspaces are fitted to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmleak.attacks._rowspace import matrix
from lmleak.gradients import observe
from lmleak.measures._attributes import Attributed, values
from lmleak.measures._release import modules
from lmleak.records import Batch, Entry, Selection, Victim
from lmleak.seeds import derive, generator


def labelled(
    config: Attributed,
    victim: Victim,
    batches: Sequence[Batch],
    selection: Selection,
    defense: Mapping[str, Any],
    seed: int,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The attribute of every batch, [n] of 0, 1, ..., and the sketches of its gradients.

    Raises:
        LmleakError: the data has no such attribute, or all samples have the same.
    """
    y = values(config, batches)
    return np.unique(y, return_inverse=True)[1], sketches(config, victim, batches, selection, defense, seed)


def sketches(
    config: Attributed,
    victim: Victim,
    batches: Sequence[Batch],
    selection: Selection,
    defense: Mapping[str, Any],
    seed: int,
) -> dict[str, np.ndarray]:
    """Features of what is released of every batch, by row of `modules`: [n, k] with k about `width` a parameter.

    One dense gradient is held at a time; the same draws serve every module and setting.
    """
    made = {entry.name: _view(config, entry, seed) for entry in selection.entries}
    seen: dict[str, list[np.ndarray]] = {entry.name: [] for entry in selection.entries}
    for i, batch in enumerate(batches):
        if config.task_label is not None:
            batch = replace(batch, labels=torch.full_like(batch.labels, config.task_label))
        gradients = observe(victim, batch, selection, defense, derive(seed, "sketch", i)).gradients
        for entry in selection.entries:
            gradient = gradients[entry.name].detach().float().cpu()
            dense = matrix(victim.module, entry, gradient) if gradient.dim() > 1 else gradient[None]
            seen[entry.name].append(made[entry.name](dense).numpy())
    stacked = {name: np.stack(rows) for name, rows in seen.items()}
    return {
        row: np.concatenate([stacked[entry.name] for entry in entries], axis=1)
        for row, entries in modules(selection.entries).items()
    }


def _view(config: Attributed, entry: Entry, seed: int) -> _Projected | _Gram:
    return (_Projected if config.view == "gradient" else _Gram)(entry.name, config.width, seed)


class _Projected:
    """L^T G R, L and R with random orthonormal columns.

    Noise of standard deviation s on the gradient is noise of s on every coordinate, and distances shrink by one factor
    on average.
    """

    def __init__(self, name: str, width: int, seed: int):
        self.name, self.width, self.seed = name, width, seed
        self.pair: tuple[Tensor, Tensor] | None = None

    def __call__(self, gradient: Tensor) -> Tensor:
        """Features of a gradient [rows, cols]."""
        if self.pair is None:
            rows, cols = gradient.shape
            draw = generator(self.seed, "projection", self.name)
            few = min(rows, max(int(self.width**0.5), self.width // cols))
            self.pair = _orthonormal(rows, few, draw), _orthonormal(cols, min(cols, self.width // few), draw)
        left, right = self.pair
        return (left.T @ gradient @ right).flatten()


class _Gram:
    """R^T G^T G R / |G|^2, the logarithms of its eigenvalues and of |G|: what does not turn over with the loss's sign.

    A gradient sum_i delta_i^T x_i changes its sign with the label; which space the inputs x span, and how many there
    are, it shows by its Gram matrix.
    """

    def __init__(self, name: str, width: int, seed: int):
        self.name, self.seed = name, seed
        self.size = max(2, int((2 * width + 0.25) ** 0.5 - 0.5) - 1)  # size (size + 1) / 2 + size + 1 features
        self.right: Tensor | None = None

    def __call__(self, gradient: Tensor) -> Tensor:
        """Features of a gradient [rows, cols]."""
        cols = gradient.shape[1]
        if self.right is None:
            self.right = _orthonormal(cols, min(cols, self.size), generator(self.seed, "projection", self.name))
        norm = gradient.norm()
        small = gradient / norm.clamp_min(1e-30) @ self.right
        gram = small.T @ small
        upper = gram[tuple(torch.triu_indices(*gram.shape))]
        spectrum = torch.linalg.eigvalsh(gram).clamp_min(1e-12).log()
        return torch.cat([upper, spectrum, norm.clamp_min(1e-30).log()[None]])


def _orthonormal(rows: int, cols: int, draw: torch.Generator) -> Tensor:
    return torch.eye(rows) if rows == cols else torch.linalg.qr(torch.randn(rows, cols, generator=draw)).Q
