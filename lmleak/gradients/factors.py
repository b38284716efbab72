"""Gradients as factors: every parameter gradient here is `left^T right`, summed over rows, and is rarely ever formed.

For y = x W^T + b with inputs x [n, t, d_in] and output gradients delta [n, t, d_out], sample i's weight gradient is
delta_i^T x_i. Linear, Conv1D, Conv2d (unfolded), Embedding (one-hot rows), norms and biases (elementwise, one row) are
the same thing in different clothes, so one record serves clipping, matching, subspace attacks and leakage measures:

    inner product with an observed G     sum_t left_t . (G right_t)                 t rows cols
    squared norm of a sample's gradient  sum((left left^T) * (right right^T))       t^2 (rows + cols)

The per-sample norm identity is Goodfellow 2015 (1510.01799); for tied weights the uses' cross terms are added.
Shapes: n samples or candidates, t rows a sample (tokens, patches), rows x cols the parameter's own layout.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from lmleak.errors import LmleakError, SelectionError
from lmleak.gradients._kinds import SUPPORTED, left_right, supported
from lmleak.records import Entry


@dataclass(frozen=True)
class LowRank:
    """A dense gradient written as `columns @ rows`, [rows, r] and [r, cols]: exact to rounding."""

    columns: Tensor
    rows: Tensor


def low_rank(gradient: Tensor, rank: int) -> LowRank | None:
    """Writes a gradient in at most `rank` outer products, or returns None where it has more or nothing is saved.

    A clean gradient of n tokens has rank n at most, and its inner products then cost n (rows + cols) a token instead of
    rows cols: a third of an optimisation step's matrix products. One pass of a range finder (Halko et al. 2011,
    0909.4061); the remainder is checked.
    """
    matrix = gradient.detach().flatten(1) if gradient.dim() > 1 else gradient[:, None]
    width = rank + 8  # oversampling
    if 4 * width > min(matrix.shape):
        return None
    # A generator of its own, at a fixed seed: any generic sketch will do.
    sketch = torch.randn(matrix.shape[1], width, generator=torch.Generator().manual_seed(0)).to(matrix)
    columns = torch.linalg.qr(matrix @ sketch).Q
    rows = columns.T @ matrix
    # Float32 gradients leave 2e-7 of rounding; matching agrees with the dense product to 1e-6.
    if not (matrix - columns @ rows).square().sum() <= 1e-12 * matrix.square().sum():
        return None
    return LowRank(columns, rows)


@dataclass(frozen=True)
class Factor:
    """One use of one parameter: sample i's gradient is `left[i]^T right[i]`, in the parameter's own layout.

    `left` is [n, t, rows], or integer indices [n, t] standing for one-hot rows (Embedding). `right` is [n, t, cols].
    """

    left: Tensor
    right: Tensor
    shape: tuple[int, ...]  #: of the parameter or slice

    @property
    def rows(self) -> int:
        """First dimension of the gradient seen as a matrix."""
        return self.shape[0]

    @property
    def one_hot(self) -> bool:
        """Whether `left` holds indices."""
        return not self.left.is_floating_point()

    def scaled(self, weight: Tensor) -> Factor:
        """The factor with sample i's gradient multiplied by weight[i]; weight [n]."""
        return replace(self, right=self.right * weight[:, None, None])

    def grouped(self, size: int) -> Factor:
        """Joins every `size` consecutive samples into one: the gradient of a batch is the sum of its samples'."""
        join = lambda tensor: tensor.reshape(-1, size * tensor.shape[1], *tensor.shape[2:])  # noqa: E731
        return replace(self, left=join(self.left), right=join(self.right))

    def each(self) -> Tensor:
        """Dense gradient of every sample, [n, *shape]."""
        n, _, cols = self.right.shape
        if self.one_hot:
            out = self.right.new_zeros(n, self.rows, cols)
            out = out.scatter_add(1, self.left[..., None].expand_as(self.right), self.right)
        else:
            out = self.left.transpose(1, 2) @ self.right
        return out.reshape(n, *self.shape)

    def total(self) -> Tensor:
        """Dense gradient summed over samples, of the parameter's shape."""
        right = self.right.flatten(0, 1)
        if self.one_hot:
            return right.new_zeros(self.rows, right.shape[1]).index_add(0, self.left.flatten(), right)
        return (self.left.flatten(0, 1).T @ right).reshape(self.shape)

    def inner(self, gradient: Tensor | LowRank) -> Tensor:
        """Inner product of every sample's gradient with one `gradient` of the parameter's shape, [n]."""
        if isinstance(gradient, LowRank):
            left = gradient.columns[self.left] if self.one_hot else self.left @ gradient.columns
            return (left * (self.right @ gradient.rows.T)).sum((1, 2))
        gradient = gradient.reshape(self.rows, -1)
        mapped = gradient[self.left] if self.one_hot else self.left @ gradient
        return (mapped * self.right).sum((1, 2))

    def dot(self, other: Factor) -> Tensor:
        """Inner product, sample by sample, with another use of the same parameter (or with itself), [n]."""
        t, u, cols = self.right.shape[1], other.right.shape[1], self.right.shape[2]
        if not self.one_hot and not other.one_hot and t * u * (self.rows + cols) > (t + u) * self.rows * cols:
            # Long samples of a small layer (early convolutions): the dense gradient is the cheaper way.
            return (self.each() * other.each()).flatten(1).sum(1)
        return (_products(self, other) * (self.right @ other.right.transpose(1, 2))).sum((1, 2))


