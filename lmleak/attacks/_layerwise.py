"""A plain stack of layers as linear systems: what each layer's weights and its gradient say of its input.

With z = W x + b known from behind, and dz, the loss's slope there, known too, the input x of layer i solves `U x = v`:
W's own rows (v: z - b) and the rows that make the weight's gradient of x (v: that gradient), both linear in x (R-GAP,
Zhu and Blaschko, 2020, arXiv 2010.07733; Chen and Campbell, 2021, arXiv 2111.10178). Padding is no unknown here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmleak.attacks._objective import frozen
from lmleak.gradients.losses import forward
from lmleak.records import Victim

PASSED = (nn.Identity, nn.Flatten, nn.Dropout)  #: in evaluation mode
INVERTIBLE = (nn.LeakyReLU, nn.Tanh, nn.Sigmoid, nn.Softplus)


@dataclass(frozen=True)
class Layer:
    """A convolution or a linear layer, and the activation behind it."""

    name: str
    module: Any  #: Conv2d or Linear; Any, because its weight is reached by attribute
    activation: nn.Module | None
    entering: tuple[int, ...]  #: [c, y, x] or [d]
    leaving: tuple[int, ...]

    @property
    def unknowns(self) -> int:
        """Values of the input."""
        return int(torch.Size(self.entering).numel())


def stack(victim: Victim) -> list[Layer] | str:
    """The model's layers in order, the last of which gives the logits; or why it is no such stack.

    Found by a run on a random picture: each part must read exactly what the part before it gave.
    """
    form, module = victim.processor, victim.module
    weight = next(module.parameters())
    shape = (1, form.channels, form.height, form.width)
    pixels = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(weight)
    runs: list[tuple[str, nn.Module, Tensor, Tensor]] = []

    def look(name: str) -> Callable[[nn.Module, tuple, Tensor], None]:
        return lambda part, args, out: runs.append((name, part, args[0].detach(), out.detach()))

    leaves = {name: part for name, part in module.named_modules() if not list(part.children())}
    handles = [part.register_forward_hook(look(name)) for name, part in leaves.items()]
    try:
        with torch.no_grad(), frozen(module):
            logits = forward(module, {"pixel_values": pixels})
    finally:
        for handle in handles:
            handle.remove()
    layers: list[Layer] = []
    before = pixels
    for name, part, read, gave in runs:
        kind = type(part).__name__
        if read.numel() != before.numel() or not torch.equal(read.flatten(), before.flatten()):
            return f"'{name}' does not read what the layer before it gives: no plain stack of layers"
        before = gave
        if isinstance(part, PASSED):
            continue
        if isinstance(part, INVERTIBLE):
            if not layers or layers[-1].activation is not None:
                return f"'{name}' ({kind}) stands behind no layer of its own"
            layers[-1] = replace(layers[-1], activation=part)
        elif isinstance(part, nn.Linear):
            layers.append(Layer(name, part, None, (read.numel(),), (gave.numel(),)))
        elif isinstance(part, nn.Conv2d) and _plain(part):
            layers.append(Layer(name, part, None, tuple(read.shape[1:]), tuple(gave.shape[1:])))
        else:
            return f"'{name}' ({kind}) cannot be inverted"
    if not layers or not isinstance(layers[-1].module, nn.Linear) or layers[-1].activation is not None:
        return "the model does not end in a linear layer"
    if not torch.equal(before.flatten(), logits.flatten()):
        return "what the last layer gives is not what the model gives"
    return layers


def _plain(part: nn.Conv2d) -> bool:
    return part.groups == 1 and part.padding_mode == "zeros" and not isinstance(part.padding, str)


def system(layer: Layer, dz: Tensor, *, observed: bool) -> Tensor:
    """U [rows, unknowns] of a convolution, float64.

    Its rows are dependent at least c_out^2 times: products of dz with W's rows, summed over places, are products of W
    with the gradient's. An unpadded convolution has rank min(unknowns, c_out u^2 + c_out c_in k^2 - c_out^2) otherwise.

    Args:
        layer: the convolution.
        dz: slope of the loss at its output, [c, y, x] float64.
        observed: whether the weight's gradient is; else U has W's rows only.
    """
    weight = layer.module.weight.detach().double()
    c_out, places = len(weight), int(dz[0].numel())
    index = places_read(layer).to(weight.device)  # [c_in k k, places]
    own = weight.new_zeros(c_out, places, layer.unknowns + 1)
    own.scatter_(2, index.T.expand(c_out, -1, -1), weight.flatten(1)[:, None].expand(-1, places, -1))
    rows = [own.flatten(0, 1)]
    if observed:
        made = weight.new_zeros(c_out, len(index), layer.unknowns + 1)
        made.scatter_(2, index.expand(c_out, -1, -1), dz.flatten(1)[:, None].expand(-1, len(index), -1))
        rows.append(made.flatten(0, 1))
    return torch.cat(rows)[:, 1:]  # 0 is what is read from the padding


def places_read(layer: Layer) -> Tensor:
    """Which value of the input, counted from 1, stands where in each place's patch; 0 is padding. [c_in k k, places]"""
    part = layer.module
    count = torch.arange(1, layer.unknowns + 1, dtype=torch.float64).reshape(1, *layer.entering)
    return F.unfold(count, part.kernel_size, part.dilation, part.padding, part.stride)[0].long()