def _products(a: Factor, b: Factor) -> Tensor:
    """left_a . left_b for all pairs of rows of a sample, [n, t_a, t_b]."""
    if a.one_hot and b.one_hot:
        return (a.left[:, :, None] == b.left[:, None, :]).to(a.right.dtype)
    if a.one_hot:
        return b.left.transpose(1, 2).gather(1, a.left[..., None].expand(-1, -1, b.left.shape[1]))
    if b.one_hot:
        return _products(b, a).transpose(1, 2)
    return a.left @ b.left.transpose(1, 2)


Factors = Mapping[str, Sequence[Factor]]  #: entry name -> the uses of its parameter (two where weights are tied)


def inner(uses: Sequence[Factor], gradient: Tensor | LowRank) -> Tensor:
    """Inner product of every sample's gradient of one parameter with one gradient, [n]."""
    return sum(use.inner(gradient) for use in uses)  # type: ignore[return-value]


def squared_norms(uses: Sequence[Factor]) -> Tensor:
    """Squared Frobenius norm of every sample's gradient of one parameter, [n]. Tied weights: cross terms included."""
    out = sum(use.dot(use) for use in uses)
    for i, use in enumerate(uses):
        for other in uses[i + 1 :]:
            out = out + 2 * use.dot(other)
    # A sum of products can end a rounding error below zero; a norm cannot.
    return out.clamp_min(0)  # type: ignore[union-attr]


class Tape:
    """Inputs and outputs of the observed modules during one forward pass; turned into factors by `factors`."""

    def __init__(self, entries: Sequence[Entry]):
        self.entries = tuple(entries)
        self.calls: dict[str, list[_Call]] = {}

    def factors(self, losses: Tensor, *, create_graph: bool = False) -> dict[str, tuple[Factor, ...]]:
        """Factors of the gradient of every sample's loss.

        Args:
            losses: [n] per-sample losses; samples must not interact in the forward pass.
            create_graph: keep the graph, to differentiate through the factors.

        Returns:
            Entry name -> its uses. A parameter the loss does not reach has factors of zero.

        Raises:
            SelectionError: an entry's module took no part in the forward pass.
            LmleakError: a module's output is shared by several samples, or its input was overwritten.
        """
        seen = {call.edge: call.output for calls in self.calls.values() for call in calls}
        with torch.enable_grad():
            total = losses.sum()
        grads = torch.autograd.grad(total, list(seen), create_graph=create_graph, allow_unused=True)
        delta = {
            edge: torch.zeros_like(y) if grad is None else grad
            for (edge, y), grad in zip(seen.items(), grads, strict=True)
        }
        out = {}
        for entry in self.entries:
            calls = self.calls.get(entry.parameter)
            if not calls:
                raise SelectionError(f"{entry.name}: its module '{entry.module}' takes no part in the forward pass")
            for call in calls:
                _check(entry, call, len(losses))
            uses = (call.factor(delta[call.edge]) for call in calls)
            out[entry.name] = tuple(_slice(use, entry.part) for use in uses)
        return out


@dataclass(frozen=True, eq=False)
class _Call:
    """One use of a module that holds an observed parameter as its attribute `name`."""

    owner: nn.Module
    name: str
    input: Tensor
    version: int  #: of the input: where the parameter is frozen, autograd does not notice that it was overwritten
    output: Tensor
    edge: GradientEdge

    def factor(self, delta: Tensor) -> Factor:
        left, right = left_right(self.owner, self.name, self.input, delta)
        return Factor(left, right, tuple(getattr(self.owner, self.name).shape))


def _check(entry: Entry, call: _Call, n: int) -> None:
    if len(call.output) != n:
        raise LmleakError(
            f"{entry.name}: its module '{entry.module}' ran on a batch of {len(call.output)} for {n} samples, so their "
            "gradients cannot be told apart; pass position_ids with the batch dimension"
        )
    if call.input._version != call.version:
        raise LmleakError(
            f"{entry.name}: the input of its module '{entry.module}' was overwritten after it was read; "
            "make the operation that follows out of place"
        )


@contextmanager
def capture(module: nn.Module, entries: Sequence[Entry]) -> Iterator[Tape]:
    """Records the observed modules' inputs and outputs while the `with` block runs the model forward.

    Only hooks set here are removed, also when the forward pass raises. Parameters need not require gradients.

    Raises:
        SelectionError: a parameter belongs to a kind of module without a factored gradient (see `unfactored`).
    """
    bad = unfactored(module, entries)
    if bad:
        kind = type(module.get_submodule(bad[0].module)).__name__
        raise SelectionError(f"{bad[0].name}: no factored gradient for a {kind} (supported: {', '.join(SUPPORTED)})")
    tape = Tape(entries)
    users = users_of(module, entries)
    wanted: dict[nn.Module, list[tuple[str, str]]] = {}
    for parameter, modules in users.items():
        for owner, name in modules:
            wanted.setdefault(owner, []).append((parameter, name))

    def hook(owner: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        x = args[0] if args else next(iter(kwargs.values()))
        given = output
        if not output.requires_grad:
            # Frozen parameters and token ids give no graph: the output becomes the leaf, nothing upstream is lost.
            output = output.detach().requires_grad_()
            given = output.clone()
        # The edge, not the tensor: a successor that works in place (ReLU(inplace=True)) would move the tensor's own.
        edge = get_gradient_edge(output)
        for parameter, name in wanted[owner]:
            tape.calls.setdefault(parameter, []).append(_Call(owner, name, x, x._version, output, edge))
        return given

    handles = [owner.register_forward_hook(hook, with_kwargs=True) for owner in wanted]
    try:
        with torch.enable_grad():
            yield tape
    finally:
        for handle in handles:
            handle.remove()


def unfactored(module: nn.Module, entries: Iterable[Entry]) -> tuple[Entry, ...]:
    """Entries whose modules have no factored gradient (plain parameters, grouped convolutions, unknown layers)."""
    entries = tuple(entries)
    users = users_of(module, entries)
    return tuple(
        e for e in entries if not users[e.parameter] or not all(supported(m, name) for m, name in users[e.parameter])
    )


def users_of(module: nn.Module, entries: Iterable[Entry]) -> dict[str, list[tuple[nn.Module, str]]]:
    """Parameter name -> every (module, attribute) that holds this very tensor: more than one where weights are tied."""
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append((owner, name))
    return {e.parameter: _without_aliases(holders.get(id(module.get_parameter(e.parameter)), [])) for e in entries}


def _without_aliases(holders: list[tuple[nn.Module, str]]) -> list[tuple[nn.Module, str]]:
    # BERT's and RoBERTa's prediction heads name their decoder's bias as their own, and never add it themselves.
    alias = lambda owner: any(other is not owner and other in set(owner.modules()) for other, _ in holders)  # noqa: E731
    return [(owner, name) for owner, name in holders if name != "bias" or not alias(owner)]


def _slice(use: Factor, part: tuple[int, int, int] | None) -> Factor:
    if part is None:
        return use
    dim, start, stop = part
    shape = (*use.shape[:dim], stop - start, *use.shape[dim + 1 :])
    if dim == 0:
        return replace(use, left=use.left[..., start:stop], shape=shape)
    return replace(use, right=use.right[..., start:stop], shape=shape)