def rank(matrix: Tensor) -> int:
    """Rank of U, rows at length 1 each: a slope far from the loss is small, and says as much."""
    lengths = matrix.norm(dim=1)
    rows = matrix[lengths > 0] / lengths[lengths > 0, None]
    if not len(rows):
        return 0
    values = torch.linalg.svdvals(rows)
    return int((values > values[0] * max(rows.shape) * 1e-14).sum())


def inverse(activation: nn.Module | None, y: Tensor) -> tuple[Tensor, Tensor]:
    """The value before an activation and the activation's slope there; y outside its range is moved to its edge."""
    edge = 1e-12
    if activation is None:
        return y, torch.ones_like(y)
    if isinstance(activation, nn.Tanh):
        y = y.clamp(edge - 1, 1 - edge)
        return torch.atanh(y), 1 - y.square()
    if isinstance(activation, nn.Sigmoid):
        y = y.clamp(edge, 1 - edge)
        return torch.logit(y), y * (1 - y)
    if isinstance(activation, nn.LeakyReLU):
        slope = torch.where(y < 0, activation.negative_slope, 1.0).to(y)
        return y / slope, slope
    assert isinstance(activation, nn.Softplus)
    y = y.clamp_min(edge)
    beta = activation.beta
    z = y + torch.log(-torch.expm1(-beta * y)) / beta
    return z, -torch.expm1(-beta * y)


def least(matrix: Tensor, target: Tensor) -> tuple[Tensor, int]:
    """The least-squares solution of a system and the number of equations it lacks; the least one where it lacks some.

    Args:
        matrix: [rows, unknowns] float64, rows of length 1.
        target: [rows].
    """
    rows, unknowns = matrix.shape
    if rows >= unknowns:
        frame, upper = torch.linalg.qr(matrix)
        steps = upper.diagonal().abs()
        if float(steps.min()) > 1e-9 * float(steps.max()):
            return torch.linalg.solve_triangular(upper, (frame.T @ target)[:, None], upper=True)[:, 0], 0
    # By the smaller Gram matrix: its eigenvalues say the rank to 1e-6 only, which a least solution can do with.
    gram = matrix @ matrix.T if rows <= unknowns else matrix.T @ matrix
    values, vectors = torch.linalg.eigh(gram)
    kept = values > 1e-12 * values[-1]
    vectors, values = vectors[:, kept], values[kept]
    if rows <= unknowns:
        x = matrix.T @ (vectors @ ((vectors.T @ target) / values))
    else:
        x = vectors @ ((vectors.T @ (matrix.T @ target)) / values)
    return x, unknowns - len(values)
